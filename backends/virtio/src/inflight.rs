//! What of a queue is in flight, kept where it outlives this process (vhost-user specification, "Inflight I/O tracking").
//!
//! The core keeps the memory and hands it to the next process, which carries out once more what this one had taken and
//! not given back. Only split virtqueues are known here. A queue's part of the memory is a header of 16 bytes, `features
//! u64, version u16, desc_num u16, last_batch_head u16, used_idx u16`, and `desc_num` entries of 16 bytes, `inflight u8,
//! padding [u8; 5], next u16, counter u64`; parts begin at multiples of 64 bytes.
//!
//! **Order.** The process may be killed between any two stores. A store that a processor has carried out is seen by
//! whoever maps the memory afterwards, in whatever order it left that processor, and a kill is taken between two
//! instructions: so the order of the program is all that matters, and only the compiler could change it. Every store is
//! atomic and stands between two compiler fences ([`Tracker::put`]).
//!
//! **Trust.** The memory is shared with the core, and an earlier process wrote it that may have been taken over by its
//! guest. It is read when a queue starts and never again; what it says then is checked against the queue.
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering, compiler_fence};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{AtomicInteger, FileOffset, VolatileMemory};

use crate::descriptor;
use crate::ring::LARGEST;

/// Sizes in bytes.
const HEADER: usize = 16;
const ENTRY: usize = 16;
const ALIGNMENT: usize = 64;

/// Offsets in the header.
const FEATURES: usize = 0;
const VERSION: usize = 8;
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;

/// Offsets in an entry.
const INFLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// The only version there is; 0 is memory that no process has used.
const VERSION_1: u16 = 1;

/// An offset in a file that mmap(2) takes is a multiple of this, in bytes.
const PAGE: u64 = 4096;

/// Why memory for tracking was refused.
#[derive(Debug, thiserror::Error)]
pub enum InflightError {
    /// No queue, or more than there are.
    #[error("a region for {0} queues of {1}")]
    Queues(u16, usize),
    /// Not the size of a split virtqueue.
    #[error("a region for queues of {0} descriptors (a power of two up to {LARGEST} is expected)")]
    Size(u16),
    /// The kernel does not give it.
    #[error("make the region: {0}")]
    Make(std::io::Error),
    /// The descriptor cannot be asked.
    #[error("ask for the {0} of the region: {1}")]
    Ask(&'static str, Errno),
    /// The descriptor may shrink.
    #[error("the region is not sealed against shrinking")]
    Unsealed,
    /// It does not begin with a page.
    #[error("the region begins at {0:#x}, which is not a multiple of the page size")]
    Offset(u64),
    /// The queues do not fit.
    #[error("the region has {0} bytes, and the queues take {1}")]
    Short(u64, usize),
    /// The file ends before it.
    #[error("the region ends behind its file, which has {0} bytes")]
    Beyond(u64),
    /// The kernel refused to map it.
    #[error("map the region: {0}")]
    Map(String),
    /// The header of a queue is none that is known.
    #[error("queue {0}: features {1:#x}, version {2} and {3} entries are not known here")]
    Header(usize, u64, u16, u16),
    /// A queue that the region has no part for.
    #[error("the region has no part for queue {0} with {1} descriptors")]
    NoPart(usize, u16),
}

/// The state of a queue and what is recorded of it contradict each other: the driver or an earlier process has broken the
/// rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResumeError {
    /// Everything that was taken and is not in flight has been used.
    #[error("the used ring is at {used}, and the queue was to go on from {base}")]
    Base {
        /// What VHOST_USER_SET_VRING_BASE said.
        base: u16,
        /// What the used ring says.
        used: u16,
    },
    /// A batch larger than the queue.
    #[error("{0} requests cannot have been answered at once")]
    Batch(u16),
    /// The list of the last batch leads out of the queue, or in a circle.
    #[error("the list of what was answered last leads to descriptor {0}")]
    List(u16),
    /// More recorded in flight than the queue that was started has descriptors.
    #[error("descriptor {0} is recorded as in flight and outside of the queue")]
    Head(u16),
}

/// How the parts of the queues lie in the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    queues: u16,
    size: u16,
}

