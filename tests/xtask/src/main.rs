//! The project's own commands: `cargo xtask demo`, `cargo xtask test`, `cargo xtask host`, `cargo xtask bench`,
//! `cargo xtask soak`.
#![allow(clippy::print_stdout)]

mod bench;
mod demo;
mod host;
mod prerequisites;
mod privileged;
mod soak;
mod test;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// The exit code for "this machine lacks something", after the command that would install it.
const LACKING: u8 = 2;

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Builds, tests and shows ozone.")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boots Debian's kernel with a disk, a NIC and a console, each in its own jailed process.
    Demo(demo::Arguments),
    /// Checks format and lints, and runs every test.
    Test(test::Arguments),
    /// Runs a shell or one command in the test host, where KVM works.
    Host(host::Arguments),
    /// Measures the product, beside its partners.
    Bench(bench::Arguments),
    /// Kills disks' backends over and over under a load that knows what must not be lost.
    Soak(soak::Arguments),
    /// The part of `demo` that runs where KVM is.
    #[command(hide = true)]
    DemoHere(demo::HereArguments),
    /// The part of `bench` that runs in the test host.
    #[command(hide = true)]
    BenchHere(bench::HereArguments),
    /// The part of `soak` that runs in the test host.
    #[command(hide = true)]
    SoakHere(soak::HereArguments),
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => ExitCode::from(code),
        Err(error) if error.is::<prerequisites::Lacking>() => {
            eprintln!("{error}");
            ExitCode::from(LACKING)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<u8> {
    match command {
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Test(arguments) => test::run(&arguments),
        Command::Host(arguments) => host::run(arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Soak(arguments) => soak::run(&arguments),
        Command::DemoHere(arguments) => demo::here(&arguments),
        Command::BenchHere(arguments) => bench::here(&arguments),
        Command::SoakHere(arguments) => soak::here(&arguments),
    }
}
