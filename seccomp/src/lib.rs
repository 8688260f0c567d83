//! The system calls each role may make, and the filters made of them.
//!
//! Every role has one file under [`policy`], and three filters follow one another. The *launch* filter is installed by the
//! jailer before `execveat`. The *set-up* filter is installed by the process itself, first thing in its `main`, and takes
//! away what only the start of an executable needs. The *run* filter is installed before it says that it is ready, by the
//! core in each thread for itself ([`CoreThread`]): filters only ever add up, so what the run table leaves out is gone. A
//! call that no table allows is not made, and ends the process with SIGSYS and a report of which it was ([`forbidden`]).
//! A call of a foreign architecture, x32 among them, ends it without one (SECCOMP_RET_KILL_PROCESS).
//!
//! `ozone` itself has one filter, from before its first child ([`policy::ozone`]). Its children inherit it, so that it is the
//! union of what it and they call.
//!
//! A program that `ozone jail` runs is of unknown nature: it has a list of what it may not ([`policy::program`]).
//!
//! A few calls of the C library's start are neither needed nor fatal: they are answered with EPERM or ENOSYS by two more
//! filters ([`policy::start::ANSWERED`], [`policy::start::ABSENT`]).

pub mod filter;
pub mod forbidden;
pub mod names;
pub mod policy;
#[cfg(test)]
mod tables;

pub use filter::{
    Check, FilterError, Rule, init_filter, install_core_thread, install_ozone, install_run, install_setup,
    launch_filters, program_filters, refuse_x32,
};
pub use policy::{CoreThread, Role};
