//! fio on the file itself: what the machine gives to a process without any device between.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use ozone_tests::tool;
use serde::Deserialize;

use super::{Job, MILLISECONDS, Medium, speed};
use crate::bench::Figure;

/// fio's report, as far as it is used.
#[derive(Deserialize)]
struct Output {
    jobs: Vec<Report>,
}

#[derive(Deserialize)]
struct Report {
    read: Direction,
    write: Direction,
    /// Of all processes, in milliseconds.
    job_runtime: f64,
    /// Shares of `job_runtime` in percent.
    usr_cpu: f64,
    sys_cpu: f64,
}

#[derive(Deserialize)]
struct Direction {
    total_ios: f64,
    /// Milliseconds.
    runtime: f64,
    clat_ns: Latency,
}

#[derive(Deserialize)]
struct Latency {
    percentile: Option<Percentiles>,
}

#[derive(Clone, Copy, Deserialize)]
struct Percentiles {
    #[serde(rename = "50.000000")]
    p50: u64,
    #[serde(rename = "99.000000")]
    p99: u64,
}

/// Measures once. In memory nothing is asynchronous: there each queue is a process that waits for each of its calls, and
/// the depth has no meaning.
pub fn measure(image: &Path, job: Job) -> Result<Vec<Figure>> {
    let pattern = match job.pattern {
        "random-read" => "randread",
        "random-write" => "randwrite",
        other => other,
    };
    let (engine, direct, depth) = match job.medium {
        Medium::Tmpfs => ("psync", 0, 1),
        Medium::Disk => ("io_uring", 1, job.depth),
    };
    let mut command = Command::new("fio");
    command
        .args(["--name=limit", "--output-format=json", "--group_reporting", "--time_based", "--invalidate=0"])
        .args(["--randrepeat=0", "--norandommap", "--thread"])
        .arg(format!("--filename={}", image.display()))
        .arg(format!("--rw={pattern}"))
        .arg(format!("--ioengine={engine}"))
        .arg(format!("--direct={direct}"))
        .arg(format!("--iodepth={depth}"))
        .arg(format!("--bs={}", job.block))
        .arg(format!("--numjobs={}", job.queues))
        .arg(format!("--offset_increment={}%", 100 / job.queues))
        .arg(format!("--runtime={MILLISECONDS}ms"));
    let output: Output = serde_json::from_str(&tool::output(&mut command)?).context("read fio's report")?;
    let report = output.jobs.into_iter().next().context("fio reports no job")?;
    let direction = if job.pattern.ends_with("read") { report.read } else { report.write };
    let Percentiles { p50, p99 } = direction.clat_ns.percentile.context("fio reports no latencies")?;
    let mut figures = speed(job, direction.total_ios, direction.runtime / 1e3, p50, p99);
    let processor = (report.usr_cpu + report.sys_cpu) / 100.0 * report.job_runtime;
    figures.push(Figure::new("processor, device", "µs/op", processor * 1e3 / direction.total_ios));
    Ok(figures)
}
