//! clone3(2): the birth of a child.
#![allow(unsafe_code)]

use std::convert::Infallible;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::errno::Errno;
use nix::libc;
use nix::unistd::Pid;

use super::sys;

/// The kernel's `struct clone_args`, version 2 (88 bytes, Linux 5.7; linux/sched.h). Every field is a 64-bit number.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// CLONE_INTO_CGROUP (clone(2)), which does not fit the type that the C library's header has for flags.
const INTO_CGROUP: u64 = 0x2_0000_0000;

/// Makes a child in new namespaces (`flags`), and in the control group of that directory if one is given, that runs
/// `child`, which ends in execveat or exit; answers its id and pidfd.
///
/// The caller has seen to it that this process has one thread.
pub(super) fn into_namespaces(
    flags: u64,
    cgroup: Option<BorrowedFd<'_>>,
    child: impl FnOnce() -> Infallible,
) -> Result<(Pid, OwnedFd), Errno> {
    let mut pidfd: RawFd = -1;
    let args = CloneArgs {
        flags: flags | libc::CLONE_PIDFD as u64 | cgroup.map_or(0, |_| INTO_CGROUP),
        cgroup: cgroup.map_or(0, |directory| u64::from(directory.as_raw_fd().unsigned_abs())),
        pidfd: (&raw mut pidfd) as u64,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArgs::default()
    };
    // SAFETY: without CLONE_VM the child has a copy of this process and goes on from here on its own copy of the stack, as
    // after fork(2). This process has one thread (checked by the caller), so no lock of the C library is held by a thread
    // that the child lacks. `args` is the kernel's structure and lives across the call, as do `pidfd` and the directory.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    match Errno::result(pid)? {
        0 => {
            // A panic must not unwind into the parent's code, which the child has a copy of.
            let _ = catch_unwind(AssertUnwindSafe(child));
            sys::exit_at_once()
        }
        pid => {
            // SAFETY: CLONE_PIDFD has just stored a new descriptor of this process, which nothing else knows.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok((Pid::from_raw(pid as libc::pid_t), pidfd))
        }
    }
}
