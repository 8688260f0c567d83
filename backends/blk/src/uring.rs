//! One io_uring(7) per queue: transfers that are under way while the queue's thread does something else.
//!
//! The ring is made while the process is being set up and can do next to nothing afterwards: read, write and flush the
//! image. It takes registered files alone, of which there are two, and no other file, operation or registration
//! (IORING_REGISTER_RESTRICTIONS). The second file is the sentinel that tells `ozone` when the ring has come to its end:
//! the kernel finishes what was submitted even after the process is gone, and lets go of the files then.
//!
//! Memory that the kernel may still read or write stays where it is: a transfer is kept in a slot and not changed from its
//! submission to its completion. (The slots themselves may move: what the kernel knows of a transfer is not within it.)
#![allow(unsafe_code)]
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode};
use nix::errno::Errno;

use crate::bounce::Bounce;
use crate::image::{Alignment, Image};
use crate::transfer::{Step, Transfer, TransferError};

/// The most transfers under way.
const DEPTH: u32 = 128;

/// The most transfers under way that go through a bounce buffer.
const BOUNCES: usize = 8;

/// The most threads that the kernel starts for what it cannot do without waiting: for files, and for all else.
const WORKERS: [u32; 2] = [4, 1];

/// The registered files.
const IMAGE: Fixed = Fixed(0);

/// A transfer and what it is for.
struct Slot<T> {
    transfer: Transfer,
    tag: T,
}

/// A ring and what is under way in it. `T` is what the owner knows a transfer by.
pub struct Uring<T> {
    ring: IoUring,
    slots: Vec<Option<Slot<T>>>,
    free: Vec<usize>,
    alignment: Option<Alignment>,
    /// Bounce buffers made and not in use, and how many more may be made. The kernel knows their addresses while they are in
    /// use, so they stay in their boxes.
    #[allow(clippy::vec_box)]
    bounces: Vec<Box<Bounce>>,
    unmade: usize,
    /// Transfers that wait for one.
    waiting: VecDeque<usize>,
    /// How many the kernel has, or will have with the next submission.
    started: usize,
    completions: Vec<(u64, i32)>,
}

/// A transfer that has come to its end.
pub struct Ended<T> {
    /// The transfer.
    pub transfer: Transfer,
    /// What it is for.
    pub tag: T,
    /// How it ended.
    pub outcome: Result<(), TransferError>,
}

