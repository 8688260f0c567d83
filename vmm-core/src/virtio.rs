//! The core's half of a virtio device: what the guest's driver sees. The other half is a backend process.
//!
//! [`device`] is what the transport and the backend's attendant share, [`state`] what a transport remembers,
//! [`mmio`] the transport, [`vhost`] what is said to the backend, and [`conversation`] how long that may take.

pub mod conversation;
pub mod device;
pub mod mmio;
pub mod state;
pub mod vhost;
