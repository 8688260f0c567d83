//! What every device backend shares: one process, one vhost-user socket, one device.
//!
//! [`run`] is the life of a backend process. [`server`] answers the vhost-user requests of the core, [`vring`] keeps
//! what it has been told about each virtqueue until that is enough to start one, [`worker`] is the thread that serves
//! it, [`ring`] and [`chain`] are the split virtqueue, [`inflight`] records what it has in flight, and [`buffers`] is the only way in which a backend, or the
//! kernel on its behalf, reads or writes guest memory ([`memory`]). A device ([`device::Device`]) knows nothing of all
//! that: it gets rings and hands back what it did.
//!
//! Everything that comes from the core or the guest is taken as hostile: a request that makes no sense is refused, a
//! ring that makes no sense latches its queue as failed, and neither ends the process nor disturbs another queue.

pub mod buffers;
pub mod chain;
#[cfg(feature = "crash-points")]
pub mod crash;
pub mod descriptor;
pub mod device;
pub mod heartbeat;
pub mod inflight;
pub mod memory;
pub mod outbox;
pub mod ring;
pub mod run;
pub mod server;
#[cfg(feature = "testing")]
pub mod testing;
pub mod threads;
pub mod vring;
pub mod worker;

pub use buffers::Buffers;
pub use chain::Chain;
pub use device::{Device, Next, Opened, QueueHandler};
pub use heartbeat::Pulse;
pub use memory::Memory;
pub use outbox::Outbox;
pub use protocol::log::Rare;
pub use ring::{Ring, RingError};
pub use run::run;
