//! Pausing and resuming a machine that does one thing over and over.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod core;

use std::time::Duration;

use ozone_tests::payload::Code;
use protocol::{FromCore, ToCore};

use crate::core::Core;

/// What must not happen is waited for as long.
const QUIET: Duration = Duration::from_millis(300);

fn boot(code: &Code, cpus: u8) -> Core {
    let core = Core::boot(&code.elf(), None, "", 64 << 20, cpus);
    core.expect("Running", |message| matches!(message, FromCore::Running));
    core
}

fn pause(core: &Core) {
    core.control.send(&ToCore::Pause).unwrap();
    core.expect("Paused", |message| matches!(message, FromCore::Paused));
}

fn resume(core: &Core) {
    core.control.send(&ToCore::Resume).unwrap();
    core.expect("Resumed", |message| matches!(message, FromCore::Resumed));
}

/// Prints for ever: `mov dx, 0x3f8; mov al, 'x'; out dx, al; jmp` to the last but one.
fn chatter() -> Code {
    Code::default().raw(&[0x66, 0xba, 0xf8, 0x03, 0xb0, b'x', 0xee, 0xeb, 0xfd])
}

#[test]
fn a_paused_guest_does_nothing_and_then_goes_on() {
    let mut core = boot(&chatter(), 2);
    for _ in 0..3 {
        core.hear("xxxx");
        pause(&core);
        core.drain(QUIET);
        resume(&core);
    }
    core.hear("xxxx");
}

#[test]
fn every_request_is_answered_whatever_the_state() {
    let core = boot(&Code::default().halt(), 1);
    resume(&core);
    for _ in 0..2 {
        pause(&core);
    }
    for _ in 0..2 {
        resume(&core);
    }
    for request in [ToCore::Pause, ToCore::Resume, ToCore::Pause] {
        core.control.send(&request).unwrap();
    }
    for paused in [true, false, true] {
        core.expect("Paused and Resumed in turn", |message| match message {
            FromCore::Paused => paused,
            FromCore::Resumed => !paused,
            _ => false,
        });
    }
}

#[test]
fn no_vcpu_is_missed_wherever_it_is() {
    let spin = Code::default().raw(&[0xeb, 0xfe]);
    let halt = Code::default().halt();
    // A register of no device, over and over: each read is an exit.
    let exits = Code::default().read_memory(0xd000_0000, u32::MAX);
    for code in [spin, halt, exits] {
        let core = boot(&code, 4);
        for _ in 0..60 {
            pause(&core);
            resume(&core);
        }
        assert!(!core.speaks(Duration::ZERO));
    }
}

#[test]
fn what_an_exit_began_is_finished_across_a_pause() {
    // Reads the serial port's line status over and over, and halts unless it is 0x60: `in al, dx; cmp al, 0x60; je over;
    // hlt; jmp back; over: dec ecx; jnz` to the first.
    let code = Code::default().raw(&[0x66, 0xba, 0xfd, 0x03, 0xb9]).raw(&20_000u32.to_le_bytes());
    let code = code.raw(&[0xec, 0x3c, 0x60, 0x74, 0x03, 0xf4, 0xeb, 0xfd, 0xff, 0xc9, 0x75, 0xf4]);
    let mut core = boot(&code.print("done").halt(), 1);
    for _ in 0..50 {
        pause(&core);
        resume(&core);
    }
    core.hear("done");
}

#[test]
fn requests_that_follow_one_another_at_once_are_each_carried_out() {
    let mut core = boot(&chatter(), 2);
    for _ in 0..40 {
        for request in [ToCore::Pause, ToCore::Resume, ToCore::Pause] {
            core.control.send(&request).unwrap();
        }
        for _ in 0..3 {
            core.expect("an answer", |message| matches!(message, FromCore::Paused | FromCore::Resumed));
        }
        resume(&core);
    }
    pause(&core);
    core.drain(QUIET);
}

#[test]
fn a_machine_that_is_paused_before_its_start_starts_when_it_is_resumed() {
    let mut core = Core::build(&Code::default().print("here").halt().elf(), None, "", 64 << 20, 1, 0);
    pause(&core);
    core.control.send(&ToCore::Run).unwrap();
    assert!(!core.speaks(QUIET), "it does not run");
    resume(&core);
    core.expect("Running", |message| matches!(message, FromCore::Running));
    core.hear("here");
}

#[test]
fn the_power_button_may_be_pressed_while_the_machine_is_paused() {
    let core = boot(&Code::default().halt(), 1);
    pause(&core);
    core.control.send(&ToCore::PowerButton).unwrap();
    resume(&core);
    assert!(!core.speaks(Duration::ZERO));
}
