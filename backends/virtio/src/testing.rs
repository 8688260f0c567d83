//! For the tests of the backends: the real executable as a process, the front-end's half of vhost-user, and the driver's
//! half of a virtqueue by hand, so that it can break every rule.
//!
//! Every wait has a deadline: a process that outlives [`DEADLINE`] is killed, which ends whatever waits for it.
#![allow(unsafe_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod driver;
mod process;

pub use driver::{Guest, NEXT, Queue, USER, WRITE};
pub use process::{
    Backend, Frontend, Record, VERSION_1, config, connect, crash_points, enable, enable_from, negotiate, spawn,
};
pub use vhost::vhost_user;
pub use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

use std::time::Duration;

/// The longest that anything in a test may take.
pub const DEADLINE: Duration = Duration::from_secs(20);
