//! System calls that no safe interface has in the form in which the filters allow them.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

/// Reads at an offset, by the call that the filters allow.
pub fn read_at(file: impl AsFd, bytes: &mut [u8], offset: i64) -> nix::Result<usize> {
    let part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: one part, which is the whole of a slice that this function has for itself.
    let count = Errno::result(unsafe { libc::preadv(file.as_fd().as_raw_fd(), &raw const part, 1, offset) })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Writes at an offset, by the call that the filters allow.
pub fn write_at(file: impl AsFd, bytes: &[u8], offset: i64) -> nix::Result<usize> {
    let part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: one part, which is the whole of a slice; the call only reads it.
    let count = Errno::result(unsafe { libc::pwritev2(file.as_fd().as_raw_fd(), &raw const part, 1, offset, 0) })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Takes descriptors that recvmsg(2) has just made.
pub fn received(numbers: &[i32]) -> Vec<File> {
    // SAFETY: the kernel has made these for this process, and nobody else knows their numbers.
    numbers.iter().map(|number| File::from(unsafe { OwnedFd::from_raw_fd(*number) })).collect()
}
