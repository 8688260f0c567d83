//! A virtio-blk request (virtio 1.2, section 5.2.6): from a descriptor chain to what is to be done.
//!
//! Nothing is assumed of how the driver divides a request among descriptors (section 2.7.4): the header is the first 16
//! readable bytes, the status the last writable one, and the data what is between.
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use virtio_backend::{Buffers, Chain, RingError};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};

/// Size of a sector in bytes, whatever the disk's block size is (section 5.2.6).
pub const SECTOR: u64 = 512;

/// The outcome of a request (section 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok,
    /// The device or the driver made an error.
    IoError,
    /// The device knows no such request.
    Unsupported,
}

impl From<Status> for u8 {
    fn from(status: Status) -> u8 {
        let code = match status {
            Status::Ok => VIRTIO_BLK_S_OK,
            Status::IoError => VIRTIO_BLK_S_IOERR,
            Status::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        u8::try_from(code).unwrap_or(u8::MAX)
    }
}

/// What is to be done.
#[derive(Debug)]
pub enum Operation {
    /// Fill `data` from byte `offset` of the disk.
    Read {
        /// Bytes from the disk's start; the end of `data` is within the disk.
        offset: u64,
        /// Where to: a multiple of [`SECTOR`].
        data: Buffers,
    },
    /// Write `data` at byte `offset` of the disk.
    Write {
        /// Bytes from the disk's start; the end of `data` is within the disk.
        offset: u64,
        /// Where from: a multiple of [`SECTOR`].
        data: Buffers,
    },
    /// Make every completed write durable.
    Flush,
    /// Fill `data` with the disk's serial number.
    GetId {
        /// Where to.
        data: Buffers,
    },
    /// Nothing but answer this.
    Refuse(Status),
}

/// A request and where its answer goes.
#[derive(Debug)]
pub struct Request {
    /// The head of its chain.
    pub head: u16,
    /// What is to be done.
    pub operation: Operation,
    /// The status byte.
    status: Buffers,
    /// Writable bytes in front of the status byte.
    writable: usize,
}

impl Request {
    /// Reads the request that `chain` is, for a disk of `capacity` bytes.
    ///
    /// # Errors
    /// [`RingError::NoAnswer`] for a chain without a byte for the status.
    pub fn parse(chain: Chain, capacity: u64) -> Result<Self, RingError> {
        let Chain { head, mut readable, writable: mut data } = chain;
        let writable = data.len().checked_sub(1).ok_or(RingError::NoAnswer(head))?;
        let status = data.split_off(writable);
        let mut header = [0; 16];
        let operation = if readable.read(&mut header) == header.len() {
            operation(header, readable, data, capacity)
        } else {
            Operation::Refuse(Status::IoError)
        };
        Ok(Self { head, operation, status, writable })
    }

