//! The integration tests. `cargo xtask test` runs them; see `ozone_tests::harness`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

mod audit;
mod boot;
mod canary;
mod cgroup;
mod console;
mod cost;
mod disk;
mod documents;
mod gc;
mod hostile;
mod hostile_backend;
mod input;
mod jail;
mod jailer;
mod kvm_device;
mod lifecycle;
mod many;
mod net;
mod restart;
mod restart_commands;
mod restart_guest;
mod restart_late;
mod rootless;
mod systemd;
mod the_host;
mod trace;
mod traces;

use std::process::ExitCode;

use ozone_tests::harness::{self, Test};

fn main() -> ExitCode {
    harness::main(&tests())
}

/// Every test.
fn tests() -> Vec<Test> {
    [
        the_host::TESTS.as_slice(),
        &audit::TESTS,
        &boot::TESTS,
        &disk::TESTS,
        &documents::TESTS,
        &net::TESTS,
        &console::TESTS,
        &lifecycle::TESTS,
        &gc::TESTS,
        &jail::TESTS,
        &jailer::TESTS,
        &hostile::TESTS,
        &hostile_backend::TESTS,
        &input::TESTS,
        &cost::TESTS,
        &trace::TESTS,
        &cgroup::TESTS,
        &canary::TESTS,
        &restart::TESTS,
        &restart_commands::TESTS,
        &restart_guest::TESTS,
        &restart_late::TESTS,
        &rootless::TESTS,
        &systemd::TESTS,
        &many::TESTS,
    ]
    .concat()
}