impl<T> Uring<T> {
    /// A ring on `image` that keeps `sentinel` open for as long as anything is under way.
    ///
    /// # Errors
    /// A kernel that has no io_uring with restrictions, or does not let this process have it.
    pub fn new(image: &Image, sentinel: BorrowedFd<'_>) -> io::Result<Self> {
        let ring = build()?;
        let submitter = ring.submitter();
        submitter.register_files(&[image.as_fd().as_raw_fd(), sentinel.as_raw_fd()])?;
        // Older kernels do not know this; their number of threads is bounded by the number of processors.
        let _ = submitter.register_iowq_max_workers(&mut WORKERS.clone());
        submitter.register_restrictions(&mut [
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()),
        ])?;
        submitter.register_enable_rings()?;
        Ok(Self {
            ring,
            slots: Vec::new(),
            free: Vec::new(),
            alignment: image.alignment(),
            bounces: Vec::new(),
            unmade: BOUNCES,
            waiting: VecDeque::new(),
            started: 0,
            completions: Vec::new(),
        })
    }

    /// Whether one more transfer may begin.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty() || self.slots.len() < usize::try_from(DEPTH).unwrap_or(0)
    }

    /// Whether nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Whether something waits to be submitted.
    pub fn is_pending(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    /// Begins a transfer that is not empty; [`submit`](Self::submit) tells the kernel of it. There has to be room.
    pub fn begin(&mut self, transfer: Transfer, tag: T) {
        let bounced = transfer.needs_bounce(self.alignment);
        let index = self.free.pop().unwrap_or(self.slots.len());
        let slot = Some(Slot { transfer, tag });
        match self.slots.get_mut(index) {
            Some(free) => *free = slot,
            None => self.slots.push(slot),
        }
        if bounced { self.bounce(index) } else { self.push(index) }
    }

    /// Starts a transfer through a bounce buffer, now or when one is free.
    fn bounce(&mut self, index: usize) {
        let bounce = match (self.bounces.pop(), self.alignment) {
            (Some(bounce), _) => bounce,
            (None, Some(alignment)) if self.unmade > 0 => {
                self.unmade = self.unmade.saturating_sub(1);
                Box::new(Bounce::new(alignment))
            }
            _ => return self.waiting.push_back(index),
        };
        if let Some(Some(slot)) = self.slots.get_mut(index) {
            slot.transfer.give(bounce);
            self.push(index);
        }
    }

    /// Queues the next step of the transfer in slot `index`, of which the kernel has no other.
    fn push(&mut self, index: usize) {
        let Some(Some(slot)) = self.slots.get(index) else { return };
        let entry = entry(&slot.transfer).user_data(index as u64);
        // SAFETY: the parts of the step lead into guest memory or a bounce buffer, and they and the array of them stay as
        // they are until the transfer is changed or dropped, wherever that moves. It is in its slot, and nothing but
        // `reap` changes it there, when the kernel has answered; the slots are given up after that alone (see `drop`).
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // There are as many entries as slots, and a slot has one of them at most: it cannot be full.
        if pushed.is_ok() {
            self.started = self.started.saturating_add(1);
        }
    }

    /// Tells the kernel of all that was begun.
    ///
    /// # Errors
    /// What io_uring_enter(2) answers: what was begun is told again the next time.
    pub fn submit(&mut self) -> nix::Result<()> {
        while self.is_pending() {
            self.enter(0)?;
        }
        Ok(())
    }

    /// Waits until something under way has come to its end, if anything is.
    ///
    /// # Errors
    /// As for [`submit`](Self::submit).
    pub fn wait(&mut self) -> nix::Result<()> {
        if self.started > 0 { self.enter(1) } else { Ok(()) }
    }

    fn enter(&mut self, completions: usize) -> nix::Result<()> {
        match self.ring.submit_and_wait(completions) {
            Ok(_) => Ok(()),
            Err(error) => match Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)) {
                Errno::EINTR => Ok(()),
                errno => Err(errno),
            },
        }
    }

    /// Takes what has come to its end. What takes another step waits to be submitted afterwards; what the kernel had no
    /// means for is carried out here by `otherwise`.
    pub fn reap(
        &mut self,
        ended: &mut Vec<Ended<T>>,
        mut otherwise: impl FnMut(&mut Transfer) -> Result<(), TransferError>,
    ) {
        let mut completions = std::mem::take(&mut self.completions);
        completions.extend(self.ring.completion().map(|completion| (completion.user_data(), completion.result())));
        for (index, result) in completions.drain(..) {
            let Ok(index) = usize::try_from(index) else { continue };
            let Some(Some(slot)) = self.slots.get_mut(index) else { continue };
            self.started = self.started.saturating_sub(1);
            let answer = usize::try_from(result).map_err(|_| Errno::from_raw(result.saturating_neg()));
            let outcome = match answer {
                // No thread for what has to wait (io_uring's answers, not the image's).
                Err(Errno::ECANCELED | Errno::EAGAIN) => Some(otherwise(&mut slot.transfer)),
                answer => slot.transfer.done(answer),
            };
            match outcome {
                None => self.push(index),
                Some(outcome) => ended.extend(self.end(index, outcome)),
            }
        }
        self.completions = completions;
    }

    /// Empties the slot of a transfer that the kernel has nothing of any more.
    fn end(&mut self, index: usize, outcome: Result<(), TransferError>) -> Option<Ended<T>> {
        let Slot { mut transfer, tag } = self.slots.get_mut(index)?.take()?;
        self.free.push(index);
        if let Some(bounce) = transfer.take() {
            self.bounces.push(bounce);
            if let Some(next) = self.waiting.pop_front() {
                self.bounce(next);
            }
        }
        Some(Ended { transfer, tag, outcome })
    }
}

