//! The user's terminal: its settings are saved before a console makes it raw, and put back whatever happens.

use std::io::IsTerminal;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use nix::fcntl::OFlag;
use nix::libc;
use nix::sys::termios::{SetArg, Termios, tcgetattr, tcsetattr};
use nix::unistd::{getpgrp, tcgetpgrp};

use super::reopen;
use crate::ioctl;

/// The terminal to put back and how it was, where a panic finds it too.
static SAVED: Mutex<Option<(OwnedFd, libc::termios)>> = Mutex::new(None);

/// The terminal that `ozone` was started on. Dropping it restores the settings.
#[derive(Debug)]
pub struct Terminal {
    fd: OwnedFd,
}

impl Terminal {
    /// The terminal of standard input and output, if both are one and `ozone` is in its foreground.
    pub fn of_stdio() -> Option<Self> {
        let stdin = std::io::stdin();
        // In the background the terminal belongs to another program, whose input a console would eat.
        let ours = stdin.is_terminal() && std::io::stdout().is_terminal() && tcgetpgrp(&stdin) == Ok(getpgrp());
        if !ours {
            return None;
        }
        // An open file description of its own keeps the console's flags off the caller's. After 'su' the terminal belongs to
        // another user, and the caller's description has to do.
        let fd = reopen(&stdin, OFlag::O_RDWR).ok().or_else(|| stdin.as_fd().try_clone_to_owned().ok())?;
        let settings = tcgetattr(&fd).ok()?;
        let copy = fd.try_clone().ok()?;
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some((copy, settings.into()));
        Some(Self { fd })
    }

    /// Columns and rows; `None` when the terminal does not say.
    pub fn size(&self) -> Option<(u16, u16)> {
        ioctl::window_size(self.fd.as_fd()).ok()
    }
}

impl AsFd for Terminal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        restore();
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Puts the terminal's settings back, if there is one to restore.
pub fn restore() {
    if let Some((terminal, settings)) = &*SAVED.lock().unwrap_or_else(PoisonError::into_inner) {
        // Not TCSADRAIN: it waits until the terminal's output is taken, and on a stopped line nobody takes it.
        let _ = tcsetattr(terminal, SetArg::TCSANOW, &Termios::from(*settings));
    }
}
