//! `oracle`: tries a disk, or checks its image. What it finds is one line of JSON.
#![allow(clippy::print_stdout)]

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};
use oracle::{check, late, run};

#[derive(Parser)]
#[command(name = "oracle", about = "Finds writes that a disk acknowledged and lost.")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Writes and reads a disk: what runs in a guest.
    Run(run::Arguments),
    /// Answers every line with the time in microseconds since 1970, until one says "stop".
    Clock,
    /// Resets a disk while it reads, and looks whether the read still comes: what runs in a guest.
    Late(late::Arguments),
    /// Compares an image with the journal of what was acknowledged.
    Check {
        /// The image of the disk.
        #[arg(long)]
        image: PathBuf,
        /// The image of the disk that the journal was written to.
        #[arg(long)]
        journal: PathBuf,
    },
}

fn main() -> Result<()> {
    let found = match Arguments::parse().command {
        Command::Run(arguments) => serde_json::to_string(&run::run(&arguments)?)?,
        Command::Clock => {
            run::clock();
            return Ok(());
        }
        Command::Late(arguments) => serde_json::to_string(&late::run(&arguments)?)?,
        Command::Check { image, journal } => serde_json::to_string(&check::check(&image, &journal)?)?,
    };
    println!("{found}");
    Ok(())
}
