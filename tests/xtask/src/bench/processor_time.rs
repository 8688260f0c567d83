//! Processor time of programs that were started and waited for.

use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use nix::time::{ClockId, clock_gettime};

/// CLOCK_MONOTONIC, as traces have it.
pub fn clock() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default()
}

/// Used by all ended children of this process, and by theirs that they waited for (getrusage(2)).
pub fn of_children() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    duration(usage.user_time())
        .zip(duration(usage.system_time()))
        .map(|(user, system)| user + system)
        .context("getrusage")
}

fn duration(time: TimeVal) -> Option<Duration> {
    let microseconds = u64::try_from(time.tv_sec()).ok()? * 1_000_000 + u64::try_from(time.tv_usec()).ok()?;
    Some(Duration::from_micros(microseconds))
}
