//! Backends that die, hang and lie, and come back: the guest of a real core does not notice.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod core;
mod fake;

use std::io::Write;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ozone_tests::payload::Code;
use protocol::{DeviceId, FromCore, ToCore};

use crate::core::{Core, reserve};
use crate::fake::request::{
    GET_CONFIG, GET_INFLIGHT_FD, GET_VRING_BASE, SET_FEATURES, SET_INFLIGHT_FD, SET_MEM_TABLE, SET_VRING_BASE,
    SET_VRING_ENABLE, SET_VRING_KICK,
};
use crate::fake::{Act, FEATURES, Fake, Honest, Request, ends, message};

/// Backends that do as they should, with and without a record of what is in flight.
fn honest() -> Honest {
    reserve();
    Honest::default()
}

fn tracking() -> Honest {
    reserve();
    Honest::tracking()
}

/// What must not happen is waited for as long.
const QUIET: Duration = Duration::from_millis(300);

/// The registers of the first device.
const REGISTERS: u64 = 0xd000_0000;
/// Where the payload puts its queue's used ring.
const USED: u64 = 0x20_2000;

/// Writes 32 bits: `mov rbx, address; mov dword [rbx], value`.
fn store(code: Code, address: u64, value: u32) -> Code {
    code.raw(&[0x48, 0xbb]).raw(&address.to_le_bytes()).raw(&[0xc7, 0x03]).raw(&value.to_le_bytes())
}

/// A driver that gets the first queue of the first device ready, and leaves `used_index` in its used ring.
fn driver(code: Code, used_index: u32) -> Code {
    let code = store(code, USED, used_index << 16);
    let registers = [
        (0x070, 1),
        (0x070, 3),
        (0x024, 0),
        (0x020, FEATURES as u32),
        (0x024, 1),
        (0x020, (FEATURES >> 32) as u32),
        (0x070, 0xb),
        (0x030, 0),
        (0x038, 128),
        (0x080, 0x20_0000),
        (0x090, 0x20_1000),
        (0x0a0, USED as u32),
        (0x044, 1),
        (0x070, 0xf),
    ];
    registers.iter().fold(code, |code, (offset, value)| store(code, REGISTERS + offset, *value))
}

/// A driver that says when it is ready, and puts the used ring at 7 as if the device had got there. It did not zero the ring
/// and waits until the device has: `mov rbx, address; back: cmp dword [rbx], 0; jne back`.
fn start() -> Code {
    let code = driver(Code::default(), 77).raw(&[0x48, 0xbb]).raw(&USED.to_le_bytes());
    store(code.raw(&[0x83, 0x3b, 0x00, 0x75, 0xfb]), USED, 7 << 16).print("up")
}

fn reset(code: Code) -> Code {
    store(code, REGISTERS + 0x070, 0)
}

/// A machine with a disk for each of `backends`, all attached.
fn boot(code: Code, backends: &mut [&mut Fake]) -> Core {
    let disks = u8::try_from(backends.len()).unwrap();
    let core = Core::build(&code.halt().elf(), None, "", 64 << 20, 1, disks);
    for (disk, backend) in (0..).zip(backends) {
        attach(&core, disk, backend);
    }
    core.control.send(&ToCore::Run).unwrap();
    core.expect("Running", |message| matches!(message, FromCore::Running));
    core
}

fn id(disk: u8) -> DeviceId {
    format!("disk{disk}").try_into().unwrap()
}

fn attach(core: &Core, disk: u8, backend: &mut Fake) {
    core.attach(disk, backend.take_socket());
    core.expect("Attached", |message| matches!(message, FromCore::Attached { device } if *device == id(disk)));
}

fn lost(core: &Core) -> String {
    match core.expect("Lost", |message| matches!(message, FromCore::Lost { device, .. } if *device == id(0))) {
        FromCore::Lost { reason, .. } => reason,
        _ => unreachable!(),
    }
}

fn gone(core: &Core) {
    core.control.send(&ToCore::Gone { device: id(0) }).unwrap();
    core.expect("Gone", |message| matches!(message, FromCore::Gone { device } if *device == id(0)));
}

