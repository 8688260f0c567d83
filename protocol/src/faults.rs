//! Faults of the processor in a jailed process.
#![allow(unsafe_code)]

use std::io;

use nix::sys::signal::{SigHandler, Signal, signal};

/// Gives SIGSEGV and SIGBUS back to the kernel.
///
/// The standard library's handlers, which look for an overflowed stack, make calls that no run table has: a defect would
/// look like an attack. With the default action the process ends of what happened.
pub(crate) fn end_the_process() -> io::Result<()> {
    for fault in [Signal::SIGSEGV, Signal::SIGBUS] {
        // SAFETY: the default action runs no code of this process, and what the handlers were for is not relied on.
        unsafe { signal(fault, SigHandler::SigDfl) }?;
    }
    Ok(())
}
