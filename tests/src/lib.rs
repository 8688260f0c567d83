//! What the integration tests and the tools stand on: guest artifacts, the test host, the harness.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

pub mod artifacts;
pub mod backends;
pub mod boot_trace;
pub mod build;
pub mod child;
pub mod control;
pub mod delay;
pub mod harness;
pub mod host;
pub mod kills;
pub mod paths;
pub mod payload;
pub mod process_table;
pub mod product;
pub mod progress;
pub mod systemd;
pub mod tool;
pub mod trial;
pub mod vm;
