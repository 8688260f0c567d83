//! Kernels, initramfs and disk image of the guests and of the test host, made from Debian's packages.

mod apt;
mod archive;
mod closure;
mod emulator;
mod ext4;
mod guest;
mod host;
mod initramfs;
mod kernel;
mod modules;
mod programs;
pub mod store;
mod userland;

pub use emulator::{Emulator, emulator};
pub use guest::{FILES, GuestFiles, guest};
pub use host::{HostFiles, host};
pub use initramfs::with_programs;
pub use programs::{Programs, programs};
pub use userland::{Userland, userland, userland_puts};
