//! The emulator of the test host: QEMU from Debian's backports, without installing it.
//!
//! QEMU 7.2, which is Debian 12's own, loses the emulated host or its guest about once in a hundred boots: processors that
//! spin for ever, a triple fault out of nowhere. QEMU 10 does not, and boots guests in half the time. It is unpacked
//! into the cache with those of its libraries that this machine lacks; the system stays as it is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::apt::Apt;
use super::store::{self, Stored};
use crate::{progress, tool};

const PACKAGE: &str = "qemu-system-x86";
const SUITE: &str = "bookworm-backports";

/// QEMU, unpacked.
#[derive(Debug)]
pub struct Emulator {
    stored: Stored,
}

/// The emulator, fetched if it is not there yet.
pub fn emulator() -> Result<Emulator> {
    let recipe = store::key([include_bytes!("emulator.rs").as_slice(), include_bytes!("apt.rs")]);
    Ok(Emulator { stored: store::directory("emulator", &recipe, fetch)? })
}

impl Emulator {
    /// A command that starts it.
    #[must_use]
    pub fn command(&self) -> Command {
        let root = self.stored.path().join("root");
        let libraries = root.join("usr/lib/x86_64-linux-gnu");
        let mut command = Command::new(root.join("usr/bin/qemu-system-x86_64"));
        command
            .env("LD_LIBRARY_PATH", &libraries)
            .env("QEMU_MODULE_DIR", libraries.join("qemu"))
            .arg("-L")
            .arg(root.join("usr/share/qemu"))
            .arg("-L")
            .arg(root.join("usr/share/seabios"));
        command
    }

    /// What it says of itself.
    pub fn version(&self) -> Result<String> {
        tool::output(self.command().arg("--version")).context("the emulator does not start")
    }
}

fn fetch(directory: &Path) -> Result<()> {
    let apt = Apt::new(directory)?;
    progress::step("read Debian's package lists", || tool::output(apt.get().arg("update")))?;
    // What the system has need not be fetched; the emulator and its firmware are taken in any case.
    let plan = tool::output(
        apt.get()
            .args(["-o", "Dir::State::status=/var/lib/dpkg/status", "-o", "Debug::NoLocking=1"])
            .args(["--simulate", "--yes", "--no-install-recommends", "--reinstall"])
            .args(["--target-release", SUITE, "install", PACKAGE, "qemu-system-common", "qemu-system-data", "seabios"]),
    )?;
    let download: PathBuf = directory.join("download");
    fs::create_dir(&download)?;
    let packages: Vec<String> = plan.lines().filter_map(planned).collect();
    progress::step(&format!("fetch {PACKAGE} and {} packages with it", packages.len().saturating_sub(1)), || {
        tool::output(apt.get().arg("download").args(&packages).current_dir(&download))
    })?;
    for file in fs::read_dir(&download)? {
        tool::output(Command::new("dpkg-deb").arg("-x").arg(file?.path()).arg(directory.join("root")))?;
    }
    fs::remove_dir_all(&download)?;
    fs::remove_dir_all(directory.join("apt"))?;
    Ok(())
}

/// A line `Inst NAME [OLD] (VERSION …)` of apt-get's plan as `NAME=VERSION`.
fn planned(line: &str) -> Option<String> {
    let rest = line.strip_prefix("Inst ")?;
    let name = rest.split_whitespace().next()?;
    let version = rest.split_once('(')?.1.split_whitespace().next()?;
    Some(format!("{name}={version}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plan_names_packages_and_versions() {
        let new = "Inst libfdt1 (1.6.1-4 Debian:12.12/oldstable [amd64])";
        let upgrade = "Inst seabios [1.16.2-1] (1.16.3-2~bpo12+1 Debian Backports:oldstable-backports [all]) []";
        assert_eq!(planned(new).unwrap(), "libfdt1=1.6.1-4");
        assert_eq!(planned(upgrade).unwrap(), "seabios=1.16.3-2~bpo12+1");
        assert_eq!(planned("Conf libfdt1 (1.6.1-4)"), None);
    }
}
