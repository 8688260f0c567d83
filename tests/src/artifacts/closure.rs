//! Programs of Debian's packages with all that they are linked with: unpacked, not installed. None of this machine's libraries
//! is used, so what is collected runs in any root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::apt::Apt;
use crate::{progress, tool};

/// Where libraries are in the packages. The last ones are those of programs that keep theirs to themselves.
const LIBRARIES: [&str; 5] = [
    "lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu/ceph",
    "lib/x86_64-linux-gnu/systemd",
    "usr/lib/x86_64-linux-gnu/systemd",
];

/// Where all of them are in a root of their own; the loader, which is one of them, has its fixed place too.
pub(super) const LIBRARY: &str = "lib/x86_64-linux-gnu";
pub(super) const LOADER: &str = "ld-linux-x86-64.so.2";

/// Where a file is on this machine, and its path in a root, without a slash before it.
pub(super) type Place = (PathBuf, String);

/// Fetches packages and all that they depend on into `directory`, and returns where they are unpacked.
pub(super) fn unpack(directory: &Path, suite: &str, packages: &[&str]) -> Result<PathBuf> {
    let apt = Apt::new(directory)?;
    progress::step("read Debian's package lists", || tool::output(apt.get().arg("update")))?;
    progress::step(&format!("fetch {} and what they depend on", packages.join(", ")), || {
        // This apt knows of no package that is installed, so it takes all of them.
        let options = ["--yes", "--download-only", "--no-install-recommends", "--target-release", suite];
        tool::output(apt.get().arg("install").args(options).args(packages))
    })?;
    let unpacked = directory.join("unpacked");
    progress::step("unpack them", || -> Result<()> {
        for file in fs::read_dir(directory.join("apt/cache/archives"))? {
            let file = file?.path();
            if file.extension().is_some_and(|it| it == "deb") {
                tool::output(Command::new("dpkg-deb").arg("-x").arg(file).arg(&unpacked))?;
            }
        }
        Ok(())
    })?;
    Ok(unpacked)
}

/// Removes what [`unpack`] has left.
pub(super) fn clean(directory: &Path) -> Result<()> {
    fs::remove_dir_all(directory.join("unpacked"))?;
    fs::remove_dir_all(directory.join("apt"))?;
    Ok(())
}

/// An executable of the packages, every library that it needs, and the loader.
pub(super) fn of(unpacked: &Path, executable: &str) -> Result<Vec<Place>> {
    let folders: Vec<_> = LIBRARIES.iter().map(|folder| unpacked.join(folder).display().to_string()).collect();
    let listed = tool::output(
        Command::new(unpacked.join(LIBRARY).join(LOADER))
            .args(["--inhibit-cache", "--library-path", &folders.join(":"), "--list"])
            .arg(unpacked.join(executable)),
    )?;
    let mut files = vec![(unpacked.join(executable), executable.to_owned())];
    for (name, path) in listed.lines().filter_map(library) {
        let path = Path::new(path);
        ensure!(path.starts_with(unpacked), "{name} is in none of the packages");
        files.push((path.to_owned(), format!("{LIBRARY}/{name}")));
    }
    files.push((unpacked.join(LIBRARY).join(LOADER), format!("lib64/{LOADER}")));
    Ok(files)
}

/// Copies files to their places in a root.
pub(super) fn copy(files: &[Place], root: &Path) -> Result<()> {
    for (from, to) in files {
        let to = root.join(to);
        fs::create_dir_all(to.parent().context("no folder")?)?;
        fs::copy(from, &to).with_context(|| format!("copy {}", from.display()))?;
    }
    Ok(())
}

/// Name and path in a line `NAME => PATH (ADDRESS)` of the loader's list; the loader itself and the kernel's own have none.
fn library(line: &str) -> Option<(&str, &str)> {
    let (name, rest) = line.trim().split_once(" => ")?;
    // A library that is not found is named in full, so that it is in none of the packages.
    let path = rest.rsplit_once(" (").map_or(rest, |(path, _)| path);
    (!name.contains('/')).then_some((name, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loaders_list_is_read() {
        assert_eq!(library("\tlibaio.so.1 => /a b/libaio.so.1 (0x00007f)"), Some(("libaio.so.1", "/a b/libaio.so.1")));
        assert_eq!(library("\tlibx.so => not found"), Some(("libx.so", "not found")));
        assert_eq!(library("\tlinux-vdso.so.1 (0x00007ffd)"), None);
        assert_eq!(library("\t/lib64/ld-linux-x86-64.so.2 => /a/ld-linux-x86-64.so.2 (0x1)"), None);
    }
}
