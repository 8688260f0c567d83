//! A buffer that lies as O_DIRECT wants it, for requests whose own do not.
//!
//! A request larger than [`CHUNK`] goes through it piece by piece.
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use libc::iovec;
use virtio_backend::Buffers;

use crate::image::Alignment;
use crate::transfer::{Kind, TransferError};

/// The most bytes that go through at once: a multiple of every alignment.
const CHUNK: usize = 128 * 1024;

/// Memory of this process, and the part of it that the kernel is asked to fill or to write.
#[derive(Debug)]
pub struct Bounce {
    memory: Box<[u8]>,
    /// Where the aligned part of `memory` begins.
    first: usize,
    /// Of places in the image and of lengths.
    place: usize,
    part: iovec,
    offset: u64,
    /// Of a read, how many bytes in front of what is wanted the part has.
    skip: usize,
}

// SAFETY: `part` leads into `memory`, which moves with it and belongs to no thread.
#[allow(unsafe_code)]
unsafe impl Send for Bounce {}

impl Bounce {
    /// A buffer for an image that wants `alignment`.
    pub fn new(alignment: Alignment) -> Self {
        let memory = vec![0; CHUNK.saturating_add(alignment.address)].into_boxed_slice();
        let first = memory.as_ptr().align_offset(alignment.address);
        let part = iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        Self { memory, first, place: alignment.place, part, offset: 0, skip: 0 }
    }

    /// The part that the kernel is asked to fill or to write.
    pub fn parts(&self) -> &[iovec] {
        std::slice::from_ref(&self.part)
    }

    /// Where in the image it belongs.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The first `length` bytes that lie as they should.
    fn bytes(&mut self, length: usize) -> &mut [u8] {
        let end = self.first.saturating_add(length);
        self.memory.get_mut(self.first..end).unwrap_or_default()
    }

    /// Makes the first `length` bytes the part, for `offset` in the image.
    fn set(&mut self, offset: u64, length: usize) {
        let bytes = self.bytes(length);
        self.part = iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        self.offset = offset;
    }

    /// Makes the blocks around `length` bytes at `offset` the part, as far as there is room; returns how many bytes in
    /// front of `offset` they have.
    pub fn enclose(&mut self, offset: u64, length: usize) -> usize {
        let before = offset.checked_rem(self.place as u64).unwrap_or(0);
        let skip = usize::try_from(before).unwrap_or(0);
        let length = skip.saturating_add(length).min(CHUNK);
        self.set(offset.saturating_sub(before), length.next_multiple_of(self.place));
        skip
    }

    /// Puts what `data` begins with over the blocks of [`enclose`](Self::enclose), from `skip` on, and makes all of them
    /// the part again; returns how many bytes went in.
    pub fn overlay(&mut self, skip: usize, data: &mut Buffers) -> usize {
        let length = skip.saturating_add(data.len()).min(CHUNK);
        let blocks = length.next_multiple_of(self.place);
        let count = data.read(self.bytes(length).get_mut(skip..).unwrap_or_default());
        // The part has been used up by reading: it ends where the blocks do.
        self.set(self.offset.saturating_sub(blocks as u64), blocks);
        count
    }

    /// Goes on behind the first `count` bytes of the part; whether nothing is left.
    pub fn advance(&mut self, count: usize) -> bool {
        let count = count.min(self.part.iov_len);
        self.part.iov_base = self.part.iov_base.wrapping_byte_add(count);
        self.part.iov_len = self.part.iov_len.saturating_sub(count);
        self.offset = self.offset.saturating_add(count as u64);
        self.part.iov_len == 0
    }

    /// Begins the next piece of a transfer. A write is of whole blocks.
    pub fn prepare(&mut self, kind: &mut Kind) {
        match kind {
            Kind::Read { offset, data } => self.skip = self.enclose(*offset, data.len()),
            Kind::Write { offset, data, .. } => {
                let length = data.len().min(CHUNK);
                let count = data.read(self.bytes(length));
                self.set(*offset, count);
                *offset = offset.saturating_add(count as u64);
            }
            Kind::Flush { .. } => {}
        }
    }

    /// The kernel has filled or written `count` bytes of the part, at least one; whether the transfer is finished.
    ///
    /// # Errors
    /// [`TransferError::Truncated`] if the image ends in front of what was to be read.
    pub fn done(&mut self, kind: &mut Kind, count: usize) -> Result<bool, TransferError> {
        match kind {
            Kind::Read { offset, data } => {
                let (end, skip) = (count.min(self.part.iov_len), self.skip);
                let filled = self.bytes(end).get(skip..).unwrap_or_default();
                if filled.is_empty() {
                    return Err(TransferError::Truncated);
                }
                *offset = offset.saturating_add(data.write(filled) as u64);
                if data.is_empty() {
                    return Ok(true);
                }
            }
            Kind::Write { data, .. } => {
                if !self.advance(count) {
                    return Ok(false);
                }
                if data.is_empty() {
                    return Ok(true);
                }
            }
            Kind::Flush { .. } => return Ok(true),
        }
        self.prepare(kind);
        Ok(false)
    }
}
