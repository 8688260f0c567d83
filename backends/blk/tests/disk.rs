//! The real `ozone-blk` with its run filter, driven by hand.
#![allow(unsafe_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use nix::fcntl::SealFlag;
use protocol::{BlkSpec, DeviceSpec, Fault, FaultKind, FromBackend};
use virtio_backend::testing::vhost_user::VhostUserFrontend;
use virtio_backend::testing::{
    Backend, Frontend, Guest, Queue, VERSION_1, VhostBackend, VhostUserMemoryRegionInfo, WRITE, config, connect, enable,
};
use vmm_sys_util::eventfd::EventFd;

const EXECUTABLE: &str = env!("CARGO_BIN_EXE_ozone-blk");

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const EVENT_IDX: u64 = 1 << 29;
const F_FLUSH: u64 = 1 << 9;

const HEADER: u64 = Guest::FREE;
const STATUS: u64 = Guest::FREE + 0x100;
const DATA: u64 = Guest::FREE + 0x1000;
const INDIRECT: u64 = Guest::FREE + 0x8000;

fn spec(image: &File, read_only: bool, queues: u16) -> DeviceSpec {
    let image = OwnedFd::from(image.try_clone().unwrap()).into();
    let (_, sentinel) = std::io::pipe().unwrap();
    DeviceSpec::Blk(BlkSpec {
        image,
        sentinel: OwnedFd::from(sentinel).into(),
        direct: false,
        successor: false,
        read_only,
        serial: "root".into(),
        queues,
    })
}

fn image(bytes: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    file
}

/// One disk with one queue, connected.
struct Disk {
    backend: Backend,
    frontend: Frontend,
    guest: Guest,
    queue: Queue,
    features: u64,
}

impl Disk {
    fn new(image: &File, read_only: bool, leave_out: u64) -> Self {
        let (backend, mut frontend) = Backend::ready(EXECUTABLE, spec(image, read_only, 1), 1);
        let guest = Guest::new(4 << 20);
        let queue = Queue::new(&guest, 0, 64);
        let features = connect(&mut frontend, &guest, &[&queue], leave_out);
        Self { backend, frontend, guest, queue, features }
    }

    fn header(&self, kind: u32, sector: u64) {
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        self.guest.put(HEADER, &header);
        self.guest.put(STATUS, &[0xee]);
    }

    /// Sends a request of header, data and status; returns its status and the bytes written.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> (u8, u32) {
        self.header(kind, sector);
        let parts = [&[(HEADER, 16, 0)], data, &[(STATUS, 1, WRITE)]].concat();
        self.queue.send(&self.guest, 3, &parts);
        let (head, written) = self.queue.next(&self.guest);
        assert_eq!(head, 3);
        (self.guest.get(STATUS, 1)[0], written)
    }

    fn read_sector(&mut self, sector: u64) -> (u8, Vec<u8>) {
        let (status, _) = self.request(IN, sector, &[(DATA, 512, WRITE)]);
        (status, self.guest.get(DATA, 512))
    }
}

#[test]
fn write_flush_and_read_back() {
    let image = image(1 << 20);
    let mut disk = Disk::new(&image, false, 0);
    assert_eq!(disk.features & (VERSION_1 | EVENT_IDX | F_FLUSH), VERSION_1 | EVENT_IDX | F_FLUSH);
    disk.guest.put(DATA, &[0xa5; 1536]);
    assert_eq!(disk.request(OUT, 7, &[(DATA, 512, 0), (DATA + 512, 1024, 0)]), (OK, 1));
    assert_eq!(disk.request(FLUSH, 0, &[]), (OK, 1));
    let mut found = [0; 1536];
    image.read_exact_at(&mut found, 7 * 512).unwrap();
    assert_eq!(found, [0xa5; 1536]);
    disk.guest.put(DATA, &[0; 1536]);
    assert_eq!(disk.request(IN, 7, &[(DATA, 100, WRITE), (DATA + 100, 1436, WRITE)]), (OK, 1537));
    assert_eq!(disk.guest.get(DATA, 1536), [0xa5; 1536]);
}

