//! The system calls of the general jailer that have no safe wrapper elsewhere.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc::{self, c_int, c_uint};
use nix::unistd::Pid;

/// linux/nsfs.h: which kind of namespace a descriptor is of, as the flag that clone(2) has for it (ioctl_ns(2)).
const NS_GET_NSTYPE: libc::c_ulong = 0xb703;

/// Closes what whoever started `ozone` has left open, but for descriptors 0 to 2.
///
/// To be called first of all, when nothing of this process's own is open.
pub(super) fn close_leaked() {
    // SAFETY: numbers only; nothing in this process owns a descriptor above 2 yet.
    let _ = unsafe { libc::close_range(3, c_uint::MAX, 0) };
}

/// Closes every descriptor but one.
///
/// For a process that owns nothing any more, as the first of a jail.
pub(super) fn close_all_but(kept: RawFd) -> Result<(), Errno> {
    let kept = kept.unsigned_abs();
    if let Some(last) = kept.checked_sub(1) {
        // SAFETY: numbers only; the owners of what is closed never run again in this process.
        Errno::result(unsafe { libc::close_range(0, last, 0) })?;
    }
    // SAFETY: as above.
    Errno::result(unsafe { libc::close_range(kept + 1, c_uint::MAX, 0) })?;
    Ok(())
}

/// Makes a copy of this process, which has one thread: nothing in the copy, which its parent answers with 0.
///
/// The caller has seen to it that there is one thread.
pub(super) fn fork() -> Result<Option<Pid>, Errno> {
    // SAFETY: no other thread can hold a lock of the C library at this moment, so the copy may go on with ordinary code.
    let pid = Errno::result(unsafe { libc::fork() })?;
    Ok((pid != 0).then(|| Pid::from_raw(pid)))
}

/// Ends this process without running anything that it has a copy of.
pub(super) fn exit_at_once(code: c_int) -> ! {
    // SAFETY: _exit takes a number and does not return.
    unsafe { libc::_exit(code) }
}

/// A copy of what is mounted at a path and below it, mounted nowhere (open_tree(2)). Symbolic links are followed.
pub(super) fn copy_of_mounts(path: &CStr) -> Result<OwnedFd, Errno> {
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_RECURSIVE as c_uint;
    // SAFETY: the path is terminated and lives across the call.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    let fd = Errno::result(fd)?;
    // SAFETY: open_tree has just made this descriptor and nothing else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Sets attributes of mounts, and has nothing propagate to or from them (mount_setattr(2)).
pub(super) fn restrict(mount: BorrowedFd<'_>, attributes: u64, recursive: bool) -> Result<(), Errno> {
    // SAFETY: numbers, of which zero is a value.
    let mut attr: libc::mount_attr = unsafe { std::mem::zeroed() };
    attr.attr_set = attributes;
    attr.propagation = libc::MS_PRIVATE;
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    let size = size_of::<libc::mount_attr>();
    // SAFETY: the path is a terminated constant; the structure is the kernel's and lives across the call.
    let result = unsafe {
        libc::syscall(libc::SYS_mount_setattr, mount.as_raw_fd(), c"".as_ptr(), flags, &raw const attr, size)
    };
    Errno::result(result)?;
    Ok(())
}

/// Mounts a copy of mounts at a place (move_mount(2)).
pub(super) fn mount_at(mount: BorrowedFd<'_>, place: BorrowedFd<'_>) -> Result<(), Errno> {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    let empty = c"".as_ptr();
    // SAFETY: both paths are terminated constants.
    let result =
        unsafe { libc::syscall(libc::SYS_move_mount, mount.as_raw_fd(), empty, place.as_raw_fd(), empty, flags) };
    Errno::result(result)?;
    Ok(())
}

/// Whether a descriptor is of a network namespace.
pub(super) fn is_network_namespace(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: the request takes no argument (ioctl_ns(2)); on what is no namespace it fails.
    unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) == libc::CLONE_NEWNET }
}

/// Has the process run as any other does: addresses are random, and what is read is not executable (personality(2)).
pub(super) fn reset_personality() -> Result<(), Errno> {
    // SAFETY: a number only.
    Errno::result(unsafe { libc::personality(0) })?;
    Ok(())
}

/// setresgid(2) and setresuid(2), to any number.
pub(super) fn set_ids(uid: u32, gid: u32) -> Result<(), Errno> {
    // SAFETY: numbers only.
    Errno::result(unsafe { libc::setresgid(gid, gid, gid) })?;
    // SAFETY: numbers only.
    Errno::result(unsafe { libc::setresuid(uid, uid, uid) })?;
    Ok(())
}

/// A signal that was waited for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrived {
    /// Which.
    pub signal: c_int,
    /// Whether a process outside of this one's pid namespace sent it (kill(2), pid_namespaces(7)).
    pub from_outside: bool,
}

/// Blocks every signal in this process, or none.
pub(super) fn block_signals(all: bool) -> Result<(), Errno> {
    use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
    let set = if all { SigSet::all() } else { SigSet::empty() };
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&set), None)
}

/// Waits for any signal; all of them are blocked.
pub(super) fn next_signal() -> Option<Arrived> {
    let set = nix::sys::signal::SigSet::all();
    // SAFETY: numbers and unions, of which zero is a value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set and the structure are the C library's and live across the call.
    let signal = unsafe { libc::sigwaitinfo(set.as_ref(), &raw mut info) };
    // SAFETY: the kernel has written the structure, and a signal that a process sent has its id in it (sigaction(2)).
    let sender = (signal > 0).then(|| unsafe { info.si_pid() })?;
    // SI_USER: by kill(2) or pidfd_send_signal(2). A sender that has no number here is outside.
    Some(Arrived { signal, from_outside: info.si_code == libc::SI_USER && sender == 0 })
}

/// A child that has ended, and its wait status; nothing if none has.
pub(super) fn ended_child() -> Option<(Pid, c_int)> {
    let mut status = 0;
    // SAFETY: the number lives across the call.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG | libc::__WALL) };
    (pid > 0).then(|| (Pid::from_raw(pid), status))
}

/// kill(2), with any signal.
pub(super) fn send(pid: Pid, signal: c_int) {
    // SAFETY: numbers only.
    let _ = unsafe { libc::kill(pid.as_raw(), signal) };
}

/// Puts a descriptor on numbers 0 to 2.
pub(super) fn replace_standard(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    for number in 0..3 {
        // SAFETY: numbers only; standard input, output and error are owned by nothing that closes them.
        Errno::result(unsafe { libc::dup2(fd.as_raw_fd(), number) })?;
    }
    Ok(())
}

/// The descriptor on a number that `Step::Descriptors` has put it on.
pub(super) fn placed(number: RawFd) -> BorrowedFd<'static> {
    // SAFETY: the child keeps the numbers it was given until it ends or executes.
    unsafe { BorrowedFd::borrow_raw(number) }
}