impl Layout {
    /// Parts for `queues` queues of `size` descriptors each, on a device that has `most` queues.
    ///
    /// # Errors
    /// [`InflightError::Queues`], [`InflightError::Size`].
    pub fn new(queues: u16, size: u16, most: usize) -> Result<Self, InflightError> {
        if !(1..=most).contains(&usize::from(queues)) {
            return Err(InflightError::Queues(queues, most));
        }
        if !size.is_power_of_two() || size > LARGEST {
            return Err(InflightError::Size(size));
        }
        Ok(Self { queues, size })
    }

    /// Bytes from one queue's part to the next: at most 16,448.
    fn stride(self) -> usize {
        ENTRY.saturating_mul(self.size.into()).saturating_add(HEADER).next_multiple_of(ALIGNMENT)
    }

    /// Bytes of all parts.
    pub fn bytes(self) -> usize {
        self.stride().saturating_mul(self.queues.into())
    }

    /// Makes memory that no process has used (VHOST_USER_GET_INFLIGHT_FD): it begins at the start of the file, and its
    /// size is sealed.
    ///
    /// # Errors
    /// [`InflightError::Make`].
    pub fn make(self) -> Result<File, InflightError> {
        let make = || {
            let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
            let mut file = File::from(memfd_create(c"inflight", flags)?);
            // Not by ftruncate(2), with which the process could cut the image off.
            file.write_all(&vec![0; self.bytes()])?;
            let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
            fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(seals))?;
            Ok(file)
        };
        make().map_err(InflightError::Make)
    }
}

/// The memory of all queues, mapped.
#[derive(Debug)]
pub struct Inflight {
    layout: Layout,
    region: MmapRegion,
}

impl Inflight {
    /// Maps what the core sent (VHOST_USER_SET_INFLIGHT_FD): `length` bytes from `offset` on.
    ///
    /// # Errors
    /// [`InflightError`]: what could shrink, does not fit, or is of another kind.
    pub fn map(file: File, length: u64, offset: u64, layout: Layout) -> Result<Self, InflightError> {
        descriptor::close_on_exec(&file).map_err(|errno| InflightError::Ask("flags", errno))?;
        let seals = fcntl(file.as_fd(), FcntlArg::F_GET_SEALS).map_err(|errno| InflightError::Ask("seals", errno))?;
        if !SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK) {
            return Err(InflightError::Unsealed);
        }
        if !offset.is_multiple_of(PAGE) {
            return Err(InflightError::Offset(offset));
        }
        let bytes = layout.bytes();
        if length < bytes as u64 {
            return Err(InflightError::Short(length, bytes));
        }
        let status = descriptor::status(file.as_fd()).map_err(|errno| InflightError::Ask("size", errno))?;
        let size = u64::try_from(status.st_size).unwrap_or(0);
        if offset.checked_add(length).is_none_or(|end| end > size) {
            return Err(InflightError::Beyond(size));
        }
        let region = MmapRegionBuilder::new(bytes)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::new(file, offset))
            .build()
            .map_err(|error| InflightError::Map(error.to_string()))?;
        let inflight = Self { layout, region };
        (0..layout.queues.into()).try_for_each(|index| inflight.check(index))?;
        Ok(inflight)
    }

    /// The part of queue `index`, which is to be started with `size` descriptors.
    ///
    /// # Errors
    /// [`InflightError::NoPart`], [`InflightError::Header`].
    pub fn part(self: &Arc<Self>, index: usize, size: u16) -> Result<Part, InflightError> {
        if index >= self.layout.queues.into() || size > self.layout.size {
            return Err(InflightError::NoPart(index, size));
        }
        self.check(index)?;
        let start = index.saturating_mul(self.layout.stride());
        Ok(Part { inflight: Arc::clone(self), start, size })
    }

    fn check(&self, index: usize) -> Result<(), InflightError> {
        let start = index.saturating_mul(self.layout.stride());
        let features: u64 = self.get::<AtomicU64>(start.saturating_add(FEATURES));
        let version: u16 = self.get::<AtomicU16>(start.saturating_add(VERSION));
        let entries: u16 = self.get::<AtomicU16>(start.saturating_add(DESC_NUM));
        match (features, version, entries) {
            // Whatever else it says: a process that began to use it may have ended before the version, which it stores last.
            (_, 0, _) => Ok(()),
            (0, VERSION_1, entries) if entries == self.layout.size => Ok(()),
            _ => Err(InflightError::Header(index, features, version, entries)),
        }
    }

    /// Every offset is within the mapping, which has room for `layout`, and aligned: the fall-back is never taken.
    fn get<T: AtomicInteger>(&self, offset: usize) -> T::V
    where
        T::V: Default,
    {
        self.region.get_atomic_ref::<T>(offset).map_or_else(|_| T::V::default(), |place| place.load(Ordering::Acquire))
    }
}

