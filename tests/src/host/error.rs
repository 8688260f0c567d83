//! Ends of a run that are not the command's own.

use std::path::PathBuf;
use std::time::Duration;

/// Why a run in the test host gave no exit status.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The emulated machine itself failed: says nothing about what was run in it.
    #[error("infrastructure failure: the test host {what}; its log is {}\n{last_lines}", log.display())]
    Infrastructure {
        /// What it did.
        what: String,
        /// Its serial line's output, in full.
        log: PathBuf,
        /// The end of that log.
        last_lines: String,
    },
    /// The command ran longer than it may.
    #[error("not finished after {0:?}; everything in the test host was killed")]
    Deadline(Duration),
}
