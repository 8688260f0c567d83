//! Commands to a running machine, as a user gives them: `ozone status` and its like.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::tool;
use crate::vm::{ANSWER, executable};

/// How often a machine is asked: it tells nothing by itself.
const INTERVAL: Duration = Duration::from_millis(20);

/// What `ozone status --json` says.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Status {
    /// Whether the vCPUs run: `running`, `paused` and what is in between.
    pub state: String,
    /// The process id of `ozone`.
    pub pid: i32,
    /// The process id of the core.
    pub core_pid: i32,
    /// The devices.
    pub devices: Vec<Device>,
}

/// One device in a [`Status`].
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Device {
    /// Its name.
    pub id: String,
    /// How far its process is: `up`, `away` and what is in between.
    pub state: String,
    /// The id of its process, if there is one.
    pub pid: Option<i32>,
    /// How often its process was replaced by one that served.
    pub restarts: u64,
    /// Why it was lost last.
    pub cause: Option<String>,
    /// How long it was away the last time, in milliseconds.
    pub away_ms: Option<u64>,
    /// Requests that were carried out again.
    pub reexecuted: u64,
}

impl Status {
    /// The device of that name.
    pub fn device(&self, id: &str) -> Result<&Device> {
        self.devices.iter().find(|device| device.id == id).with_context(|| format!("no {id} in {self:?}"))
    }

    /// Requests that were carried out again, of all devices.
    #[must_use]
    pub fn reexecuted(&self) -> u64 {
        self.devices.iter().map(|device| device.reexecuted).sum()
    }
}

/// Asks the machine of that name how it is.
pub fn status(name: &str) -> Result<Status> {
    let text = tool::output(Command::new(executable("ozone")).args(["status", name, "--json"]))?;
    serde_json::from_str(&text).with_context(|| format!("not a status: {text}"))
}

/// Gives a command to the machine, such as `["restart", name, "disk0"]`; it must be carried out.
pub fn command(words: &[&str]) -> Result<String> {
    tool::output(Command::new(executable("ozone")).args(words))
}

/// Gives a command that must be refused; returns what it says and its exit code.
pub fn refused(words: &[&str]) -> Result<(String, i32)> {
    let output = Command::new(executable("ozone")).args(words).stdin(Stdio::null()).output()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success(), "ozone {words:?} was carried out");
    Ok((text, output.status.code().unwrap_or(-1)))
}

/// Waits until the machine's status is as it should be, and returns it.
pub fn until(name: &str, what: &str, is: impl Fn(&Status) -> bool) -> Result<Status> {
    until_within(name, what, ANSWER, is)
}

/// The same with another patience than [`ANSWER`].
pub fn until_within(name: &str, what: &str, patience: Duration, is: impl Fn(&Status) -> bool) -> Result<Status> {
    let deadline = Instant::now() + patience;
    loop {
        let status = status(name)?;
        if is(&status) {
            return Ok(status);
        }
        if Instant::now() > deadline {
            bail!("awaited for {patience:?} that {what}: {status:#?}");
        }
        std::thread::sleep(INTERVAL);
    }
}

/// Waits until every device of the machine serves.
pub fn all_up(name: &str) -> Result<Status> {
    until(name, "every device is up", |status| status.devices.iter().all(|device| device.state == "up"))
}