/// Shows that the second disk is served: its configuration is asked for.
fn is_served(core: &Core, backend: &Fake) {
    core.control.send(&ToCore::ConfigChanged { device: id(1) }).unwrap();
    backend.until(GET_CONFIG);
}

fn codes(requests: &[Request]) -> Vec<u32> {
    requests.iter().map(|request| request.code).collect()
}

#[test]
fn the_guest_of_a_core_that_loses_backends_again_and_again_runs_on() {
    let mut first = tracking().serve();
    let mut other = honest().serve();
    let mut core = boot(start(), &mut [&mut first, &mut other]);
    core.hear("up");
    let requests = first.until(SET_VRING_ENABLE);
    let region = requests.iter().find(|request| request.code == SET_INFLIGHT_FD).unwrap().inode();
    drop(requests);
    is_served(&core, &other);
    let descriptors = core.descriptors();
    first.die();
    for round in 0..50 {
        gone(&core);
        // Greeting, features, memory, region, and one queue.
        let last = 1 + round % 15;
        let mut count = 0;
        let mut failing = tracking().start(move |_| {
            count += 1;
            if count == last { Act::Close } else { Act::Answer }
        });
        core.attach(0, failing.take_socket());
        lost(&core);
        failing.closed();
        is_served(&core, &other);
        gone(&core);
        let mut next = tracking().serve();
        attach(&core, 0, &mut next);
        let requests = next.heard();
        let find = |code| requests.iter().find(|request| request.code == code).unwrap();
        assert_eq!(find(SET_INFLIGHT_FD).inode(), region);
        assert_eq!(find(SET_VRING_BASE).word(4), 7, "round {round}");
        drop(requests);
        next.die();
    }
    gone(&core);
    let mut last = tracking().serve();
    attach(&core, 0, &mut last);
    assert_eq!(core.descriptors(), descriptors);
    assert!(!core.speaks(Duration::ZERO));
}

#[test]
fn a_backend_that_says_nothing_is_hung_up_on_and_holds_nobody_else_up() {
    let mut first = honest().serve();
    let mut other = honest().serve();
    let mut core = boot(start(), &mut [&mut first, &mut other]);
    core.hear("up");
    first.until(SET_VRING_ENABLE);
    first.die();
    gone(&core);
    let mut silent = honest().start(|request| if request.code == SET_MEM_TABLE { Act::Silence } else { Act::Answer });
    let begun = Instant::now();
    core.attach(0, silent.take_socket());
    silent.until(SET_MEM_TABLE);
    is_served(&core, &other);
    // A core that is stopped and continues takes up its timed waits by a call of its own.
    let pid = Pid::from_raw(core.process.id().try_into().unwrap());
    kill(pid, Signal::SIGSTOP).unwrap();
    kill(pid, Signal::SIGCONT).unwrap();
    is_served(&core, &other);
    let reason = lost(&core);
    assert!(reason.starts_with("it did not answer within 8 s"), "{reason}");
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    silent.closed();
    gone(&core);
    attach(&core, 0, &mut honest().serve());
}

