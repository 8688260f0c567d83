//! The project's own commands: `cargo xtask demo`, `cargo xtask test`, `cargo xtask host`.
#![allow(clippy::print_stdout)]

mod host;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Builds, tests and shows ozone.")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs a shell or one command in the test host, where KVM works.
    Host(host::Arguments),
}

fn main() {
    let result = match Arguments::parse().command {
        Command::Host(arguments) => host::run(arguments),
    };
    match result {
        Ok(code) => std::process::exit(code),
        Err(error) => {
            eprintln!("error: {error:#}");
            std::process::exit(1);
        }
    }
}
