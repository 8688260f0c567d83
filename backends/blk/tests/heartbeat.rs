//! Questions whether the process goes round, and when it answers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::os::fd::OwnedFd;

use protocol::{BlkSpec, DeviceSpec, FromBackend, ToBackend};
use virtio_backend::testing::{Backend, Guest, Queue, VhostBackend, WRITE, connect};
use vmm_sys_util::eventfd::EventFd;

const EXECUTABLE: &str = env!("CARGO_BIN_EXE_ozone-blk");

const FLUSH: u32 = 4;
const HEADER: u64 = Guest::FREE;
const STATUS: u64 = Guest::FREE + 0x100;

fn spec(queues: u16) -> DeviceSpec {
    let image = tempfile::tempfile().unwrap();
    image.set_len(4096).unwrap();
    let (_, sentinel) = std::io::pipe().unwrap();
    DeviceSpec::Blk(BlkSpec {
        image: OwnedFd::from(image).into(),
        sentinel: OwnedFd::from(sentinel).into(),
        direct: false,
        successor: false,
        read_only: false,
        serial: "root".into(),
        queues,
    })
}

fn ping(backend: &Backend, number: u64) {
    backend.control.send(&ToBackend::Ping { number }).unwrap();
}

fn alive(backend: &Backend) -> u64 {
    let FromBackend::Alive { number } = backend.message() else { panic!("another message came") };
    number
}

#[test]
fn it_is_alive_before_and_after_its_queues_are_started() {
    let (backend, mut frontend) = Backend::ready(EXECUTABLE, spec(4), 4);
    ping(&backend, 5);
    assert_eq!(alive(&backend), 5);
    let guest = Guest::new(4 << 20);
    let queues = [0, 1, 2].map(|index| Queue::new(&guest, index, 8));
    connect(&mut frontend, &guest, &queues.each_ref(), 0);
    for number in [0, u64::MAX, 3] {
        ping(&backend, number);
        assert_eq!(alive(&backend), number);
    }
    frontend.get_vring_base(1).unwrap();
    ping(&backend, 4);
    assert_eq!(alive(&backend), 4);
    assert!(!backend.readable(20), "nothing is said unasked");
}

#[test]
fn a_queue_that_was_given_up_is_no_hang() {
    let (backend, mut frontend) = Backend::ready(EXECUTABLE, spec(1), 1);
    let guest = Guest::new(4 << 20);
    let mut queue = Queue::new(&guest, 0, 8);
    connect(&mut frontend, &guest, &[&queue], 0);
    queue.offer(&guest, 4711);
    queue.kick.write(1).unwrap();
    assert!(matches!(backend.message(), FromBackend::Violated { queue: 0 }));
    for number in 1..10 {
        ping(&backend, number);
        assert_eq!(alive(&backend), number);
    }
}

#[test]
fn a_thread_that_hangs_answers_nothing_until_it_goes_on() {
    let (backend, mut frontend) = Backend::ready(EXECUTABLE, spec(2), 2);
    let guest = Guest::new(4 << 20);
    let mut queue = Queue::new(&guest, 0, 8);
    let other = Queue::new(&guest, 1, 8);
    connect(&mut frontend, &guest, &[&queue, &other], 0);
    // A counter that is full: who signals it hangs.
    let blocking = EventFd::new(0).unwrap();
    blocking.write(u64::MAX - 1).unwrap();
    frontend.set_vring_call(0, &blocking).unwrap();
    guest.put(HEADER, &[&FLUSH.to_le_bytes()[..], &[0; 12]].concat());
    queue.send(&guest, 0, &[(HEADER, 16, 0), (STATUS, 1, WRITE)]);
    assert_eq!(queue.next(&guest), (0, 1));
    let before = backend.ticks();
    for number in 1..=100 {
        ping(&backend, number);
    }
    assert!(!backend.readable(200), "one thread hangs");
    assert!(backend.ticks() - before < 10, "it does not spin meanwhile");
    blocking.read().unwrap();
    assert_eq!(alive(&backend), 100, "the last question is the one that counts");
    assert!(!backend.readable(20), "and it is answered once");
}
