//! Programs of others that the product is compared with, and how they come into the test host.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::Result;
use ozone_tests::artifacts::{self, Programs};
use ozone_tests::host::{Put, executable};

/// A program of `folder`, or else of Debian's packages, or else of the PATH. In the test host, what was put there is on
/// the PATH.
pub fn find(name: &str, folder: Option<&Path>) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let unpacked = if in_test_host() { None } else { unpacked() };
    let places = folder.map(Path::to_owned).into_iter().chain(unpacked.map(Programs::folder));
    let places = places.chain(std::env::split_paths(&path)).map(|place| place.join(name));
    places.chain([PathBuf::from(executable(name))]).find(|candidate| candidate.is_file())
}

/// These programs for the test host, each at its package's own place: nothing if they cannot be had, which the suite
/// then says.
pub fn puts(names: &[&str]) -> Result<Vec<Put>> {
    let mut puts: Vec<Put> = Vec::new();
    for name in names {
        let files = unpacked().map(|programs| programs.files(name)).transpose()?.unwrap_or_default();
        puts.extend(files.into_iter().map(|(from, to)| Put { from, to }));
    }
    // They have libraries in common.
    puts.sort_by(|one, other| one.to.cmp(&other.to));
    puts.dedup_by(|one, other| one.to == other.to);
    Ok(puts)
}

/// QEMU for the test host.
pub fn qemu() -> Result<Vec<Put>> {
    puts(&["qemu-system-x86_64"])
}

/// What was unpacked from Debian's packages, kept in the cache for as long as this process lives.
pub fn unpacked() -> Option<&'static Programs> {
    static PROGRAMS: OnceLock<Option<Programs>> = OnceLock::new();
    let fetch = || {
        let programs = artifacts::programs();
        programs.inspect_err(|error| eprintln!("… no programs to compare with from Debian's packages: {error:#}")).ok()
    };
    PROGRAMS.get_or_init(fetch).as_ref()
}

fn in_test_host() -> bool {
    std::env::var_os(agent::layout::IN_HOST).is_some()
}
