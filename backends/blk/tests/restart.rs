//! What one `ozone-blk` leaves and the next finds: the record of requests in flight, and a core that gets it wrong.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use nix::fcntl::SealFlag;
use protocol::{BlkSpec, DeviceSpec, FromBackend};
use virtio_backend::testing::{Backend, Frontend, Guest, Queue, Record, VhostBackend, WRITE, enable_from, negotiate};

const EXECUTABLE: &str = env!("CARGO_BIN_EXE_ozone-blk");

const OUT: u32 = 1;
const SIZE: u16 = 16;

/// Request `n` has its header, status and data from here on.
fn place(n: u16) -> u64 {
    Guest::FREE + 0x1000 * u64::from(n)
}

fn spec(image: &File, queues: u16) -> DeviceSpec {
    let (_, sentinel) = std::io::pipe().unwrap();
    DeviceSpec::Blk(BlkSpec {
        image: OwnedFd::from(image.try_clone().unwrap()).into(),
        sentinel: OwnedFd::from(sentinel).into(),
        direct: false,
        successor: true,
        read_only: false,
        serial: "root".into(),
        queues,
    })
}

/// A disk whose queue is not started yet.
struct Disk {
    backend: Backend,
    frontend: Frontend,
    guest: Guest,
    queue: Queue,
    image: File,
}

impl Disk {
    fn new() -> Self {
        let image = tempfile::tempfile().unwrap();
        image.set_len(1 << 20).unwrap();
        let (backend, mut frontend) = Backend::ready(EXECUTABLE, spec(&image, 2), 2);
        let guest = Guest::new(4 << 20);
        let queue = Queue::new(&guest, 0, SIZE);
        negotiate(&mut frontend, &guest, 0);
        Self { backend, frontend, guest, queue, image }
    }

    /// Makes a write of the byte `n` to sector `n` available, with descriptor `head` and those after it.
    fn offer(&mut self, n: u16, head: u16) {
        let place = place(n);
        let header = [&OUT.to_le_bytes()[..], &[0; 4], &u64::from(n).to_le_bytes()].concat();
        self.guest.put(place, &header);
        self.guest.put(place + 0x100, &[0xee]);
        self.guest.put(place + 0x200, &[n.to_le_bytes()[0]; 512]);
        let parts = [(place, 16, 0), (place + 0x200, 512, 0), (place + 0x100, 1, WRITE)];
        self.queue.chain(&self.guest, self.queue.table(), head, &parts);
        self.queue.offer(&self.guest, head);
    }

    fn sector(&self, n: u64) -> [u8; 512] {
        let mut bytes = [0; 512];
        self.image.read_exact_at(&mut bytes, n * 512).unwrap();
        bytes
    }
}

/// The header and an entry of a queue's part (vhost-user specification, "Inflight I/O tracking").
fn header(entries: u16, last_batch_head: u16, used: u16) -> Vec<u8> {
    let words = [1, entries, last_batch_head, used];
    [vec![0; 8], words.into_iter().flat_map(u16::to_ne_bytes).collect()].concat()
}

fn entry(next: u16, counter: u64) -> Vec<u8> {
    [&[1, 0, 0, 0, 0, 0][..], &next.to_ne_bytes(), &counter.to_ne_bytes()].concat()
}

fn put_entry(record: &Record, head: u16, bytes: &[u8]) {
    record.file.write_all_at(bytes, 16 + 16 * u64::from(head)).unwrap();
}