#[test]
fn whatever_a_backend_answers_no_descriptor_of_its_stays() {
    type Lie = fn(&Request) -> (Vec<u8>, Vec<OwnedFd>);
    fn pipes(count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| nix::unistd::pipe().unwrap().0).collect()
    }
    let mut backend = honest().serve();
    let mut core = boot(start(), &mut [&mut backend]);
    core.hear("up");
    backend.until(SET_VRING_ENABLE);
    let descriptors = core.descriptors();
    backend.die();
    let lies: [(u32, Lie); 9] = [
        // Nothing that is a message, the answer to another request, and one of the wrong length.
        (SET_FEATURES, |_| (vec![0xff; 64], Vec::new())),
        (SET_FEATURES, |_| (message(&Request::new(SET_MEM_TABLE, Vec::new()), &[0; 8]), Vec::new())),
        (SET_FEATURES, |request| (message(request, &[0; 16]), Vec::new())),
        // A refusal.
        (SET_FEATURES, |request| (message(request, &[1, 0, 0, 0, 0, 0, 0, 0]), Vec::new())),
        // Descriptors where none belong.
        (SET_FEATURES, |request| (message(request, &[0; 8]), pipes(1))),
        (GET_CONFIG, |request| (message(request, &request.body), pipes(32))),
        // The wrong kind, and the wrong number.
        (GET_INFLIGHT_FD, |request| (message(request, &with_size(request, 8192)), pipes(1))),
        (GET_INFLIGHT_FD, |request| (message(request, &with_size(request, 8192)), pipes(3))),
        (GET_INFLIGHT_FD, |request| (message(request, &with_size(request, 8192)), Vec::new())),
    ];
    for (code, lie) in lies {
        gone(&core);
        let mut liar = tracking().start(move |request| {
            if request.code == code {
                let (bytes, files) = lie(request);
                Act::Send(bytes, files)
            } else {
                Act::Answer
            }
        });
        core.attach(0, liar.take_socket());
        lost(&core);
        liar.closed();
    }
    gone(&core);
    attach(&core, 0, &mut honest().serve());
    assert_eq!(core.descriptors(), descriptors);
}

fn with_size(request: &Request, size: u64) -> Vec<u8> {
    [&size.to_le_bytes()[..], &request.body[8..]].concat()
}

