//! The real `ozone-net` with its run filter, on a real tap in a network namespace of the test's own.
//!
//! These tests need root and /dev/net/tun, as the machine's first test of them says by its failure.
#![allow(unsafe_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use protocol::{DeviceSpec, FromBackend, NetSpec};
use virtio_backend::testing::vhost_user::VhostUserFrontend;
use virtio_backend::testing::{
    Backend, DEADLINE, Frontend, Guest, Queue, VhostBackend, WRITE, config, connect, enable,
};

const EXECUTABLE: &str = env!("CARGO_BIN_EXE_ozone-net");
const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

/// An EtherType for local experiments, by which the frames of a test are told from the kernel's own.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

const MQ: u64 = 1 << 22;
const CTRL_VQ: u64 = 1 << 17;
const MRG_RXBUF: u64 = 1 << 15;

const HEADER: usize = 12;
const DATA: u64 = Guest::FREE;

/// The request of an ioctl on a `struct ifreq` that names the interface and has `flags`; returns the flags after it.
fn interface(fd: &impl AsRawFd, request: libc::Ioctl, flags: i32) -> nix::Result<i32> {
    // SAFETY: all zeroes are a valid `struct ifreq`.
    let mut ifreq: libc::ifreq = unsafe { std::mem::zeroed() };
    ifreq.ifr_name[..4].copy_from_slice(&[b't', b'a', b'p', b'0'].map(u8::cast_signed));
    ifreq.ifr_ifru.ifru_flags = flags.try_into().unwrap();
    // SAFETY: the requests used here take a `struct ifreq`.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut ifreq) })?;
    // SAFETY: these requests leave the flags in place or return them.
    Ok(unsafe { ifreq.ifr_ifru.ifru_flags }.into())
}

/// The two ends of the wire: the queues of a tap, and a packet socket on it.
struct Wire {
    taps: Vec<OwnedFd>,
    socket: OwnedFd,
    control: OwnedFd,
}

