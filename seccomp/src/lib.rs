//! The system calls each role may make, and the filters made of them.
//!
//! Every role has one file under [`policy`], and three filters follow one another. The *launch* filter is installed by the
//! jailer before `execveat`. The *set-up* filter is installed by the process itself, first thing in its `main`, and takes
//! away what only the start of an executable needs. The *run* filter is installed before it says that it is ready:
//! filters only ever add up, so what the run table leaves out is gone. A call that no table allows ends the process with
//! SIGSYS (seccomp(2), SECCOMP_RET_KILL_PROCESS). Foreign architectures are refused by a filter's first instruction,
//! x32 by having other call numbers.
//!
//! A few calls of the C library's start are neither needed nor fatal: they are answered with EPERM or ENOSYS by two more
//! filters ([`policy::start::ANSWERED`], [`policy::start::ABSENT`]).

pub mod filter;
pub mod policy;

pub use filter::{Check, FilterError, Rule, install_run, install_setup, launch_filters};
pub use policy::Role;