/// The part of one queue, before the queue is started.
#[derive(Debug)]
pub struct Part {
    inflight: Arc<Inflight>,
    start: usize,
    size: u16,
}

impl Part {
    /// Begins where the used ring, at index `used`, has got to; `base` is where the core said that the queue goes on.
    /// Returns what records from now on, and the heads of the chains that an earlier process had taken and not given
    /// back, in the order in which it took them.
    ///
    /// # Errors
    /// [`ResumeError`].
    pub fn resume(self, base: u16, used: u16) -> Result<(Tracker, Vec<u16>), ResumeError> {
        if base != used {
            return Err(ResumeError::Base { base, used });
        }
        let mut tracker = Tracker { part: self, counter: 0, last_batch_head: 0 };
        if tracker.part.header::<AtomicU16>(VERSION) == 0 {
            tracker.begin(used);
            return Ok((tracker, Vec::new()));
        }
        tracker.finish_last_batch(used)?;
        let mut heads = tracker.part.in_flight()?;
        // Equal counters are no order at all; any will do.
        heads.sort_unstable();
        tracker.counter = heads.last().map_or(0, |&(counter, _)| counter.wrapping_add(1));
        Ok((tracker, heads.into_iter().map(|(_, head)| head).collect()))
    }

    fn header<T: AtomicInteger>(&self, field: usize) -> T::V
    where
        T::V: Default,
    {
        self.inflight.get::<T>(self.start.saturating_add(field))
    }

    fn place(&self, head: u16, field: usize) -> usize {
        let entry = ENTRY.saturating_mul(head.into());
        self.start.saturating_add(HEADER).saturating_add(entry).saturating_add(field)
    }

    fn entry<T: AtomicInteger>(&self, head: u16, field: usize) -> T::V
    where
        T::V: Default,
    {
        self.inflight.get::<T>(self.place(head, field))
    }

    /// Counters and heads of all that is in flight.
    fn in_flight(&self) -> Result<Vec<(u64, u16)>, ResumeError> {
        let mut heads = Vec::new();
        for head in 0..self.inflight.layout.size {
            if self.entry::<AtomicU8>(head, INFLIGHT) == 0 {
                continue;
            }
            if head >= self.size {
                return Err(ResumeError::Head(head));
            }
            heads.push((self.entry::<AtomicU64>(head, COUNTER), head));
        }
        Ok(heads)
    }
}

/// Records what a started queue has in flight. Heads are those of chains that were walked, so they are in the queue.
#[derive(Debug)]
pub struct Tracker {
    part: Part,
    /// The next chain's number.
    counter: u64,
    /// The same as in the memory, which is not read again.
    last_batch_head: u16,
}

impl Tracker {
    /// Makes memory that no process has used the record of a queue with nothing in flight. The version comes last: until
    /// then it stays unused.
    fn begin(&mut self, used: u16) {
        for head in 0..self.part.inflight.layout.size {
            self.put_entry::<AtomicU8>(head, INFLIGHT, 0);
        }
        self.put::<AtomicU64>(self.part.start.saturating_add(FEATURES), 0);
        self.put_header(LAST_BATCH_HEAD, 0);
        self.put_header(USED_IDX, used);
        self.put_header(DESC_NUM, self.part.inflight.layout.size);
        self.put_header(VERSION, VERSION_1);
    }

    /// Finishes what an earlier process was about when it ended: chains that the driver has been given back are not in
    /// flight, even if it did not come to record that. What it had not published counts as not done.
    fn finish_last_batch(&mut self, used: u16) -> Result<(), ResumeError> {
        let part = &self.part;
        let head = part.header::<AtomicU16>(LAST_BATCH_HEAD);
        let count = used.wrapping_sub(part.header::<AtomicU16>(USED_IDX));
        if count > part.size {
            return Err(ResumeError::Batch(count));
        }
        let mut batch: Vec<u16> = Vec::with_capacity(count.into());
        let mut next = head;
        for _ in 0..count {
            if next >= part.size || batch.contains(&next) {
                return Err(ResumeError::List(next));
            }
            batch.push(next);
            next = part.entry::<AtomicU16>(next, NEXT);
        }
        self.last_batch_head = if head < part.size { head } else { 0 };
        batch.into_iter().for_each(|head| self.put_entry::<AtomicU8>(head, INFLIGHT, 0));
        self.put_header(USED_IDX, used);
        Ok(())
    }