impl<T> AsFd for Uring<T> {
    /// Readable while something has come to its end and was not taken.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns its descriptor and lives as long as this borrow.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl<T> Drop for Uring<T> {
    fn drop(&mut self) {
        let mut ended = Vec::new();
        while self.started > 0 {
            if self.wait().is_err() {
                // The kernel may still be writing there.
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
            self.reap(&mut ended, |_| Err(Errno::ECANCELED.into()));
        }
    }
}

/// A ring that does nothing yet. What only makes it faster is left out where the kernel does not know it.
fn build() -> io::Result<IoUring> {
    let make = |fast: bool| {
        let mut builder = IoUring::builder();
        builder.setup_r_disabled().dontfork();
        if fast {
            // The thread looks for completions itself: it need not be interrupted for them.
            builder.setup_coop_taskrun().setup_submit_all();
        }
        builder.build(DEPTH)
    };
    make(true).or_else(|error| if error.raw_os_error() == Some(libc::EINVAL) { make(false) } else { Err(error) })
}

fn entry(transfer: &Transfer) -> Entry {
    let length = |parts: &[libc::iovec]| u32::try_from(parts.len()).unwrap_or(0);
    let entry = match transfer.step() {
        Step::Read(parts, offset) => opcode::Readv::new(IMAGE, parts.as_ptr(), length(parts)).offset(offset).build(),
        Step::Write(parts, offset, flags) => {
            opcode::Writev::new(IMAGE, parts.as_ptr(), length(parts)).offset(offset).rw_flags(flags).build()
        }
        Step::Flush { everything } => {
            let flags = if everything { FsyncFlags::empty() } else { FsyncFlags::DATASYNC };
            opcode::Fsync::new(IMAGE).flags(flags).build()
        }
    };
    entry.flags(Flags::FIXED_FILE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transfer::Kind;
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;
    use virtio_backend::{Buffers, Memory};
    use vm_memory::{Bytes, GuestAddress};

    fn memory() -> Arc<Memory> {
        Arc::new(Memory::from_ranges(&[(GuestAddress(0), 0x100_0000)]).unwrap())
    }

    fn image() -> (Image, File) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        (Image::new(file.try_clone().unwrap().into(), false, false).unwrap(), file)
    }

    fn ring<T>(image: &Image) -> (Uring<T>, std::io::PipeReader) {
        let (reader, writer) = std::io::pipe().unwrap();
        (Uring::new(image, writer.as_fd()).unwrap(), reader)
    }

    fn buffers(memory: &Arc<Memory>, address: u64, length: usize) -> Buffers {
        let mut buffers = Buffers::new(Arc::clone(memory));
        buffers.push(GuestAddress(address), length).unwrap();
        buffers
    }

    /// Waits until nothing is under way; returns what came to its end.
    fn finish<T>(ring: &mut Uring<T>) -> Vec<Ended<T>> {
        let mut ended = Vec::new();
        while !ring.is_idle() {
            ring.submit().unwrap();
            ring.wait().unwrap();
            ring.reap(&mut ended, |_| panic!("the kernel had no thread"));
        }
        ended
    }

    #[test]
    fn transfers_of_all_kinds_come_to_their_end() {
        let ((image, file), memory) = (image(), memory());
        let (mut ring, _reader) = ring(&image);
        for n in 0..100_u64 {
            memory.write_slice(&[n.to_le_bytes()[0]; 512], GuestAddress(n * 512)).unwrap();
            let data = buffers(&memory, n * 512, 512);
            ring.begin(Transfer::new(Kind::Write { offset: n * 512, data, durable: n % 2 == 0 }), n);
        }
        assert!(!ring.is_idle() && ring.has_room());
        let mut tags: Vec<u64> = finish(&mut ring).into_iter().map(|it| it.outcome.map(|()| it.tag).unwrap()).collect();
        tags.sort_unstable();
        assert!(tags.into_iter().eq(0..100));
        for n in 0..100_u64 {
            let mut found = [0; 512];
            file.read_exact_at(&mut found, n * 512).unwrap();
            assert_eq!(found, [n.to_le_bytes()[0]; 512]);
        }
        ring.begin(Transfer::new(Kind::Flush { everything: true }), 0);
        ring.begin(Transfer::new(Kind::Flush { everything: false }), 1);
        let data = buffers(&memory, 0x80_0000, 4096);
        ring.begin(Transfer::new(Kind::Read { offset: 0, data }), 2);
        assert!(finish(&mut ring).iter().all(|it| it.outcome.is_ok()));
        assert_eq!(memory.read_obj::<[u8; 2]>(GuestAddress(0x80_0000 + 1023)).unwrap(), [1, 2]);
    }

    #[test]
    fn there_is_room_for_so_many() {
        let (image, _) = image();
        let (mut ring, _reader) = ring(&image);
        for n in 0..DEPTH {
            assert!(ring.has_room(), "{n}");
            ring.begin(Transfer::new(Kind::Flush { everything: false }), n);
        }
        assert!(!ring.has_room());
        assert_eq!(finish(&mut ring).len(), 128);
        assert!(ring.has_room());
    }

    #[test]
    fn more_parts_than_one_entry_takes_and_short_reads_are_continued() {
        let ((image, file), memory) = (image(), memory());
        file.write_all_at(&[7; 24_000], 0).unwrap();
        let (mut ring, _reader) = ring(&image);
        let mut data = Buffers::new(Arc::clone(&memory));
        (0..3000).for_each(|part| data.push(GuestAddress(part * 16), 8).unwrap());
        ring.begin(Transfer::new(Kind::Read { offset: 0, data }), ());
        assert!(finish(&mut ring)[0].outcome.is_ok());
        assert_eq!(memory.read_obj::<[u8; 9]>(GuestAddress(2999 * 16)).unwrap(), [7, 7, 7, 7, 7, 7, 7, 7, 0]);
        file.set_len(700).unwrap();
        let data = buffers(&memory, 0, 1024);
        ring.begin(Transfer::new(Kind::Read { offset: 0, data }), ());
        assert_eq!(finish(&mut ring)[0].outcome, Err(TransferError::Truncated));
    }

    #[test]
    fn many_bounced_transfers_share_few_buffers() {
        let ((mut image, file), memory) = (image(), memory());
        image.pretend(Alignment { address: 4096, place: 512 });
        file.write_all_at(&[9; 100 * 512], 0).unwrap();
        let (mut ring, _reader) = ring(&image);
        for n in 0..100_u64 {
            let data = buffers(&memory, 1 + n * 1024, 512);
            ring.begin(Transfer::new(Kind::Read { offset: n * 512, data }), n);
        }
        let ended = finish(&mut ring);
        assert_eq!((ended.len(), ring.bounces.len(), ring.unmade), (100, BOUNCES, 0));
        assert!(ended.iter().all(|it| it.outcome.is_ok()));
        assert_eq!(memory.read_obj::<[u8; 3]>(GuestAddress(99 * 1024 + 511)).unwrap(), [9, 9, 0]);
    }

    /// What the kernel answers to an entry that no transfer would lead to.
    fn answer(entry: &Entry) -> i32 {
        let (image, _) = image();
        let (mut ring, _reader) = ring::<()>(&image);
        // SAFETY: the operations of this test have no memory.
        unsafe { ring.ring.submission().push(entry).unwrap() };
        ring.ring.submit_and_wait(1).unwrap();
        ring.ring.completion().next().unwrap().result()
    }

    #[test]
    fn the_restrictions_hold() {
        assert_eq!(answer(&opcode::Fsync::new(IMAGE).build().flags(Flags::FIXED_FILE)), 0);
        let fixed = |entry: Entry| answer(&entry.flags(Flags::FIXED_FILE));
        assert_eq!(fixed(opcode::Nop::new().build()), -libc::EACCES);
        assert_eq!(fixed(opcode::Close::new(Fixed(1)).build()), -libc::EACCES);
        let path = c"/proc/self/exe".as_ptr();
        assert_eq!(answer(&opcode::OpenAt::new(io_uring::types::Fd(-1), path).build()), -libc::EACCES);
        assert_eq!(answer(&opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build()), -libc::EACCES);
        let (_, other) = image();
        let other = io_uring::types::Fd(other.as_raw_fd());
        assert_eq!(answer(&opcode::Fsync::new(other).build()), -libc::EACCES, "a file that is not registered");
        let (image, _) = image();
        let (ring, _reader) = ring::<()>(&image);
        let again = ring.ring.submitter().register_files_update(0, &[0]);
        assert_eq!(again.unwrap_err().raw_os_error(), Some(libc::EACCES));
    }

    #[test]
    fn the_sentinel_is_open_until_the_ring_is_gone() {
        let (image, _) = image();
        let (ring, reader) = ring::<()>(&image);
        let closed = |milliseconds| {
            let mut fds = [nix::poll::PollFd::new(reader.as_fd(), nix::poll::PollFlags::POLLIN)];
            nix::poll::poll(&mut fds, nix::poll::PollTimeout::from(milliseconds)).unwrap() > 0
        };
        assert!(!closed(20_u16));
        drop(ring);
        assert!(closed(10_000), "the ring holds the sentinel after its end");
    }
}
