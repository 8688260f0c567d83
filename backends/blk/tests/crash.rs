//! Disks that die in the middle of requests, over and over, and a driver that must not notice.
//!
//! The driver keeps so many writes in flight, one per block at most, each with a number that goes into every 8 bytes of
//! its block. Whenever the process dies, the next takes over, as core and supervisor have it do. At any such moment a
//! block has the last write that was acknowledged, or the one in flight, and in the end the last; no request is answered
//! twice, and none is forgotten.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::io::PipeReader;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};
use protocol::{BlkSpec, DeviceSpec, FromBackend};
use virtio_backend::testing::{
    Backend, DEADLINE, Frontend, Guest, Queue, Record, WRITE, crash_points, enable_from, negotiate,
};

const EXECUTABLE: &str = env!("CARGO_BIN_EXE_ozone-blk");

const OUT: u32 = 1;
const EVENT_IDX: u64 = 1 << 29;
const INDIRECT_DESC: u64 = 1 << 28;

/// Descriptors of a queue: three for each of 64 writes.
const SIZE: u16 = 256;
const BLOCK: usize = 4096;
const BLOCKS: u64 = 1024;

/// Memory of one write: header, status at 0x100, an indirect table at 0x200, the block at 0x1000.
const PLACE: u64 = 0x2000;

/// A small generator of numbers that look random (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// Where the writes of a queue are.
struct Lane {
    queue: Queue,
    /// What each place has in flight: block and number.
    flights: Vec<Option<(u64, u64)>>,
    free: Vec<usize>,
}

struct Machine {
    guest: Guest,
    lanes: Vec<Lane>,
    indirect: bool,
    image: tempfile::NamedTempFile,
    direct: bool,
    /// System calls that the host answers with EPERM.
    denied: &'static [i64],
    record: Option<Record>,
    /// Of each block, the last write that was acknowledged.
    acknowledged: Vec<u64>,
    busy: Vec<bool>,
    number: u64,
    random: Random,
    incarnations: u32,
}

/// One process that serves the machine.
struct Incarnation {
    backend: Backend,
    _frontend: Frontend,
    sentinel: PipeReader,
}

impl Machine {
    fn new(queues: usize, depth: usize, indirect: bool, direct: bool) -> Self {
        let guest = Guest::new(16 << 20);
        let lane = |index| Lane {
            queue: Queue::new(&guest, index, SIZE),
            flights: vec![None; depth],
            free: (0..depth).collect(),
        };
        let lanes = (0..queues).map(lane).collect();
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(BLOCKS * BLOCK as u64).unwrap();
        let count = usize::try_from(BLOCKS).unwrap();
        Self {
            guest,
            lanes,
            indirect,
            image,
            direct,
            denied: &[],
            record: None,
            acknowledged: vec![0; count],
            busy: vec![false; count],
            number: 0,
            random: Random(0x9e37_79b9_7f4a_7c15 ^ (queues * 1000 + depth) as u64),
            incarnations: 0,
        }
    }

    /// What core and supervisor do: a process, its set-up with what the last one left, and a kick for every queue.
    fn attach(&mut self, executable: &str, serial: &str) -> Incarnation {
        let flags = if self.direct { libc::O_DIRECT } else { 0 };
        let image = File::options().read(true).write(true).custom_flags(flags).open(self.image.path()).unwrap();
        let (sentinel, writer) = std::io::pipe().unwrap();
        let queues = u16::try_from(self.lanes.len()).unwrap();
        let spec = BlkSpec {
            image: OwnedFd::from(image).into(),
            sentinel: OwnedFd::from(writer).into(),
            direct: self.direct,
            successor: self.incarnations > 0,
            read_only: false,
            serial: serial.into(),
            queues,
        };
        self.incarnations += 1;
        let (backend, mut frontend) =
            Backend::ready_denied(executable, DeviceSpec::Blk(spec), queues.into(), self.denied);
        let features = negotiate(&mut frontend, &self.guest, EVENT_IDX);
        assert_eq!(features & INDIRECT_DESC == 0, serial.ends_with("-d"), "{serial}: what is offered");
        let record = self.record.get_or_insert_with(|| Record::get(&mut frontend, queues, SIZE));
        // A process that dies in the middle of this is no failure: the next one goes on.
        let mut enable = || {
            record.set(&mut frontend)?;
            for lane in &self.lanes {
                let used = lane.queue.used_index(&self.guest);
                enable_from(&mut frontend, &lane.queue, used)?;
                lane.queue.kick.write(1)?;
            }
            Ok::<(), Box<dyn std::error::Error>>(())
        };
        if let Err(error) = enable() {
            assert!(serial != "root", "the set-up was refused: {error}");
        }
        Incarnation { backend, _frontend: frontend, sentinel }
    }

