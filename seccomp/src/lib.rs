//! The system calls each role may make, and the filters made of them.
//!
//! Every role has one file under [`policy`] with two tables. The *launch* table is in force from before `execve`: it
//! holds what the start of a static executable and the setting up of the role need. The *run* table is installed by the
//! process itself before it says that it is ready; filters only ever add up, so what the run table leaves out is gone.
//! A call that no table allows ends the process with SIGSYS (seccomp(2), SECCOMP_RET_KILL_PROCESS). Foreign
//! architectures are refused by the filter's first instruction, x32 by having other call numbers.
//!
//! A few calls of the C library's start are neither needed nor fatal: they are answered with EPERM by a second
//! stacked filter ([`policy::start::ANSWERED`]).

pub mod filter;
pub mod policy;

pub use filter::{Check, FilterError, Rule, install_run, launch_filters};
pub use policy::Role;