    /// Answers: writes the status and returns how many bytes the device has written, for the used ring.
    pub fn answer(mut self, status: Status) -> u32 {
        self.status.write(&[status.into()]);
        // Only bytes from the first writable one on without a gap count (section 2.7.8.2).
        let written = match status {
            Status::Ok => self.writable.saturating_add(1),
            _ if self.writable == 0 => 1,
            _ => 0,
        };
        u32::try_from(written).unwrap_or(u32::MAX)
    }
}

fn operation(header: [u8; 16], readable: Buffers, writable: Buffers, capacity: u64) -> Operation {
    let [t0, t1, t2, t3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    match u32::from_le_bytes([t0, t1, t2, t3]) {
        VIRTIO_BLK_T_IN => match offset(sector, writable.len(), capacity) {
            Some(offset) if readable.is_empty() => Operation::Read { offset, data: writable },
            _ => Operation::Refuse(Status::IoError),
        },
        VIRTIO_BLK_T_OUT => match offset(sector, readable.len(), capacity) {
            Some(offset) if writable.is_empty() => Operation::Write { offset, data: readable },
            _ => Operation::Refuse(Status::IoError),
        },
        VIRTIO_BLK_T_FLUSH => Operation::Flush,
        VIRTIO_BLK_T_GET_ID if writable.len() <= VIRTIO_BLK_ID_BYTES as usize => Operation::GetId { data: writable },
        VIRTIO_BLK_T_GET_ID => Operation::Refuse(Status::IoError),
        _ => Operation::Refuse(Status::Unsupported),
    }
}

/// Where on the disk `length` bytes from `sector` on begin, if they are whole sectors and within it.
fn offset(sector: u64, length: usize, capacity: u64) -> Option<u64> {
    let length = u64::try_from(length).ok()?;
    let offset = sector.checked_mul(SECTOR)?;
    let end = offset.checked_add(length)?;
    (length.is_multiple_of(SECTOR) && end <= capacity).then_some(offset)
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use virtio_backend::Memory;
    use vm_memory::{Bytes, GuestAddress};

    const CAPACITY: u64 = 64 * SECTOR;
    const STATUS: u64 = 0xf000;

    fn header(kind: u32, sector: u64) -> Vec<u8> {
        [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
    }

    /// A chain whose readable bytes are `readable`, divided into parts of `part` bytes, followed by `writable` bytes that
    /// end with the status byte.
    fn chain(readable: &[u8], part: usize, writable: usize) -> (Arc<Memory>, Chain) {
        let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap());
        let mut chain =
            Chain { head: 5, readable: Buffers::new(Arc::clone(&memory)), writable: Buffers::new(Arc::clone(&memory)) };
        for (index, bytes) in readable.chunks(part).enumerate() {
            let address = GuestAddress(0x1000 + 2 * (index * part) as u64);
            memory.write_slice(bytes, address).unwrap();
            chain.readable.push(address, bytes.len()).unwrap();
        }
        for index in 0..writable as u64 {
            let address = GuestAddress(STATUS - 3 * (writable as u64 - 1 - index));
            chain.writable.push(address, 1).unwrap();
        }
        memory.write_obj(0xff_u8, GuestAddress(STATUS)).unwrap();
        (memory, chain)
    }

    fn parse(readable: &[u8], writable: usize) -> Request {
        Request::parse(chain(readable, 7, writable).1, CAPACITY).unwrap()
    }

    fn refused(request: &Request) -> Option<Status> {
        match request.operation {
            Operation::Refuse(status) => Some(status),
            _ => None,
        }
    }

    #[test]
    fn the_header_may_be_divided_in_any_way() {
        let bytes = [header(VIRTIO_BLK_T_OUT, 3), vec![0x5a; 1024]].concat();
        for part in [1, 2, 3, 8, 15, 16, 17, 100, 2000] {
            let request = Request::parse(chain(&bytes, part, 1).1, CAPACITY).unwrap();
            let Operation::Write { offset, mut data } = request.operation else { panic!("parts of {part}") };
            let mut copy = vec![0; 1024];
            assert_eq!((offset, data.read(&mut copy)), (3 * SECTOR, 1024));
            assert!(copy.iter().all(|&byte| byte == 0x5a));
        }
    }

    #[test]
    fn the_status_is_the_last_writable_byte() {
        let (memory, chain) = chain(&header(VIRTIO_BLK_T_IN, 0), 16, 513);
        let request = Request::parse(chain, CAPACITY).unwrap();
        assert!(matches!(&request.operation, Operation::Read { offset: 0, data } if data.len() == 512));
        assert_eq!(request.answer(Status::Ok), 513);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), 0);
    }

    #[test]
    fn lengths_and_sectors_have_to_fit_the_disk() {
        for (sector, length) in [(0, 511), (0, 513), (63, 1024), (64, 512), (u64::MAX, 512), (u64::MAX / 512, 512)] {
            let read = parse(&header(VIRTIO_BLK_T_IN, sector), length + 1);
            assert_eq!(refused(&read), Some(Status::IoError), "read {length} at {sector}");
            let write = parse(&[header(VIRTIO_BLK_T_OUT, sector), vec![0; length]].concat(), 1);
            assert_eq!(refused(&write), Some(Status::IoError), "write {length} at {sector}");
        }
        assert_eq!(refused(&parse(&header(VIRTIO_BLK_T_IN, 62), 1025)), None);
    }

    #[test]
    fn a_short_header_is_an_error_with_an_answer() {
        let request = parse(&header(VIRTIO_BLK_T_IN, 0)[..15], 513);
        assert_eq!(refused(&request), Some(Status::IoError));
        assert_eq!(request.answer(Status::IoError), 0, "the data in front of the status was not written");
        assert_eq!(parse(&[], 1).answer(Status::IoError), 1);
    }

    #[test]
    fn data_on_the_wrong_side_is_an_error() {
        let read = parse(&[header(VIRTIO_BLK_T_IN, 0), vec![0; 512]].concat(), 513);
        assert_eq!(refused(&read), Some(Status::IoError));
        let write = parse(&[header(VIRTIO_BLK_T_OUT, 0), vec![0; 512]].concat(), 513);
        assert_eq!(refused(&write), Some(Status::IoError));
    }

    #[test]
    fn unknown_kinds_are_unsupported_and_no_room_for_an_answer_is_a_violation() {
        for kind in [2, 11, 13, 0x8000_0000, u32::MAX] {
            assert_eq!(refused(&parse(&header(kind, 0), 513)), Some(Status::Unsupported), "{kind}");
        }
        let nowhere = chain(&header(VIRTIO_BLK_T_FLUSH, 0), 16, 0).1;
        assert!(matches!(Request::parse(nowhere, CAPACITY), Err(RingError::NoAnswer(5))));
    }
}
