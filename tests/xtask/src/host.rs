//! `cargo xtask host`.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use agent::wire::{self, Channel};
use anyhow::{Context, Result};
use ozone_tests::host::{self, DEFAULT_MEMORY, Parcel, Put, Stdin, TestHost};
use ozone_tests::{build, progress};

use crate::prerequisites;

/// Options of `cargo xtask host`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Put this file into the host's PATH; FILE:PATH puts it at that absolute path.
    #[arg(long, value_name = "FILE[:PATH]")]
    put: Vec<String>,
    /// The host's memory, such as 4G.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
    /// Kill everything after this many seconds; without it a command may run for ever.
    #[arg(long, value_name = "SECONDS")]
    deadline: Option<u64>,
    /// Only name what this machine lacks.
    #[arg(long)]
    no_install: bool,
    /// The command; without one a shell.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Runs the command in a test host and returns its exit status.
pub fn run(arguments: Arguments) -> Result<u8> {
    prerequisites::ensure_programs(!arguments.no_install)?;
    let mut puts: Vec<_> = build::product()?.into_iter().map(Put::executable).collect();
    puts.extend(arguments.put.iter().map(|text| parse_put(text)));
    let snapshot = host::snapshot(arguments.memory.unwrap_or(DEFAULT_MEMORY))?;
    let parcel = Parcel::pack(&puts)?;
    let mut host = progress::step("resume the test host", || TestHost::resume(&snapshot, &parcel))?;
    let argv = match arguments.command.is_empty() {
        true => vec!["/bin/sh".to_owned(), "-l".to_owned()],
        false => arguments.command,
    };
    let terminal = if host::is_terminal() { host::window() } else { None };
    let command = wire::Command { argv, env: host::environment(), terminal };
    let deadline = arguments.deadline.map(Duration::from_secs);
    let exit = host.run(command, Stdin::Ours, deadline, &mut show)?;
    Ok(u8::try_from(exit.shell_code()).unwrap_or(u8::MAX))
}

/// Passes a command's output on as it comes.
pub fn show(channel: Channel, bytes: &[u8]) {
    // Whoever reads our output may be gone; the command's end still counts.
    let _ = match channel {
        Channel::Stderr => io::stderr().write_all(bytes),
        _ => io::stdout().write_all(bytes).and_then(|()| io::stdout().flush()),
    };
}

fn parse_put(text: &str) -> Put {
    match text.rsplit_once(':') {
        Some((from, to)) if to.starts_with('/') => Put { from: from.into(), to: to.to_owned() },
        _ => Put::executable(PathBuf::from(text)),
    }
}

/// Parses a size in bytes with a suffix of K, M, G or none.
fn parse_size(text: &str) -> Result<u64> {
    let (number, unit) = match text.find(|it: char| !it.is_ascii_digit()) {
        Some(end) => text.split_at(end),
        None => (text, ""),
    };
    let shift = match unit {
        "" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        _ => anyhow::bail!("'{unit}' is no unit: use K, M or G"),
    };
    let number: u64 = number.parse().with_context(|| format!("'{text}' is no size"))?;
    number.checked_shl(shift).filter(|size| *size >= 256 << 20).context("at least 256M")
}
