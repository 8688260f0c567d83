//! The backend processes of a running machine, to be found and killed.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// How often the process table is looked at: nothing tells that a process has come.
const INTERVAL: Duration = Duration::from_millis(1);

/// The process that `ozone` (its process id) has under that name now, such as `blk/disk0`, if there is one. Before its exec a
/// child has no name yet.
#[must_use]
pub fn find(ozone: i32, role: &str) -> Option<i32> {
    children(ozone).into_iter().find(|pid| name(*pid).as_deref() == Some(role))
}

/// The children of `ozone` with their names.
#[must_use]
pub fn all(ozone: i32) -> Vec<(i32, String)> {
    children(ozone).into_iter().filter_map(|pid| Some((pid, name(pid)?))).collect()
}

/// The ids of all children of `ozone`.
#[must_use]
pub fn children(ozone: i32) -> Vec<i32> {
    let mut children = Vec::new();
    // Every thread of a process has children of its own.
    for task in fs::read_dir(format!("/proc/{ozone}/task")).into_iter().flatten().flatten() {
        let text = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        children.extend(text.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok()));
    }
    children
}

/// The first argument of a process; nothing of one that is dead and not yet reaped.
fn name(pid: i32) -> Option<String> {
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let first = arguments.split(|byte| *byte == 0).next()?;
    Some(String::from_utf8_lossy(first).into_owned()).filter(|name| !name.is_empty())
}

/// Waits until there is such a process other than `previous`.
pub fn await_other(ozone: i32, role: &str, previous: Option<i32>, patience: Duration) -> Result<i32> {
    let deadline = Instant::now() + patience;
    loop {
        match find(ozone, role) {
            Some(pid) if Some(pid) != previous => return Ok(pid),
            _ if Instant::now() > deadline => {
                bail!("awaited a process {role} other than {previous:?} for {patience:?}; there are {:?}", all(ozone))
            }
            _ => std::thread::sleep(INTERVAL),
        }
    }
}

/// Sends a signal to a process; returns whether it was still there.
pub fn signal(pid: i32, signal: Signal) -> Result<bool> {
    let pid = Pid::from_raw(pid).context("no process id")?;
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(false) };
    Ok(pidfd_send_signal(process, signal).is_ok())
}

/// Kills the process of that name; returns its id.
pub fn kill(ozone: i32, role: &str) -> Result<i32> {
    let pid = find(ozone, role).with_context(|| format!("no {role} among {:?}", all(ozone)))?;
    ensure!(signal(pid, Signal::KILL)?, "{role} ended by itself");
    Ok(pid)
}

/// How many descriptors a process has open.
pub fn descriptors(pid: i32) -> Result<usize> {
    let directory = format!("/proc/{pid}/fd");
    Ok(fs::read_dir(&directory).with_context(|| directory)?.count())
}
