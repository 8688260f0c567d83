//! `cargo xtask soak`: disks whose backend is killed over and over under a checksummed load.
//!
//! The part that runs machines runs in the test host, where this same executable is put.

mod crash_loop;
mod crash_points;
mod kills;
mod report;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent::wire::{self, Exit};
use anyhow::{Context, Result, bail};
use ozone_tests::host::{self, DEFAULT_MEMORY, Parcel, Put, Stdin, TestHost};
use ozone_tests::kills::Random;
use ozone_tests::{build, progress};

use crate::host::show;
use crate::prerequisites;
use report::Report;

/// Options of `cargo xtask soak`.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    plan: Plan,
    /// Write what was found to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only name what this machine lacks.
    #[arg(long)]
    no_install: bool,
}

/// What is done.
#[derive(Clone, Debug, clap::Args)]
pub struct Plan {
    /// How often the disk's backend is killed at a random time.
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    kills: usize,
    /// How many of those kills are of a disk whose device is slow; a fifth if not given.
    #[arg(long, value_name = "NUMBER")]
    delay_kills: Option<usize>,
    /// Where the sequence of random numbers begins.
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,
    /// Kill a backend at every point of the order in which it gives requests back.
    #[arg(long)]
    crash_points: bool,
    /// Kill every backend as soon as it appears, for so many seconds.
    #[arg(long, value_name = "SECONDS")]
    crash_loop: Option<u64>,
}

/// Options of the part that runs in the test host.
#[derive(clap::Args)]
pub struct HereArguments {
    #[command(flatten)]
    plan: Plan,
    #[arg(long)]
    json: PathBuf,
}

impl Plan {
    /// As words of a command line.
    fn words(&self) -> Vec<String> {
        let mut words = vec!["--kills".to_owned(), self.kills.to_string()];
        let mut option = |name: &str, value: Option<u64>| {
            words.extend(value.into_iter().flat_map(|value| [name.to_owned(), value.to_string()]));
        };
        option("--delay-kills", self.delay_kills.map(|kills| kills as u64));
        option("--seed", self.seed);
        option("--crash-loop", self.crash_loop);
        words.extend(self.crash_points.then(|| "--crash-points".to_owned()));
        words
    }

    /// Longer than all of it takes on a slow and busy machine.
    fn deadline(&self) -> Duration {
        let kills = Duration::from_secs(5) * u32::try_from(self.kills).unwrap_or(u32::MAX);
        let points = if self.crash_points { crash_points::DEADLINE } else { Duration::ZERO };
        Duration::from_secs(600) + kills + points + Duration::from_secs(self.crash_loop.unwrap_or(0))
    }
}

/// The report's place in the test host.
const REPORT: &str = "/run/soak.json";

/// Runs it in a test host.
pub fn run(arguments: &Arguments) -> Result<u8> {
    let mut plan = arguments.plan.clone();
    if plan.kills == 0 && !plan.crash_points && plan.crash_loop.is_none() {
        bail!("nothing to do: --kills NUMBER, --crash-points or --crash-loop SECONDS");
    }
    let seed = *plan.seed.get_or_insert_with(Random::any_seed);
    eprintln!("… the seed is {seed}");
    prerequisites::ensure_programs(!arguments.no_install)?;
    let executables = build::product()?.into_iter().chain(build::companions()?).chain([build::xtask()?]);
    let mut puts: Vec<_> = executables.map(Put::executable).collect();
    if plan.crash_points {
        puts.push(crash_points::executable()?);
    }
    let snapshot = host::snapshot(DEFAULT_MEMORY)?;
    let parcel = Parcel::pack(&puts)?;
    let mut host = progress::step("resume the test host", || TestHost::resume(&snapshot, &parcel))?;
    let argv = [&host::executable("xtask"), "soak-here", "--json", REPORT].map(str::to_owned).into_iter();
    let command = wire::Command { argv: argv.chain(plan.words()).collect(), env: host::environment(), terminal: None };
    let exit = host.run(command, Stdin::Empty, Some(plan.deadline()), &mut show)?;
    if let Some(json) = &arguments.json {
        // A run that got nowhere has said why, and left no report.
        let report = match host.fetch(REPORT) {
            Err(_) if exit != Exit::Code(0) => return Ok(1),
            report => report?,
        };
        fs::write(json, report).with_context(|| format!("write {}", json.display()))?;
    }
    Ok(u8::try_from(exit.shell_code()).unwrap_or(u8::MAX))
}

/// Runs it on this machine.
pub fn here(arguments: &HereArguments) -> Result<u8> {
    let plan = &arguments.plan;
    let seed = plan.seed.unwrap_or_else(Random::any_seed);
    let mut report = Report::new(seed);
    let outcome = all(plan, seed, &mut report);
    // What was found before something failed counts too.
    report.conclude(outcome.as_ref().err());
    write(&arguments.json, &report)?;
    println!("{report}");
    outcome?;
    Ok(u8::from(!report.ok))
}

fn all(plan: &Plan, seed: u64, report: &mut Report) -> Result<()> {
    let mut random = Random::new(seed);
    if plan.kills > 0 {
        let slow = plan.delay_kills.unwrap_or(plan.kills / 5).min(plan.kills);
        report.process_start_ms = kills::process_start()?;
        for (medium, count) in kills::mediums(plan.kills - slow, slow) {
            report.kills.push(kills::run(medium, count, &mut random)?);
        }
    }
    if plan.crash_points {
        crash_points::run(report)?;
    }
    if let Some(seconds) = plan.crash_loop {
        report.crash_loop = Some(crash_loop::run(Duration::from_secs(seconds))?);
    }
    Ok(())
}

fn write(path: &Path, report: &Report) -> Result<()> {
    let text = serde_json::to_string_pretty(&report.json())? + "\n";
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}
