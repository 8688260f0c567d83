//! Signals to `ozone` as something to poll.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd};

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// The signals that end a run.
const ENDING: [Signal; 4] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT];

/// The signals that are passed on: the terminal has another size; the guest's power button is pressed.
const PASSED_ON: [Signal; 2] = [Signal::SIGWINCH, Signal::SIGPWR];

/// The signals `ozone` handles, blocked and readable.
#[derive(Debug)]
pub struct Signals {
    fd: SignalFd,
}

impl Signals {
    /// Blocks the signals for this process and makes them readable.
    ///
    /// # Errors
    /// What sigprocmask(2) or signalfd(2) answers.
    pub fn take() -> Result<Self, Errno> {
        Self::take_these(ENDING.into_iter().chain(PASSED_ON))
    }

    /// Likewise with other signals.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn take_these(signals: impl IntoIterator<Item = Signal>) -> Result<Self, Errno> {
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        // SAFETY: the default action runs no code of this process. A caller that ignores SIGCHLD hands that down, and the
        // exit statuses of our children would be lost (waitid(2), NOTES).
        unsafe { sigaction(Signal::SIGCHLD, &default) }?;
        let mut mask = SigSet::empty();
        for signal in signals {
            mask.add(signal);
        }
        // In the background a change of the terminal's settings stops the program unless this is blocked or ignored; it
        // is ozone that has to put them back.
        let mut blocked = mask;
        blocked.add(Signal::SIGTTOU);
        blocked.thread_block()?;
        Ok(Self { fd: SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)? })
    }

    /// The next signal that has arrived.
    pub fn next(&self) -> Option<Signal> {
        let info = self.fd.read_signal().ok().flatten()?;
        Signal::try_from(i32::try_from(info.ssi_signo).ok()?).ok()
    }
}

impl Signals {
    /// Waits for a while, or for a signal that ends the run.
    pub fn wait(&self, patience: Duration) -> Option<Signal> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(signal) = std::iter::from_fn(|| self.next()).find(|signal| ENDING.contains(signal)) {
                return Some(signal);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            let _ = poll(&mut [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)], timeout);
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