#[test]
fn descriptors_that_a_backend_made_blocking_hold_nobody_up() {
    let mut hostile = honest().serve();
    let mut core = boot(start(), &mut [&mut hostile]);
    core.hear("up");
    let requests = hostile.until(SET_VRING_ENABLE);
    for file in requests.iter().filter(|request| request.code == SET_VRING_KICK).flat_map(|request| &request.files) {
        fcntl(file, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        // The kick that came with it is in the counter.
        let _ = (&*file).write(&(u64::MAX - 2).to_ne_bytes()).unwrap();
    }
    // As of a dead process.
    drop(requests);
    hostile.die();
    gone(&core);
    let mut next = honest().serve();
    attach(&core, 0, &mut next);
    assert!(next.heard().iter().any(|request| request.code == SET_VRING_ENABLE));
}

#[test]
fn what_a_dead_backend_left_unread_is_closed_before_it_is_gone() {
    let mut hostile = honest().serve();
    let mut core = boot(start(), &mut [&mut hostile]);
    core.hear("up");
    hostile.until(SET_VRING_ENABLE);
    let (reader, writer) = nix::unistd::pipe().unwrap();
    hostile.push(&[0; 12], &[writer]);
    hostile.die();
    core.control.send(&ToCore::Dead { device: id(0) }).unwrap();
    assert!(ends(&reader), "the core keeps it open");
    assert!(!core.speaks(Duration::ZERO), "nothing is told of a backend that is known to be dead");
    gone(&core);
    attach(&core, 0, &mut honest().serve());
}

/// A backend that ends when its queues are to be stopped.
fn unstoppable() -> Fake {
    honest().start(|request| if request.code == GET_VRING_BASE { Act::Close } else { Act::Answer })
}

#[test]
fn a_reset_waits_until_the_backend_is_gone_and_all_is_well_afterwards() {
    let mut first = unstoppable();
    let mut core = boot(driver(reset(start()).print("reset"), 3).print("again"), &mut [&mut first]);
    core.hear("up");
    lost(&core);
    assert!(!core.prints(QUIET), "the guest would reuse memory that the backend may write to");
    gone(&core);
    core.hear("again");
    let mut second = honest().serve();
    attach(&core, 0, &mut second);
    let requests = second.heard();
    // From the beginning: its driver is a new one.
    assert!(requests.iter().any(|request| request.code == SET_VRING_BASE && request.word(4) == 0));
}

#[test]
fn a_pause_does_not_wait_for_a_reset_but_until_the_backend_is_gone() {
    let mut backend = unstoppable();
    let mut core = boot(reset(start()).print("reset"), &mut [&mut backend]);
    core.hear("up");
    lost(&core);
    core.control.send(&ToCore::Pause).unwrap();
    core.control.send(&ToCore::Dead { device: id(0) }).unwrap();
    assert!(!core.speaks(QUIET), "the backend may still write into guest memory");
    core.control.send(&ToCore::Gone { device: id(0) }).unwrap();
    core.expect("Paused", |message| matches!(message, FromCore::Paused));
    core.expect("Gone", |message| matches!(message, FromCore::Gone { .. }));
    assert!(!core.prints(QUIET), "the vCPU is held once it is out of the reset");
    let mut next = honest().serve();
    attach(&core, 0, &mut next);
    core.control.send(&ToCore::Resume).unwrap();
    core.expect("Resumed", |message| matches!(message, FromCore::Resumed));
    core.hear("reset");
}

#[test]
fn a_pause_waits_for_storage_longer_than_anything_else_does() {
    // Longer than the time that a backend has for anything else.
    const SLOW: Duration = Duration::from_secs(9);
    let mut slow = honest().start(|request| {
        if request.code == GET_VRING_BASE {
            std::thread::sleep(SLOW);
        }
        Act::Answer
    });
    let mut other = honest().serve();
    let mut core = boot(start(), &mut [&mut slow, &mut other]);
    core.hear("up");
    slow.until(SET_VRING_ENABLE);
    core.control.send(&ToCore::Pause).unwrap();
    is_served(&core, &other);
    core.expect("Paused", |message| matches!(message, FromCore::Paused));
    core.control.send(&ToCore::Resume).unwrap();
    core.expect("Resumed", |message| matches!(message, FromCore::Resumed));
    assert_eq!(codes(&slow.heard()).last(), Some(&SET_VRING_ENABLE));
}

#[test]
fn a_device_is_detached_paused_and_attached_again() {
    let mut first = tracking().serve();
    let mut core = boot(start(), &mut [&mut first]);
    core.hear("up");
    first.until(SET_VRING_ENABLE);
    core.control.send(&ToCore::Pause).unwrap();
    core.expect("Paused", |message| matches!(message, FromCore::Paused));
    assert_eq!(codes(&first.heard()), [GET_VRING_BASE]);
    core.control.send(&ToCore::Detach { device: id(0) }).unwrap();
    core.expect("Detached", |message| matches!(message, FromCore::Detached { .. }));
    first.closed();
    gone(&core);
    let mut second = tracking().serve();
    attach(&core, 0, &mut second);
    assert_eq!(codes(&second.heard()).last(), Some(&GET_CONFIG), "it is greeted, and no more");
    core.control.send(&ToCore::Resume).unwrap();
    core.expect("Resumed", |message| matches!(message, FromCore::Resumed));
    assert_eq!(codes(&second.heard()).last(), Some(&SET_VRING_ENABLE));
}

#[test]
fn the_vcpus_start_once_every_device_has_been_attached_however_often_one_was() {
    let core = Core::build(&Code::default().halt().elf(), None, "", 64 << 20, 1, 2);
    core.control.send(&ToCore::Run).unwrap();
    for _ in 0..3 {
        attach(&core, 0, &mut honest().serve());
    }
    assert!(!core.speaks(QUIET), "one is missing");
    attach(&core, 1, &mut honest().serve());
    core.expect("Running", |message| matches!(message, FromCore::Running));
}

#[test]
fn a_message_about_a_device_that_is_none_ends_the_core() {
    let device = id(9);
    for message in [
        ToCore::Dead { device: device.clone() },
        ToCore::Gone { device: device.clone() },
        ToCore::Detach { device: device.clone() },
        ToCore::NeedsReset { device },
    ] {
        let core = Core::boot(&Code::default().halt().elf(), None, "", 64 << 20, 1);
        core.expect("Running", |message| matches!(message, FromCore::Running));
        core.control.send(&message).unwrap();
        core.expect("Failed", |message| matches!(message, FromCore::Failed(_)));
    }
}
