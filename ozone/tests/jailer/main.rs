//! `ozone jail`: what a program of unknown nature finds in its jail, what the host sees of it, and what is left of it.
//!
//! This executable is its own jailed program: under the name `probe` it looks around and tells ([`probe`]). Every test runs the
//! real `ozone`. What needs root is shown as ignored without it, never as passed; what needs control groups of the second
//! version is among the integration tests, in `tests/tests/vm/jailer.rs`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

mod closest;
mod life;
mod options;
mod ordinary;
mod probe;
mod sources;
mod support;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};
use nix::unistd::Uid;

/// A test, and whether it needs root.
type Test = (&'static str, bool, fn() -> Result<(), Failed>);

fn main() -> ExitCode {
    let name = std::env::args().next().unwrap_or_default();
    if name.ends_with("/probe") {
        return probe::main();
    }
    let root = Uid::effective().is_root();
    let tests = [closest::TESTS, options::TESTS, sources::TESTS, life::TESTS, ordinary::TESTS].concat();
    let trial = |(name, needs_root, body): Test| {
        let ignored = needs_root && !root;
        let reason = if ignored { " (needs root)" } else { "" };
        Trial::test(format!("{name}{reason}"), body).with_ignored_flag(ignored)
    };
    libtest_mimic::run(&Arguments::from_args(), tests.into_iter().map(trial).collect()).exit_code()
}
