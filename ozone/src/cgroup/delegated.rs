//! systemd's mark on a control group that it leaves to the programs in it ("Control Group APIs and Delegation",
//! <https://systemd.io/CGROUP_DELEGATION>).
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::libc;

/// The extended attributes that carry the mark: systemd sets the first as root and, since version 251, the second as well.
const MARKS: [&CStr; 2] = [c"trusted.delegate", c"user.delegate"];

/// Whether the group of that directory carries the mark.
pub fn is_marked(directory: BorrowedFd<'_>) -> bool {
    MARKS.iter().any(|mark| {
        let mut value = [0_u8; 4];
        // SAFETY: the name is terminated, the buffer as long as is said, and both live across the call (fgetxattr(2)).
        let length =
            unsafe { libc::fgetxattr(directory.as_raw_fd(), mark.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
        length == 1 && value[0] == b'1'
    })
}
