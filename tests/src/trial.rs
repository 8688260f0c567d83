//! A guest whose disk is tried by the oracle, and what came of it.

use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use oracle::run::Progress;
use oracle::stalls::since_1970;
use oracle::verdict::Faults;
use oracle::{Checked, Found};

use crate::delay::{Delayed, Loop};
use crate::vm::{ANSWER, Guest, Vm};

/// The disk's size in bytes: small, so that each place is written over and over.
const DISK: u64 = 16 << 20;

/// The journal's disk.
const JOURNAL: u64 = 4 << 20;

/// From "stop" to the result: every place is read meanwhile.
const END: Duration = Duration::from_secs(120);

/// How often the guest's clock is read.
const CLOCK_READINGS: u32 = 20;

/// What the tried disk is on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Medium {
    /// A file, through the page cache.
    #[default]
    File,
    /// A loop device, past the page cache.
    Direct,
    /// A loop device whose reads and writes are delayed, past the page cache.
    Slow {
        /// By how much.
        delay: Duration,
    },
}

/// The host's side of the two disks.
#[derive(Debug)]
pub struct Disks {
    // Let go of before the file under it.
    device: Option<Device>,
    directory: tempfile::TempDir,
    medium: Medium,
}

#[derive(Debug)]
enum Device {
    Loop(Loop),
    Delayed(Delayed),
}

impl Disks {
    /// Fresh ones.
    pub fn make(medium: Medium) -> Result<Self> {
        let mut disks = Self { device: None, directory: tempfile::tempdir()?, medium };
        File::create(disks.image())?.set_len(DISK)?;
        File::create(disks.journal())?.set_len(JOURNAL)?;
        disks.device = match medium {
            Medium::File => None,
            Medium::Direct => Some(Device::Loop(Loop::attach(&disks.image())?)),
            Medium::Slow { delay } => {
                let name = format!("ozone-trial-{}", std::process::id());
                Some(Device::Delayed(Delayed::over(Loop::attach(&disks.image())?, &name, delay, delay)?))
            }
        };
        Ok(disks)
    }

    fn image(&self) -> PathBuf {
        self.directory.path().join("image")
    }

    fn journal(&self) -> PathBuf {
        self.directory.path().join("journal")
    }

    /// What the tried disk's `path=` is.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        match &self.device {
            None => self.image(),
            Some(Device::Loop(device)) => device.path().to_owned(),
            Some(Device::Delayed(device)) => device.path().to_owned(),
        }
    }

    /// Gives `guest` the disk as `/dev/vda` and the journal's as `/dev/vdb`, and the oracle in its `/bin`. `keys` are
    /// further ones of the tried disk's option, such as `id=data,queues=4`.
    pub fn give(&self, guest: Guest, keys: &str) -> Result<Guest> {
        let mut option = format!("path={}", self.path().display());
        if self.medium != Medium::File {
            option.push_str(",direct");
        }
        if !keys.is_empty() {
            option.push(',');
            option.push_str(keys);
        }
        let journal = format!("path={},id=journal", self.journal().display());
        guest.option("--disk", option).option("--disk", journal).programs(&["oracle"])
    }

    /// Looks at the image from outside, once the machine has ended.
    pub fn check(&self) -> Result<Checked> {
        // Through the device, if there is one: what it holds is what counts.
        oracle::check::check(&self.path(), &self.journal())
    }
}

/// How far the guest's clock is ahead of the host's, in microseconds: a guest that has the oracle and nothing else to do.
pub fn clock_offset(vm: &mut Vm) -> Result<i64> {
    vm.send_line("oracle clock")?;
    let mut best = (u64::MAX, 0);
    for number in 0..CLOCK_READINGS {
        let before = since_1970(SystemTime::now());
        vm.send_line(&format!("reading-{number}"))?;
        vm.expect(&format!("reading-{number} "), ANSWER)?;
        let guest: u64 = vm.expect("\n", ANSWER)?.trim().parse().context("the guest's clock")?;
        let way = since_1970(SystemTime::now()).saturating_sub(before);
        // The quicker the answer, the less it matters which part of its time was which way.
        best = best.min((way, guest.cast_signed() - (before + way / 2).cast_signed()));
    }
    vm.send_line("stop")?;
    Ok(best.1)
}

/// Starts the oracle in a guest that takes commands; `words` are further ones for it, such as `--depth 8`.
pub fn start(vm: &mut Vm, words: &str) -> Result<()> {
    vm.send_line(&format!("oracle run --path /dev/vda --journal /dev/vdb {words}"))?;
    vm.expect("oracle: running\n", ANSWER).map(drop)
}

/// How far the oracle has got.
pub fn progress(vm: &mut Vm) -> Result<Progress> {
    vm.send_line("progress")?;
    vm.expect_json(ANSWER).context("the oracle's progress")
}

/// Waits until at least `more` further writes were acknowledged.
pub fn await_writes(vm: &mut Vm, more: u64, patience: Duration) -> Result<()> {
    let (deadline, start) = (Instant::now() + patience, progress(vm)?.acknowledged);
    loop {
        let now = progress(vm)?.acknowledged;
        if now >= start + more {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "awaited {more} writes for {patience:?}: {}", now - start);
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Ends the oracle and takes what it found.
pub fn stop(vm: &mut Vm) -> Result<Found> {
    vm.send_line("stop")?;
    vm.expect_json(END).context("what the oracle found")
}

/// The lines of the guest's kernel log that tell of an I/O error.
pub fn complaints(vm: &mut Vm) -> Result<Vec<String>> {
    let log = vm.guest("dmesg")?;
    let words = ["I/O error", "blk_update_request", "Buffer I/O", "hung task", "blocked for more than"];
    let bad = |line: &&str| words.iter().any(|word| line.contains(word));
    Ok(log.lines().filter(bad).map(str::to_owned).collect())
}

/// Nothing may be wrong with what was found inside and outside.
pub fn expect_clean(found: &Found, checked: &Checked) -> Result<()> {
    let clean = Faults::default();
    if found.faults != clean || found.io_errors != 0 || checked.faults != clean {
        bail!(
            "inside: {:?}, {} I/O errors\n{}\noutside: {:?}\n{}",
            found.faults,
            found.io_errors,
            found.told.join("\n"),
            checked.faults,
            checked.told.join("\n")
        );
    }
    ensure!(found.acknowledged > 0, "nothing was written");
    Ok(())
}
