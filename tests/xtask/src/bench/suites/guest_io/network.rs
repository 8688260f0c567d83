//! iperf3 between a guest, which is the client, and the host.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

/// How long each way is measured, in seconds.
const SECONDS: u32 = 2;

/// The host's side, ended on drop.
pub struct Server(Child);

impl Server {
    /// Starts it in this process's network namespace.
    pub fn start(program: &Path) -> Result<Self> {
        let mut command = Command::new(program);
        command.args(["--server", "--version4"]).stdin(Stdio::null()).stdout(Stdio::null());
        Ok(Self(command.spawn().with_context(|| format!("start {}", program.display()))?))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Which way the data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    FromGuest,
    ToGuest,
}

/// The guest's command, which writes its report to a file.
pub fn command(host: &str, way: Way, report: &str) -> String {
    let reverse = if way == Way::ToGuest { " --reverse" } else { "" };
    format!("/usr/bin/iperf3 --client {host} --json --interval 0 --time {SECONDS}{reverse} --logfile {report}")
}

/// iperf3's report (iperf3(1), --json), as far as it is used.
#[derive(Deserialize)]
pub struct Report {
    error: Option<String>,
    end: End,
}

#[derive(Deserialize)]
struct End {
    sum_received: Option<Sum>,
}

#[derive(Deserialize)]
struct Sum {
    bits_per_second: f64,
}

impl Report {
    /// What arrived, in bytes per second.
    pub fn rate(self) -> Result<f64> {
        match (self.error, self.end.sum_received) {
            (None, Some(sum)) => Ok(sum.bits_per_second / 8.0),
            (error, _) => bail!("iperf3: {}", error.as_deref().unwrap_or("nothing arrived")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_receivers_rate_is_read() {
        let text = r#"{"start": {}, "intervals": [], "end": {"streams": [],
            "sum_sent": {"bits_per_second": 9.0}, "sum_received": {"bytes": 4, "bits_per_second": 16.0}}}"#;
        assert_eq!(serde_json::from_str::<Report>(text).unwrap().rate().unwrap(), 2.0);
        let failed = r#"{"start": {}, "intervals": [], "end": {}, "error": "unable to connect"}"#;
        let error = serde_json::from_str::<Report>(failed).unwrap().rate().unwrap_err().to_string();
        assert!(error.contains("unable to connect"), "{error}");
    }
}
