//! What a soak found: for programs, and for people.

use std::fmt;

use oracle::verdict::Faults;
use ozone_tests::kills::quantile;
use serde::Serialize;

use super::crash_loop::CrashLoop;
use super::crash_points::Point;
use super::kills::Part;

/// Everything.
#[derive(Debug)]
pub struct Report {
    /// Where the sequence of random numbers began.
    pub seed: u64,
    /// Whether every promise held.
    pub ok: bool,
    /// The kills, by medium.
    pub kills: Vec<Part>,
    /// The middle time of a plain start of the backend's executable.
    pub process_start_ms: f64,
    /// The crash points.
    pub points: Vec<Point>,
    /// The crash loop.
    pub crash_loop: Option<CrashLoop>,
    /// Why not everything was done.
    pub failed: Option<String>,
}

/// The report as JSON.
#[derive(Debug, Serialize)]
pub struct Json {
    seed: u64,
    ok: bool,
    kills: usize,
    verify_errors: u64,
    lost_acknowledged: u64,
    stale_overwrites: u64,
    reexecuted: u64,
    acknowledged: u64,
    stall_ms: Quantiles,
    back_ms: f64,
    back_at_once_ms: f64,
    process_start_ms: f64,
    core_pid_changed: bool,
    guest_io_errors: u64,
    mediums: Vec<Medium>,
    crash_points: Vec<Point>,
    crash_loop: Option<CrashLoop>,
    failed: Option<String>,
}

/// The kills on one medium.
#[derive(Debug, Serialize)]
struct Medium {
    medium: &'static str,
    kills: usize,
    reexecuted: u64,
    acknowledged: u64,
    stall_ms: Quantiles,
    back_ms: f64,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Quantiles {
    p50: f64,
    p99: f64,
    max: f64,
}

impl Quantiles {
    fn of(values: &[f64]) -> Self {
        let [p50, p99, max] = [0.5, 0.99, 1.0].map(|part| rounded(quantile(values, part)));
        Self { p50, p99, max }
    }
}

/// To a hundredth: more is noise.
fn rounded(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

fn milliseconds<'a>(
    parts: impl IntoIterator<Item = &'a Part>,
    of: impl Fn(&super::kills::Part) -> Vec<f64>,
) -> Vec<f64> {
    parts.into_iter().flat_map(of).collect()
}

fn stalls(part: &Part) -> Vec<f64> {
    part.waits.iter().map(|wait| wait.stall.as_secs_f64() * 1e3).collect()
}

/// Of processes that had served: the first restart is at once.
fn backs_at_once(part: &Part) -> Vec<f64> {
    part.waits.iter().filter(|wait| wait.served).map(|wait| wait.back.as_secs_f64() * 1e3).collect()
}

fn backs(part: &Part) -> Vec<f64> {
    part.waits.iter().map(|wait| wait.back.as_secs_f64() * 1e3).collect()
}

impl Report {
    /// Nothing yet.
    pub fn new(seed: u64) -> Self {
        let (kills, points) = (Vec::new(), Vec::new());
        Self { seed, ok: false, kills, process_start_ms: 0.0, points, crash_loop: None, failed: None }
    }

    fn faults(&self) -> Faults {
        let mut all = Faults::default();
        self.kills.iter().for_each(|part| all.merge(&part.faults));
        self.points.iter().for_each(|point| all.merge(&point.faults));
        all
    }

    fn io_errors(&self) -> u64 {
        let points = self.points.iter().map(|point| point.io_errors);
        self.kills.iter().map(|part| part.io_errors).chain(points).sum()
    }

    fn core_changed(&self) -> bool {
        self.kills.iter().any(|part| part.core_changed)
            || self.crash_loop.as_ref().is_some_and(|it| it.core_pid_changed)
    }

