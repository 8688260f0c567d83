//! The buffers of one request in guest memory, and every way in which their bytes are read or written.
//!
//! The kernel reads and writes them through their addresses in this process, with no copy. Every write, the kernel's
//! included, is recorded in the dirty bitmap of its region, here and nowhere else: who hands addresses to the kernel
//! ([`Buffers::parts`]) says what came of it ([`Buffers::filled`]). (Rings are written through
//! [`Bytes`](vm_memory::Bytes), which does the same.)
//!
//! A guest may change its memory at any time, so bytes are copied out once and then looked at.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use libc::iovec;
use nix::errno::Errno;
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion, Permissions,
    VolatileSlice,
};

use crate::memory::Dirty;

/// The most parts that one system call takes (UIO_MAXIOV).
pub const PARTS: usize = 1024;

/// A sequence of bytes in guest memory that gets shorter at its front as it is read or written.
#[derive(Debug)]
pub struct Buffers<B: Bitmap = Dirty> {
    memory: Arc<GuestMemoryMmap<B>>,
    /// Parts of the mappings of `memory`; those before `first` are used up.
    parts: Vec<iovec>,
    first: usize,
    length: usize,
}

// SAFETY: the pointers lead into shared mappings, which `memory` keeps alive and which are accessed only by volatile
// copies and by the kernel; nothing about them belongs to a thread.
unsafe impl<B: Bitmap + Send + Sync> Send for Buffers<B> {}

impl<B: Bitmap> Buffers<B> {
    /// No bytes yet.
    pub fn new(memory: Arc<GuestMemoryMmap<B>>) -> Self {
        Self { memory, parts: Vec::new(), first: 0, length: 0 }
    }

