//! The ways in which the image is read and written: with and without io_uring, with and without the page cache.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use protocol::{BlkSpec, DeviceSpec};
use virtio_backend::testing::{Backend, Frontend, Guest, Queue, VhostBackend, WRITE, connect};

const EXECUTABLE: &str = env!("CARGO_BIN_EXE_ozone-blk");

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const OK: u8 = 0;
const IOERR: u8 = 1;

const SECTORS: u64 = 2048;
const SIZE: u16 = 128;

/// Header and status of the request that begins with descriptor `head`.
fn header(head: u16) -> u64 {
    Guest::FREE + 64 * u64::from(head)
}

/// Data of the requests.
const DATA: u64 = Guest::FREE + 0x1_0000;

struct Disk {
    _backend: Backend,
    frontend: Frontend,
    guest: Guest,
    queue: Queue,
    image: File,
}

/// An image whose sectors have their numbers in them.
fn image(directory: &str) -> tempfile::NamedTempFile {
    let image = tempfile::NamedTempFile::new_in(directory).unwrap();
    let bytes: Vec<u8> = (0..SECTORS).flat_map(sector).collect();
    image.as_file().write_all_at(&bytes, 0).unwrap();
    image
}

fn sector(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(64)
}

impl Disk {
    fn new(directory: &str, direct: bool, denied: &[i64]) -> Self {
        let file = image(directory);
        let flags = if direct { libc::O_DIRECT } else { 0 };
        let image = File::options().read(true).write(true).custom_flags(flags).open(file.path()).unwrap();
        let (_, sentinel) = std::io::pipe().unwrap();
        let spec = BlkSpec {
            image: OwnedFd::from(image).into(),
            sentinel: OwnedFd::from(sentinel).into(),
            direct,
            successor: true,
            read_only: false,
            serial: "root".into(),
            queues: 1,
        };
        let (backend, mut frontend) = Backend::ready_denied(EXECUTABLE, DeviceSpec::Blk(spec), 1, denied);
        let guest = Guest::new(16 << 20);
        let queue = Queue::new(&guest, 0, SIZE);
        connect(&mut frontend, &guest, &[&queue], 0);
        Self { _backend: backend, frontend, guest, queue, image: file.reopen().unwrap() }
    }

    fn offer(&mut self, head: u16, kind: u32, sector: u64, data: &[(u64, u32)]) {
        let place = header(head);
        self.guest.put(place, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes(), &[0xee]].concat());
        let flags = if kind == IN { WRITE } else { 0 };
        let data = data.iter().map(|&(address, length)| (address, length, flags));
        let parts: Vec<_> =
            std::iter::once((place, 16, 0)).chain(data).chain(std::iter::once((place + 16, 1, WRITE))).collect();
        let table = self.queue.table();
        self.queue.chain(&self.guest, table, head, &parts);
        self.queue.offer(&self.guest, head);
    }

    /// Waits for `count` requests that all succeed.
    fn finish(&mut self, count: usize) {
        self.queue.kick.write(1).unwrap();
        for _ in 0..count {
            let (head, _) = self.queue.next(&self.guest);
            let status = self.guest.get(header(head.try_into().unwrap()) + 16, 1);
            assert_eq!(status, [OK], "request {head}");
        }
    }

    /// Reads and writes alone and together, wherever the buffers lie.
    fn exercise(&mut self) {
        for shift in [0, 0x200, 0x1, 0x1ff] {
            for number in [0, 1, 7, SECTORS - 1] {
                let place = DATA + shift;
                self.offer(0, IN, number, &[(place, 100), (place + 100, 412)]);
                self.finish(1);
                assert_eq!(self.guest.get(place, 512), sector(number), "sector {number} to {place:#x}");
            }
        }
        // Many at once, of 1 to 3 sectors.
        let mut expected: Vec<u64> = (0..SECTORS).collect();
        for round in 0..6 {
            for n in 0..32_u16 {
                let place = DATA + 0x1000 * u64::from(n) + [0, 0x200, 0x3][usize::from(n % 3)];
                let (first, count) = (4 * u64::from(n) + round * 128, u64::from(n % 3) + 1);
                for (at, number) in (first..first + count).enumerate() {
                    self.guest.put(place + 512 * at as u64, &sector(number + 10_000));
                    expected[usize::try_from(number).unwrap()] = number + 10_000;
                }
                self.offer(4 * n, OUT, first, &[(place, 512 * u32::try_from(count).unwrap())]);
            }
            self.finish(32);
            self.offer(0, FLUSH, 0, &[]);
            self.finish(1);
        }
        // Larger than what goes through at once.
        let length = 512 * u32::try_from(SECTORS).unwrap();
        self.offer(0, IN, 0, &[(DATA + 1, length)]);
        self.finish(1);
        let found = self.guest.get(DATA + 1, length.try_into().unwrap());
        let whole: Vec<u8> = expected.iter().flat_map(|&number| sector(number)).collect();
        assert!(found == whole, "what the disk reads is not what was written");
        let mut bytes = vec![0; whole.len()];
        self.image.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == whole, "what the image has is not what was written");
        self.frontend.get_vring_base(0).unwrap();
    }
}

