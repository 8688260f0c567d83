//! Requests of the driver (virtio 1.2, section 5.2.6), carried out one after the other.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use virtio_backend::{Buffers, Memory};
use virtio_queue::desc::split::Descriptor;

use crate::image::{Image, SECTOR};
use crate::sys;

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const IDENTIFY: u32 = 8;

/// Bytes that are moved at once.
const PART: usize = 64 << 10;

const OK: u8 = 0;
const FAILED: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// Carries a request out; returns how many bytes were written into it.
pub fn carry_out(
    image: &Image,
    name: &str,
    memory: &Arc<Memory>,
    chain: impl Iterator<Item = Descriptor>,
) -> Option<u32> {
    let (mut from, mut to) = (Buffers::new(Arc::clone(memory)), Buffers::new(Arc::clone(memory)));
    for descriptor in chain {
        let into = if descriptor.is_write_only() { &mut to } else { &mut from };
        into.push(descriptor.addr(), usize::try_from(descriptor.len()).ok()?).ok()?;
    }
    let mut header = [0; 16];
    from.read(&mut header);
    let kind = u32::from_le_bytes(*header.first_chunk()?);
    let sector = u64::from_le_bytes(*header.get(8..)?.first_chunk()?);
    let mut status = to.split_off(to.len().checked_sub(1)?);
    let (given, length) = (from.len(), to.len());
    let written = u32::try_from(length).ok()?;
    let file = image.file.as_fd();
    let (answer, count) = match kind {
        READ => {
            let read = |room: &mut [u8], offset| sys::read_at(file, room, offset).map(|_| to.write(room));
            (parts(length, sector, read), written)
        }
        WRITE => {
            let write = |room: &mut [u8], offset| {
                let count = from.read(room);
                sys::write_at(file, room.get(..count).unwrap_or_default(), offset)
            };
            (parts(given, sector, write), 0)
        }
        FLUSH => (flush(file), 0),
        IDENTIFY => {
            let mut id = [0; 20];
            id.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from);
            to.write(&id);
            (OK, 20)
        }
        _ => (UNSUPPORTED, 0),
    };
    status.write(&[answer]);
    Some(count + 1)
}

/// Does a request's data in parts of at most [`PART`], with the offset of each.
fn parts(length: usize, sector: u64, mut part: impl FnMut(&mut [u8], i64) -> nix::Result<usize>) -> u8 {
    let Some(mut offset) = sector.checked_mul(SECTOR).and_then(|offset| i64::try_from(offset).ok()) else {
        return FAILED;
    };
    let (mut left, mut room) = (length, vec![0; PART.min(length)]);
    while left > 0 {
        let now = left.min(PART);
        match part(room.get_mut(..now).unwrap_or_default(), offset) {
            Ok(count) if count == now => offset += i64::try_from(now).unwrap_or(0),
            _ => return FAILED,
        }
        left -= now;
    }
    OK
}

fn flush(image: BorrowedFd<'_>) -> u8 {
    nix::unistd::fdatasync(image).map_or(FAILED, |()| OK)
}
