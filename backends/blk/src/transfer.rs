//! One read, write or flush of the image: as many calls as it takes, whoever makes them.
//!
//! A call may do less than it was asked to, and takes a limited number of parts, so a transfer is a sequence of steps.
//! [`Transfer::step`] says what to ask for, [`Transfer::done`] takes the answer.
#![allow(unsafe_code)]
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use libc::iovec;
use nix::errno::Errno;
use virtio_backend::Buffers;

use crate::bounce::Bounce;
use crate::image::{Alignment, Image};
use crate::writes::Whole;

/// Why a transfer could not be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// The kernel said no.
    #[error("{0}")]
    Call(#[from] Errno),
    /// The image has become shorter than it was.
    #[error("the image ends too early: it was made shorter while in use")]
    Truncated,
}

/// What is transferred.
#[derive(Debug)]
pub enum Kind {
    /// Fills guest memory.
    Read {
        /// Bytes from the start of the image.
        offset: u64,
        /// Where to.
        data: Buffers,
    },
    /// Writes guest memory.
    Write {
        /// Bytes from the start of the image.
        offset: u64,
        /// Where from.
        data: Buffers,
        /// Whether it is durable when it is done, as if a flush followed.
        durable: bool,
    },
    /// Makes what has been written durable.
    Flush {
        /// Times and the like too.
        everything: bool,
    },
}

