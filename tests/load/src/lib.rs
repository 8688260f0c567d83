//! Load for a device's backend: the front-end of vhost-user and a driver that is as fast as can be, without a guest.

pub mod blk;
pub mod check;
pub mod cpu;
pub mod disk;
pub mod frame;
pub mod frontend;
pub mod histogram;
pub mod memory;
pub mod net;
pub mod partner;
pub mod ring;
pub mod stream;
pub mod vhost_net;
pub mod wire;

pub use oracle::stamp;