    /// Adds `length` bytes at `address`.
    ///
    /// # Errors
    /// If not all of them are guest memory.
    pub fn push(&mut self, address: GuestAddress, length: usize) -> Result<(), GuestMemoryError> {
        for slice in GuestMemory::get_slices(self.memory.as_ref(), address, length, Permissions::ReadWrite)? {
            let slice = slice?;
            self.parts.push(iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
            self.length = self.length.saturating_add(slice.len());
        }
        Ok(())
    }

    /// Bytes left.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether no bytes are left.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Cuts the sequence after `at` bytes and returns what follows.
    pub fn split_off(&mut self, at: usize) -> Self {
        let mut rest = Self::new(Arc::clone(&self.memory));
        let mut keep = at;
        let mut kept = self.first;
        while let Some(part) = self.parts.get_mut(kept) {
            // Nothing of a part stays an empty part, which O_DIRECT would not like where it lies.
            if keep == 0 {
                break;
            }
            if part.iov_len > keep {
                // SAFETY: `keep` is less than the part's length, so the sum is an address within the part.
                let start = unsafe { part.iov_base.byte_add(keep) };
                rest.parts.push(iovec { iov_base: start, iov_len: part.iov_len.saturating_sub(keep) });
                part.iov_len = keep;
                kept = kept.saturating_add(1);
                break;
            }
            keep = keep.saturating_sub(part.iov_len);
            kept = kept.saturating_add(1);
        }
        rest.parts.extend(self.parts.drain(kept.min(self.parts.len())..));
        rest.length = self.length.saturating_sub(at);
        self.length = self.length.min(at);
        rest
    }

    /// Copies bytes out of guest memory, from the front, and returns how many.
    pub fn read(&mut self, mut into: &mut [u8]) -> usize {
        let mut copied = 0_usize;
        for part in self.left() {
            // SAFETY: a part is a range of a mapping that `memory` keeps alive.
            let slice = unsafe { VolatileSlice::new(part.iov_base.cast(), part.iov_len) };
            let count = slice.copy_to(into);
            copied = copied.saturating_add(count);
            into = into.get_mut(count..).unwrap_or_default();
            if into.is_empty() {
                break;
            }
        }
        self.advance(copied);
        copied
    }

    /// Copies bytes into guest memory, from the front, and returns how many.
    pub fn write(&mut self, mut from: &[u8]) -> usize {
        let mut copied = 0_usize;
        for part in self.left() {
            let count = part.iov_len.min(from.len());
            let (now, later) = from.split_at(count);
            // SAFETY: a part is a range of a mapping that `memory` keeps alive.
            unsafe { VolatileSlice::new(part.iov_base.cast(), part.iov_len) }.copy_from(now);
            copied = copied.saturating_add(count);
            from = later;
            if from.is_empty() {
                break;
            }
        }
        self.written(copied);
        copied
    }

    /// What of it one system call can take: at most [`PARTS`] parts. They stay where they are, and lead into guest memory,
    /// until this is changed or dropped.
    pub fn parts(&self) -> &[iovec] {
        let left = self.left();
        left.get(..PARTS).unwrap_or(left)
    }

    /// Whether every part begins at a multiple of `address` in this process and has a multiple of `length` bytes.
    pub fn is_aligned(&self, address: usize, length: usize) -> bool {
        let is = |part: &iovec| (part.iov_base as usize).is_multiple_of(address) && part.iov_len.is_multiple_of(length);
        self.left().iter().all(is)
    }

    /// The kernel has filled the first `count` bytes: records that, and goes on behind them.
    pub fn filled(&mut self, count: usize) {
        self.written(count);
    }

    /// The kernel has taken the first `count` bytes: goes on behind them.
    pub fn taken(&mut self, count: usize) {
        self.advance(count);
    }

    /// Writes all that is left as one packet by writev(2).
    ///
    /// # Errors
    /// What writev(2) answers, and E2BIG for more than [`PARTS`] parts.
    pub fn send(&mut self, packets: BorrowedFd<'_>) -> nix::Result<usize> {
        let parts = self.left();
        if parts.len() > PARTS {
            return Err(Errno::E2BIG);
        }
        // SAFETY: every part is a range of a mapping that `memory` keeps alive for the call.
        let count = unsafe { libc::writev(packets.as_raw_fd(), parts.as_ptr(), count_of(parts)) };
        let count = length(count)?;
        self.advance(count);
        Ok(count)
    }

    fn left(&self) -> &[iovec] {
        self.parts.get(self.first..).unwrap_or_default()
    }

    /// Records that the first `count` bytes have been written, and goes on behind them.
    fn written(&mut self, count: usize) {
        let mut left = count;
        for part in self.left() {
            let now = part.iov_len.min(left);
            mark(&self.memory, part.iov_base as usize, now);
            left = left.saturating_sub(now);
            if left == 0 {
                break;
            }
        }
        self.advance(count);
    }

    fn advance(&mut self, count: usize) {
        let mut left = count.min(self.length);
        self.length = self.length.saturating_sub(left);
        while let Some(part) = self.parts.get_mut(self.first) {
            if part.iov_len > left {
                // SAFETY: `left` is less than the part's length, so the sum is an address within the part.
                part.iov_base = unsafe { part.iov_base.byte_add(left) };
                part.iov_len = part.iov_len.saturating_sub(left);
                break;
            }
            left = left.saturating_sub(part.iov_len);
            self.first = self.first.saturating_add(1);
        }
    }
}

/// Records a write of `length` bytes at `start` in this process.
fn mark<B: Bitmap>(memory: &GuestMemoryMmap<B>, start: usize, length: usize) {
    for region in memory.iter() {
        let offset = start.wrapping_sub(region.as_ptr() as usize);
        if offset < region.size() {
            region.bitmap().mark_dirty(offset, length);
            return;
        }
    }
}

/// Receives one packet by readv(2): first into `header`, then into several buffers in their order, and then into
/// `spare`; returns the packet's length, as far as there was room. `scratch` only saves an allocation.
///
/// # Errors
/// What readv(2) answers, and E2BIG for more than [`PARTS`] parts.
pub fn receive<'b, B: Bitmap + 'b>(
    packets: BorrowedFd<'_>,
    header: &mut [u8],
    buffers: impl Iterator<Item = &'b mut Buffers<B>>,
    spare: &mut [u8],
    scratch: &mut Scratch,
) -> nix::Result<usize> {
    let parts = &mut scratch.0;
    parts.clear();
    parts.push(iovec { iov_base: header.as_mut_ptr().cast(), iov_len: header.len() });
    let mut filled: Vec<&mut Buffers<B>> = Vec::with_capacity(1);
    for buffer in buffers {
        parts.extend_from_slice(buffer.left());
        filled.push(buffer);
    }
    parts.push(iovec { iov_base: spare.as_mut_ptr().cast(), iov_len: spare.len() });
    if parts.len() > PARTS {
        return Err(Errno::E2BIG);
    }
    // SAFETY: every part but the first and the last is a range of a mapping that its buffer keeps alive for the call; those
    // two are the whole of slices that this function has for itself.
    let count = unsafe { libc::readv(packets.as_raw_fd(), parts.as_ptr(), count_of(parts)) };
    parts.clear();
    let count = length(count)?;
    let mut left = count.saturating_sub(header.len());
    for buffer in filled {
        let now = buffer.length.min(left);
        buffer.written(now);
        left = left.saturating_sub(now);
    }
    Ok(count)
}

/// Room for the arguments of [`receive`], kept from call to call. It is empty in between.
#[derive(Debug, Default)]
pub struct Scratch(Vec<iovec>);

// SAFETY: it is empty whenever nobody is in `receive`.
unsafe impl Send for Scratch {}

fn count_of(parts: &[iovec]) -> i32 {
    i32::try_from(parts.len()).unwrap_or(i32::MAX)
}

fn length(answer: isize) -> nix::Result<usize> {
    usize::try_from(Errno::result(answer)?).map_err(|_| Errno::EIO)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use vm_memory::Bytes;
    use vm_memory::bitmap::AtomicBitmap;

    type Tracked = Arc<GuestMemoryMmap<AtomicBitmap>>;

    /// Two adjacent regions of 64 KiB with a page-sized bitmap each.
    fn memory() -> Tracked {
        let ranges = [(GuestAddress(0), 0x10000), (GuestAddress(0x10000), 0x10000)];
        Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
    }

    fn dirty(memory: &Tracked) -> Vec<u64> {
        let dirty = |address: &u64| {
            let (region, offset) = memory.to_region_addr(GuestAddress(*address)).unwrap();
            region.bitmap().dirty_at(usize::try_from(offset.0).unwrap())
        };
        (0..32).map(|page| page * 0x1000).filter(dirty).collect()
    }

    fn buffers(memory: &Tracked, parts: &[(u64, usize)]) -> Buffers<AtomicBitmap> {
        let mut buffers = Buffers::new(Arc::clone(memory));
        parts.iter().for_each(|&(address, length)| buffers.push(GuestAddress(address), length).unwrap());
        buffers
    }

    #[test]
    fn copies_cross_parts_and_regions_and_are_recorded() {
        let memory = memory();
        let mut target = buffers(&memory, &[(0x100, 3), (0xfffe, 4)]);
        assert_eq!(target.len(), 7);
        assert_eq!(target.write(b"abcdefgh"), 7);
        assert!(target.is_empty());
        assert_eq!(dirty(&memory), [0, 0xf000, 0x10000]);
        let mut text = [0; 8];
        assert_eq!(buffers(&memory, &[(0x100, 3), (0xfffe, 4)]).read(&mut text), 7);
        assert_eq!(&text[..7], b"abcdefg");
    }

    #[test]
    fn the_kernels_writes_are_recorded_as_far_as_they_went() {
        let memory = memory();
        let mut target = buffers(&memory, &[(0x1000, 4), (0x3000, 4), (0x5000, 0x2000)]);
        target.filled(8);
        assert_eq!(dirty(&memory), [0x1000, 0x3000]);
        assert_eq!((target.len(), target.parts().len()), (0x2000, 1));
        target.filled(0);
        assert_eq!(dirty(&memory), [0x1000, 0x3000]);
    }

    #[test]
    fn what_the_kernel_takes_is_not_recorded() {
        let memory = memory();
        let mut source = buffers(&memory, &[(0x2000, 2), (0x2002, 3)]);
        source.taken(3);
        assert_eq!((source.len(), source.parts().first().map(|part| part.iov_len)), (2, Some(2)));
        assert!(dirty(&memory).is_empty());
    }

    #[test]
    fn one_call_takes_so_many_parts() {
        let memory = memory();
        let mut many = buffers(&memory, &[(0x100, 8); PARTS + 1]);
        assert_eq!(many.parts().len(), PARTS);
        many.taken(PARTS * 8);
        assert_eq!((many.parts().len(), many.len()), (1, 8));
    }

    #[test]
    fn alignment_is_that_of_every_part_that_is_left() {
        let memory = memory();
        let mut buffers = buffers(&memory, &[(0x101, 0xff), (0x1000, 0x200), (0x2200, 0x400)]);
        assert!(!buffers.is_aligned(512, 512));
        buffers.taken(0xff);
        assert!(buffers.is_aligned(512, 512));
        assert!(!buffers.is_aligned(4096, 512));
        assert!(!buffers.is_aligned(512, 1024));
    }

    #[test]
    fn a_split_keeps_both_sides() {
        let memory = memory();
        memory.write_slice(b"abcdef", GuestAddress(0)).unwrap();
        for at in 0..=6 {
            let mut front = buffers(&memory, &[(0, 2), (2, 2), (4, 2)]);
            let mut back = front.split_off(at);
            let (mut first, mut second) = ([0; 6], [0; 6]);
            assert_eq!((front.read(&mut first), back.read(&mut second)), (at, 6 - at));
            assert_eq!([&first[..at], &second[..6 - at]].concat(), b"abcdef");
            let mut front = buffers(&memory, &[(0, 2), (2, 2), (4, 2)]);
            let back = front.split_off(at);
            assert!(front.parts().iter().chain(back.parts()).all(|part| part.iov_len > 0), "no part is empty");
        }
    }

    #[test]
    fn addresses_outside_of_memory_are_refused() {
        let mut target = Buffers::new(memory());
        assert!(target.push(GuestAddress(0x1fff0), 0x11).is_err());
        assert!(target.push(GuestAddress(u64::MAX), 2).is_err());
    }

    #[test]
    fn a_packet_fills_buffers_in_order_and_then_the_spare_room() {
        let memory = memory();
        let (reader, writer) = nix::unistd::pipe().unwrap();
        nix::unistd::write(&writer, b"0123456789").unwrap();
        let mut targets = [buffers(&memory, &[(0x1000, 4)]), buffers(&memory, &[(0x2000, 4)])];
        let mut spare = [0; 4];
        let mut header = [0; 1];
        let count = receive(reader.as_fd(), &mut header, targets.iter_mut(), &mut spare, &mut Scratch::default());
        assert_eq!((count, &header, &spare[..1]), (Ok(10), b"0", &b"9"[..]));
        assert_eq!(dirty(&memory), [0x1000, 0x2000]);
    }
}
