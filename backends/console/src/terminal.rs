//! The user's terminal: made raw, and restored whatever happens.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// The terminal and how it was, from before it is made raw until the process ends.
static SAVED: OnceLock<(RawFd, libc::termios)> = OnceLock::new();

/// Has SIGTERM restore the terminal and end the process.
///
/// Every console asks for it: the first process of a pid namespace is spared the signals that it has no handler for
/// (pid_namespaces(7)), and SIGTERM is how it learns of the death of `ozone`.
///
/// # Errors
/// What sigaction(2) answers.
pub fn end_on_sigterm() -> nix::Result<()> {
    handle(Signal::SIGTERM, SigHandler::Handler(on_end))
}

fn handle(signal: Signal, handler: SigHandler) -> nix::Result<()> {
    let action = SigAction::new(handler, SaFlags::empty(), SigSet::empty());
    // SAFETY: `on_end` calls nothing but what a handler may (signal-safety(7)); to ignore a signal runs no code.
    unsafe { sigaction(signal, &action) }.map(drop)
}

/// Makes the user's terminal raw, and sees to it that a panic restores it.
///
/// # Errors
/// ENOTTY for what is no terminal, and what else the kernel answers.
pub fn take(terminal: BorrowedFd<'_>) -> nix::Result<()> {
    let saved = attributes(terminal)?;
    if SAVED.set((terminal.as_raw_fd(), saved)).is_err() {
        return Err(Errno::EBUSY);
    }
    // Should this process be in the background of its terminal, a change of it or a read from it must not stop it.
    handle(Signal::SIGTTOU, SigHandler::SigIgn)?;
    handle(Signal::SIGTTIN, SigHandler::SigIgn)?;
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        restore();
        report(panic);
    }));
    make_raw(terminal)
}

/// Puts the user's terminal back to what it was. It may be called by anyone, often, and in a signal handler.
pub fn restore() {
    if let Some((terminal, saved)) = SAVED.get() {
        // SAFETY: the request reads one `struct termios`; the number is the terminal's, which stays open with the process.
        let _ = unsafe { libc::ioctl(*terminal, libc::TCSETS, &raw const *saved) };
    }
}

extern "C" fn on_end(_signal: libc::c_int) {
    restore();
    // SAFETY: it ends the process and touches nothing.
    unsafe { libc::_exit(128 + libc::SIGTERM) }
}

/// Makes a terminal raw: bytes pass unchanged, and none is a signal. For the master of a pseudo-terminal it is the
/// slave that is made raw.
///
/// # Errors
/// What ioctl(2) answers.
pub fn make_raw(terminal: BorrowedFd<'_>) -> nix::Result<()> {
    let mut raw = attributes(terminal)?;
    // SAFETY: it changes fields of the structure that it is given.
    unsafe { libc::cfmakeraw(&raw mut raw) };
    // SAFETY: the request reads one `struct termios`.
    Errno::result(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TCSETS, &raw const raw) }).map(drop)
}

/// Columns and rows of a terminal; zeroes if it has no size.
pub fn size(terminal: BorrowedFd<'_>) -> (u16, u16) {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the request fills in one `struct winsize`.
    let _ = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    (size.ws_col, size.ws_row)
}

/// The C library's structure begins with the kernel's, so it is used with the kernel's requests: which requests the
/// library's functions make differs from version to version, and the filter has to know them.
fn attributes(terminal: BorrowedFd<'_>) -> nix::Result<libc::termios> {
    // SAFETY: all zeroes are a valid `struct termios`.
    let mut attributes: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: the request fills in the kernel's `struct termios`, with which the structure begins.
    Errno::result(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TCGETS, &raw mut attributes) })?;
    Ok(attributes)
}
