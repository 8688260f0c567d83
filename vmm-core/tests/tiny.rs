//! Payloads of a few instructions.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod core;

use std::os::fd::{AsFd, AsRawFd};
use std::time::Instant;

use nix::sys::socket::{Shutdown, shutdown};
use ozone_tests::payload::Code;
use protocol::{Cause, Fault, FaultKind, FromCore, ToCore};

use crate::core::{Core, DEADLINE};

fn run(code: &Code) -> (FromCore, String) {
    Core::boot(&code.elf(), None, "", 64 << 20, 1).end()
}

fn cause(code: &Code) -> Cause {
    match run(code).0 {
        FromCore::Exited(cause) => cause,
        other => panic!("{other:?}"),
    }
}

fn fault(kernel: &[u8], initrd: Option<&[u8]>, command_line: &str) -> Fault {
    match Core::boot(kernel, initrd, command_line, 64 << 20, 1).end().0 {
        FromCore::Failed(fault) => fault,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_a_guest_prints_arrives_before_its_power_off() {
    let (last, text) = run(&Code::default().print("hello from ring 0").out(0x600, 0x34).halt());
    assert!(matches!(last, FromCore::Exited(Cause::PowerOff)), "{last:?}");
    assert_eq!(text, "hello from ring 0");
}

#[test]
fn reset_register_and_keyboard_controller_reset() {
    assert_eq!(cause(&Code::default().out(0x602, 1).halt()), Cause::Reset);
    assert_eq!(cause(&Code::default().out(0x64, 0xfe).halt()), Cause::Reset);
}

#[test]
fn a_reported_panic_is_told_from_a_power_off() {
    assert_eq!(cause(&Code::default().out(0x505, 1).halt()), Cause::Panic);
}

#[test]
fn an_exception_without_handlers_is_a_triple_fault() {
    assert_eq!(cause(&Code::default().raw(&[0x0f, 0x0b])), Cause::TripleFault);
}

#[test]
fn an_instruction_that_kvm_cannot_carry_out_is_told_with_its_place() {
    // mov eax, 0xd0001000; jmp rax: nothing is there to be fetched.
    let (last, _) = run(&Code::default().raw(&[0xb8, 0x00, 0x10, 0x00, 0xd0, 0xff, 0xe0]));
    let FromCore::Failed(fault) = last else { panic!("{last:?}") };
    assert!(fault.message.contains("KVM_EXIT_INTERNAL_ERROR 1 (emulation failure)"), "{fault}");
    assert!(fault.message.contains("at instruction 0xd0001000"), "{fault}");
}

#[test]
fn empty_device_slots_read_as_all_ones() {
    let (_, text) = run(&Code::default().print_word_at(0xd000_0000).out(0x600, 0x34).halt());
    assert_eq!(text.chars().count(), 4);
    assert!(!text.contains("virt"));
}

#[test]
fn several_vcpus_are_made_and_only_the_first_runs_the_kernel() {
    let code = Code::default().print("once").out(0x600, 0x34).halt();
    let (last, text) = Core::boot(&code.elf(), None, "", 64 << 20, 4).end();
    assert!(matches!(last, FromCore::Exited(Cause::PowerOff)), "{last:?}");
    assert_eq!(text, "once");
}

#[test]
fn memory_reaches_across_the_hole_below_4_gib() {
    // The last word of 5 GiB is at 6 GiB - 4; the identity map of the boot state ends at 4 GiB, so the payload looks
    // at the last word below the hole.
    let code = Code::default().print_word_at(0xc000_0000 - 4).out(0x600, 0x34).halt();
    let (last, text) = Core::boot(&code.elf(), None, "", 5 << 30, 1).end();
    assert!(matches!(last, FromCore::Exited(Cause::PowerOff)), "{last:?}");
    assert_eq!(text, "\0\0\0\0");
}

#[test]
fn what_is_not_a_kernel_is_the_users_fault() {
    for image in [&b""[..], b"x", &[0; 4096], b"#!/bin/sh\nexit 0\n"] {
        let fault = fault(image, None, "");
        assert_eq!(fault.kind, FaultKind::Input, "{fault}");
        assert!(fault.message.starts_with("--kernel: "), "{fault}");
    }
}

#[test]
fn a_truncated_kernel_is_the_users_fault() {
    let whole = Code::default().print(&"x".repeat(1000)).elf();
    for part in 0..32 {
        let fault = fault(&whole[..whole.len() * part / 32], None, "");
        assert_eq!(fault.kind, FaultKind::Input, "{part}/32: {fault}");
    }
}

#[test]
fn an_initial_ramdisk_or_command_line_that_is_too_long_is_the_users_fault() {
    let kernel = Code::default().halt().elf();
    let initrd = vec![0; 65 << 20];
    let too_large = fault(&kernel, Some(&initrd), "");
    assert_eq!(too_large.kind, FaultKind::Input);
    assert!(too_large.message.starts_with("--initrd: "), "{too_large}");
    for length in [2048, 70_000] {
        let too_long = fault(&kernel, None, &"x".repeat(length));
        assert_eq!(too_long.kind, FaultKind::Input);
        assert!(too_long.message.starts_with("--append: "), "{too_long}");
    }
}

#[test]
fn a_message_out_of_turn_ends_the_core() {
    let core = Core::boot(&Code::default().halt().elf(), None, "", 64 << 20, 1);
    assert!(matches!(core.next(), Ok(FromCore::Running)));
    core.control.send(&ToCore::Run).unwrap();
    assert!(matches!(core.next(), Ok(FromCore::Failed(Fault { kind: FaultKind::Internal, .. }))));
}

#[test]
fn the_core_ends_when_its_launcher_does() {
    let core = Core::boot(&Code::default().halt().elf(), None, "", 64 << 20, 1);
    assert!(matches!(core.next(), Ok(FromCore::Running)));
    let Core { control, process, .. } = &mut { core };
    shutdown(control.as_fd().as_raw_fd(), Shutdown::Both).unwrap();
    let deadline = Instant::now() + DEADLINE;
    while process.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "the core still runs {DEADLINE:?} after its control channel closed");
        std::thread::yield_now();
    }
}