    /// Says whether every promise held.
    pub fn conclude(&mut self, error: Option<&anyhow::Error>) {
        self.failed = error.map(|error| format!("{error:#}"));
        self.ok = self.failed.is_none()
            && self.faults().is_clean()
            && self.io_errors() == 0
            && !self.core_changed()
            && self.points.iter().all(|point| point.crashes > 0)
            && self.crash_loop.as_ref().is_none_or(|it| it.clean);
    }

    /// As JSON.
    pub fn json(&self) -> Json {
        let Faults { verify_errors, lost_acknowledged, stale_overwrites } = self.faults();
        let medium = |part: &Part| Medium {
            medium: part.medium,
            kills: part.kills,
            reexecuted: part.reexecuted,
            acknowledged: part.acknowledged,
            stall_ms: Quantiles::of(&stalls(part)),
            back_ms: rounded(quantile(&backs(part), 0.5)),
        };
        // What a slow device adds says nothing of a restart.
        let quick: Vec<_> = self.kills.iter().filter(|part| part.medium == "direct").collect();
        let quick = if quick.is_empty() { self.kills.iter().collect() } else { quick };
        Json {
            seed: self.seed,
            ok: self.ok,
            kills: self.kills.iter().map(|part| part.kills).sum(),
            verify_errors,
            lost_acknowledged,
            stale_overwrites,
            reexecuted: self.kills.iter().map(|part| part.reexecuted).sum(),
            acknowledged: self.kills.iter().map(|part| part.acknowledged).sum(),
            stall_ms: Quantiles::of(&milliseconds(&self.kills, stalls)),
            back_ms: rounded(quantile(&milliseconds(quick.iter().copied(), backs), 0.5)),
            back_at_once_ms: rounded(quantile(&milliseconds(quick, backs_at_once), 0.5)),
            process_start_ms: rounded(self.process_start_ms),
            core_pid_changed: self.core_changed(),
            guest_io_errors: self.io_errors(),
            mediums: self.kills.iter().map(medium).collect(),
            crash_points: self.points.clone(),
            crash_loop: self.crash_loop.clone(),
            failed: self.failed.clone(),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let json = self.json();
        let mut line = |name: &str, value: String| writeln!(f, "{name:34} {value}");
        line("seed", json.seed.to_string())?;
        for (part, medium) in self.kills.iter().zip(&json.mediums) {
            line(&format!("kills, {}", part.medium), part.kills.to_string())?;
            line("  acknowledged writes", part.acknowledged.to_string())?;
            line("  carried out again", part.reexecuted.to_string())?;
            let Quantiles { p50, p99, max } = medium.stall_ms;
            line("  stall, p50 / p99 / longest", format!("{p50} / {p99} / {max} ms"))?;
            line("  back after, middle", format!("{} ms", medium.back_ms))?;
        }
        if !self.kills.is_empty() {
            line("back after, no series of failures", format!("{} ms", json.back_at_once_ms))?;
            line("plain start of the executable", format!("{} ms", json.process_start_ms))?;
        }
        for point in &self.points {
            line(&format!("crash point {}", point.name()), format!("{} crashes", point.crashes))?;
        }
        if let Some(CrashLoop { seconds, kills, healthy_after_ms, .. }) = &self.crash_loop {
            line("crash loop", format!("{kills} kills in {seconds} s, healthy {healthy_after_ms} ms later"))?;
        }
        line("verify errors", json.verify_errors.to_string())?;
        line("lost acknowledged writes", json.lost_acknowledged.to_string())?;
        line("stale overwrites", json.stale_overwrites.to_string())?;
        line("I/O errors in the guest", json.guest_io_errors.to_string())?;
        line("core replaced", if json.core_pid_changed { "yes" } else { "no" }.to_owned())?;
        for told in self.kills.iter().flat_map(|part| &part.told).chain(self.points.iter().flat_map(|it| &it.told)) {
            writeln!(f, "  {told}")?;
        }
        if let Some(failed) = &self.failed {
            writeln!(f, "FAILED: {failed}")?;
        }
        write!(f, "{}", if self.ok { "ok: every promise held" } else { "NOT HELD" })
    }
}
