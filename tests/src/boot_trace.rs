//! What `--boot-trace` writes: the Chrome trace event format, as far as `ozone` uses it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;

/// The steps of every process of a launch.
#[derive(Debug)]
pub struct BootTrace {
    /// In the order in which they began.
    pub steps: Vec<Step>,
}

/// One thing that one process did.
#[derive(Debug)]
pub struct Step {
    /// Who did it, such as `ozone` or `blk/disk0`.
    pub process: String,
    /// What.
    pub name: String,
    /// When it began, in microseconds of CLOCK_MONOTONIC.
    pub start: f64,
    /// How long it took, in microseconds.
    pub length: f64,
}

#[derive(Deserialize)]
struct Document {
    #[serde(rename = "traceEvents")]
    events: Vec<Event>,
}

#[derive(Deserialize)]
struct Event {
    name: String,
    ph: String,
    pid: i32,
    ts: Option<f64>,
    dur: Option<f64>,
    args: Option<Arguments>,
}

#[derive(Deserialize)]
struct Arguments {
    name: String,
}

impl BootTrace {
    /// Reads the file.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        let document: Document = serde_json::from_slice(&text).context("parse the boot trace")?;
        let mut names = BTreeMap::new();
        let mut steps = Vec::new();
        for Event { name, ph, pid, ts, dur, args } in document.events {
            match (ph.as_str(), args, ts) {
                ("M", Some(arguments), _) => drop(names.insert(pid, arguments.name)),
                (_, _, Some(start)) => steps.push((pid, name, start, dur.unwrap_or(0.0))),
                _ => {}
            }
        }
        let process = |pid| names.get(&pid).cloned().unwrap_or_else(|| format!("process {pid}"));
        let step = |(pid, name, start, length)| Step { process: process(pid), name, start, length };
        let mut steps: Vec<_> = steps.into_iter().map(step).collect();
        steps.sort_by(|one, other| one.start.total_cmp(&other.start));
        Ok(Self { steps })
    }

    /// The first step of that name of a process.
    #[must_use]
    pub fn step(&self, process: &str, name: &str) -> Option<&Step> {
        self.steps.iter().find(|step| step.process == process && step.name == name)
    }
}
