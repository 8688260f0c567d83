//! Slow disks: a loop device, and one of the device mapper's over it that delays reads and writes.
//!
//! Both take input and output past the page cache, which the test host's own file system does not.

mod mapper;

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::tool;

/// A node under /dev appears, and a device is let go of, within this.
const PATIENCE: Duration = Duration::from_secs(20);

/// A block device over a file; detached on drop.
#[derive(Debug)]
pub struct Loop {
    device: PathBuf,
}

impl Loop {
    /// Attaches `file` to a free loop device.
    pub fn attach(file: &Path) -> Result<Self> {
        // Between the search and the use of a free device there must not be another.
        static SEARCH: Mutex<()> = Mutex::new(());
        let _one = SEARCH.lock();
        let device = PathBuf::from(tool::output(Command::new("losetup").arg("-f"))?.trim());
        tool::output(Command::new("losetup").arg(&device).arg(file))?;
        Ok(Self { device })
    }

    /// The device.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.device
    }

    /// How many sectors of 512 bytes it has.
    fn sectors(&self) -> Result<u64> {
        let name = self.device.file_name().context("a device without a name")?.to_string_lossy();
        let path = format!("/sys/block/{name}/size");
        Ok(fs::read_to_string(&path).with_context(|| path)?.trim().parse()?)
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = tool::output(Command::new("losetup").arg("-d").arg(&self.device));
    }
}

/// A loop device whose reads and writes take longer; removed on drop.
#[derive(Debug)]
pub struct Delayed {
    name: String,
    device: PathBuf,
    _under: Loop,
}

impl Delayed {
    /// Puts a device under that name over `under`.
    pub fn over(under: Loop, name: &str, read: Duration, write: Duration) -> Result<Self> {
        let sectors = under.sectors()?;
        let path = under.path().display();
        let (read, write) = (read.as_millis(), write.as_millis());
        let minor = mapper::create(name, sectors, "delay", &format!("{path} 0 {read} {path} 0 {write}"))?;
        let delayed = Self { name: name.to_owned(), device: format!("/dev/dm-{minor}").into(), _under: under };
        let deadline = Instant::now() + PATIENCE;
        while !fs::metadata(&delayed.device).is_ok_and(|it| it.file_type().is_block_device()) {
            ensure!(Instant::now() < deadline, "{} did not appear", delayed.device.display());
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(delayed)
    }

    /// The device.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.device
    }
}

impl Drop for Delayed {
    fn drop(&mut self) {
        // Whoever used it may have been killed a moment ago, with requests that are still delayed.
        let deadline = Instant::now() + PATIENCE;
        while mapper::remove(&self.name).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
