//! fio on the file itself: what the machine gives to a process without any device between.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use ozone_tests::tool;

use super::{Job, MILLISECONDS, Medium, speed};
use crate::bench::Figure;
use crate::bench::fio::{Done, Report};

/// Measures once. In memory nothing is asynchronous: there each queue is a process that waits for each of its calls, and
/// the depth has no meaning.
pub fn measure(program: &Path, image: &Path, job: Job) -> Result<Vec<Figure>> {
    let pattern = match job.pattern {
        "random-read" => "randread",
        "random-write" => "randwrite",
        other => other,
    };
    let (engine, direct, depth) = match job.medium {
        Medium::Tmpfs => ("psync", 0, 1),
        Medium::Disk => ("io_uring", 1, job.depth),
    };
    let mut command = Command::new(program);
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
    let report: Report = serde_json::from_str(&tool::output(&mut command)?).context("read fio's report")?;
    let Done { operations, seconds, p50, p99, processor } =
        report.jobs.first().context("fio reports no job")?.done()?;
    let mut figures = speed(job, operations, seconds, p50, p99);
    figures.push(Figure::new("processor, device", "µs/op", processor / operations));
    Ok(figures)
}