#[test]
fn what_was_in_flight_is_carried_out_first_and_in_its_order() {
    let mut disk = Disk::new();
    let record = Record::get(&mut disk.frontend, 2, SIZE);
    // Heads 6 and 3 were taken, 6 first; head 9 had been taken between the two and was given back. The driver has used its
    // descriptors again since, in the place of the available ring where head 6 was.
    record.file.write_all_at(&header(SIZE, 0, 0), 0).unwrap();
    put_entry(&record, 6, &entry(0, 40));
    put_entry(&record, 3, &entry(0, 41));
    disk.offer(2, 3);
    disk.offer(1, 6);
    disk.offer(3, 9);
    record.set(&mut disk.frontend).unwrap();
    enable_from(&mut disk.frontend, &disk.queue, 0).unwrap();
    let mut heads = [0; 3].map(|_| disk.queue.next(&disk.guest).0);
    heads.sort_unstable();
    assert_eq!(heads, [3, 6, 9]);
    assert!(matches!(disk.backend.message(), FromBackend::Resubmitted { requests: 2 }));
    (1..=3).for_each(|n| assert_eq!(disk.sector(n), [n.to_le_bytes()[0]; 512], "sector {n}"));
    assert_eq!(disk.frontend.get_vring_base(0).unwrap(), 3);
    // Nothing is in flight any more, and the queue goes on from there.
    record.set(&mut disk.frontend).unwrap();
    disk.offer(4, 0);
    enable_from(&mut disk.frontend, &disk.queue, 3).unwrap();
    assert_eq!(disk.queue.next(&disk.guest), (0, 1));
    assert!(!disk.backend.readable(50), "nothing was resubmitted");
}

#[test]
fn a_request_that_was_published_is_not_carried_out_again() {
    let mut disk = Disk::new();
    let record = Record::get(&mut disk.frontend, 1, SIZE);
    // Head 3 was published, and the process ended before it recorded that; head 6 was not.
    record.file.write_all_at(&header(SIZE, 3, 0), 0).unwrap();
    put_entry(&record, 3, &entry(0, 0));
    put_entry(&record, 6, &entry(0, 1));
    disk.offer(1, 3);
    disk.offer(2, 6);
    disk.guest.put(disk.queue.used() + 2, &1_u16.to_le_bytes());
    record.set(&mut disk.frontend).unwrap();
    enable_from(&mut disk.frontend, &disk.queue, 1).unwrap();
    assert!(matches!(disk.backend.message(), FromBackend::Resubmitted { requests: 1 }));
    let _published = disk.queue.next(&disk.guest);
    assert_eq!(disk.queue.next(&disk.guest), (6, 1));
    assert_eq!((disk.sector(1), disk.sector(2)), ([0; 512], [2; 512]));
}

#[test]
fn a_hostile_record_latches_the_queue_and_nothing_else() {
    let circle = |record: &Record| {
        record.file.write_all_at(&header(SIZE, 3, 0), 0).unwrap();
        put_entry(record, 3, &entry(3, 0));
    };
    let outside = |record: &Record| record.file.write_all_at(&header(SIZE, 999, 0), 0).unwrap();
    let too_many = |record: &Record| record.file.write_all_at(&header(SIZE, 0, 1000), 0).unwrap();
    let elsewhere = |record: &Record| {
        record.file.write_all_at(&header(SIZE, 0, 2), 0).unwrap();
        // A chain that is none: the table has a descriptor whose buffer is nowhere.
        put_entry(record, 15, &entry(0, 0));
    };
    let attacks: [&dyn Fn(&Record); 4] = [&circle, &outside, &too_many, &elsewhere];
    for (number, attack) in attacks.into_iter().enumerate() {
        let mut disk = Disk::new();
        let record = Record::get(&mut disk.frontend, 1, SIZE);
        attack(&record);
        disk.queue.describe(&disk.guest, disk.queue.table(), 15, (1 << 40, 16, 0, 0));
        disk.guest.put(disk.queue.used() + 2, &2_u16.to_le_bytes());
        disk.queue.next_available = 2;
        disk.offer(1, 0);
        record.set(&mut disk.frontend).unwrap();
        enable_from(&mut disk.frontend, &disk.queue, 2).unwrap();
        let mut message = disk.backend.message();
        if matches!(message, FromBackend::Resubmitted { .. }) {
            message = disk.backend.message();
        }
        assert!(matches!(message, FromBackend::Violated { queue: 0 }), "attack {number}: {message:?}");
        assert_eq!(disk.queue.used_index(&disk.guest), 2, "attack {number}: nothing is answered");
        assert_eq!(disk.sector(1), [0; 512], "attack {number}");
        let before = disk.backend.ticks();
        for _ in 0..20 {
            disk.queue.kick.write(1).unwrap();
            std::thread::sleep(Duration::from_millis(2));
        }
        assert!(disk.backend.ticks() - before < 5, "attack {number}: a queue that was given up spins");
        disk.frontend.get_vring_base(0).unwrap();
        // As after the device's reset: fresh memory, rings from nothing.
        disk.queue = Queue::new(&disk.guest, 0, SIZE);
        Record::get(&mut disk.frontend, 1, SIZE).set(&mut disk.frontend).unwrap();
        enable_from(&mut disk.frontend, &disk.queue, 0).unwrap();
        disk.offer(1, 0);
        disk.queue.kick.write(1).unwrap();
        assert_eq!(disk.queue.next(&disk.guest), (0, 1), "attack {number}");
    }
}

