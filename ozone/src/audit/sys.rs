//! The system calls of the audit that have no safe wrapper elsewhere.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc;

/// A descriptor for a process (pidfd_open(2)): it stays with that process when its id is given to another.
///
/// # Errors
/// `ESRCH` if there is none.
pub(super) fn pidfd_open(pid: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: numbers only.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: pidfd_open has just made this descriptor and nothing else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// The protocol of the socket that a link in `/proc/PID/fd` stands for, such as `UNIX-STREAM` or `TCP`: the kernel tells it
/// as the extended attribute `system.sockprotoname` of the socket (getxattr(2), lsof(8)).
///
/// # Errors
/// What getxattr(2) answers.
pub(super) fn socket_protocol(link: &str) -> Result<String, Errno> {
    let link = CString::new(link).map_err(|_| Errno::EINVAL)?;
    let mut name = [0_u8; 64];
    // SAFETY: both names are terminated, and the kernel writes at most `name.len()` bytes to `name`; all three live across
    // the call.
    let length = Errno::result(unsafe {
        libc::getxattr(link.as_ptr(), c"system.sockprotoname".as_ptr(), name.as_mut_ptr().cast(), name.len())
    })?;
    let bytes = name.iter().take(length.unsigned_abs()).copied().take_while(|byte| *byte != 0);
    Ok(bytes.map(char::from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_kernel_tells_a_sockets_protocol() {
        let (one, _other) = UnixStream::pair().unwrap();
        let protocol = socket_protocol(&format!("/proc/self/fd/{}", one.as_raw_fd())).unwrap();
        assert!(protocol.starts_with("UNIX"), "{protocol}");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(socket_protocol(&format!("/proc/self/fd/{}", listener.as_raw_fd())).unwrap(), "TCP");
    }

    #[test]
    fn there_is_no_descriptor_for_a_process_that_is_not_there() {
        assert!(pidfd_open(std::process::id().cast_signed()).is_ok());
        assert_eq!(pidfd_open(i32::MAX).unwrap_err(), Errno::ESRCH);
    }
}
