//! fio in a guest.

use std::fmt::Write;

use anyhow::{Result, ensure};

use crate::bench::Figure;
use crate::bench::fio::{Done, Report};

/// How long each job is measured, and how long it runs before, in milliseconds.
const MILLISECONDS: u32 = 1500;
const BEFORE: u32 = 200;

/// What is done to the disk: fio's name for it, ours, KiB, depth.
const JOBS: [(&str, &str, u32, u32); 6] = [
    ("randread", "random read", 4, 1),
    ("randread", "random read", 4, 32),
    ("randwrite", "random write", 4, 1),
    ("randwrite", "random write", 4, 32),
    ("read", "read", 256, 4),
    ("write", "write", 256, 4),
];

/// The command that does all of it, job after job, and writes its report to a file: fio's start takes longer than a job where
/// processors are emulated.
pub fn command(device: &str, report: &str) -> String {
    let mut line = format!(
        "/usr/bin/fio --output={report} --output-format=json --name=global --filename={device} --direct=1 \
         --ioengine=libaio --thread --time_based --runtime={MILLISECONDS}ms --ramp_time={BEFORE}ms --randrepeat=0 \
         --norandommap --eta=never"
    );
    for (index, (pattern, _, kib, depth)) in JOBS.iter().enumerate() {
        let _ = write!(line, " --name=job{index} --stonewall --rw={pattern} --bs={kib}k --iodepth={depth}");
    }
    line
}

/// What fio reports.
pub fn figures(report: &Report) -> Result<Vec<Figure>> {
    ensure!(report.jobs.len() == JOBS.len(), "fio reports {} jobs", report.jobs.len());
    let mut figures = Vec::new();
    for ((_, words, kib, depth), job) in JOBS.iter().zip(&report.jobs) {
        let Done { operations, seconds, p50, p99, .. } = job.done()?;
        let words = format!("{words} {kib} KiB, depth {depth}");
        figures.push(Figure::new(words.clone(), "op/s", operations / seconds));
        for (name, nanoseconds) in [("p50", p50), ("p99", p99)] {
            figures.push(Figure::new(format!("{words}, {name}"), "µs", nanoseconds as f64 / 1e3));
        }
    }
    Ok(figures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_job_waits_for_the_one_before() {
        let line = command("/dev/vda", "/tmp/fio");
        assert_eq!(line.matches("--stonewall").count(), JOBS.len());
        assert!(line.ends_with("--name=job5 --stonewall --rw=write --bs=256k --iodepth=4"), "{line}");
    }
}
