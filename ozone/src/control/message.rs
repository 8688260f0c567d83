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
    /// Say what it uses.
    Usage,
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
    /// What the machine uses.
    Usage(Usage),
}

/// What a machine uses of its host, since it was started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Usage {
    /// The path of its control group.
    pub cgroup: String,
    /// Processor time of all processes together, in microseconds.
    pub cpu_usec: u64,
    /// Its memory, if that is accounted.
    pub memory: Option<MemoryUsage>,
    /// Its processes: `ozone`, the core, and the devices' in the order of the board.
    pub processes: Vec<ProcessUsage>,
}

/// Memory of a machine, its guest's included.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MemoryUsage {
    /// In bytes.
    pub current: u64,
    /// The most that it was, in bytes; Linux 5.19 and later tell.
    pub peak: Option<u64>,
    /// Processes that the kernel killed because of a limit.
    pub kills: u64,
}

/// What one process of a machine uses, together with those that were there before it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ProcessUsage {
    /// Its name.
    pub process: String,
    /// Processor time in microseconds.
    pub cpu_usec: u64,
    /// How many periods of cpu.max it was held back in, if there is one.
    pub throttled: Option<u64>,
    /// Its threads now, if they are counted.
    pub pids: Option<u64>,
    /// What it read and wrote, if that is accounted.
    pub io: Vec<IoUsage>,
}

/// What went from and to one block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct IoUsage {
    /// Its numbers, as `8:0`.
    pub device: String,
    /// In bytes.
    pub read_bytes: u64,
    /// In bytes.
    pub written_bytes: u64,
    /// Requests.
    pub reads: u64,
    /// Requests.
    pub writes: u64,
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
    /// The uid of the core on the host, and its gid.
    pub core_uid: u32,
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
    /// The uid of all its processes on the host, and their gid.
    pub uid: u32,
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
