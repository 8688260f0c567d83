//! One descriptor chain of a split virtqueue (virtio 1.2, section 2.7), walked once and checked whole.
//!
//! virtio-queue's own iterator ends silently where a chain goes wrong, so that a broken chain looks like a shorter one.
//! Here it is an error.
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::sync::Arc;

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress};

use crate::buffers::Buffers;
use crate::memory::Memory;

/// The most descriptors in a chain, as the largest queue has.
pub const LONGEST: u32 = 1024;

/// Size of a descriptor in bytes (virtio 1.2, section 2.7.5).
const DESCRIPTOR: u32 = 16;

/// The rules of section 2.7 that a chain can break.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A descriptor's index is not in its table.
    #[error("descriptor {0} is outside of its table")]
    Index(u16),
    /// More descriptors than the table has, so there is a loop, or more than [`LONGEST`].
    #[error("the chain has a loop or is too long")]
    Loop,
    /// A descriptor table is not guest memory.
    #[error("the descriptor table at {0:#x} is not in guest memory")]
    Table(u64),
    /// A buffer is not guest memory.
    #[error("a buffer of {1} bytes at {0:#x} is not in guest memory")]
    Buffer(u64, u32),
    /// An indirect table within an indirect table, or one with a successor (section 2.7.5.3.1).
    #[error("an indirect descriptor is not the last, or within an indirect table")]
    Indirect,
    /// An indirect table's length is not a positive multiple of 16, or it has too many.
    #[error("an indirect descriptor table of {0} bytes")]
    IndirectLength(u32),
    /// A device-readable buffer follows a device-writable one (section 2.7.4.2).
    #[error("a readable buffer follows a writable one")]
    Order,
    /// More than 2^32 bytes (section 2.7.5.2).
    #[error("the chain has more than 2^32 bytes")]
    Bytes,
}

/// A request: what the device reads, and what it writes.
#[derive(Debug)]
pub struct Chain {
    /// The index by which the driver knows it.
    pub head: u16,
    /// Device-readable buffers, as one sequence.
    pub readable: Buffers,
    /// Device-writable buffers, as one sequence.
    pub writable: Buffers,
}

