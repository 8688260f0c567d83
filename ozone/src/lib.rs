//! The launcher and supervisor of a virtual machine: it opens every host path, puts every other process in its jail,
//! and sees to their end.

pub mod audit;
pub mod cgroup;
pub mod cli;
pub mod confine;
pub mod control;
#[cfg(feature = "crash-points")]
pub mod crash;
pub mod directory;
pub mod exit;
pub mod gc;
pub mod ioctl;
pub mod jail;
pub mod jailer;
pub mod journal;
pub mod landlock;
pub mod notify;
pub mod process;
pub mod record;
pub mod report;
pub mod resources;
pub mod runtime;
pub mod socket;
pub mod spec;
pub mod supervisor;
pub mod time;
pub mod trace;
pub mod uids;