    fn place(&self, lane: usize, slot: usize) -> u64 {
        Guest::FREE + PLACE * (lane * self.lanes[lane].flights.len() + slot) as u64
    }

    /// Offers a write of a block that has none in flight, if there is room for one.
    fn offer(&mut self, lane: usize) -> bool {
        let Some(slot) = self.lanes[lane].free.pop() else { return false };
        let block = loop {
            let block = self.random.below(BLOCKS);
            if !std::mem::replace(&mut self.busy[usize::try_from(block).unwrap()], true) {
                break block;
            }
        };
        self.number += 1;
        let place = self.place(lane, slot);
        let sector = block * BLOCK as u64 / 512;
        let header = [&OUT.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        self.guest.put(place, &header);
        self.guest.put(place + 0x100, &[0xee]);
        self.guest.put(place + 0x1000, &self.number.to_le_bytes().repeat(BLOCK / 8));
        let half = u32::try_from(BLOCK / 2).unwrap();
        let parts = [(place, 16, 0), (place + 0x1000, 2 * half, 0), (place + 0x100, 1, WRITE)];
        let Lane { queue, flights, .. } = &mut self.lanes[lane];
        flights[slot] = Some((block, self.number));
        let head = 3 * u16::try_from(slot).unwrap();
        if self.indirect {
            queue.send_indirect(&self.guest, head, place + 0x200, &parts);
        } else {
            queue.send(&self.guest, head, &parts);
        }
        true
    }

    /// Takes what was answered; how many.
    fn reap(&mut self) -> usize {
        let mut count = 0;
        for lane in 0..self.lanes.len() {
            while let Some((head, written)) = self.lanes[lane].queue.poll(&self.guest) {
                let slot = usize::try_from(head / 3).unwrap();
                let flight = self.lanes[lane].flights.get_mut(slot).and_then(Option::take);
                let (block, number) = flight.unwrap_or_else(|| panic!("head {head} was answered and not in flight"));
                assert_eq!((head % 3, written), (0, 1));
                assert_eq!(self.guest.get(self.place(lane, slot) + 0x100, 1), [0], "the status of write {number}");
                let block = usize::try_from(block).unwrap();
                self.acknowledged[block] = number;
                self.busy[block] = false;
                self.lanes[lane].free.push(slot);
                count += 1;
            }
        }
        count
    }

    fn in_flight(&self) -> usize {
        self.lanes.iter().map(|lane| lane.flights.len() - lane.free.len()).sum()
    }

    fn rest(&self) {
        let calls = self.lanes.iter().map(|lane| &lane.queue.call);
        // SAFETY: the eventfds live as long as the lanes.
        let fds = calls.clone().map(|call| borrowed(call));
        let mut fds: Vec<PollFd<'_>> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        nix::poll::poll(&mut fds, 5_u16).unwrap();
        calls.for_each(|call| drop(call.read()));
    }

    /// Writes until the process ends, as it was told to or because it is killed after `patience`.
    fn write_until_the_end(&mut self, incarnation: &mut Incarnation, patience: Option<Duration>) {
        let begun = Instant::now();
        let mut killed = false;
        while incarnation.backend.ended().is_none() {
            assert!(begun.elapsed() < DEADLINE, "it goes on and on with {} in flight", self.in_flight());
            for lane in 0..self.lanes.len() {
                while self.offer(lane) {}
            }
            if self.reap() == 0 {
                self.rest();
            }
            if !killed && patience.is_some_and(|patience| begun.elapsed() >= patience) {
                incarnation.backend.kill();
                killed = true;
            }
        }
    }

    /// Waits until nothing of a dead process is under way, and looks at what it left.
    fn drain(&mut self, incarnation: &Incarnation) {
        let mut closed = [PollFd::new(incarnation.sentinel.as_fd(), PollFlags::POLLIN)];
        let milliseconds = u16::try_from(DEADLINE.as_millis()).unwrap();
        assert_eq!(nix::poll::poll(&mut closed, milliseconds).unwrap(), 1, "the sentinel stays open");
        self.reap();
        self.look();
    }

    /// Lets all that is in flight come to its end.
    fn finish(&mut self) {
        let begun = Instant::now();
        while self.in_flight() > 0 {
            assert!(begun.elapsed() < DEADLINE, "{} requests were lost", self.in_flight());
            if self.reap() == 0 {
                self.rest();
            }
        }
        self.look();
    }

    /// Every block has the last write that was acknowledged, or a later one in flight.
    fn look(&self) {
        let mut later = vec![0; self.acknowledged.len()];
        for (block, number) in self.lanes.iter().flat_map(|lane| lane.flights.iter().flatten()) {
            later[usize::try_from(*block).unwrap()] = *number;
        }
        let mut bytes = vec![0; usize::try_from(BLOCKS).unwrap() * BLOCK];
        self.image.as_file().read_exact_at(&mut bytes, 0).unwrap();
        for (block, words) in bytes.chunks(BLOCK).enumerate() {
            let (last, later) = (self.acknowledged[block], later[block]);
            for word in words.chunks(8) {
                let found = u64::from_le_bytes(word.try_into().unwrap());
                assert!(
                    found == last || (later > 0 && found == later),
                    "block {block} has write {found}; {last} was acknowledged, and {later} is in flight"
                );
            }
        }
    }
}

fn borrowed(event: &vmm_sys_util::eventfd::EventFd) -> std::os::fd::BorrowedFd<'_> {
    use std::os::fd::AsRawFd;
    #[allow(unsafe_code)]
    // SAFETY: the eventfd lives as long as the borrow.
    unsafe {
        std::os::fd::BorrowedFd::borrow_raw(event.as_raw_fd())
    }
}

