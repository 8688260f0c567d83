//! What is asked of a machine, and what it answers.

use protocol::{DeviceId, DeviceKind};
use serde::{Deserialize, Serialize};

/// A command to a machine: one per connection.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Replace the processes of devices by new ones; answered when all of them serve.
    Restart {
        /// Which; every one if empty.
        devices: Vec<DeviceId>,
    },
    /// Stop the vCPUs and the queues; answered when nothing runs.
    Pause,
    /// Go on; answered when the vCPUs run.
    Resume,
    /// Say how it is.
    Status,
}

/// What comes of a [`Request`].
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It is done.
    Done,
    /// It cannot be done, and why.
    Refused(String),
    /// How the machine is.
    Status(Status),
}

/// A machine as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Status {
    /// Its name.
    pub name: String,
    /// Whether its vCPUs run.
    pub state: MachineState,
    /// The process id of `ozone`.
    pub pid: i32,
    /// The process id of the core.
    pub core_pid: i32,
    /// The devices, in the order of the board.
    pub devices: Vec<DeviceStatus>,
}

/// Whether the vCPUs of a machine run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MachineState {
    /// They run.
    Running,
    /// They are about to stop.
    Pausing,
    /// They stand still, and so do the queues.
    Paused,
    /// They are about to run.
    Resuming,
}

/// A device as it is, and what has happened to it since the machine started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DeviceStatus {
    /// Its name.
    pub id: DeviceId,
    /// What it is.
    pub kind: DeviceKind,
    /// How far its process is.
    pub state: DeviceState,
    /// The id of its process, if there is one.
    pub pid: Option<i32>,
    /// How often its process was replaced by one that served.
    pub restarts: u64,
    /// Why it was lost last.
    pub cause: Option<String>,
    /// How long the next process had to wait for its time then, in milliseconds.
    pub delay_ms: u64,
    /// How long it was away the last time, in milliseconds.
    pub away_ms: Option<u64>,
    /// How long it has been away altogether, the outage under way included, in milliseconds.
    pub away_total_ms: u64,
    /// Requests that were in flight when a process was lost and were carried out again.
    pub reexecuted: u64,
}

/// How far the process of a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// It serves.
    Up,
    /// Its queues are being stopped, because it is to be replaced.
    Detaching,
    /// It was ended, and its end is awaited.
    Ending,
    /// It has ended; what it began is still under way.
    Draining,
    /// The next one waits for its time.
    Waiting,
    /// The next one is on its way.
    Starting,
    /// The core is connecting to it.
    Attaching,
    /// There is none before `ozone restart`.
    Away,
}
