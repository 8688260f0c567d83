//! The core's threads, each under a filter of its own.
//!
//! No filter is installed in all threads at once: the kernel does that only for threads that have the same ones
//! (seccomp(2), SECCOMP_FILTER_FLAG_TSYNC), and a vCPU may less than the others. So each takes its own, when it has nothing
//! left to set up and before any vCPU runs.

use protocol::{Fault, process};
use seccomp::CoreThread;

/// Starts a thread that sets nothing up, and returns once its run filter is in force.
///
/// # Errors
/// A host fault when there is no room for a thread or the kernel refuses the filter.
pub fn spawn(kind: CoreThread, name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), Fault> {
    process::spawn_prepared(name, move || confine(kind), body)
}

/// Installs the run filter of the calling thread.
///
/// # Errors
/// A host fault when the kernel refuses it.
pub fn confine(kind: CoreThread) -> Result<(), Fault> {
    seccomp::install_core_thread(kind).map_err(|error| Fault::host(error.to_string()))
}
