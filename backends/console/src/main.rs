//! `ozone-console`: the back-end of one virtio-console device (virtio 1.2, section 5.3) with one port.
//!
//! Bytes go through two bounded buffers, so that neither side waits for the other: the threads of [`host`] know the
//! terminal, the pipe, the pseudo-terminal or the socket, the handlers of [`queues`] know the rings.

mod buffer;
mod device;
mod escape;
mod host;
mod input;
mod output;
mod queues;
mod terminal;

use std::process::ExitCode;

use nix::sys::signal::Signal;
use seccomp::Role;

fn main() -> ExitCode {
    // SIGTERM and not SIGKILL when ozone dies: the user's terminal has to be restored.
    virtio_backend::run(Role::Console, Signal::SIGTERM, device::open)
}