#[test]
fn records_that_cannot_be_are_refused() {
    let mut disk = Disk::new();
    let descriptors = disk.backend.descriptors();
    let refused = |disk: &mut Disk, change: &dyn Fn(&mut Record)| {
        let mut record = Record::get(&mut disk.frontend, 2, SIZE);
        change(&mut record);
        assert!(record.set(&mut disk.frontend).is_err(), "{:?}", (record.about.mmap_size, record.about.mmap_offset));
    };
    refused(&mut disk, &|record| record.about.mmap_size -= 1);
    refused(&mut disk, &|record| record.about.mmap_size += 1);
    refused(&mut disk, &|record| record.about.mmap_size = 1);
    refused(&mut disk, &|record| record.about.mmap_size = u64::MAX);
    refused(&mut disk, &|record| record.about.mmap_offset = 1);
    refused(&mut disk, &|record| record.about.mmap_offset = 4096);
    refused(&mut disk, &|record| record.about.mmap_offset = !4095);
    refused(&mut disk, &|record| record.about.num_queues = 3);
    refused(&mut disk, &|record| record.about.num_queues = u16::MAX);
    refused(&mut disk, &|record| record.about.queue_size = 2 * SIZE);
    refused(&mut disk, &|record| record.about.queue_size = SIZE - 1);
    refused(&mut disk, &|record| record.about.queue_size = u16::MAX);
    refused(&mut disk, &|record| record.file.write_all_at(&header(SIZE / 2, 0, 0), 0).unwrap());
    refused(&mut disk, &|record| {
        record.file.write_all_at(&header(SIZE, 0, 0), 0).unwrap();
        record.file.write_all_at(&[1], 0).unwrap();
    });
    refused(&mut disk, &|record| record.file.write_all_at(&[2], 8).unwrap());
    refused(&mut disk, &|record| record.file = tempfile::tempfile().unwrap());
    let unsealed = Guest::sealed(4096, SealFlag::F_SEAL_GROW);
    refused(&mut disk, &|record| record.file = unsealed.file().try_clone().unwrap());
    let record = Record::get(&mut disk.frontend, 2, SIZE);
    assert!(record.file.set_len(0).is_err(), "it cannot be made shorter afterwards");
    drop(record);
    // A request has been dealt with in whole when the next one is answered.
    disk.frontend.get_features().unwrap();
    assert_eq!(disk.backend.descriptors(), descriptors, "no descriptor was left behind");

    let record = Record::get(&mut disk.frontend, 1, SIZE);
    record.set(&mut disk.frontend).unwrap();
    let second = Queue::new(&disk.guest, 1, SIZE);
    assert!(enable_from(&mut disk.frontend, &second, 0).is_err(), "the record has no part for it");
    let large = Queue::new(&disk.guest, 0, 2 * SIZE);
    assert!(enable_from(&mut disk.frontend, &large, 0).is_err(), "its part is too small");
    enable_from(&mut disk.frontend, &disk.queue, 0).unwrap();
    assert!(record.set(&mut disk.frontend).is_err(), "a queue is running");
    disk.offer(1, 0);
    disk.queue.kick.write(1).unwrap();
    assert_eq!(disk.queue.next(&disk.guest), (0, 1));
}