/// What to ask the kernel for. The parts are valid, and stay where they are, until the transfer is changed or dropped; it
/// may be moved meanwhile.
#[derive(Debug)]
pub enum Step<'t> {
    /// preadv(2) at an offset.
    Read(&'t [iovec], u64),
    /// pwritev2(2) at an offset, with flags.
    Write(&'t [iovec], u64, i32),
    /// fsync(2), or fdatasync(2).
    Flush {
        /// Which of the two.
        everything: bool,
    },
}

/// A transfer under way.
#[derive(Debug)]
pub struct Transfer {
    kind: Kind,
    /// What the kernel reads into or writes from instead of guest memory.
    bounce: Option<Box<Bounce>>,
    /// Of a write past the page cache, that it may be under way.
    leave: Option<Whole>,
}

impl Transfer {
    /// A transfer of which nothing is done.
    pub fn new(kind: Kind) -> Self {
        Self { kind, bounce: None, leave: None }
    }

    /// What a message about it says.
    pub fn verb(&self) -> &'static str {
        match self.kind {
            Kind::Read { .. } => "read",
            Kind::Write { .. } => "write",
            Kind::Flush { .. } => "flush",
        }
    }

    /// Whether it is a write.
    pub fn is_write(&self) -> bool {
        matches!(self.kind, Kind::Write { .. })
    }

    /// Whether it is a flush.
    pub fn is_flush(&self) -> bool {
        matches!(self.kind, Kind::Flush { .. })
    }

    /// Whether it is a flush that made everything durable.
    pub fn is_whole_flush(&self) -> bool {
        matches!(self.kind, Kind::Flush { everything: true })
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        match &self.kind {
            Kind::Read { data, .. } | Kind::Write { data, .. } => data.is_empty(),
            Kind::Flush { .. } => false,
        }
    }

    /// Whether the kernel cannot take the guest's buffers as they are.
    pub fn needs_bounce(&self, alignment: Option<Alignment>) -> bool {
        match (&self.kind, alignment) {
            (Kind::Read { offset, data } | Kind::Write { offset, data, .. }, Some(Alignment { address, place })) => {
                !offset.is_multiple_of(place as u64) || !data.is_aligned(address, place)
            }
            _ => false,
        }
    }

    /// Whether it is a write of parts of blocks, for which the rest of them has to be read first.
    pub fn is_partial(&self, alignment: Option<Alignment>) -> bool {
        match (&self.kind, alignment) {
            (Kind::Write { offset, data, .. }, Some(Alignment { place, .. })) => {
                !offset.is_multiple_of(place as u64) || !data.len().is_multiple_of(place)
            }
            _ => false,
        }
    }

    /// Keeps `leave` for as long as there is this transfer.
    pub fn admit(&mut self, leave: Whole) {
        self.leave = Some(leave);
    }

    /// Has it go through `bounce` from its start.
    pub fn give(&mut self, mut bounce: Box<Bounce>) {
        bounce.prepare(&mut self.kind);
        self.bounce = Some(bounce);
    }

    /// Takes the bounce buffer back.
    pub fn take(&mut self) -> Option<Box<Bounce>> {
        self.bounce.take()
    }

    /// What to ask for next.
    pub fn step(&self) -> Step<'_> {
        let bounce = self.bounce.as_deref();
        match &self.kind {
            Kind::Read { offset, data } => match bounce {
                Some(bounce) => Step::Read(bounce.parts(), bounce.offset()),
                None => Step::Read(data.parts(), *offset),
            },
            Kind::Write { offset, data, durable } => {
                let flags = if *durable { libc::RWF_DSYNC } else { 0 };
                match bounce {
                    Some(bounce) => Step::Write(bounce.parts(), bounce.offset(), flags),
                    None => Step::Write(data.parts(), *offset, flags),
                }
            }
            Kind::Flush { everything } => Step::Flush { everything: *everything },
        }
    }

    /// Takes the answer to the last step; `None` if there is another.
    pub fn done(&mut self, answer: nix::Result<usize>) -> Option<Result<(), TransferError>> {
        let count = match answer {
            Err(Errno::EINTR) => return None,
            Err(errno) => return Some(Err(errno.into())),
            Ok(count) => count,
        };
        let finished = match (&mut self.kind, &mut self.bounce) {
            (Kind::Flush { .. }, _) => return Some(Ok(())),
            (_, _) if count == 0 => return Some(Err(TransferError::Truncated)),
            (kind, Some(bounce)) => match bounce.done(kind, count) {
                Ok(finished) => finished,
                Err(error) => return Some(Err(error)),
            },
            (Kind::Read { offset, data }, None) => {
                data.filled(count);
                *offset = offset.saturating_add(count as u64);
                data.is_empty()
            }
            (Kind::Write { offset, data, .. }, None) => {
                data.taken(count);
                *offset = offset.saturating_add(count as u64);
                data.is_empty()
            }
        };
        finished.then_some(Ok(()))
    }

    /// Carries out what is left of it, and returns when it is done.
    ///
    /// # Errors
    /// [`TransferError`].
    pub fn carry_out(&mut self, image: &Image) -> Result<(), TransferError> {
        if self.is_empty() && self.bounce.is_none() {
            return Ok(());
        }
        loop {
            let answer = match self.step() {
                // SAFETY: the parts lead into guest memory or into the bounce buffer, both of which this transfer keeps;
                // nobody has a reference into either, and guest memory may be written by anyone at any time.
                Step::Read(parts, offset) => unsafe { image.read(parts, offset) },
                // SAFETY: as above.
                Step::Write(parts, offset, flags) => unsafe { image.write(parts, offset, flags) },
                Step::Flush { everything } => image.flush(everything).map(|()| 0),
            };
            if let Some(outcome) = self.done(answer) {
                return outcome;
            }
        }
    }

    /// Carries out a write of parts of blocks: reads the blocks, changes them and writes them, while no other write is under
    /// way.
    ///
    /// # Errors
    /// [`TransferError`].
    pub fn rewrite(&mut self, image: &Image, bounce: &mut Bounce) -> Result<(), TransferError> {
        image.writes.alone(|| self.rewrite_alone(image, bounce))
    }

    fn rewrite_alone(&mut self, image: &Image, bounce: &mut Bounce) -> Result<(), TransferError> {
        let Kind::Write { offset, data, durable } = &mut self.kind else { return Ok(()) };
        let flags = if *durable { libc::RWF_DSYNC } else { 0 };
        while !data.is_empty() {
            let inside = bounce.enclose(*offset, data.len());
            // SAFETY: the part is memory of `bounce`, which is borrowed for this alone.
            whole(bounce, |bounce| unsafe { image.read(bounce.parts(), bounce.offset()) })?;
            *offset = offset.saturating_add(bounce.overlay(inside, data) as u64);
            // SAFETY: as above.
            whole(bounce, |bounce| unsafe { image.write(bounce.parts(), bounce.offset(), flags) })?;
        }
        Ok(())
    }
}