#[test]
fn the_configuration_space_describes_the_disk() {
    let (_backend, mut frontend) = Backend::ready(EXECUTABLE, spec(&image(1000 * 512 + 100), true, 4), 4);
    let guest = Guest::new(1 << 20);
    let features = connect(&mut frontend, &guest, &[], 0);
    assert_eq!(features & (1 << 5 | 1 << 12), 1 << 5 | 1 << 12, "read-only, several queues");
    assert_eq!(frontend.get_queue_num().unwrap(), 4);
    let config = config(&mut frontend, 60);
    assert_eq!(config[..8], 1000_u64.to_le_bytes());
    assert_eq!(config[12..16], 254_u32.to_le_bytes());
    assert_eq!(config[20..24], 512_u32.to_le_bytes());
    assert_eq!(config[34..36], 4_u16.to_le_bytes());
}

#[test]
fn the_identity_is_twenty_bytes() {
    let mut disk = Disk::new(&image(4096), false, 0);
    assert_eq!(disk.request(GET_ID, 0, &[(DATA, 20, WRITE)]), (OK, 21));
    assert_eq!(disk.guest.get(DATA, 20), b"root\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let image = image(4096);
    let mut disk = Disk::new(&image, true, 0);
    disk.guest.put(DATA, &[1; 512]);
    assert_eq!(disk.request(OUT, 0, &[(DATA, 512, 0)]), (IOERR, 1));
    assert_eq!(disk.request(FLUSH, 0, &[]), (OK, 1));
    assert_eq!(disk.read_sector(0), (OK, vec![0; 512]));
}

#[test]
fn unknown_and_impossible_requests_are_answered() {
    let mut disk = Disk::new(&image(4096), false, 0);
    assert_eq!(disk.request(99, 0, &[(DATA, 512, WRITE)]), (UNSUPP, 0));
    assert_eq!(disk.request(IN, 8, &[(DATA, 512, WRITE)]).0, IOERR, "beyond the end");
    assert_eq!(disk.request(IN, u64::MAX, &[(DATA, 512, WRITE)]).0, IOERR);
    assert_eq!(disk.request(OUT, 0, &[(DATA, 511, 0)]).0, IOERR);
    assert_eq!(disk.read_sector(7).0, OK, "the queue goes on");
}

#[test]
fn an_image_that_was_made_shorter_is_an_io_error() {
    let image = image(1 << 20);
    let mut disk = Disk::new(&image, false, 0);
    image.set_len(4096).unwrap();
    assert_eq!(disk.request(IN, 6, &[(DATA, 4096, WRITE)]).0, IOERR);
    assert_eq!(disk.read_sector(7).0, OK);
}

#[test]
fn indirect_descriptors() {
    let image = image(1 << 20);
    image.write_all_at(&[0x42; 2048], 0).unwrap();
    let mut disk = Disk::new(&image, false, 0);
    disk.header(IN, 0);
    let mut parts = vec![(HEADER, 5, 0), (HEADER + 5, 11, 0)];
    parts.extend((0..200).map(|part| (DATA + 10 * part, 10, WRITE)));
    parts.extend([(DATA + 2000, 48, WRITE), (STATUS, 1, WRITE)]);
    disk.queue.send_indirect(&disk.guest, 9, INDIRECT, &parts);
    assert_eq!(disk.queue.next(&disk.guest), (9, 2049));
    assert_eq!(disk.guest.get(DATA, 2048), [0x42; 2048]);
}

#[test]
fn interrupts_come_where_the_driver_asked() {
    let mut disk = Disk::new(&image(4096), false, 0);
    let used_event = disk.queue.available() + 4 + 2 * 64;
    disk.guest.put(used_event, &2_u16.to_le_bytes());
    for _ in 0..2 {
        assert_eq!(disk.read_sector(0).0, OK);
    }
    // The wait for a used element swallows interrupts, so look at a third one that is not waited for.
    disk.header(IN, 0);
    disk.queue.send(&disk.guest, 0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    assert!(disk.queue.interrupted(10_000));
    assert_eq!(disk.queue.next(&disk.guest).0, 0);
    disk.queue.send(&disk.guest, 0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    while disk.queue.poll(&disk.guest).is_none() {
        std::thread::yield_now();
    }
    assert!(!disk.queue.interrupted(50), "the event index has been passed");
}

#[test]
fn without_the_event_index_every_completion_interrupts() {
    let mut disk = Disk::new(&image(4096), false, EVENT_IDX);
    assert_eq!(disk.features & EVENT_IDX, 0);
    for _ in 0..3 {
        disk.header(FLUSH, 0);
        disk.queue.send(&disk.guest, 0, &[(HEADER, 16, 0), (STATUS, 1, WRITE)]);
        assert!(disk.queue.interrupted(10_000));
        assert!(disk.queue.poll(&disk.guest).is_some());
    }
}

#[test]
fn a_thousand_requests_in_batches() {
    let image = image(1 << 20);
    let mut disk = Disk::new(&image, false, 0);
    for round in 0..64_u64 {
        for slot in 0..16_u16 {
            let place = u64::from(slot) * 0x1000;
            let sector = round * 16 + u64::from(slot);
            let header = [&OUT.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
            disk.guest.put(DATA + place, &header);
            disk.guest.put(DATA + place + 512, &[u8::try_from(sector % 251).unwrap(); 512]);
            let parts = [(DATA + place, 16, 0), (DATA + place + 512, 512, 0), (DATA + place + 256, 1, WRITE)];
            let table = disk.queue.table();
            disk.queue.chain(&disk.guest, table, slot * 3, &parts);
            disk.queue.offer(&disk.guest, slot * 3);
        }
        disk.queue.kick.write(1).unwrap();
        (0..16).for_each(|_| assert_eq!(disk.queue.next(&disk.guest).1, 1));
    }
    for sector in 0..1024_u64 {
        let mut found = [0; 512];
        image.read_exact_at(&mut found, sector * 512).unwrap();
        assert_eq!(found, [u8::try_from(sector % 251).unwrap(); 512], "sector {sector}");
    }
}

#[test]
fn queues_stop_and_start_again_on_one_connection() {
    let mut disk = Disk::new(&image(4096), false, 0);
    let descriptors = disk.backend.descriptors();
    for round in 1..=3 {
        (0..round).for_each(|_| assert_eq!(disk.read_sector(0).0, OK));
        let base = disk.frontend.get_vring_base(0).unwrap();
        assert_eq!(base, u32::from(disk.queue.next_available));
        assert_eq!(disk.frontend.get_vring_base(0).unwrap(), base, "a stop is idempotent");
        disk.queue.kick.write(1).unwrap();
        // The driver is probed again: rings from nothing, the same connection.
        disk.queue = Queue::new(&disk.guest, 0, 32);
        disk.frontend.set_features(disk.frontend.get_features().unwrap()).unwrap();
        disk.frontend.set_mem_table(&[disk.guest.region()]).unwrap();
        enable(&mut disk.frontend, &disk.queue);
    }
    assert_eq!(disk.read_sector(0).0, OK);
    assert_eq!(disk.backend.descriptors(), descriptors, "no descriptor was left behind");
}

#[test]
fn a_request_made_before_the_start_needs_no_kick() {
    let (_backend, mut frontend) = Backend::ready(EXECUTABLE, spec(&image(4096), false, 1), 1);
    let guest = Guest::new(4 << 20);
    let mut queue = Queue::new(&guest, 0, 8);
    guest.put(HEADER, &[&FLUSH.to_le_bytes()[..], &[0; 12]].concat());
    queue.chain(&guest, queue.table(), 0, &[(HEADER, 16, 0), (STATUS, 1, WRITE)]);
    queue.offer(&guest, 0);
    let made = std::mem::take(&mut queue.next_available);
    connect(&mut frontend, &guest, &[&queue], 0);
    queue.next_available = made;
    assert_eq!(queue.next(&guest), (0, 1));
}

#[test]
fn a_disabled_queue_rests() {
    let mut disk = Disk::new(&image(4096), false, 0);
    disk.frontend.set_vring_enable(0, false).unwrap();
    disk.header(FLUSH, 0);
    disk.queue.send(&disk.guest, 0, &[(HEADER, 16, 0), (STATUS, 1, WRITE)]);
    assert!(!disk.queue.interrupted(50));
    assert!(disk.queue.poll(&disk.guest).is_none());
    disk.frontend.set_vring_enable(0, true).unwrap();
    assert_eq!(disk.queue.next(&disk.guest), (0, 1));
}

#[test]
fn to_enable_a_queue_that_runs_does_not_stop_it() {
    let mut disk = Disk::new(&image(4096), false, 0);
    // A counter that is full: the thread that signals it hangs, and a stop would release it.
    let blocking = EventFd::new(0).unwrap();
    blocking.write(u64::MAX - 1).unwrap();
    disk.frontend.set_vring_call(0, &blocking).unwrap();
    disk.header(FLUSH, 0);
    disk.queue.send(&disk.guest, 0, &[(HEADER, 16, 0), (STATUS, 1, WRITE)]);
    assert_eq!(disk.queue.next(&disk.guest), (0, 1));
    disk.frontend.set_vring_enable(0, true).unwrap();
    assert_eq!(blocking.read().unwrap(), u64::MAX - 1, "it was stopped");
    disk.frontend.set_vring_enable(0, false).unwrap();
}

#[test]
fn the_memory_may_change_under_a_running_queue() {
    let mut disk = Disk::new(&image(4096), false, 0);
    let more = Guest::new(1 << 20);
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 1 << 32,
        userspace_addr: disk.guest.region().userspace_addr + (1 << 32),
        ..more.region()
    };
    assert_eq!(disk.frontend.get_max_mem_slots().unwrap(), 32);
    disk.frontend.add_mem_region(&region).unwrap();
    assert_eq!(disk.request(IN, 0, &[((1 << 32) + 0x1000, 512, WRITE)]), (OK, 513));
    disk.frontend.remove_mem_region(&region).unwrap();
    assert_eq!(disk.read_sector(0).0, OK);
}

/// Sends a chain that breaks the rules, and sees the queue given up without noise, the process in order, and the queue
/// as good as new after a reset.
fn violates(offend: impl FnOnce(&mut Disk)) {
    let mut disk = Disk::new(&image(4096), false, 0);
    assert_eq!(disk.read_sector(0).0, OK);
    let used = disk.queue.used_index(&disk.guest);
    offend(&mut disk);
    disk.queue.kick.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(disk.queue.used_index(&disk.guest), used, "nothing of it is answered");
    assert!(matches!(disk.backend.message(), FromBackend::Violated { queue: 0 }));
    let before = disk.backend.ticks();
    for _ in 0..50 {
        disk.queue.kick.write(1).unwrap();
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(disk.backend.ticks() - before < 5, "a queue that was given up spins");
    assert!(!disk.backend.readable(0), "it is told once");
    disk.frontend.get_vring_base(0).unwrap();
    disk.queue = Queue::new(&disk.guest, 0, 64);
    enable(&mut disk.frontend, &disk.queue);
    assert_eq!(disk.read_sector(0).0, OK, "after a reset");
}

#[test]
fn a_head_outside_of_the_table_latches_the_queue() {
    violates(|disk| disk.queue.offer(&disk.guest, 64));
}

#[test]
fn a_next_outside_of_the_table_latches_the_queue() {
    violates(|disk| {
        disk.queue.describe(&disk.guest, disk.queue.table(), 0, (HEADER, 16, 1, 4711));
        disk.queue.offer(&disk.guest, 0);
    });
}

#[test]
fn a_request_made_available_twice_latches_the_queue() {
    let mut disk = Disk::new(&image(4096), false, 0);
    disk.header(IN, 0);
    let table = disk.queue.table();
    disk.queue.chain(&disk.guest, table, 0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    (0..3).for_each(|_| disk.queue.offer(&disk.guest, 0));
    disk.queue.kick.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(disk.queue.used_index(&disk.guest), 0, "the queue was given up");
    assert_eq!(disk.frontend.get_vring_base(0).unwrap(), 1);
    assert_eq!(disk.queue.next(&disk.guest), (0, 513), "what was begun is finished when it stops");
    assert_eq!(disk.queue.used_index(&disk.guest), 1, "and nothing more is");
    disk.queue = Queue::new(&disk.guest, 0, 64);
    enable(&mut disk.frontend, &disk.queue);
    assert_eq!(disk.read_sector(0).0, OK, "after a reset");
}

#[test]
fn a_loop_latches_the_queue() {
    violates(|disk| {
        disk.queue.describe(&disk.guest, disk.queue.table(), 0, (HEADER, 16, 1, 1));
        disk.queue.describe(&disk.guest, disk.queue.table(), 1, (HEADER, 16, 1, 0));
        disk.queue.offer(&disk.guest, 0);
    });
}

#[test]
fn a_buffer_outside_of_memory_latches_the_queue() {
    violates(|disk| {
        disk.queue.chain(
            &disk.guest,
            disk.queue.table(),
            0,
            &[(HEADER, 16, 0), (1 << 40, 512, WRITE), (STATUS, 1, WRITE)],
        );
        disk.queue.offer(&disk.guest, 0);
    });
}

#[test]
fn an_available_index_that_jumps_latches_the_queue() {
    violates(|disk| disk.queue.publish(&disk.guest, disk.queue.next_available.wrapping_add(1000)));
}

#[test]
fn a_request_without_room_for_a_status_latches_the_queue() {
    violates(|disk| {
        disk.header(IN, 0);
        disk.queue.chain(&disk.guest, disk.queue.table(), 0, &[(HEADER, 16, 0)]);
        disk.queue.offer(&disk.guest, 0);
    });
}

#[test]
fn bad_memory_tables_are_refused_and_the_old_one_stays() {
    let mut disk = Disk::new(&image(4096), false, 0);
    let unsealed = Guest::sealed(1 << 20, SealFlag::F_SEAL_GROW);
    let good = disk.guest.region();
    let beyond = VhostUserMemoryRegionInfo { memory_size: 5 << 20, ..good };
    let behind = VhostUserMemoryRegionInfo { mmap_offset: 1 << 20, ..good };
    let twice = [good, VhostUserMemoryRegionInfo { userspace_addr: good.userspace_addr + (1 << 40), ..good }];
    let file = image(4 << 20);
    let plain = VhostUserMemoryRegionInfo { mmap_handle: file.as_raw_fd(), ..good };
    let unaligned = VhostUserMemoryRegionInfo { mmap_offset: 1, memory_size: 4096, ..good };
    let descriptors = disk.backend.descriptors();
    for regions in [&[unsealed.region()][..], &[beyond], &[behind], &twice, &[plain], &[unaligned]] {
        assert!(disk.frontend.set_mem_table(regions).is_err());
        assert_eq!(disk.read_sector(0).0, OK, "queue and control go on");
    }
    assert_eq!(disk.backend.descriptors(), descriptors);
}

#[test]
fn bad_queue_descriptions_are_refused() {
    let mut disk = Disk::new(&image(4096), false, 0);
    let frontend = &mut disk.frontend;
    assert!(frontend.set_vring_num(0, 32).is_err(), "the queue is running");
    assert!(frontend.set_vring_base(0, 3).is_err(), "the queue is running");
    frontend.get_vring_base(0).unwrap();
    for size in [0, 3, 2048, 65535] {
        assert!(frontend.set_vring_num(0, size).is_err(), "{size}");
    }
    let mut outside = disk.queue.places();
    outside.used_ring_addr = 0x1000;
    assert!(frontend.set_vring_addr(0, &outside).is_err());
    let mut end = disk.queue.places();
    end.avail_ring_addr = disk.guest.region().userspace_addr + (4 << 20) - 2;
    frontend.set_vring_addr(0, &end).unwrap();
    frontend.set_vring_kick(0, &disk.queue.kick).unwrap_err();
    enable(frontend, &disk.queue);
    assert_eq!(disk.read_sector(0).0, OK);
}

#[test]
fn bad_event_descriptors_are_refused() {
    let mut disk = Disk::new(&image(4096), false, 0);
    let (reader, _writer) = nix::unistd::pipe().unwrap();
    for bad in [OwnedFd::from(image(8)), OwnedFd::from(File::open("/dev/zero").unwrap()), reader] {
        let raw = std::os::fd::IntoRawFd::into_raw_fd(bad);
        // SAFETY: the number was given up by its owner on the line before.
        let bad = unsafe { EventFd::from_raw_fd(raw) };
        disk.frontend.set_vring_kick(0, &bad).unwrap_err();
        disk.frontend.set_vring_call(0, &bad).unwrap_err();
        assert_eq!(disk.read_sector(0).0, OK, "the old descriptors stay");
    }
}

#[test]
fn a_call_that_blocks_holds_neither_control_nor_the_stop() {
    let mut disk = Disk::new(&image(4096), false, 0);
    let blocking = EventFd::new(0).unwrap();
    blocking.write(u64::MAX - 1).unwrap();
    disk.frontend.set_vring_call(0, &blocking).unwrap();
    disk.guest.put(disk.queue.available() + 4 + 2 * 64, &0_u16.to_le_bytes());
    disk.header(FLUSH, 0);
    disk.queue.send(&disk.guest, 0, &[(HEADER, 16, 0), (STATUS, 1, WRITE)]);
    assert_eq!(disk.queue.next(&disk.guest), (0, 1));
    assert_eq!(config(&mut disk.frontend, 60)[..8], 8_u64.to_le_bytes());
    assert_eq!(disk.frontend.get_vring_base(0).unwrap(), 1);
}

#[test]
fn a_blocking_kick_that_somebody_else_drains_hangs_nothing() {
    let mut disk = Disk::new(&image(4096), false, 0);
    disk.frontend.get_vring_base(0).unwrap();
    disk.queue.kick = EventFd::new(0).unwrap();
    disk.frontend.set_vring_call(0, &disk.queue.call).unwrap();
    disk.frontend.set_vring_kick(0, &disk.queue.kick).unwrap();
    for _ in 0..100 {
        disk.queue.kick.write(1).unwrap();
        disk.queue.kick.read().unwrap();
        assert_eq!(disk.read_sector(0).0, OK);
    }
    assert_eq!(disk.frontend.get_vring_base(0).unwrap(), 100);
}

#[test]
fn the_peer_may_close_at_any_byte_of_a_message() {
    let message = [&1_u32.to_le_bytes()[..], &1_u32.to_le_bytes(), &0_u32.to_le_bytes()].concat();
    for length in 0..=message.len() {
        let (mut backend, mut socket) = Backend::start(EXECUTABLE, spec(&image(4096), false, 1));
        assert!(matches!(backend.message(), FromBackend::Ready));
        socket.write_all(&message[..length]).unwrap();
        drop(socket);
        assert_eq!(backend.exit().code(), Some(0), "after {length} bytes");
    }
}

#[test]
fn garbage_ends_the_connection_in_order() {
    for garbage in [&[0xff; 64][..], &[0; 64], &[5, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0x7f]] {
        let (mut backend, mut socket) = Backend::start(EXECUTABLE, spec(&image(4096), false, 1));
        assert!(matches!(backend.message(), FromBackend::Ready));
        socket.write_all(garbage).unwrap();
        assert_eq!(backend.exit().code(), Some(0));
    }
}

#[test]
fn to_be_stopped_and_continued_changes_nothing() {
    let mut disk = Disk::new(&image(4096), false, 0);
    let pid = nix::unistd::Pid::from_raw(disk.backend.pid().try_into().unwrap());
    for _ in 0..3 {
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).unwrap();
        assert_eq!(disk.read_sector(0).0, OK);
        assert_eq!(config(&mut disk.frontend, 60)[..8], 8_u64.to_le_bytes());
    }
}

#[test]
fn it_ends_with_its_supervisor() {
    let (mut backend, _socket) = Backend::start(EXECUTABLE, spec(&image(4096), false, 1));
    assert!(matches!(backend.message(), FromBackend::Ready));
    let (other, _) = protocol::Channel::pair().unwrap();
    backend.control = other;
    assert_eq!(backend.exit().code(), Some(0));
}

#[test]
fn an_image_without_a_sector_is_the_users_fault() {
    let (mut backend, _socket) = Backend::start(EXECUTABLE, spec(&image(511), false, 1));
    let FromBackend::Failed(Fault { kind, message }) = backend.message() else { panic!("it should have failed") };
    assert_eq!(kind, FaultKind::Input);
    assert!(message.contains("'root' has 511 bytes"), "{message}");
    assert_eq!(backend.exit().code(), Some(1));
}

#[test]
fn the_run_filter_is_in_force() {
    let disk = Disk::new(&image(4096), false, 0);
    let tasks = std::fs::read_dir(format!("/proc/{}/task", disk.backend.pid())).unwrap();
    let mut threads = 0;
    for task in tasks {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        assert!(status.contains("Seccomp:\t2"), "{status}");
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
        threads += 1;
    }
    assert_eq!(threads, 3, "control, vhost-user and one queue");
}