/// How many requests an ended process says that it carried out once more.
fn resubmitted(incarnation: &Incarnation) -> u32 {
    let mut count = 0;
    while let Ok(message) = incarnation.backend.control.try_receive() {
        let FromBackend::Resubmitted { requests } = message else { panic!("another message: {message:?}") };
        count += requests;
    }
    count
}

fn executable() -> &'static str {
    static PATH: OnceLock<String> = OnceLock::new();
    PATH.get_or_init(|| crash_points("ozone-blk"))
}

/// Dies at `point` several times with so many queues, writes in flight and kinds of descriptors, at another passage each
/// time, then comes to its end in order.
fn dies_at(point: &str, most: u64) {
    let mut again = 0;
    for (queues, depth, indirect) in
        [1, 4].into_iter().flat_map(|q| [1, 8, 64].into_iter().flat_map(move |d| [false, true].map(|i| (q, d, i))))
    {
        // Half of it past the page cache, where requests come to their end in any order.
        let mut machine = Machine::new(queues, depth, indirect, queues == 4);
        for death in 0..4 {
            let passage = if death == 0 { 1 } else { 1 + machine.random.below(most) };
            let serial = format!("cp-{point}-{passage}{}", if indirect { "" } else { "-d" });
            let before = machine.in_flight();
            let mut incarnation = machine.attach(executable(), &serial);
            machine.write_until_the_end(&mut incarnation, None);
            let status = incarnation.backend.ended().unwrap();
            assert_eq!(status.code(), Some(137), "{serial}, {queues} queues, depth {depth}");
            machine.drain(&incarnation);
            let count = resubmitted(&incarnation);
            assert!(usize::try_from(count).unwrap() <= before, "{count} of {before} were in flight");
            again += count;
        }
        let incarnation = machine.attach(EXECUTABLE, "root");
        machine.finish();
        again += resubmitted(&incarnation);
    }
    assert!(again > 0, "nothing was ever carried out again");
}

#[test]
fn after_a_request_was_taken() {
    dies_at("fetch", 100);
}

#[test]
fn after_the_host_has_done_its_part() {
    dies_at("io", 20);
}

#[test]
fn after_a_used_element_was_written() {
    dies_at("element", 100);
}

#[test]
fn after_the_used_index_was_written() {
    dies_at("index", 20);
}

#[test]
fn after_the_record_was_written() {
    dies_at("commit", 20);
}

#[test]
fn killed_at_any_time() {
    let forbidden: &[i64] = &[libc::SYS_io_uring_setup];
    for (queues, indirect, denied) in [(1, true, &[][..]), (4, false, &[]), (2, true, forbidden)] {
        let mut machine = Machine::new(queues, 32, indirect, true);
        machine.denied = denied;
        for _ in 0..12 {
            let patience = Duration::from_micros(machine.random.below(12_000));
            let mut incarnation = machine.attach(EXECUTABLE, "root");
            machine.write_until_the_end(&mut incarnation, Some(patience));
            machine.drain(&incarnation);
        }
        let _incarnation = machine.attach(EXECUTABLE, "root");
        machine.finish();
    }
}
