//! The core's half of a virtio device: what the guest's driver sees. The other half is a backend process.
//!
//! [`device`] is what the transport and the backend's attendant share, [`state`] what a transport remembers, [`mmio`] the
//! transport. [`attendant`] decides what is said to the backend and when: [`handshake`] greets an [`incarnation`] of it,
//! [`replay`] hands it the driver's queues with their [`signals`] and what earlier ones left [`inflight`], and
//! [`conversation`] is how long that may take.

pub mod attendant;
pub mod conversation;
pub mod device;
mod features;
mod handshake;
mod incarnation;
mod inflight;
pub mod mmio;
mod replay;
pub mod signals;
pub mod state;