/// Where temporary files are, which is a disk on most hosts, and a file system in memory.
fn directories() -> [String; 2] {
    [std::env::temp_dir().display().to_string(), "/dev/shm".into()]
}

#[test]
fn with_io_uring_and_the_page_cache() {
    directories().iter().for_each(|directory| Disk::new(directory, false, &[]).exercise());
}

#[test]
fn without_io_uring() {
    for directory in directories() {
        Disk::new(&directory, false, &[libc::SYS_io_uring_setup]).exercise();
        Disk::new(&directory, true, &[libc::SYS_io_uring_setup]).exercise();
        Disk::new(&directory, false, &[libc::SYS_io_uring_register]).exercise();
    }
}

#[test]
fn past_the_page_cache_buffers_may_lie_anywhere() {
    directories().iter().for_each(|directory| Disk::new(directory, true, &[]).exercise());
}

#[test]
fn what_cannot_be_read_is_an_error_in_the_middle_of_others() {
    let mut disk = Disk::new(&directories()[0], false, &[]);
    disk.image.set_len(4096).unwrap();
    for n in 0..16_u16 {
        disk.offer(4 * n, IN, u64::from(n), &[(DATA + 512 * u64::from(n), 512)]);
    }
    disk.queue.kick.write(1).unwrap();
    for _ in 0..16 {
        let head = u16::try_from(disk.queue.next(&disk.guest).0).unwrap();
        let expected = if head / 4 < 8 { OK } else { IOERR };
        assert_eq!(disk.guest.get(header(head) + 16, 1), [expected], "request {head}");
    }
}

#[test]
fn the_sentinel_outlives_the_process_by_no_more_than_what_it_began() {
    let file = image(&directories()[0]);
    let (reader, sentinel) = std::io::pipe().unwrap();
    let spec = BlkSpec {
        image: OwnedFd::from(file.reopen().unwrap()).into(),
        sentinel: OwnedFd::from(sentinel).into(),
        direct: false,
        successor: false,
        read_only: false,
        serial: "root".into(),
        queues: 4,
    };
    let (backend, _frontend) = Backend::ready(EXECUTABLE, DeviceSpec::Blk(spec), 4);
    let closed = |milliseconds: u16| {
        let fd = std::os::fd::AsFd::as_fd(&reader);
        let mut fds = [nix::poll::PollFd::new(fd, nix::poll::PollFlags::POLLIN)];
        nix::poll::poll(&mut fds, milliseconds).unwrap() > 0
    };
    assert!(!closed(50));
    drop(backend);
    assert!(closed(10_000), "somebody holds the sentinel");
}
