//! Programs of others that the product is measured beside, each with all that it needs: from Debian's packages, which are
//! unpacked without being installed. None of this machine's libraries is used, so the same set runs here, in the test
//! host and in a guest.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::closure::{self, LIBRARY, LOADER};
use super::ext4;
use super::store::{self, Stored};

/// QEMU is that of the test host's emulator; the rest has no newer version there.
const SUITE: &str = "bookworm-backports";

const PACKAGES: [&str; 6] = ["qemu-system-x86", "qemu-system-data", "seabios", "qemu-utils", "fio", "iperf3"];

const PROGRAMS: [&str; 4] = ["qemu-system-x86_64", "qemu-storage-daemon", "fio", "iperf3"];

/// What QEMU reads beside its libraries: boot firmware, and the option ROMs that load a kernel.
const FIRMWARE: [&str; 9] = [
    "usr/share/qemu/kvmvapic.bin",
    "usr/share/qemu/linuxboot.bin",
    "usr/share/qemu/linuxboot_dma.bin",
    "usr/share/qemu/multiboot_dma.bin",
    "usr/share/qemu/pvh.bin",
    "usr/share/qemu/qboot.rom",
    "usr/share/seabios/bios-256k.bin",
    "usr/share/seabios/bios-microvm.bin",
    "usr/share/seabios/bios.bin",
];

/// What a guest is given.
const GUEST_PROGRAMS: [&str; 2] = ["fio", "iperf3"];
const GUEST_DISK: &str = "guest.ext4";

/// Programs, unpacked.
#[derive(Debug)]
pub struct Programs {
    stored: Stored,
}

/// The programs, fetched if they are not there yet.
pub fn programs() -> Result<Programs> {
    let recipe = store::key([
        include_bytes!("programs.rs").as_slice(),
        include_bytes!("apt.rs"),
        include_bytes!("closure.rs"),
        include_bytes!("ext4.rs"),
    ]);
    Ok(Programs { stored: store::directory("programs", &recipe, fetch)? })
}

impl Programs {
    /// The folder with an executable for each program that runs on this machine.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        self.stored.path().join("bin")
    }

    /// All files of a program: where each is on this machine, and its absolute path in a root where it is to run.
    pub fn files(&self, program: &str) -> Result<Vec<(PathBuf, String)>> {
        let list = self.stored.path().join(program);
        let list = fs::read_to_string(&list).with_context(|| format!("read {}", list.display()))?;
        Ok(list.lines().map(|path| (self.stored.path().join("root").join(path), format!("/{path}"))).collect())
    }

    /// An ext4 image with fio and iperf3 for a guest to change its root to. It has empty `dev`, `proc` and `tmp`.
    #[must_use]
    pub fn guest_disk(&self) -> PathBuf {
        self.stored.path().join(GUEST_DISK)
    }
}

fn fetch(directory: &Path) -> Result<()> {
    let unpacked = closure::unpack(directory, SUITE, &PACKAGES)?;
    for program in PROGRAMS {
        collect(directory, &unpacked, program).with_context(|| format!("collect what {program} needs"))?;
    }
    guest_disk(directory)?;
    closure::clean(directory)
}

/// Copies a program and all that it needs into the root, lists its files, and makes the executable that starts it here.
fn collect(directory: &Path, unpacked: &Path, program: &str) -> Result<()> {
    let executable = format!("usr/bin/{program}");
    let mut files = closure::of(unpacked, &executable)?;
    if program.starts_with("qemu-system") {
        files.extend(FIRMWARE.iter().map(|path| (unpacked.join(path), (*path).to_owned())));
    }
    let root = directory.join("root");
    closure::copy(&files, &root)?;
    let list: String = files.iter().map(|(_, path)| format!("{path}\n")).collect();
    fs::write(directory.join(program), list)?;
    let starter = directory.join("bin").join(program);
    fs::create_dir_all(directory.join("bin"))?;
    // Named by its place, the loader leaves this machine's libraries alone.
    let root = "\"$(dirname \"$0\")/../root";
    let script = format!(
        "#!/bin/sh\nexec {root}/lib64/{LOADER}\" --inhibit-cache --library-path {root}/{LIBRARY}\" {root}/{executable}\" \"$@\"\n"
    );
    fs::write(&starter, script)?;
    fs::set_permissions(&starter, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

fn guest_disk(directory: &Path) -> Result<()> {
    let tree = tempfile::tempdir_in(directory)?;
    for name in ["dev", "proc", "tmp"] {
        fs::create_dir(tree.path().join(name))?;
    }
    for program in GUEST_PROGRAMS {
        for path in fs::read_to_string(directory.join(program))?.lines() {
            let to = tree.path().join(path);
            fs::create_dir_all(to.parent().context("no folder")?)?;
            fs::copy(directory.join("root").join(path), &to)?;
        }
    }
    ext4::make(tree.path(), &directory.join(GUEST_DISK), "ozone-programs", "256M")
}
