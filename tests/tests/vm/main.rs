//! The integration tests. `cargo xtask test` runs them; see `ozone_tests::harness`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

mod the_host;

use std::process::ExitCode;

use ozone_tests::harness;

fn main() -> ExitCode {
    let tests = [the_host::TESTS.as_slice()].concat();
    harness::main(&tests)
}
