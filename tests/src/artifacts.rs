//! Kernels, initramfs and disk image of the guests and of the test host, made from Debian's packages.

mod apt;
mod archive;
mod emulator;
mod guest;
mod host;
mod kernel;
mod modules;
pub mod store;

pub use emulator::{Emulator, emulator};
pub use guest::{FILES, GuestFiles, guest};
pub use host::{HostFiles, host};
