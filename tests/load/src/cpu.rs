//! Processor time of this process and of others.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::resource::{UsageWho, getrusage};

/// Processor time that this process has used.
///
/// # Errors
/// What getrusage(2) answers.
pub fn own() -> Result<Duration> {
    usage(UsageWho::RUSAGE_SELF)
}

/// Processor time that this thread has used.
///
/// # Errors
/// What getrusage(2) answers.
pub fn thread() -> Result<Duration> {
    usage(UsageWho::RUSAGE_THREAD)
}

fn usage(who: UsageWho) -> Result<Duration> {
    let usage = getrusage(who)?;
    let of = |time: nix::sys::time::TimeVal| {
        Duration::new(time.tv_sec().unsigned_abs(), time.tv_usec().unsigned_abs() as u32 * 1000)
    };
    Ok(of(usage.user_time()) + of(usage.system_time()))
}

/// Processor time that the threads of process `pid` have used which are there now, to the nanosecond.
///
/// # Errors
/// A process that is gone.
pub fn of(pid: u32) -> Result<Duration> {
    let mut nanoseconds = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid} is gone"))? {
        // A thread that has ended meanwhile has taken its count with it.
        nanoseconds += of_task(&task?.path().join("schedstat")).unwrap_or_default().as_nanos();
    }
    Ok(Duration::from_nanos(u64::try_from(nanoseconds)?))
}

/// Processor time of the thread with this `schedstat`.
///
/// # Errors
/// A thread that is gone.
pub fn of_task(schedstat: &Path) -> Result<Duration> {
    let text = fs::read_to_string(schedstat)?;
    let nanoseconds = text.split(' ').next().unwrap_or_default().parse().context("schedstat")?;
    Ok(Duration::from_nanos(nanoseconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_seen() {
        let (before, by_pid) = (own().unwrap(), of(std::process::id()).unwrap());
        while own().unwrap() < before + Duration::from_millis(20) {}
        assert!(of(std::process::id()).unwrap() > by_pid);
    }
}
