//! fio's report (fio(1), --output-format=json), as far as it is used.

use anyhow::{Context, Result};
use serde::Deserialize;

/// The report of one run.
#[derive(Deserialize)]
pub struct Report {
    /// One entry per job, or per group of jobs that report together.
    pub jobs: Vec<Job>,
}

/// What fio found of a job, which either reads or writes.
#[derive(Deserialize)]
pub struct Job {
    /// The job's name.
    #[serde(rename = "jobname")]
    pub name: String,
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

/// What a job did, as the bench counts it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Done {
    /// Requests.
    pub operations: f64,
    /// In which time.
    pub seconds: f64,
    /// The middle latency in nanoseconds.
    pub p50: u64,
    /// The latency that 99 of 100 do not exceed.
    pub p99: u64,
    /// Processor time of fio in microseconds.
    pub processor: f64,
}

impl Job {
    /// The reads, or the writes if there are no reads.
    pub fn done(&self) -> Result<Done> {
        let direction = if self.read.total_ios > 0.0 { &self.read } else { &self.write };
        let Direction { total_ios: operations, runtime, clat_ns } = direction;
        let percentile = clat_ns.percentile.with_context(|| format!("fio's job {} has no latencies", self.name))?;
        Ok(Done {
            operations: *operations,
            seconds: runtime / 1e3,
            p50: percentile.p50,
            p99: percentile.p99,
            processor: (self.usr_cpu + self.sys_cpu) / 100.0 * self.job_runtime * 1e3,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_job_did_is_found_in_its_direction() {
        let direction = |ios: u32, percentile: &str| {
            format!(r#"{{"total_ios": {ios}, "runtime": 500, "io_kbytes": 4, "clat_ns": {{"N": {ios}{percentile}}}}}"#)
        };
        let percentile = r#", "percentile": {"1.000000": 1, "50.000000": 2000, "99.000000": 3000}"#;
        let (none, some) = (direction(0, ""), direction(100, percentile));
        let text = format!(
            r#"{{"fio version": "fio-3.33", "jobs": [{{"jobname": "a", "read": {none}, "write": {some},
                "job_runtime": 1000, "usr_cpu": 1.5, "sys_cpu": 0.5}}]}}"#
        );
        let report: Report = serde_json::from_str(&text).unwrap();
        assert_eq!(report.jobs[0].name, "a");
        let expected = Done { operations: 100.0, seconds: 0.5, p50: 2000, p99: 3000, processor: 20_000.0 };
        assert_eq!(report.jobs[0].done().unwrap(), expected);
    }
}
