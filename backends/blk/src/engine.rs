//! The host side of a disk: reads, writes and flushes of the image, each finished when its call returns.
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use virtio_backend::Buffers;

/// Why a request could not be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The kernel said no.
    #[error("{0}")]
    Call(#[from] Errno),
    /// The image has become shorter than it was.
    #[error("the image ends too early: it was made shorter while in use")]
    Truncated,
}

/// A raw image or a block device.
#[derive(Debug)]
pub struct Engine {
    image: OwnedFd,
}

impl Engine {
    /// An engine on `image`.
    pub fn new(image: OwnedFd) -> Self {
        Self { image }
    }

    /// The size in bytes; of a block device too.
    ///
    /// # Errors
    /// What lseek(2) answers.
    pub fn size(&self) -> nix::Result<u64> {
        lseek(&self.image, 0, Whence::SeekEnd).map(|size| u64::try_from(size).unwrap_or(0))
    }

    /// Fills `data` from byte `offset` on.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn read(&self, offset: u64, mut data: Buffers) -> Result<(), EngineError> {
        whole(offset, &mut data, |data, offset| data.read_from(self.image.as_fd(), offset))
    }

    /// Writes `data` from byte `offset` on; if `durable`, as if a flush followed.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn write(&self, offset: u64, mut data: Buffers, durable: bool) -> Result<(), EngineError> {
        let flags = if durable { libc::RWF_DSYNC } else { 0 };
        whole(offset, &mut data, |data, offset| data.write_to(self.image.as_fd(), offset, flags))
    }

    /// Makes what has been written durable.
    ///
    /// # Errors
    /// What fdatasync(2) answers.
    pub fn flush(&self) -> Result<(), EngineError> {
        Ok(nix::unistd::fdatasync(&self.image)?)
    }
}

/// Repeats `call` until all of `data` is dealt with: a call may do less than it was asked to.
fn whole(
    start: u64,
    data: &mut Buffers,
    mut call: impl FnMut(&mut Buffers, i64) -> nix::Result<usize>,
) -> Result<(), EngineError> {
    let mut offset = i64::try_from(start).map_err(|_| Errno::EOVERFLOW)?;
    while !data.is_empty() {
        match call(data, offset) {
            Ok(0) => return Err(EngineError::Truncated),
            Ok(count) => {
                let count = i64::try_from(count).map_err(|_| Errno::EOVERFLOW)?;
                offset = offset.checked_add(count).ok_or(Errno::EOVERFLOW)?;
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use virtio_backend::Memory;
    use vm_memory::{Bytes, GuestAddress};

    fn memory() -> Arc<Memory> {
        Arc::new(Memory::from_ranges(&[(GuestAddress(0), 0x100_0000)]).unwrap())
    }

    fn image(bytes: &[u8]) -> Engine {
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, bytes, 0).unwrap();
        Engine::new(file.into())
    }

    #[test]
    fn more_parts_than_one_call_takes_are_continued() {
        let memory = memory();
        let bytes: Vec<u8> = (0..3000 * 8).map(|index: u32| index.to_le_bytes()[0]).collect();
        let engine = image(&bytes);
        let mut data = Buffers::new(Arc::clone(&memory));
        for part in 0..3000 {
            data.push(GuestAddress(part * 16), 8).unwrap();
        }
        engine.read(0, data).unwrap();
        for part in [0, 1023, 1024, 2999] {
            let mut found = [0; 8];
            memory.read_slice(&mut found, GuestAddress(part * 16)).unwrap();
            let start = usize::try_from(part * 8).unwrap();
            assert_eq!(Some(&found[..]), bytes.get(start..start + 8));
        }
    }

    #[test]
    fn a_truncated_image_is_an_error() {
        let engine = image(&[1; 700]);
        let mut data = Buffers::new(memory());
        data.push(GuestAddress(0), 1024).unwrap();
        assert_eq!(engine.read(0, data), Err(EngineError::Truncated));
    }

    #[test]
    fn what_the_kernel_refuses_is_reported() {
        let (reader, _writer) = nix::unistd::pipe().unwrap();
        let mut data = Buffers::new(memory());
        data.push(GuestAddress(0), 512).unwrap();
        assert_eq!(Engine::new(reader).write(0, data, false), Err(EngineError::Call(Errno::ESPIPE)));
    }
}
