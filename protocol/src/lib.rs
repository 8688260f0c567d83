//! What the processes of one virtual machine say to each other.
//!
//! `ozone` starts every other process with one connected `SOCK_SEQPACKET` socket and nothing else; all that the
//! process needs, descriptors included, arrives over it in the messages of this crate. [`link`] carries messages
//! and descriptors, [`message`] names them, [`device`] describes the devices, [`fault`] is the one form in which any
//! process reports why it cannot go on, [`trace`] says when a launch did what, and [`process`] and [`log`](mod@log) are what every jailed process does first.

mod allocator;
pub mod device;
pub mod fault;
mod faults;
pub mod link;
pub mod log;
pub mod message;
pub mod process;
pub mod trace;

pub use device::{BlkSpec, ConsoleHost, ConsoleSpec, DeviceId, DeviceKind, DeviceSpec, NetSpec};
pub use fault::{Fault, FaultKind};
pub use link::{Channel, Descriptor, LinkError};
pub use message::{
    Attach, Boot, Cause, CpuModel, Cpus, FromBackend, FromCore, Machine, Memory, Slot, Start, ToBackend, ToCore,
};
