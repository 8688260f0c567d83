//! SIGKILLs at random times under a checksummed random-write load, past every page cache.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use oracle::verdict::Faults;
use ozone_tests::control;
use ozone_tests::kills::{self, Random, Wait};
use ozone_tests::trial::{self, Disks, Medium};
use ozone_tests::vm::{BOOT, Guest, executable};

/// The machine's name.
const NAME: &str = "soak";

/// The backend that is killed.
const ROLE: &str = "blk/disk0";

/// What a slow device adds to every read and write.
const DELAY: Duration = Duration::from_millis(20);

/// How often the start of a process is measured.
const STARTS: usize = 15;

/// What came of the kills on one medium.
#[derive(Clone, Debug)]
pub struct Part {
    /// What the disk was.
    pub medium: &'static str,
    /// How many processes were killed.
    pub kills: usize,
    /// What the guest found, and what is found in the image, whichever is worse.
    pub faults: Faults,
    /// Requests of the guest's program that failed, and lines of its kernel's log that tell of such.
    pub io_errors: u64,
    /// Writes that were acknowledged.
    pub acknowledged: u64,
    /// Requests that were carried out again.
    pub reexecuted: u64,
    /// The guest's waits.
    pub waits: Vec<Wait>,
    /// Whether the core or `ozone` was another process at the end.
    pub core_changed: bool,
    /// The first faults, in words.
    pub told: Vec<String>,
}

/// The mediums and the kills of each; those without kills are left out.
pub fn mediums(direct: usize, slow: usize) -> impl Iterator<Item = (Medium, usize)> {
    [(Medium::Direct, direct), (Medium::Slow { delay: DELAY }, slow)].into_iter().filter(|(_, kills)| *kills > 0)
}

/// One machine and its kills.
pub fn run(medium: Medium, count: usize, random: &mut Random) -> Result<Part> {
    let words = if medium == Medium::Direct { "direct" } else { "direct, slow" };
    eprintln!("… {count} kills of a disk: {words}");
    let disks = Disks::make(medium)?;
    let mut vm = disks.give(Guest::new()?.option("--name", NAME), "id=disk0")?.boot()?;
    let offset = trial::clock_offset(&mut vm)?;
    let before = control::status(NAME)?;
    trial::start(&mut vm, "--depth 32")?;
    let killed = kills::at_random(vm.pid(), ROLE, count, random)?;
    trial::await_writes(&mut vm, 100, BOOT).context("after the last kill")?;
    let after = control::all_up(NAME)?;
    let found = trial::stop(&mut vm)?;
    let complaints = trial::complaints(&mut vm)?;
    vm.power_off()?;
    let checked = disks.check()?;
    let worse = |one: u64, other: u64| one.max(other);
    let faults = Faults {
        verify_errors: worse(found.faults.verify_errors, checked.faults.verify_errors),
        lost_acknowledged: worse(found.faults.lost_acknowledged, checked.faults.lost_acknowledged),
        stale_overwrites: worse(found.faults.stale_overwrites, checked.faults.stale_overwrites),
    };
    let told = [found.told, checked.told, complaints.clone()].concat();
    Ok(Part {
        medium: words,
        kills: killed.len(),
        faults,
        io_errors: found.io_errors + complaints.len() as u64,
        acknowledged: found.acknowledged,
        reexecuted: after.reexecuted(),
        waits: kills::waits(&killed, &found.stalls, offset),
        core_changed: (before.core_pid, before.pid) != (after.core_pid, after.pid),
        told,
    })
}

/// The middle time, in milliseconds, from before the fork to the first byte that the backend's executable writes, started
/// as any program is: it says that it is not to be started by hand.
pub fn process_start() -> Result<f64> {
    let program = executable("ozone-blk");
    let mut times = Vec::with_capacity(STARTS);
    for _ in 0..STARTS {
        let start = Instant::now();
        let mut child = Command::new(&program)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        let mut output = child.stderr.take().context("no pipe")?;
        let first = output.read(&mut [0; 1]);
        times.push(start.elapsed().as_secs_f64() * 1e3);
        child.wait()?;
        anyhow::ensure!(first? == 1, "{} said nothing", program.display());
    }
    Ok(kills::quantile(&times, 0.5))
}