    /// A chain was taken from the available ring.
    pub fn taken(&mut self, head: u16) {
        self.put_entry::<AtomicU64>(head, COUNTER, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.put_entry::<AtomicU8>(head, INFLIGHT, 1);
    }

    /// A chain was put back as if it had never been taken.
    pub fn put_back(&mut self, head: u16) {
        self.put_entry::<AtomicU8>(head, INFLIGHT, 0);
    }

    /// A chain is about to be published as used: for each chain of a batch before the first of them is.
    pub fn about_to_publish(&mut self, head: u16) {
        self.put_entry::<AtomicU16>(head, NEXT, self.last_batch_head);
        self.put_header(LAST_BATCH_HEAD, head);
        self.last_batch_head = head;
    }

    /// The chains of a batch have been published: the index of the used ring is `used` now.
    pub fn published(&mut self, heads: impl Iterator<Item = u16>, used: u16) {
        heads.for_each(|head| self.put_entry::<AtomicU8>(head, INFLIGHT, 0));
        self.put_header(USED_IDX, used);
    }

    fn put_entry<T: AtomicInteger>(&self, head: u16, field: usize, value: T::V) {
        self.put::<T>(self.part.place(head, field), value);
    }

    fn put_header(&self, field: usize, value: u16) {
        self.put::<AtomicU16>(self.part.start.saturating_add(field), value);
    }

    /// Stores neither before what precedes it nor after what follows it: see the order in the module's documentation.
    ///
    /// Offsets are within the mapping as in [`Inflight::get`].
    fn put<T: AtomicInteger>(&self, offset: usize, value: T::V) {
        if let Ok(place) = self.part.inflight.region.get_atomic_ref::<T>(offset) {
            compiler_fence(Ordering::SeqCst);
            place.store(value, Ordering::Release);
            compiler_fence(Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod tests {
    use super::*;

    const SIZE: u16 = 8;

    fn layout() -> Layout {
        Layout::new(2, SIZE, 2).unwrap()
    }

    fn map(file: &File) -> Result<Arc<Inflight>, InflightError> {
        let layout = layout();
        Inflight::map(file.try_clone().unwrap(), layout.bytes() as u64, 0, layout).map(Arc::new)
    }

    /// What is recorded of queue 1, in a file that can be looked at and written to.
    struct Record(File);

    impl Record {
        fn new() -> Self {
            Self(layout().make().unwrap())
        }

        fn resume(&self, used: u16) -> Result<(Tracker, Vec<u16>), ResumeError> {
            map(&self.0).unwrap().part(1, SIZE).unwrap().resume(used, used)
        }

        fn at(head: u16, field: usize) -> u64 {
            (layout().stride() + HEADER + ENTRY * usize::from(head) + field) as u64
        }

        fn put(&self, offset: u64, bytes: &[u8]) {
            std::os::unix::fs::FileExt::write_all_at(&self.0, bytes, offset).unwrap();
        }

        fn put_header(&self, field: usize, value: u16) {
            self.put((layout().stride() + field) as u64, &value.to_ne_bytes());
        }

        fn header(&self, field: usize) -> u16 {
            let mut bytes = [0; 2];
            let offset = (layout().stride() + field) as u64;
            std::os::unix::fs::FileExt::read_exact_at(&self.0, &mut bytes, offset).unwrap();
            u16::from_ne_bytes(bytes)
        }
    }

    #[test]
    fn the_layout_is_that_of_the_specification() {
        assert_eq!(Layout::new(1, 1, 1).unwrap().bytes(), 64);
        assert_eq!(Layout::new(1, 256, 1).unwrap().bytes(), 16 + 16 * 256 + 48);
        assert_eq!(Layout::new(16, 1024, 16).unwrap().bytes(), 16 * 16_448);
        let record = Record::new();
        let (mut tracker, _) = record.resume(9).unwrap();
        tracker.taken(3);
        tracker.taken(5);
        tracker.about_to_publish(5);
        tracker.published(std::iter::once(5), 10);
        let mut found = [0; 16 + 8 * 16];
        std::os::unix::fs::FileExt::read_exact_at(&record.0, &mut found, 192).unwrap();
        assert_eq!(found[..16], [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 8, 0, 5, 0, 10, 0]);
        assert_eq!(found[16 + 3 * 16..][..16], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(found[16 + 5 * 16..][..16], [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn what_was_taken_and_not_given_back_comes_again_in_order() {
        let record = Record::new();
        let (mut tracker, none) = record.resume(u16::MAX).unwrap();
        assert!(none.is_empty());
        [4, 2, 7, 0, 1].into_iter().for_each(|head| tracker.taken(head));
        tracker.put_back(1);
        tracker.about_to_publish(2);
        tracker.published(std::iter::once(2), 0);
        drop(tracker);
        let (mut tracker, heads) = record.resume(0).unwrap();
        assert_eq!(heads, [4, 7, 0]);
        tracker.taken(1);
        drop(tracker);
        assert_eq!(record.resume(0).unwrap().1, [4, 7, 0, 1]);
    }

    #[test]
    fn a_batch_that_was_published_is_committed_and_one_that_was_not_is_rolled_back() {
        for published in [false, true] {
            let record = Record::new();
            let (mut tracker, _) = record.resume(7).unwrap();
            (0..6).for_each(|head| tracker.taken(head));
            [1, 4, 2].into_iter().for_each(|head| tracker.about_to_publish(head));
            drop(tracker);
            let (used, expected) = if published { (10, vec![0, 3, 5]) } else { (7, vec![0, 1, 2, 3, 4, 5]) };
            assert_eq!(record.resume(used).unwrap().1, expected);
            assert_eq!(record.resume(used).unwrap().1, expected, "once more, after an end right then");
            assert_eq!(record.header(USED_IDX), used);
        }
    }

    #[test]
    fn a_batch_committed_in_part_is_committed_in_whole() {
        let record = Record::new();
        let (mut tracker, _) = record.resume(0).unwrap();
        (0..4).for_each(|head| tracker.taken(head));
        // One batch that came to nothing, and another with the same head first: its list goes in a circle.
        tracker.about_to_publish(3);
        [3, 1, 0].into_iter().for_each(|head| tracker.about_to_publish(head));
        tracker.put_entry::<AtomicU8>(3, INFLIGHT, 0);
        drop(tracker);
        assert_eq!(record.resume(3).unwrap().1, [2]);
    }

    #[test]
    fn a_used_ring_that_contradicts_the_record_is_refused() {
        let record = Record::new();
        drop(record.resume(100).unwrap());
        assert_eq!(record.resume(109).unwrap_err(), ResumeError::Batch(9));
        assert_eq!(record.resume(99).unwrap_err(), ResumeError::Batch(u16::MAX));
        let part = map(&record.0).unwrap().part(1, SIZE).unwrap();
        assert_eq!(part.resume(101, 100).unwrap_err(), ResumeError::Base { base: 101, used: 100 });
    }

    #[test]
    fn lists_and_heads_that_lead_nowhere_are_refused() {
        let record = Record::new();
        let (mut tracker, _) = record.resume(0).unwrap();
        [1, 2].into_iter().for_each(|head| tracker.taken(head));
        [1, 2].into_iter().for_each(|head| tracker.about_to_publish(head));
        drop(tracker);
        record.put(Record::at(2, NEXT), &2_u16.to_ne_bytes());
        assert_eq!(record.resume(2).unwrap_err(), ResumeError::List(2), "a circle");
        record.put(Record::at(2, NEXT), &SIZE.to_ne_bytes());
        assert_eq!(record.resume(2).unwrap_err(), ResumeError::List(SIZE));
        record.put_header(LAST_BATCH_HEAD, u16::MAX);
        assert_eq!(record.resume(2).unwrap_err(), ResumeError::List(u16::MAX));
        assert_eq!(record.resume(0).unwrap().1, [1, 2], "with no batch to finish the list says nothing");
        let part = map(&record.0).unwrap().part(1, 2).unwrap();
        assert_eq!(part.resume(0, 0).unwrap_err(), ResumeError::Head(2), "the queue is smaller than it was");
    }

    #[test]
    fn counters_may_be_anything() {
        let record = Record::new();
        drop(record.resume(0).unwrap());
        for head in 0..SIZE {
            record.put(Record::at(head, INFLIGHT), &[0xff]);
            record.put(Record::at(head, COUNTER), &u64::MAX.to_ne_bytes());
        }
        let (mut tracker, heads) = record.resume(0).unwrap();
        assert_eq!(heads, (0..SIZE).collect::<Vec<_>>(), "each once");
        tracker.taken(0);
    }

    #[test]
    fn whatever_the_memory_says_every_head_comes_once_at_most() {
        let mut state = 1_u64;
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for _ in 0..2000 {
            let record = Record::new();
            drop(record.resume(0).unwrap());
            let small = |value: u64| u16::try_from(value % 10).unwrap();
            record.put_header(LAST_BATCH_HEAD, small(random()));
            record.put_header(USED_IDX, small(random()));
            for head in 0..SIZE {
                let words = [random() & 0x0009_0000_0000_0001, random() % 4].map(u64::to_ne_bytes);
                record.put(Record::at(head, INFLIGHT), words.as_flattened());
            }
            if let Ok((mut tracker, heads)) = record.resume(small(random())) {
                let mut once = heads.clone();
                once.sort_unstable();
                once.dedup();
                assert!(once.len() == heads.len() && once.iter().all(|&head| head < SIZE), "{heads:?}");
                once.iter().for_each(|&head| tracker.about_to_publish(head));
            }
        }
    }

    #[test]
    fn memory_of_another_kind_is_refused() {
        for (field, value) in [(FEATURES, 1), (VERSION, 2), (DESC_NUM, 0), (DESC_NUM, SIZE + 1)] {
            let record = Record::new();
            drop(record.resume(0).unwrap());
            record.put_header(field, value);
            assert!(matches!(map(&record.0), Err(InflightError::Header(1, ..))), "{field}: {value}");
        }
    }

    #[test]
    fn a_process_that_ended_before_it_had_begun_leaves_memory_that_is_unused() {
        // Any part of what precedes the version, and what no process of this kind stores there.
        let stores = [(LAST_BATCH_HEAD, 3), (USED_IDX, 9), (DESC_NUM, SIZE), (DESC_NUM, SIZE + 1), (FEATURES, 1)];
        for (field, value) in stores {
            let record = Record::new();
            record.put_header(field, value);
            record.put(Record::at(5, INFLIGHT), &[1]);
            let (mut tracker, heads) = record.resume(9).unwrap();
            assert!(heads.is_empty(), "{field}: {value}");
            tracker.taken(2);
            drop(tracker);
            assert_eq!(record.resume(9).unwrap().1, [2], "{field}: {value}");
        }
    }

    #[test]
    fn sizes_offsets_and_seals_are_checked() {
        let layout = layout();
        let bytes = layout.bytes() as u64;
        let whole = layout.make().unwrap();
        let map = |file: &File, length, offset| Inflight::map(file.try_clone().unwrap(), length, offset, layout);
        assert!(matches!(map(&whole, bytes - 1, 0), Err(InflightError::Short(..))));
        assert!(matches!(map(&whole, 0, 0), Err(InflightError::Short(..))));
        assert!(matches!(map(&whole, bytes + 1, 0), Err(InflightError::Beyond(_))));
        assert!(matches!(map(&whole, u64::MAX, 0), Err(InflightError::Beyond(_))));
        assert!(matches!(map(&whole, bytes, 1), Err(InflightError::Offset(1))));
        assert!(matches!(map(&whole, bytes, 4096), Err(InflightError::Beyond(_))));
        assert!(matches!(map(&whole, bytes, u64::MAX - 4095), Err(InflightError::Beyond(_))));
        assert!(whole.set_len(bytes - 1).is_err() && whole.set_len(bytes + 1).is_err(), "it is sealed");
        let unsealed = File::from(memfd_create(c"bad", MFdFlags::MFD_ALLOW_SEALING).unwrap());
        unsealed.set_len(bytes).unwrap();
        assert!(matches!(map(&unsealed, bytes, 0), Err(InflightError::Unsealed)));
        assert!(matches!(map(&File::open("/dev/zero").unwrap(), bytes, 0), Err(InflightError::Ask("seals", _))));
        let inflight = Arc::new(map(&whole, bytes, 0).unwrap());
        assert!(matches!(inflight.part(2, SIZE), Err(InflightError::NoPart(2, SIZE))));
        assert!(matches!(inflight.part(0, 2 * SIZE), Err(InflightError::NoPart(0, 16))));
    }

    #[test]
    fn impossible_layouts_are_refused() {
        for queues in [0, 3, u16::MAX] {
            assert!(matches!(Layout::new(queues, 8, 2), Err(InflightError::Queues(..))));
        }
        for size in [0, 3, 2048, u16::MAX] {
            assert!(matches!(Layout::new(1, size, 1), Err(InflightError::Size(_))));
        }
    }
}
