//! Debian packages, fetched and unpacked without root and without touching the system's own apt state.
//!
//! Once fetched a set of packages stays in the cache: builds are repeatable and work offline. Removing
//! the cache fetches the newest versions.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::store::{self, Stored};
use crate::{progress, tool};

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const SUITES: [(&str, &str); 3] = [
    ("http://deb.debian.org/debian", "bookworm"),
    ("http://deb.debian.org/debian-security", "bookworm-security"),
    ("http://deb.debian.org/debian", "bookworm-backports"),
];

/// The unpacked packages.
#[derive(Debug)]
pub struct Packages {
    stored: Stored,
}

impl Packages {
    /// The 6.1 cloud kernel: Debian 12's own.
    #[must_use]
    pub fn linux_6_1(&self) -> PathBuf {
        self.stored.path().join("linux-6.1")
    }

    /// The 6.12 cloud kernel, from backports.
    #[must_use]
    pub fn linux_6_12(&self) -> PathBuf {
        self.stored.path().join("linux-6.12")
    }

    /// The static busybox.
    #[must_use]
    pub fn busybox(&self) -> PathBuf {
        self.stored.path().join("busybox/bin/busybox")
    }

    /// Names and versions of what was unpacked: what everything made from it depends on.
    pub fn versions(&self) -> Result<Vec<u8>> {
        Ok(fs::read(self.stored.path().join("versions"))?)
    }
}

/// The packages, fetched if they are not there yet.
pub fn packages() -> Result<Packages> {
    let recipe = store::key([include_bytes!("apt.rs").as_slice()]);
    let stored = store::directory("packages", &recipe, fetch)?;
    Ok(Packages { stored })
}

fn fetch(directory: &Path) -> Result<()> {
    let apt = Apt::new(directory)?;
    progress::step("read Debian's package lists", || tool::output(apt.get().arg("update")))?;
    let wanted = [
        ("linux-6.1", apt.kernel("6.1.")?),
        ("linux-6.12", apt.kernel("6.12.")?),
        ("busybox", "busybox-static".to_owned()),
    ];
    let mut versions = String::new();
    for (name, package) in wanted {
        let download = directory.join("download");
        fs::create_dir(&download)?;
        progress::step(&format!("fetch {package}"), || {
            tool::output(apt.get().arg("download").arg(&package).current_dir(&download))
        })?;
        let file = fs::read_dir(&download)?.next().context("apt-get downloaded nothing")??;
        let into = directory.join(name);
        progress::step(&format!("unpack {package}"), || {
            tool::output(Command::new("dpkg-deb").arg("-x").arg(file.path()).arg(&into))
        })?;
        versions.push_str(&format!("{}\n", file.file_name().display()));
        fs::remove_dir_all(&download)?;
    }
    fs::remove_dir_all(directory.join("apt"))?;
    fs::write(directory.join("versions"), versions)?;
    Ok(())
}

/// An apt of our own: lists, caches and sources under one directory.
pub(super) struct Apt {
    configuration: PathBuf,
}

impl Apt {
    pub(super) fn new(parent: &Path) -> Result<Self> {
        let root = parent.join("apt");
        for name in ["state/lists/partial", "cache/archives/partial", "parts"] {
            fs::create_dir_all(root.join(name))?;
        }
        fs::write(root.join("status"), "")?;
        let sources: String = SUITES
            .iter()
            .map(|(address, suite)| format!("deb [signed-by={KEYRING}] {address} {suite} main\n"))
            .collect();
        fs::write(root.join("sources.list"), sources)?;
        let configuration = root.join("apt.conf");
        let root = root.display();
        // Proxies and the like of the system's configuration still count; its hooks do not.
        fs::write(
            &configuration,
            format!(
                "Dir::State \"{root}/state\";\n\
                 Dir::State::status \"{root}/status\";\n\
                 Dir::Cache \"{root}/cache\";\n\
                 Dir::Etc::sourcelist \"{root}/sources.list\";\n\
                 Dir::Etc::sourceparts \"{root}/parts\";\n\
                 Dir::Etc::preferences \"{root}/none\";\n\
                 Dir::Etc::preferencesparts \"{root}/parts\";\n\
                 APT::Architecture \"amd64\";\n\
                 APT::Sandbox::User \"\";\n\
                 Acquire::Languages \"none\";\n\
                 Acquire::Retries \"3\";\n\
                 #clear APT::Update::Post-Invoke;\n\
                 #clear APT::Update::Post-Invoke-Success;\n\
                 #clear Acquire::IndexTargets::deb::DEP-11;\n"
            ),
        )?;
        Ok(Self { configuration })
    }

    pub(super) fn get(&self) -> Command {
        let mut command = Command::new("apt-get");
        command.arg("-c").arg(&self.configuration);
        command
    }

    /// Name and version of the kernel package that `linux-image-cloud-amd64` of that series stands for.
    fn kernel(&self, series: &str) -> Result<String> {
        let shown = tool::output(
            Command::new("apt-cache").arg("-c").arg(&self.configuration).args(["show", "linux-image-cloud-amd64"]),
        )?;
        kernel_package(&shown, series)
            .with_context(|| format!("no linux-image-cloud-amd64 {series}x in Debian's lists"))
    }
}

/// Finds the series in apt's paragraphs (newest first) and turns `name (= version)` into `name=version`.
fn kernel_package(shown: &str, series: &str) -> Option<String> {
    let paragraph = shown
        .split("\n\n")
        .find(|paragraph| field(paragraph, "Version").is_some_and(|version| version.starts_with(series)))?;
    let (name, version) = field(paragraph, "Depends")?.split_once(" (= ")?;
    let (version, _) = version.split_once(')')?;
    Some(format!("{name}={version}"))
}

fn field<'a>(paragraph: &'a str, name: &str) -> Option<&'a str> {
    paragraph.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_of_a_series_is_found() {
        let shown = "Package: k\nVersion: 6.12.9-1\nDepends: linux-6.12.9 (= 6.12.9-1)\n\n\
                     Package: k\nVersion: 6.1.192-2\nDepends: linux-6.1.0-56 (= 6.1.192-2)\n\n\
                     Package: k\nVersion: 6.1.176-1\nDepends: linux-6.1.0-50 (= 6.1.176-1)\n";
        assert_eq!(kernel_package(shown, "6.1.").unwrap(), "linux-6.1.0-56=6.1.192-2");
        assert_eq!(kernel_package(shown, "6.12.").unwrap(), "linux-6.12.9=6.12.9-1");
        assert_eq!(kernel_package(shown, "6.18."), None);
    }
}
