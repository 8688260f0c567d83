//! Child processes that end with us and take chosen descriptors along.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;

/// Starts `command` so that it is killed when the calling thread ends, whatever the reason, and keeps
/// `inherited` open in it under the same numbers.
pub fn spawn(command: &mut Command, inherited: Vec<OwnedFd>) -> io::Result<Child> {
    let parent = std::process::id();
    // SAFETY: between fork and exec only prctl, fcntl and getppid are called: system calls without
    // locks or allocation. The closure owns the descriptors, so they are open while it runs.
    unsafe {
        command.pre_exec(move || {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            // The parent may have died before the line above took effect.
            if std::os::unix::process::parent_id() != parent {
                return Err(io::Error::from_raw_os_error(nix::Error::ESRCH as i32));
            }
            for descriptor in &inherited {
                fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::empty()))?;
            }
            Ok(())
        });
    }
    command.spawn()
}

/// Starts `command` in new namespaces of its own.
pub fn spawn_into(command: &mut Command, namespaces: CloneFlags) -> io::Result<Child> {
    // SAFETY: between fork and exec only unshare is called: a system call without locks or allocation.
    unsafe {
        command.pre_exec(move || Ok(unshare(namespaces)?));
    }
    command.spawn()
}

/// The number under which a child sees `descriptor`.
#[must_use]
pub fn number(descriptor: &OwnedFd) -> i32 {
    descriptor.as_raw_fd()
}
