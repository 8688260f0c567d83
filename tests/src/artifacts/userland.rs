//! A root with a real systemd in it, for tests of what the product is to a service manager: from Debian's packages, as few files
//! as systemd needs to start services.

use std::fs;
use std::path::{Path, PathBuf};

use agent::layout;
use anyhow::{Context, Result};

use super::closure;
use super::store::{self, Stored};
use crate::host::Put;

/// Where it is in the test host.
const IN_HOST: &str = "/userland";

const SUITE: &str = "bookworm";

const PACKAGES: [&str; 3] = ["systemd", "coreutils", "procps"];

/// The service manager, its commands, and what the units under test call.
const PROGRAMS: [&str; 8] = [
    "lib/systemd/systemd",
    "lib/systemd/systemd-journald",
    "bin/systemctl",
    "bin/journalctl",
    "usr/bin/systemd-analyze",
    "bin/kill",
    "bin/true",
    "usr/bin/tail",
];

const UNITS: &str = "lib/systemd/system";

/// The journal; of the rest the targets and slices alone, which do nothing by themselves.
const JOURNAL: [&str; 3] = ["systemd-journald.service", "systemd-journald.socket", "systemd-journald-dev-log.socket"];

/// A root for systemd.
#[derive(Debug)]
pub struct Userland {
    root: PathBuf,
}

impl Userland {
    /// The root in the place where the present program finds it: the test host's, else the cache's.
    pub fn here() -> Result<Self> {
        if std::env::var_os(layout::IN_HOST).is_some() {
            return Ok(Self { root: IN_HOST.into() });
        }
        let stored = userland()?;
        let root = root(&stored);
        // Kept from removal until this process ends.
        std::mem::forget(stored);
        Ok(Self { root })
    }

    /// The directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }
}

/// The root in the cache, made if it is not there yet.
pub fn userland() -> Result<Stored> {
    let recipe =
        store::key([include_bytes!("userland.rs").as_slice(), include_bytes!("apt.rs"), include_bytes!("closure.rs")]);
    store::directory("userland", &recipe, make)
}

/// The files of [`userland`] for the test host.
pub fn userland_puts() -> Result<Vec<Put>> {
    let root = root(&userland()?);
    let mut puts = Vec::new();
    let mut left = vec![root.clone()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(&directory)? {
            let path = entry?.path();
            if path.is_dir() {
                left.push(path);
            } else {
                let relative = path.strip_prefix(&root)?.display().to_string();
                puts.push(Put { from: path, to: format!("{IN_HOST}/{relative}") });
            }
        }
    }
    Ok(puts)
}

fn root(stored: &Stored) -> PathBuf {
    stored.path().join("root")
}

fn make(directory: &Path) -> Result<()> {
    let unpacked = closure::unpack(directory, SUITE, &PACKAGES)?;
    let root = directory.join("root");
    for program in PROGRAMS {
        let files = closure::of(&unpacked, program).with_context(|| format!("collect what {program} needs"))?;
        closure::copy(&files, &root)?;
    }
    let units = root.join(UNITS);
    fs::create_dir_all(&units)?;
    for entry in fs::read_dir(unpacked.join(UNITS))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let passive = name.ends_with(".target") || name.ends_with(".slice");
        if passive || JOURNAL.contains(&name.as_str()) {
            // A link to another unit becomes a copy of it; one to nothing is a unit that is off.
            if let Ok(text) = fs::read(entry.path()) {
                fs::write(units.join(name), text)?;
            }
        }
    }
    fs::create_dir_all(root.join("etc"))?;
    fs::write(root.join("etc/machine-id"), "6f7a6f6e650040008000000000000001\n")?;
    fs::write(root.join("etc/os-release"), "ID=debian\nPRETTY_NAME=\"the tests' userland\"\n")?;
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
    fs::write(root.join("etc/group"), "root:x:0:\nsystemd-journal:x:101:\n")?;
    closure::clean(directory)
}
