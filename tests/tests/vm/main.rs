//! The integration tests. `cargo xtask test` runs them; see `ozone_tests::harness`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

mod boot;
mod console;
mod cost;
mod disk;
mod input;
mod jail;
mod lifecycle;
mod net;
mod the_host;
mod trace;

use std::process::ExitCode;

use ozone_tests::harness;

fn main() -> ExitCode {
    let tests = [
        the_host::TESTS.as_slice(),
        &boot::TESTS,
        &disk::TESTS,
        &net::TESTS,
        &console::TESTS,
        &lifecycle::TESTS,
        &jail::TESTS,
        &input::TESTS,
        &cost::TESTS,
        &trace::TESTS,
    ]
    .concat();
    harness::main(&tests)
}
