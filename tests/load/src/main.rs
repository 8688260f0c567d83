//! `load`: one measurement, or one check, of a device's backend. What it finds is one line of JSON.
#![allow(clippy::print_stdout)]

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};
use load::partner::Image;
use load::{blk, check, net, stream};

#[derive(Parser)]
#[command(name = "load", about = "Drives a device's backend without a guest, or the network from within one.")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Makes an image that is stamped throughout, as `blk` expects it for reads.
    Stamp {
        /// Where.
        #[arg(long)]
        image: PathBuf,
        /// How large.
        #[arg(long)]
        bytes: u64,
    },
    /// Writes a stamped pattern through the device, reads it back and looks into the image.
    Check {
        #[command(flatten)]
        image: Image,
        /// Bytes of a request.
        #[arg(long, default_value_t = 4096)]
        block: usize,
        /// Requests in flight per queue.
        #[arg(long, default_value_t = 32)]
        depth: usize,
    },
    /// Measures a disk.
    Blk(blk::Arguments),
    /// Measures a network interface.
    Net(net::Arguments),
    /// Measures round trips over TCP between a guest and its host: the guest's side.
    Stream(stream::Arguments),
}

fn main() -> Result<()> {
    let found = match Arguments::parse().command {
        Command::Stamp { image, bytes } => serde_json::to_string(&check::stamp(&image, bytes)?)?,
        Command::Check { image, block, depth } => serde_json::to_string(&check::run(&image, block, depth)?)?,
        Command::Blk(arguments) => serde_json::to_string(&blk::run(&arguments)?)?,
        Command::Net(arguments) => serde_json::to_string(&net::run(&arguments)?)?,
        Command::Stream(arguments) => serde_json::to_string(&stream::run(&arguments)?)?,
    };
    println!("{found}");
    Ok(())
}