/// Repeats `call` until all of `bounce` is dealt with.
fn whole(bounce: &mut Bounce, mut call: impl FnMut(&Bounce) -> nix::Result<usize>) -> Result<(), TransferError> {
    loop {
        match call(bounce) {
            Ok(0) => return Err(TransferError::Truncated),
            Ok(count) => {
                if bounce.advance(count) {
                    return Ok(());
                }
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;
    use virtio_backend::Memory;
    use vm_memory::{Bytes, GuestAddress};

    fn memory() -> Arc<Memory> {
        Arc::new(Memory::from_ranges(&[(GuestAddress(0), 0x100_0000)]).unwrap())
    }

    fn image(bytes: &[u8]) -> (Image, File) {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        (Image::new(file.try_clone().unwrap().into(), false, false).unwrap(), file)
    }

    fn pattern(count: usize) -> Vec<u8> {
        (0..count).map(|index| index.wrapping_mul(7).to_le_bytes()[0] ^ index.to_le_bytes()[1]).collect()
    }

    fn buffers(memory: &Arc<Memory>, parts: &[(u64, usize)]) -> Buffers {
        let mut buffers = Buffers::new(Arc::clone(memory));
        parts.iter().for_each(|&(address, length)| buffers.push(GuestAddress(address), length).unwrap());
        buffers
    }

    #[test]
    fn more_parts_than_one_call_takes_are_continued() {
        let memory = memory();
        let bytes: Vec<u8> = (0..3000 * 8).map(|index: u32| index.to_le_bytes()[0]).collect();
        let (image, _) = image(&bytes);
        let parts: Vec<(u64, usize)> = (0..3000).map(|part| (part * 16, 8)).collect();
        let mut read = Transfer::new(Kind::Read { offset: 0, data: buffers(&memory, &parts) });
        read.carry_out(&image).unwrap();
        for part in [0, 1023, 1024, 2999] {
            let mut found = [0; 8];
            memory.read_slice(&mut found, GuestAddress(part * 16)).unwrap();
            let start = usize::try_from(part * 8).unwrap();
            assert_eq!(Some(&found[..]), bytes.get(start..start + 8));
        }
    }

    #[test]
    fn a_truncated_image_is_an_error() {
        let (image, _) = image(&[1; 700]);
        let mut read = Transfer::new(Kind::Read { offset: 0, data: buffers(&memory(), &[(0, 1024)]) });
        assert_eq!(read.carry_out(&image), Err(TransferError::Truncated));
    }

    #[test]
    fn what_the_kernel_refuses_is_reported() {
        let (reader, _writer) = nix::unistd::pipe().unwrap();
        let image = Image::new(reader, false, false).unwrap();
        let data = buffers(&memory(), &[(0, 512)]);
        let mut write = Transfer::new(Kind::Write { offset: 0, data, durable: false });
        assert_eq!(write.carry_out(&image), Err(TransferError::Call(Errno::ESPIPE)));
    }

    #[test]
    fn answers_that_are_short_lead_to_further_steps() {
        let memory = memory();
        let mut read = Transfer::new(Kind::Read { offset: 512, data: buffers(&memory, &[(0, 100), (0x1000, 412)]) });
        assert!(read.done(Ok(60)).is_none());
        assert!(read.done(Err(Errno::EINTR)).is_none());
        assert!(matches!(read.step(), Step::Read(parts, 572) if parts.iter().map(|p| p.iov_len).eq([40, 412])));
        assert!(read.done(Ok(451)).is_none());
        assert!(matches!(read.step(), Step::Read(parts, 1023) if parts.iter().map(|p| p.iov_len).eq([1])));
        assert_eq!(read.done(Ok(1)), Some(Ok(())));
    }

    /// Reads and writes through a bounce buffer by calls that stop short, and looks at what came of it.
    #[test]
    fn a_bounce_buffer_gives_the_same_as_none() {
        let bytes = pattern(1 << 20);
        let alignment = Alignment { address: 4096, place: 512 };
        for (offset, length) in [(0, 512), (512, 1024), (1024, 400_000), (700, 100), (513, 300_001), (1_048_000, 576)] {
            let (image, file) = image(&bytes);
            let memory = memory();
            let parts = [(0x101, length / 3), (0x20_0003, length - length / 3)];
            let mut read = Transfer::new(Kind::Read { offset, data: buffers(&memory, &parts) });
            assert!(read.needs_bounce(Some(alignment)) && !read.needs_bounce(None));
            read.give(Box::new(Bounce::new(alignment)));
            read.carry_out(&image).unwrap();
            let mut found = vec![0; length];
            buffers(&memory, &parts).read(&mut found);
            let start = usize::try_from(offset).unwrap();
            assert!(found == bytes[start..start + length], "read {length} at {offset}");

            let new: Vec<u8> = found.iter().map(|byte| !byte).collect();
            buffers(&memory, &parts).write(&new);
            let data = buffers(&memory, &parts);
            let mut write = Transfer::new(Kind::Write { offset, data, durable: true });
            let partial = !offset.is_multiple_of(512) || !length.is_multiple_of(512);
            assert_eq!(write.is_partial(Some(alignment)), partial);
            if partial {
                write.rewrite(&image, &mut Bounce::new(alignment)).unwrap();
            } else {
                write.give(Box::new(Bounce::new(alignment)));
                write.carry_out(&image).unwrap();
            }
            let mut expected = bytes.clone();
            expected[start..start + length].copy_from_slice(&new);
            let mut found = vec![0; bytes.len()];
            file.read_exact_at(&mut found, 0).unwrap();
            assert!(found == expected, "write {length} at {offset}");
            assert_eq!(file.metadata().unwrap().len(), bytes.len() as u64);
        }
    }

    #[test]
    fn short_answers_to_a_bounced_transfer_are_continued() {
        let memory = memory();
        let alignment = Alignment { address: 512, place: 512 };
        memory.write_slice(&pattern(2048), GuestAddress(1)).unwrap();
        let data = buffers(&memory, &[(1, 2048)]);
        let mut write = Transfer::new(Kind::Write { offset: 4096, data, durable: false });
        write.give(Box::new(Bounce::new(alignment)));
        assert!(write.done(Ok(512)).is_none());
        assert!(matches!(write.step(), Step::Write([part], 4608, 0) if part.iov_len == 1536));
        assert_eq!(write.done(Ok(1536)), Some(Ok(())));
        assert!(write.take().is_some());
        let mut read = Transfer::new(Kind::Read { offset: 100, data: buffers(&memory, &[(1, 1000)]) });
        read.give(Box::new(Bounce::new(alignment)));
        assert!(matches!(read.step(), Step::Read([part], 0) if part.iov_len == 1536));
        assert!(read.done(Ok(512)).is_none());
        assert!(matches!(read.step(), Step::Read([part], 512) if part.iov_len == 1024));
        assert_eq!(read.done(Ok(1024)), Some(Ok(())));
        let mut beyond = Transfer::new(Kind::Read { offset: 100, data: buffers(&memory, &[(1, 1000)]) });
        beyond.give(Box::new(Bounce::new(alignment)));
        assert_eq!(beyond.done(Ok(100)), Some(Err(TransferError::Truncated)), "the image ends where it begins");
    }
}
