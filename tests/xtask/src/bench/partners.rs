//! Programs of others that the product is compared with, and how they come into the test host.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use ozone_tests::host::{Put, executable};
use ozone_tests::tool;

/// What QEMU reads beside its libraries, as Debian's packages place it: boot firmware and the option ROMs that load a
/// kernel. The test host runs on QEMU, so its package is here.
const QEMU_FILES: [&str; 12] = [
    "/usr/share/qemu/bios-microvm.bin",
    "/usr/share/qemu/qboot.rom",
    "/usr/share/qemu/linuxboot.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
    "/usr/share/qemu/multiboot_dma.bin",
    "/usr/share/qemu/pvh.bin",
    "/usr/share/qemu/kvmvapic.bin",
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/seabios/bios-microvm.bin",
    "/usr/share/seabios/bios.bin",
    "/usr/lib/ipxe/qemu/efi-virtio.rom",
    "/usr/lib/ipxe/qemu/pxe-virtio.rom",
];

/// QEMU of this machine for the test host: nothing if it is not here, which the suite then says.
pub fn qemu() -> Result<Vec<Put>> {
    let Some(program) = find("qemu-system-x86_64", None) else { return Ok(Vec::new()) };
    // It looks for its files beside itself.
    let mut puts = vec![Put { to: "/usr/bin/qemu-system-x86_64".to_owned(), from: program.clone() }];
    for file in libraries(&program)?.into_iter().chain(QEMU_FILES.map(str::to_owned)) {
        if Path::new(&file).is_file() {
            puts.push(Put { from: file.clone().into(), to: file });
        }
    }
    Ok(puts)
}

/// The dynamic loader and every library of a program, as it finds them.
fn libraries(program: &Path) -> Result<Vec<String>> {
    let list = tool::output(Command::new("ldd").arg(program))?;
    let path = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.into_iter().find(|word| word.starts_with('/')).map(str::to_owned)
    };
    Ok(list.lines().filter_map(path).collect())
}

/// A program of `folder`, or else of the PATH or of the place where the test host has what was put there.
pub fn find(name: &str, folder: Option<&Path>) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = folder.map(Path::to_owned).into_iter().chain(std::env::split_paths(&path));
    let mut candidates = places.map(|place| place.join(name)).chain([PathBuf::from(executable(name))]);
    candidates.find(|candidate| candidate.is_file())
}
