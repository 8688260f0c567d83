//! The image on the host, and what the kernel wants of those who go past the page cache.
#![allow(unsafe_code)]
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::iovec;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use crate::writes::Writes;

/// What is assumed where the kernel does not say what it wants (before Linux 6.1, and of some file systems), in bytes.
const USUAL: usize = 4096;

/// The coarsest alignment that is worked with, in bytes.
const COARSEST: usize = 64 * 1024;

/// How buffers and places have to lie for O_DIRECT (open(2)): powers of two, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Of a buffer's address.
    pub address: usize,
    /// Of a place in the image, and of every buffer's length.
    pub place: usize,
}

/// A raw image or a block device.
#[derive(Debug)]
pub struct Image {
    fd: OwnedFd,
    /// Only with O_DIRECT.
    alignment: Option<Alignment>,
    /// Which writes may be under way together, with O_DIRECT.
    pub writes: Arc<Writes>,
    /// Whether an earlier process may have left something in the page cache whose writing failed since.
    inherited: AtomicBool,
}

impl Image {
    /// An image; `direct` if it was opened with O_DIRECT, `successor` if an earlier process may have written to it.
    ///
    /// # Errors
    /// What statx(2) answers, and EINVAL for an alignment that is not worked with.
    pub fn new(fd: OwnedFd, direct: bool, successor: bool) -> nix::Result<Self> {
        let alignment = if direct { Some(alignment(fd.as_fd())?) } else { None };
        Ok(Self { fd, alignment, writes: Arc::default(), inherited: AtomicBool::new(successor) })
    }

    /// The size in bytes; of a block device too.
    ///
    /// # Errors
    /// What lseek(2) answers.
    pub fn size(&self) -> nix::Result<u64> {
        lseek(&self.fd, 0, Whence::SeekEnd).map(|size| u64::try_from(size).unwrap_or(0))
    }

    /// What O_DIRECT asks for; `None` for an image that is read and written through the page cache.
    pub fn alignment(&self) -> Option<Alignment> {
        self.alignment
    }

    /// Has the image want `alignment`, whatever the kernel says.
    #[cfg(test)]
    pub fn pretend(&mut self, alignment: Alignment) {
        self.alignment = Some(alignment);
    }

    /// Whether a flush has to find out about an earlier process's writes too.
    pub fn inherited(&self) -> bool {
        self.inherited.load(Ordering::Relaxed)
    }

    /// A flush has found that all of an earlier process's writes are durable.
    pub fn settled(&self) {
        self.inherited.store(false, Ordering::Relaxed);
    }

    /// One preadv(2); returns how many bytes came, 0 at the end of the image.
    ///
    /// # Errors
    /// What preadv(2) answers.
    ///
    /// # Safety
    /// Every part is memory that anyone may write to at any time, and stays so during the call.
    pub unsafe fn read(&self, parts: &[iovec], offset: u64) -> nix::Result<usize> {
        let offset = i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        // SAFETY: the caller vouches for the parts; the array of them is borrowed for the call.
        length(unsafe { libc::preadv(self.fd.as_raw_fd(), parts.as_ptr(), count(parts), offset) })
    }

    /// One pwritev2(2); returns how many bytes went. `flags` are `RWF_DSYNC` and its like.
    ///
    /// # Errors
    /// What pwritev2(2) answers.
    ///
    /// # Safety
    /// Every part is memory that stays readable during the call, whoever else writes to it.
    pub unsafe fn write(&self, parts: &[iovec], offset: u64, flags: i32) -> nix::Result<usize> {
        let offset = i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        // SAFETY: the caller vouches for the parts; the array of them is borrowed for the call.
        length(unsafe { libc::pwritev2(self.fd.as_raw_fd(), parts.as_ptr(), count(parts), offset, flags) })
    }

    /// Makes what has been written durable; `everything` includes times and the like (fsync(2) instead of fdatasync(2)).
    ///
    /// # Errors
    /// What the call answers.
    pub fn flush(&self, everything: bool) -> nix::Result<()> {
        if everything { nix::unistd::fsync(&self.fd) } else { nix::unistd::fdatasync(&self.fd) }
    }
}

impl AsFd for Image {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn count(parts: &[iovec]) -> i32 {
    i32::try_from(parts.len()).unwrap_or(i32::MAX)
}

fn length(answer: isize) -> nix::Result<usize> {
    usize::try_from(Errno::result(answer)?).map_err(|_| Errno::EIO)
}

/// Asks the kernel (statx(2), STATX_DIOALIGN).
fn alignment(fd: BorrowedFd<'_>) -> nix::Result<Alignment> {
    let mut status = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty C string, and the call writes one `struct statx` into room that is exactly that large.
    Errno::result(unsafe {
        let (path, room) = (c"".as_ptr(), status.as_mut_ptr());
        libc::syscall(libc::SYS_statx, fd.as_raw_fd(), path, libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, room)
    })?;
    // SAFETY: all zeroes are a valid `struct statx`, and the call has filled it in.
    let status = unsafe { status.assume_init() };
    let known = status.stx_mask & libc::STATX_DIOALIGN != 0;
    let found = [status.stx_dio_mem_align, status.stx_dio_offset_align].map(|it| usize::try_from(it).unwrap_or(0));
    match found {
        [address, place] if known && address.is_power_of_two() && place.is_power_of_two() => {
            if address.max(place) > COARSEST { Err(Errno::EINVAL) } else { Ok(Alignment { address, place }) }
        }
        _ => Ok(Alignment { address: USUAL, place: USUAL }),
    }
}
