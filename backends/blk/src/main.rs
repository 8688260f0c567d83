//! `ozone-blk`: the back-end of one virtio-blk device (virtio 1.2, section 5.2) on a raw image or a block device.

mod bounce;
mod device;
mod image;
mod queue;
mod request;
mod transfer;
mod uring;
mod writes;

use std::process::ExitCode;

use nix::sys::signal::Signal;
use seccomp::Role;

fn main() -> ExitCode {
    virtio_backend::run(Role::Blk, Signal::SIGKILL, device::open)
}
