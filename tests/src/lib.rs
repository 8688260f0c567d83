//! What the integration tests and the tools stand on: guest artifacts, the test host, the harness.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

pub mod artifacts;
pub mod boot_trace;
pub mod build;
pub mod child;
pub mod harness;
pub mod host;
pub mod paths;
pub mod payload;
pub mod process_table;
pub mod progress;
pub mod tool;
pub mod vm;
