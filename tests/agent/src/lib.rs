//! What the agent in the test host and the programs outside it have in common: the frames on the
//! virtio-serial port and the layout of the host's file system.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod layout;
pub mod wire;