impl Wire {
    /// A tap with `queues` queues in a fresh network namespace, which this thread is in from now on.
    fn new(queues: usize) -> Self {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace: run the tests as root");
        const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
        const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let flags = flags | if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        let tap = |_| {
            use std::os::unix::fs::OpenOptionsExt;
            let mut options = File::options();
            options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
            let tap = options.open("/dev/net/tun").expect("/dev/net/tun");
            interface(&tap, TUNSETIFF, flags).unwrap();
            let size: libc::c_int = 12;
            // SAFETY: the request reads one int.
            Errno::result(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) }).unwrap();
            OwnedFd::from(tap)
        };
        let taps = (0..queues).map(tap).collect();
        let protocol = i32::from(u16::from_ne_bytes(ETHERTYPE));
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: socket(2) makes a descriptor, which nobody else has.
        let socket =
            unsafe { OwnedFd::from_raw_fd(Errno::result(libc::socket(libc::AF_PACKET, kind, protocol)).unwrap()) };
        // SAFETY: as above.
        let control = unsafe {
            OwnedFd::from_raw_fd(
                Errno::result(libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0)).unwrap(),
            )
        };
        let wire = Self { taps, socket, control };
        // Binding to an interface that is down leaves an error behind.
        wire.up(true);
        // SAFETY: all zeroes are a valid `struct sockaddr_ll`, and bind(2) reads one.
        unsafe {
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET.try_into().unwrap();
            address.sll_protocol = u16::from_ne_bytes(ETHERTYPE);
            address.sll_ifindex = libc::if_nametoindex(c"tap0".as_ptr()).try_into().unwrap();
            let size = u32::try_from(size_of_val(&address)).unwrap();
            Errno::result(libc::bind(wire.socket.as_raw_fd(), (&raw const address).cast(), size)).unwrap();
        }
        wire
    }

    fn up(&self, up: bool) {
        interface(&self.control, libc::SIOCSIFFLAGS, if up { libc::IFF_UP } else { 0 }).unwrap();
    }

    /// Whether the kernel uses a queue of the tap.
    fn attached(&self, queue: usize) -> bool {
        const TUNGETIFF: libc::Ioctl = 0x8004_54d2;
        const IFF_DETACH_QUEUE: i32 = 0x0400;
        interface(&self.taps[queue], TUNGETIFF, 0).unwrap() & IFF_DETACH_QUEUE == 0
    }

    fn spec(&self) -> DeviceSpec {
        self.spec_of_successor(1)
    }

    fn spec_of_successor(&self, pairs: u16) -> DeviceSpec {
        let taps = self.taps.iter().map(|tap| tap.try_clone().unwrap().into()).collect();
        DeviceSpec::Net(NetSpec { taps, pairs, mac: MAC, mtu: 1500 })
    }

    fn send(&self, frame: &[u8]) {
        // An interface that was down has left an error behind, which is reported once.
        let sent = nix::unistd::write(&self.socket, frame);
        let sent = if sent == Err(Errno::ENETDOWN) { nix::unistd::write(&self.socket, frame) } else { sent };
        assert_eq!(sent, Ok(frame.len()));
    }

    fn receive(&self) -> Vec<u8> {
        let deadline = Instant::now() + DEADLINE;
        let mut frame = vec![0; 70_000];
        loop {
            match nix::unistd::read(&self.socket, &mut frame) {
                Ok(length) => {
                    frame.truncate(length);
                    return frame;
                }
                Err(Errno::EAGAIN) => assert!(Instant::now() < deadline, "no frame came"),
                Err(errno) => panic!("{errno}"),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn frame(length: usize, fill: u8) -> Vec<u8> {
    let mut frame = [&[0xff; 6][..], &MAC, &ETHERTYPE].concat();
    frame.resize(length, fill);
    frame
}

/// An interface with one pair of queues, connected.
struct Interface {
    wire: Wire,
    backend: Backend,
    frontend: Frontend,
    guest: Guest,
    receive: Queue,
    transmit: Queue,
    /// The length of the last receive buffer.
    length: u32,
}

impl Interface {
    fn new(leave_out: u64) -> Self {
        let wire = Wire::new(1);
        let (backend, mut frontend) = Backend::ready(EXECUTABLE, wire.spec(), 2);
        let guest = Guest::new(4 << 20);
        let (receive, transmit) = (Queue::new(&guest, 0, 64), Queue::new(&guest, 1, 64));
        connect(&mut frontend, &guest, &[&receive, &transmit], leave_out);
        Self { wire, backend, frontend, guest, receive, transmit, length: 0 }
    }

    /// Offers a receive buffer as descriptor `head`.
    fn offer(&mut self, head: u16, address: u64, length: u32) {
        self.length = length;
        self.receive.send(&self.guest, head, &[(address, length, WRITE)]);
    }

    /// The next frame of the test that is received, its buffers in order, and the header's count of them.
    ///
    /// `place` says where the buffer of a head is. What the kernel sends of itself is passed over.
    fn next_frame(&mut self, place: impl Fn(u32) -> u64) -> (Vec<u32>, u16, Vec<u8>) {
        loop {
            let (head, written) = self.receive.next(&self.guest);
            let mut bytes = self.guest.get(place(head), written.try_into().unwrap());
            let mut heads = vec![head];
            let count = u16::from_le_bytes([bytes[10], bytes[11]]);
            for _ in 1..count {
                let (head, written) = self.receive.poll(&self.guest).expect("all parts of a packet at once");
                bytes.extend(self.guest.get(place(head), written.try_into().unwrap()));
                heads.push(head);
            }
            let packet = bytes.split_off(HEADER);
            if packet[12..14] == ETHERTYPE {
                return (heads, count, packet);
            }
            // Not ours: the kernel greets the network. Its buffer is given back.
            heads.iter().for_each(|&head| self.offer(head.try_into().unwrap(), place(head), self.length));
        }
    }
}

#[test]
fn frames_go_both_ways() {
    let mut net = Interface::new(0);
    let place = |head: u32| DATA + 0x1000 * u64::from(head);
    (0..8).for_each(|head| net.offer(head, place(head.into()), 2048));
    for round in 0..4_u8 {
        let sent = frame(1000 + usize::from(round), round);
        net.wire.send(&sent);
        let (_, count, received) = net.next_frame(place);
        assert_eq!((count, received), (1, sent));
        let sent = frame(300 + usize::from(round), 0x80 | round);
        net.guest.put(DATA + 0x10_0000, &[&[0; HEADER][..], &sent].concat());
        let (first, rest) = (20, u32::try_from(sent.len()).unwrap() - 8);
        net.transmit.send(&net.guest, 0, &[(DATA + 0x10_0000, first, 0), (DATA + 0x10_0000 + 20, rest, 0)]);
        assert_eq!(net.transmit.next(&net.guest), (0, 0));
        assert_eq!(net.wire.receive(), sent);
    }
}

#[test]
fn the_configuration_space_has_address_link_pairs_and_mtu() {
    let mut net = Interface::new(0);
    let expected = [&MAC[..], &1_u16.to_le_bytes(), &1_u16.to_le_bytes(), &1500_u16.to_le_bytes()].concat();
    assert_eq!(config(&mut net.frontend, 12), expected);
    assert_eq!(net.frontend.get_features().unwrap() & (MQ | CTRL_VQ), 0);
}

#[test]
fn a_packet_may_be_divided_among_buffers() {
    let mut net = Interface::new(0);
    let place = |head: u32| DATA + 0x1000 * u64::from(head);
    (0..32).for_each(|head| net.offer(head, place(head.into()), 256));
    let sent = frame(1000, 7);
    net.wire.send(&sent);
    let (heads, count, received) = net.next_frame(place);
    assert_eq!((heads.len(), count, received), (4, 4, sent));
    assert_eq!(net.frontend.get_features().unwrap() & MRG_RXBUF, MRG_RXBUF);
}

#[test]
fn without_mergeable_buffers_a_packet_that_does_not_fit_is_dropped() {
    let mut net = Interface::new(MRG_RXBUF);
    let place = |head: u32| DATA + 0x1000 * u64::from(head);
    net.offer(0, place(0), 256);
    net.wire.send(&frame(1000, 1));
    let small = frame(100, 2);
    net.wire.send(&small);
    let (heads, count, received) = net.next_frame(place);
    assert_eq!((heads, count, received), (vec![0], 1, small));
    let base = net.frontend.get_vring_base(0).unwrap();
    assert_eq!(base, u32::from(net.receive.used_index(&net.guest)), "no buffer was lost");
}

#[test]
fn frames_wait_for_buffers_without_a_spin() {
    let mut net = Interface::new(0);
    (0..20).for_each(|fill| net.wire.send(&frame(100, fill)));
    std::thread::sleep(Duration::from_millis(50));
    let before = net.backend.ticks();
    std::thread::sleep(Duration::from_millis(300));
    assert!(net.backend.ticks() - before < 5, "it spins while it has no buffer");
    let place = |head: u32| DATA + 0x1000 * u64::from(head);
    (0..32).for_each(|head| net.offer(head, place(head.into()), 2048));
    for fill in 0..20 {
        assert_eq!(net.next_frame(place).2, frame(100, fill));
    }
}

#[test]
fn malformed_packets_are_counted_and_passed_over() {
    let mut net = Interface::new(0);
    net.guest.put(DATA, &[0xff; 2000]);
    for length in [1, 11, 12, 13, 25, 2000] {
        net.transmit.send(&net.guest, 0, &[(DATA, length, 0)]);
        assert_eq!(net.transmit.next(&net.guest), (0, 0));
    }
    net.offer(0, DATA, 5);
    net.wire.send(&frame(100, 1));
    assert_eq!(net.receive.next(&net.guest), (0, 0), "a buffer without room for a header");
    let sent = frame(200, 3);
    net.guest.put(DATA, &[&[0; HEADER][..], &sent].concat());
    net.transmit.send(&net.guest, 0, &[(DATA, 212, 0)]);
    assert_eq!(net.wire.receive(), sent);
}

#[test]
fn a_tap_that_goes_down_and_up_serves_again() {
    let mut net = Interface::new(0);
    let place = |head: u32| DATA + 0x1000 * u64::from(head);
    (0..16).for_each(|head| net.offer(head, place(head.into()), 2048));
    net.wire.up(false);
    net.guest.put(DATA + 0x10_0000, &[&[0; HEADER][..], &frame(100, 1)].concat());
    net.transmit.send(&net.guest, 0, &[(DATA + 0x10_0000, 112, 0)]);
    assert_eq!(net.transmit.next(&net.guest), (0, 0));
    let before = net.backend.ticks();
    std::thread::sleep(Duration::from_millis(300));
    assert!(net.backend.ticks() - before < 5, "it spins while the tap is down");
    net.wire.up(true);
    net.wire.send(&frame(100, 9));
    assert_eq!(net.next_frame(place).2, frame(100, 9));
}

#[test]
fn unused_buffers_come_back_with_a_stop() {
    let mut net = Interface::new(0);
    let place = |head: u32| DATA + 0x1000 * u64::from(head);
    (0..8).for_each(|head| net.offer(head, place(head.into()), 2048));
    net.wire.send(&frame(100, 1));
    net.next_frame(place);
    let base = net.frontend.get_vring_base(0).unwrap();
    assert_eq!(base, u32::from(net.receive.used_index(&net.guest)));
    let made = std::mem::replace(&mut net.receive.next_available, base.try_into().unwrap());
    enable(&mut net.frontend, &net.receive);
    net.receive.next_available = made;
    net.wire.send(&frame(100, 2));
    assert_eq!(net.next_frame(place).2, frame(100, 2));
}

/// A device with two pairs, its queues, and a control queue at `control`.
fn pairs(control: usize, leave_out: u64) -> (Wire, Backend, Frontend, Guest, Queue, Vec<Queue>) {
    let wire = Wire::new(2);
    let (backend, mut frontend) = Backend::ready(EXECUTABLE, wire.spec(), 5);
    assert_eq!(frontend.get_features().unwrap() & (MQ | CTRL_VQ), MQ | CTRL_VQ);
    let guest = Guest::new(4 << 20);
    let commands = Queue::new(&guest, control, 16);
    let data: Vec<Queue> = (0..control).map(|index| Queue::new(&guest, index, 16)).collect();
    let mut all: Vec<&Queue> = data.iter().collect();
    all.push(&commands);
    connect(&mut frontend, &guest, &all, leave_out);
    assert_eq!(frontend.get_queue_num().unwrap(), 5);
    (wire, backend, frontend, guest, commands, data)
}

fn set_pairs(guest: &Guest, commands: &mut Queue, command: &[u8]) -> u8 {
    guest.put(DATA, command);
    guest.put(DATA + 0x100, &[0xee]);
    let length = u32::try_from(command.len()).unwrap();
    commands.send(guest, 0, &[(DATA, 2, 0), (DATA + 2, length - 2, 0), (DATA + 0x100, 1, WRITE)]);
    assert_eq!(commands.next(guest), (0, 1));
    guest.get(DATA + 0x100, 1)[0]
}

#[test]
fn the_driver_chooses_how_many_pairs_to_use() {
    let (wire, _backend, _frontend, guest, mut commands, mut data) = pairs(4, 0);
    let packet = [&[0; HEADER][..], &frame(100, 1)].concat();
    assert!(wire.attached(0) && !wire.attached(1), "a driver begins with one pair");
    assert_eq!(set_pairs(&guest, &mut commands, &[4, 0, 2, 0]), 0);
    assert!(wire.attached(0) && wire.attached(1));
    guest.put(DATA + 0x1000, &packet);
    data[3].send(&guest, 0, &[(DATA + 0x1000, 112, 0)]);
    assert_eq!(data[3].next(&guest), (0, 0));
    assert_eq!(wire.receive(), frame(100, 1));
    for bad in [&[4, 0, 0, 0][..], &[4, 0, 3, 0], &[4, 1, 1, 0], &[5, 0, 1, 0], &[4, 0, 1], &[4, 0, 1, 0, 0]] {
        assert_eq!(set_pairs(&guest, &mut commands, bad), 1, "{bad:?}");
    }
    assert_eq!(set_pairs(&guest, &mut commands, &[4, 0, 1, 0]), 0);
    assert!(wire.attached(0) && !wire.attached(1));
}

/// The next number of pairs that the process tells of.
fn told(backend: &Backend) -> u16 {
    match backend.message() {
        FromBackend::Pairs { pairs } => pairs,
        other => panic!("{other:?}"),
    }
}

/// Has the main thread of a process stand still until the process ends, and its other threads go on (ptrace(2)).
fn hold_main_thread(backend: &Backend) {
    let pid = libc::pid_t::try_from(backend.pid()).unwrap();
    // SAFETY: none of the calls touches memory of this process, but for the status, into which one word is written.
    unsafe {
        Errno::result(libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0)).unwrap();
        Errno::result(libc::ptrace(libc::PTRACE_INTERRUPT, pid, 0, 0)).unwrap();
        let mut status = 0;
        assert_eq!(libc::waitpid(pid, &raw mut status, libc::__WALL), pid);
        assert!(libc::WIFSTOPPED(status), "status {status:#x}");
    }
}

#[test]
fn ozone_is_told_of_a_number_of_pairs_before_the_driver_is() {
    let (_wire, backend, _frontend, guest, mut commands, _data) = pairs(4, 0);
    hold_main_thread(&backend);
    assert_eq!(set_pairs(&guest, &mut commands, &[4, 0, 2, 0]), 0);
    assert!(backend.readable(0), "a process that ends now is replaced by one that does not know");
    assert_eq!(told(&backend), 2);
    assert_eq!(set_pairs(&guest, &mut commands, &[4, 0, 2, 0]), 0);
    assert!(!backend.readable(0), "the number has not changed");
}

#[test]
fn a_driver_is_not_kept_waiting_by_an_ozone_that_does_not_read() {
    let (_wire, _backend, _frontend, guest, mut commands, _data) = pairs(4, 0);
    // More than a socket holds.
    for round in 0..500 {
        let pairs = if round % 2 == 0 { 2 } else { 1 };
        assert_eq!(set_pairs(&guest, &mut commands, &[4, 0, pairs, 0]), 0, "round {round}");
    }
}

#[test]
fn a_successor_goes_on_with_the_pairs_in_use() {
    let (wire, backend, frontend, guest, mut commands, mut data) = pairs(4, 0);
    assert_eq!(set_pairs(&guest, &mut commands, &[4, 0, 2, 0]), 0);
    assert_eq!(told(&backend), 2);
    drop((backend, frontend));
    let (backend, mut frontend) = Backend::ready(EXECUTABLE, wire.spec_of_successor(2), 5);
    let mut all: Vec<&Queue> = data.iter().collect();
    all.push(&commands);
    connect(&mut frontend, &guest, &all, 0);
    let packet = [&[0; HEADER][..], &frame(100, 1)].concat();
    guest.put(DATA + 0x1000, &packet);
    data[3].send(&guest, 0, &[(DATA + 0x1000, 112, 0)]);
    assert_eq!(data[3].next(&guest), (0, 0));
    assert_eq!(wire.receive(), frame(100, 1), "the second pair still sends");
    assert!(wire.attached(0) && wire.attached(1));
    assert!(!backend.readable(0), "the number has not changed");
    drop((backend, frontend));

    // One that begins anew begins with one pair, whatever the last one used.
    let (backend, mut frontend) = Backend::ready(EXECUTABLE, wire.spec_of_successor(2), 5);
    let guest = Guest::new(4 << 20);
    let fresh: Vec<Queue> = (0..5).map(|index| Queue::new(&guest, index, 16)).collect();
    connect(&mut frontend, &guest, &fresh.iter().collect::<Vec<_>>(), 0);
    assert_eq!(told(&backend), 1);
    assert!(wire.attached(0) && !wire.attached(1));
}

#[test]
fn a_driver_without_several_pairs_has_the_control_queue_third() {
    let (_wire, _backend, _frontend, guest, mut commands, _data) = pairs(2, MQ);
    assert_eq!(set_pairs(&guest, &mut commands, &[0, 0, 1, 0]), 1, "answered, so it is a control queue");
}
