//! Files into the host (from the parcel disk) and out of it.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path};

use agent::layout;
use anyhow::{Context, Result, ensure};

const BLOCK: usize = 64 << 10;

/// Unpacks the archive of `bytes` on the parcel disk under `directory`.
pub fn unpack(bytes: u64, directory: &str) -> Result<()> {
    let disk = File::open(layout::PARCEL).context("open the parcel disk")?;
    let mut archive = tar::Archive::new(BufReader::with_capacity(1 << 20, disk.take(bytes)));
    for entry in archive.entries().context("read the parcel")? {
        let mut entry = entry.context("read the parcel")?;
        let name = entry.path()?.into_owned();
        ensure!(
            name.components().all(|part| matches!(part, Component::Normal(_))),
            "{}: not a plain relative path",
            name.display()
        );
        let target = Path::new(directory).join(&name);
        let mode = entry.header().mode()?;
        write_sparse(&mut entry, &target, mode).with_context(|| format!("unpack {}", name.display()))?;
    }
    Ok(())
}

/// Copies `from` to a new file, leaving holes where it is zero: the host's files live in memory.
fn write_sparse(from: &mut impl Read, target: &Path, mode: u32) -> Result<()> {
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    // A running executable cannot be written to, only replaced.
    let _ = fs::remove_file(target);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(target)?;
    let mut block = vec![0; BLOCK];
    let mut length = 0;
    loop {
        let count = read_full(from, &mut block)?;
        let data = block.get(..count).unwrap_or_default();
        if data.iter().all(|byte| *byte == 0) {
            file.seek(SeekFrom::Current(i64::try_from(count)?))?;
        } else {
            file.write_all(data)?;
        }
        length += count as u64;
        if count < BLOCK {
            break;
        }
    }
    file.set_len(length)?;
    fs::set_permissions(target, Permissions::from_mode(mode))?;
    Ok(())
}

fn read_full(from: &mut impl Read, block: &mut [u8]) -> std::io::Result<usize> {
    let mut count = 0;
    while let Some(rest) = block.get_mut(count..).filter(|rest| !rest.is_empty()) {
        match from.read(rest)? {
            0 => break,
            more => count += more,
        }
    }
    Ok(count)
}
