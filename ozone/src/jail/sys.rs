//! The system calls of the jail that have no safe wrapper elsewhere.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc::{self, c_int, c_long, c_uint};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};

/// How many signals the kernel has (_NSIG).
const SIGNALS: c_int = 64;

/// Ends this process without running anything of the parent's: no destructors, no exit handlers, no buffers.
pub(super) fn exit_at_once() -> ! {
    // SAFETY: _exit takes a number and does not return.
    unsafe { libc::_exit(127) }
}

fn answer(result: c_long) -> Result<c_long, Errno> {
    Errno::result(result)
}

/// Sends a signal through a pidfd.
pub(super) fn pidfd_signal(pidfd: BorrowedFd<'_>, signal: Signal) -> Result<(), Errno> {
    let none: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: a null siginfo is allowed (pidfd_send_signal(2)); the other arguments are numbers.
    answer(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal as c_int, none, 0) })?;
    Ok(())
}

/// Puts `sources[i]` on number `i`, without close-on-exec for the first `kept` of them, and closes every other descriptor.
///
/// For a child that owns nothing any more: whatever a number stood for before is closed.
pub(super) fn place_descriptors(sources: &[BorrowedFd<'_>], kept: usize) -> Result<(), Errno> {
    let count = sources.len() as RawFd;
    let mut high = Vec::with_capacity(sources.len());
    for source in sources {
        // SAFETY: fcntl with F_DUPFD_CLOEXEC takes numbers only. The copies lie above every target, so that no target is
        // overwritten while it is still a source.
        high.push(Errno::result(unsafe { libc::fcntl(source.as_raw_fd(), libc::F_DUPFD_CLOEXEC, count) })?);
    }
    for (target, source) in high.iter().enumerate() {
        let flags = if target < kept { 0 } else { libc::O_CLOEXEC };
        // SAFETY: numbers only. What the target stood for is given up on purpose: no destructor runs in this process.
        Errno::result(unsafe { libc::dup3(*source, target as c_int, flags) })?;
    }
    // SAFETY: numbers only; the descriptors closed are owned by values of the parent's whose destructors never run here.
    Errno::result(unsafe { libc::close_range(count as c_uint, c_uint::MAX, 0) })?;
    Ok(())
}

/// Names a descriptor that [`place_descriptors`] has put on `number`.
pub(super) fn placed(number: RawFd) -> BorrowedFd<'static> {
    // SAFETY: the child keeps the numbers it was given until it ends or execs; nothing closes them.
    unsafe { BorrowedFd::borrow_raw(number) }
}

/// Unblocks every signal and gives every one its default action: ignored ones stay ignored across execve otherwise.
pub(super) fn reset_signals() -> Result<(), Errno> {
    // The kernel's own structure, of which zeroes are the default action (rt_sigaction(2), asm/signal.h). The C library keeps
    // two of the real-time signals to itself, which whoever started ozone may have had ignored as well.
    let default = [0_u64; 4];
    let none: *const u64 = std::ptr::null();
    for signal in (1..=SIGNALS).filter(|signal| ![libc::SIGKILL, libc::SIGSTOP].contains(signal)) {
        // SAFETY: the array is as large as the structure and lives across the call; the default action runs no code of this
        // process. The last argument is the size of the kernel's signal set.
        answer(unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), none, SIGNALS / 8) })?;
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)
}

/// A new tmpfs with no room for anything, read-only, mounted nowhere yet.
pub(super) fn empty_tmpfs() -> Result<OwnedFd, Errno> {
    // One inode: the root directory itself.
    tmpfs(c"1", libc::MOUNT_ATTR_RDONLY)
}

/// A new tmpfs without room for data and with this many inodes, mounted nowhere yet. Nothing in it can be executed, and it has
/// neither devices nor set-uid files; `attributes` (mount_setattr(2)) come on top of that.
pub(crate) fn tmpfs(inodes: &CStr, attributes: u64) -> Result<OwnedFd, Errno> {
    // One page. Zero would mean without limit (tmpfs(5)).
    new_mount(c"tmpfs", &[(c"size", c"4096"), (c"nr_inodes", inodes), (c"mode", c"0555")], attributes)
}

/// A new procfs with processes alone, those of this process's pid namespace: nothing of the kernel's settings is in it
/// (proc(5), `subset=pid`, Linux 5.8). It is mounted nowhere.
pub(super) fn processes() -> Result<OwnedFd, Errno> {
    new_mount(c"proc", &[(c"subset", c"pid")], 0)
}

/// A mount of a new file system that is mounted nowhere, and lives as long as its descriptor.
fn new_mount(filesystem: &CStr, options: &[(&CStr, &CStr)], attributes: u64) -> Result<OwnedFd, Errno> {
    let context = fsopen(filesystem)?;
    for option in options {
        fsconfig(&context, libc::FSCONFIG_SET_STRING as c_uint, Some(*option))?;
    }
    fsconfig(&context, libc::FSCONFIG_CMD_CREATE as c_uint, None)?;
    let attributes = attributes | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    // SAFETY: numbers only (fsmount(2)).
    let mount =
        answer(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), libc::FSMOUNT_CLOEXEC, attributes) })?;
    // SAFETY: fsmount has just made this descriptor and nothing else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(mount as RawFd) })
}

fn fsopen(filesystem: &CStr) -> Result<OwnedFd, Errno> {
    // SAFETY: the name is terminated and lives across the call (fsopen(2)).
    let fd = answer(unsafe { libc::syscall(libc::SYS_fsopen, filesystem.as_ptr(), libc::FSOPEN_CLOEXEC) })?;
    // SAFETY: fsopen has just made this descriptor and nothing else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

fn fsconfig(context: &OwnedFd, command: c_uint, pair: Option<(&CStr, &CStr)>) -> Result<(), Errno> {
    let (key, value) = pair.map_or((std::ptr::null(), std::ptr::null()), |(key, value)| (key.as_ptr(), value.as_ptr()));
    // SAFETY: key and value are null or terminated and live across the call (fsconfig(2)).
    answer(unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0) })?;
    Ok(())
}

/// Mounts `mount` over this process's root directory.
pub(crate) fn mount_over_root(mount: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: both paths are terminated constants (move_mount(2)).
    answer(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            c"/".as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    })?;
    Ok(())
}

/// Sets the securebits (capabilities(7)).
pub(crate) fn set_securebits(bits: c_int) -> Result<(), Errno> {
    // SAFETY: numbers only.
    Errno::result(unsafe { libc::prctl(libc::PR_SET_SECUREBITS, bits, 0, 0, 0) })?;
    Ok(())
}