impl Chain {
    /// Walks the chain that begins with descriptor `head` of the table of `size` descriptors at `table`.
    ///
    /// # Errors
    /// [`ChainError`].
    pub fn walk(memory: &Arc<Memory>, table: GuestAddress, size: u16, head: u16) -> Result<Self, ChainError> {
        let mut readable = Buffers::new(Arc::clone(memory));
        let mut writable = Buffers::new(Arc::clone(memory));
        let (mut table, mut size, mut indirect) = (table, u32::from(size), false);
        let (mut index, mut count, mut bytes) = (head, 0_u32, 0_u32);
        loop {
            if u32::from(index) >= size {
                return Err(ChainError::Index(index));
            }
            if count >= size.min(LONGEST) {
                return Err(ChainError::Loop);
            }
            count = count.saturating_add(1);
            let place = u64::from(index).saturating_mul(DESCRIPTOR.into());
            let descriptor = table
                .checked_add(place)
                .and_then(|place| memory.read_obj::<Descriptor>(place).ok())
                .ok_or(ChainError::Table(table.0))?;
            let length = descriptor.len();
            if descriptor.refers_to_indirect_table() {
                if indirect || descriptor.has_next() {
                    return Err(ChainError::Indirect);
                }
                let entries = length / DESCRIPTOR;
                if length % DESCRIPTOR != 0 || !(1..=u32::from(u16::MAX)).contains(&entries) {
                    return Err(ChainError::IndirectLength(length));
                }
                (table, size, indirect) = (descriptor.addr(), entries, true);
                (index, count) = (0, 0);
                continue;
            }
            bytes = bytes.checked_add(length).ok_or(ChainError::Bytes)?;
            let target = if descriptor.is_write_only() {
                &mut writable
            } else if writable.is_empty() {
                &mut readable
            } else {
                return Err(ChainError::Order);
            };
            let outside = ChainError::Buffer(descriptor.addr().0, length);
            target.push(descriptor.addr(), usize::try_from(length).map_err(|_| outside)?).map_err(|_| outside)?;
            if !descriptor.has_next() {
                return Ok(Self { head, readable, writable });
            }
            index = descriptor.next();
        }
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod tests {
    use super::*;

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    const TABLE: u64 = 0x1000;

    /// 64 KiB of guest memory with a descriptor table of `(address, length, flags, next)`.
    fn memory(table: u64, descriptors: &[(u64, u32, u16, u16)]) -> Arc<Memory> {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        put(&memory, table, descriptors);
        Arc::new(memory)
    }

    fn put(memory: &Memory, table: u64, descriptors: &[(u64, u32, u16, u16)]) {
        for (index, &(address, length, flags, next)) in descriptors.iter().enumerate() {
            let place = GuestAddress(table + 16 * index as u64);
            memory.write_obj(Descriptor::new(address, length, flags, next), place).unwrap();
        }
    }

    fn walk(memory: &Arc<Memory>, size: u16, head: u16) -> Result<(usize, usize), ChainError> {
        Chain::walk(memory, GuestAddress(TABLE), size, head).map(|c| (c.readable.len(), c.writable.len()))
    }

    #[test]
    fn a_direct_chain_is_its_buffers_in_order() {
        let memory = memory(
            TABLE,
            &[(0x4000, 16, NEXT, 2), (0, 0, 0, 0), (0x5000, 0x200, NEXT | WRITE, 3), (0x6000, 1, WRITE, 0)],
        );
        assert_eq!(walk(&memory, 4, 0), Ok((16, 0x201)));
    }

    #[test]
    fn an_indirect_chain_may_follow_direct_buffers() {
        let memory = memory(TABLE, &[(0x4000, 16, NEXT, 1), (0x2000, 32, INDIRECT, 0)]);
        put(&memory, 0x2000, &[(0x5000, 4, NEXT, 1), (0x6000, 8, WRITE, 0)]);
        assert_eq!(walk(&memory, 2, 0), Ok((20, 8)));
    }

    #[test]
    fn loops_end() {
        let direct = memory(TABLE, &[(0x4000, 1, NEXT, 1), (0x4000, 1, NEXT, 0)]);
        assert_eq!(walk(&direct, 2, 0), Err(ChainError::Loop));
        let itself = memory(TABLE, &[(0x4000, 1, NEXT, 0)]);
        assert_eq!(walk(&itself, 256, 0), Err(ChainError::Loop));
        let indirect = memory(TABLE, &[(0x2000, 32, INDIRECT, 0)]);
        put(&indirect, 0x2000, &[(0x4000, 1, NEXT, 1), (0x4000, 1, NEXT, 0)]);
        assert_eq!(walk(&indirect, 4, 0), Err(ChainError::Loop));
    }

    #[test]
    fn indexes_outside_of_a_table_are_refused() {
        let memory = memory(TABLE, &[(0x4000, 1, NEXT, 9), (0x2000, 16, INDIRECT, 0)]);
        assert_eq!(walk(&memory, 4, 4), Err(ChainError::Index(4)));
        assert_eq!(walk(&memory, 4, 0), Err(ChainError::Index(9)));
        put(&memory, 0x2000, &[(0x4000, 1, NEXT, 1)]);
        assert_eq!(walk(&memory, 4, 1), Err(ChainError::Index(1)));
    }

    #[test]
    fn malformed_indirect_descriptors_are_refused() {
        for length in [0, 8, 17, 16 * 0x10000] {
            let memory = memory(TABLE, &[(0x2000, length, INDIRECT, 0)]);
            assert_eq!(walk(&memory, 4, 0), Err(ChainError::IndirectLength(length)));
        }
        let nested = memory(TABLE, &[(0x2000, 16, INDIRECT, 0)]);
        put(&nested, 0x2000, &[(0x3000, 16, INDIRECT, 0)]);
        assert_eq!(walk(&nested, 4, 0), Err(ChainError::Indirect));
        let continued = memory(TABLE, &[(0x2000, 16, INDIRECT | NEXT, 1)]);
        assert_eq!(walk(&continued, 4, 0), Err(ChainError::Indirect));
        let outside = memory(TABLE, &[(u64::MAX - 15, 16, INDIRECT, 0)]);
        assert_eq!(walk(&outside, 4, 0), Err(ChainError::Table(u64::MAX - 15)));
    }

    #[test]
    fn buffers_outside_of_guest_memory_are_refused() {
        for (address, length) in [(0x10000, 1), (0xffff, 2), (u64::MAX, 1), (u64::MAX - 1, 4), (0, u32::MAX)] {
            let memory = memory(TABLE, &[(address, length, 0, 0)]);
            assert_eq!(walk(&memory, 4, 0), Err(ChainError::Buffer(address, length)));
        }
    }

    #[test]
    fn readable_after_writable_and_too_many_bytes_are_refused() {
        let order = memory(TABLE, &[(0x4000, 1, WRITE | NEXT, 1), (0x4000, 1, 0, 0)]);
        assert_eq!(walk(&order, 4, 0), Err(ChainError::Order));
        let large = memory(TABLE, &[(0, 0x8000, NEXT, 1), (0, u32::MAX, 0, 0)]);
        assert_eq!(walk(&large, 4, 0), Err(ChainError::Bytes));
    }
}
