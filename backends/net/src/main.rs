//! `ozone-net`: the back-end of one virtio-net device (virtio 1.2, section 5.1) on the queues of a tap.

mod control;
mod device;
mod receive;
mod tap;
mod transmit;

use std::process::ExitCode;

use nix::sys::signal::Signal;
use seccomp::Role;

fn main() -> ExitCode {
    virtio_backend::run(Role::Net, Signal::SIGKILL, device::open)
}
