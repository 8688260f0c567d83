//! Backends that are killed as soon as they appear, for a while; then they are left alone.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ozone_tests::backends;
use ozone_tests::control;
use ozone_tests::trial::{self, Disks, Medium};
use ozone_tests::vm::{BOOT, Guest};

const NAME: &str = "crash-loop";
const ROLE: &str = "blk/disk0";

/// The longest delay between two attempts, and some time for the attempt.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often it is looked for a new process.
const INTERVAL: Duration = Duration::from_millis(1);

/// What came of it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct CrashLoop {
    /// For how long.
    pub seconds: u64,
    /// How many processes were killed.
    pub kills: u64,
    /// From the last kill to the next acknowledged writes.
    pub healthy_after_ms: u64,
    /// Whether nothing was lost and no request failed.
    pub clean: bool,
    /// Whether the core or `ozone` was another process at the end.
    pub core_pid_changed: bool,
}

/// One machine.
pub fn run(time: Duration) -> Result<CrashLoop> {
    eprintln!("… a crash loop of {} s", time.as_secs());
    let disks = Disks::make(Medium::File)?;
    let mut vm = disks.give(Guest::new()?.option("--name", NAME), "id=disk0")?.boot()?;
    let before = control::status(NAME)?;
    trial::start(&mut vm, "--depth 32")?;
    trial::await_writes(&mut vm, 100, BOOT)?;
    let end = Instant::now() + time;
    let mut kills = 0;
    while Instant::now() < end {
        if let Some(pid) = backends::find(vm.pid(), ROLE) {
            kills += u64::from(backends::signal(pid, rustix::process::Signal::KILL)?);
        }
        std::thread::sleep(INTERVAL);
    }
    let last = Instant::now();
    trial::await_writes(&mut vm, 100, PATIENCE).context("after the crash loop")?;
    let healthy = last.elapsed();
    let after = control::all_up(NAME)?;
    let found = trial::stop(&mut vm)?;
    let complaints = trial::complaints(&mut vm)?;
    vm.power_off()?;
    let checked = disks.check()?;
    for line in found.told.iter().chain(&checked.told).chain(&complaints) {
        println!("{line}");
    }
    Ok(CrashLoop {
        seconds: time.as_secs(),
        kills,
        healthy_after_ms: u64::try_from(healthy.as_millis())?,
        clean: found.faults.is_clean() && checked.faults.is_clean() && found.io_errors == 0 && complaints.is_empty(),
        core_pid_changed: (before.core_pid, before.pid) != (after.core_pid, after.pid),
    })
}
