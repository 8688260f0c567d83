//! Suites that run in the test host.

use std::fs;
use std::path::Path;
use std::time::Duration;

use agent::wire;
use anyhow::{Context as _, Result, bail, ensure};
use ozone_tests::host::{self, Clock, Parcel, Put, Snapshot, Stdin, TestHost};
use ozone_tests::{artifacts, build, progress};

use super::noise::{Mark, Noise};
use super::row::Report;
use super::suites::Suite;
use super::{Arguments, stats};
use crate::host::show;

/// The report's place in the test host.
const REPORT: &str = "/run/bench.json";

/// Where partners' executables are put in the test host.
const PARTNERS: &str = "/partners";

/// The longest that a suite takes in the test host.
const DEADLINE: Duration = Duration::from_secs(3600);

/// The longest that two runs of one contender take where instructions are counted, and how often they are tried.
const APART: Duration = Duration::from_secs(120);
const ATTEMPTS: u32 = 4;

/// Runs a suite in one test host.
pub fn together(suite: &Suite, memory: u64, arguments: &Arguments) -> Result<Report> {
    Nested::prepare(suite, memory, Clock::Wall, arguments)?.measure(arguments.runs, None, DEADLINE)
}

/// Runs a suite in test hosts that count instructions: one for each contender and run, in turns.
///
/// A machine that counts instructions and has a hypervisor in it does not last: one guest in some forty leaves it with a
/// processor that turns in circles, in the emulated kernel or in the guest's. With a host for every two guests such a one
/// costs some minutes and another attempt.
pub fn apart(suite: &Suite, memory: u64, contenders: &[String], arguments: &Arguments) -> Result<Report> {
    let nested = Nested::prepare(suite, memory, Clock::Instructions, arguments)?;
    let mut all: Option<Report> = None;
    let mut given_up = Vec::new();
    for _ in 0..arguments.runs {
        for contender in contenders {
            if given_up.contains(contender) {
                continue;
            }
            let Some(report) = nested.attempt(contender) else {
                given_up.push(contender.clone());
                continue;
            };
            match &mut all {
                Some(all) => all.add(report),
                None => all = Some(report),
            }
        }
    }
    let mut report = all.context("no contender could be measured")?;
    report.rows = stats::merge(report.rows);
    report.missing.extend(given_up.into_iter().map(|it| format!("{it}: not in {ATTEMPTS} attempts")));
    Ok(report)
}

/// What resumes test hosts for a suite.
struct Nested<'a> {
    suite: &'a Suite,
    clock: Clock,
    snapshot: Snapshot,
    parcel: Parcel,
    options: Vec<String>,
}

impl<'a> Nested<'a> {
    fn prepare(suite: &'a Suite, memory: u64, clock: Clock, arguments: &Arguments) -> Result<Self> {
        drop(artifacts::guest()?);
        let mut puts: Vec<_> = build::product()?.into_iter().chain([build::xtask()?]).map(Put::executable).collect();
        puts.extend((suite.puts)()?);
        let mut options = Vec::new();
        if arguments.full {
            options.push("--full".to_owned());
        }
        if let Some(folder) = &arguments.partners {
            puts.extend(folder_puts(folder)?);
            options.extend(["--partners".to_owned(), PARTNERS.to_owned()]);
        }
        let snapshot = host::snapshot_of(memory, clock)?;
        Ok(Self { suite, clock, snapshot, parcel: Parcel::pack(&puts)?, options })
    }

    /// Measures once in a fresh host, or only one contender.
    fn measure(&self, runs: usize, only: Option<&str>, deadline: Duration) -> Result<Report> {
        let runs = runs.to_string();
        let mut argv: Vec<String> =
            [&host::executable("xtask"), "bench-here", self.suite.name, "--json", REPORT, "--runs", &runs]
                .map(str::to_owned)
                .to_vec();
        argv.extend(self.options.iter().cloned());
        argv.extend(only.into_iter().flat_map(|only| ["--only".to_owned(), only.to_owned()]));
        let mut host = progress::step("resume the test host", || TestHost::resume(&self.snapshot, &self.parcel))?;
        let command = wire::Command { argv, env: host::environment(), terminal: None };
        let (mark, mut noise) = (Mark::now()?, Noise::default());
        let exit = host.run(command, Stdin::Empty, Some(deadline), &mut show)?;
        if exit != wire::Exit::Code(0) {
            bail!("the suite {} ended with {}", self.suite.name, exit.shell_code());
        }
        let mut report: Report = serde_json::from_slice(&host.fetch(REPORT)?)?;
        // The test host does not see what else this machine does. Where it counts instructions, it does not matter either.
        noise.add(&mark)?;
        if let (Clock::Wall, Some(note)) = (self.clock, noise.note()) {
            for row in &mut report.rows {
                row.note.get_or_insert_with(|| note.clone());
            }
        }
        Ok(report)
    }

    /// One counted run of one contender; `None` if it does not succeed.
    fn attempt(&self, contender: &str) -> Option<Report> {
        for attempt in 1..=ATTEMPTS {
            let measured = self.measure(1, Some(contender), APART).and_then(|report| {
                ensure!(!report.rows.is_empty(), "{}", report.missing.join("\n"));
                Ok(report)
            });
            match measured {
                Ok(report) => return Some(report),
                Err(error) => eprintln!("… attempt {attempt} of {ATTEMPTS} at {contender} failed: {error:#}"),
            }
        }
        None
    }
}

fn folder_puts(folder: &Path) -> Result<Vec<Put>> {
    let mut puts = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let from = entry?.path();
        if from.is_file() {
            let name = from.file_name().unwrap_or_default().to_string_lossy();
            puts.push(Put { to: format!("{PARTNERS}/{name}"), from });
        }
    }
    Ok(puts)
}
