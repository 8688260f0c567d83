//! `cargo xtask bench`: where the product stands, beside its partners.

mod compare;
mod docs;
mod fio;
mod first_entry;
mod footprint;
mod nested;
mod noise;
mod partners;
mod plot;
mod processor_time;
mod row;
mod stats;
mod suites;
mod table;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use ozone_tests::{build, paths, progress};

pub use compare::{Contender, Context};
pub use row::{Figure, Report, Row};
use suites::{Place, SUITES, Suite};

use crate::prerequisites;

/// Options of `cargo xtask bench`.
#[derive(clap::Args)]
pub struct Arguments {
    /// The suites; without one they are listed.
    #[arg(value_name = "SUITE")]
    suites: Vec<String>,
    /// Write what was found to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How many runs count.
    #[arg(long, value_name = "NUMBER", default_value_t = 5)]
    runs: usize,
    /// Measure everything a suite can, rather than a choice that takes minutes.
    #[arg(long)]
    full: bool,
    /// Draw a picture of each suite into docs/performance.
    #[arg(long)]
    plot: bool,
    /// Put the tables into docs/performance.md.
    #[arg(long)]
    write_docs: bool,
    /// A folder with executables of partners, used before those of Debian's packages.
    #[arg(long, value_name = "FOLDER")]
    partners: Option<PathBuf>,
    /// Take the reports from this file rather than measuring; with --plot and --write-docs.
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    from: Option<PathBuf>,
    /// Only name what this machine lacks.
    #[arg(long)]
    no_install: bool,
}

/// Options of the part of a suite that runs in the test host.
#[derive(clap::Args)]
pub struct HereArguments {
    suite: String,
    #[arg(long)]
    json: PathBuf,
    #[arg(long)]
    runs: usize,
    #[arg(long)]
    partners: Option<PathBuf>,
    #[arg(long)]
    full: bool,
    /// The one contender to measure.
    #[arg(long)]
    only: Option<String>,
}

/// Runs the suites, one after the other.
pub fn run(arguments: &Arguments) -> Result<u8> {
    if let Some(from) = &arguments.from {
        let text = fs::read(from).with_context(|| format!("read {}", from.display()))?;
        return publish(arguments, &serde_json::from_slice::<Vec<Report>>(&text)?).map(|()| 0);
    }
    if arguments.suites.is_empty() {
        for suite in SUITES {
            println!("{:15} {}", suite.name, suite.about);
        }
        return Ok(0);
    }
    ensure!(arguments.runs > 0, "--runs 0 measures nothing");
    let suites = arguments.suites.iter().map(|name| find(name)).collect::<Result<Vec<_>>>()?;
    prerequisites::ensure_programs(!arguments.no_install)?;
    build::product()?;
    let mut reports = Vec::new();
    for suite in suites {
        let report = progress::step(&format!("{}: {}", suite.name, suite.about), || match suite.place {
            Place::Here => measure(suite, Context::new(arguments.runs, arguments.partners.clone(), arguments.full)),
            Place::TestHost { memory } => nested::together(suite, memory, arguments),
            Place::Counted { memory, contenders } => nested::apart(suite, memory, &contenders()?, arguments),
        })?;
        println!("{}\n\n{}", report.place, table::markdown(&report));
        reports.push(report);
        // A later suite that fails leaves what the earlier ones found.
        if let Some(json) = &arguments.json {
            write(json, &reports)?;
        }
    }
    publish(arguments, &reports)?;
    Ok(0)
}

/// Runs one suite in the test host.
pub fn here(arguments: &HereArguments) -> Result<u8> {
    let mut context = Context::new(arguments.runs, arguments.partners.clone(), arguments.full);
    context.only.clone_from(&arguments.only);
    let report = measure(find(&arguments.suite)?, context)?;
    write(&arguments.json, &report)?;
    Ok(0)
}

fn find(name: &str) -> Result<&'static Suite> {
    let names = || SUITES.iter().map(|suite| suite.name).collect::<Vec<_>>().join(", ");
    SUITES.iter().find(|suite| suite.name == name).with_context(|| format!("no suite '{name}'; there are {}", names()))
}

fn measure(suite: &Suite, context: Context) -> Result<Report> {
    let rows = (suite.run)(&context).with_context(|| format!("suite {}", suite.name))?;
    Ok(Report { suite: suite.name.to_owned(), place: place()?, rows, missing: context.into_missing() })
}

/// Where this process runs, in words.
fn place() -> Result<String> {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let host = if std::env::var_os(agent::layout::IN_HOST).is_some() { "the test host (emulated), " } else { "" };
    Ok(format!("{host}Linux {}, {} processors", kernel.trim(), noise::processors()))
}

fn write(path: &Path, report: &impl serde::Serialize) -> Result<()> {
    fs::write(path, serde_json::to_string_pretty(report)? + "\n").with_context(|| format!("write {}", path.display()))
}

/// Pictures and tables for the documentation.
fn publish(arguments: &Arguments, reports: &[Report]) -> Result<()> {
    let directory = paths::workspace().join("docs/performance");
    if arguments.plot {
        fs::create_dir_all(&directory)?;
        for report in reports {
            fs::write(directory.join(format!("{}.svg", report.suite)), plot::svg(report))?;
        }
    }
    if arguments.write_docs {
        docs::update(&paths::workspace().join("docs/performance.md"), reports)?;
    }
    Ok(())
}
