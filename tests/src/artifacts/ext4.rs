//! Images with an ext4 file system.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::tool;

/// Fixed, so that an image is the same wherever it is made.
const UUID: &str = "6f7a6f6e-6500-4000-8000-000000000001";

/// Makes an image of that size (mke2fs(8)) at `path` from the files in `tree`, which belong to root there.
pub fn make(tree: &Path, path: &Path, label: &str, size: &str) -> Result<()> {
    tool::output(
        Command::new("mke2fs")
            .env("PATH", search_path())
            .env("E2FSPROGS_FAKE_TIME", "1700000000")
            .args(["-q", "-t", "ext4", "-b", "4096", "-m", "0", "-L", label])
            .args(["-U", UUID, "-E"])
            .arg(format!("hash_seed={UUID},root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0"))
            .arg("-d")
            .args([tree, path])
            .arg(size),
    )?;
    Ok(())
}

/// Ordinary users often lack the directory where Debian keeps `mke2fs`.
fn search_path() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}
