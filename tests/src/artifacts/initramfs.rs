//! An initramfs with further programs: archives may follow one another (Linux, early-userspace/buffer-format).

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use tempfile::TempPath;

use super::archive::Archive;

/// Copies the archive `base` and adds `programs` to its `/bin`.
pub fn with_programs(base: &Path, programs: &[&Path]) -> Result<TempPath> {
    let added = tempfile::NamedTempFile::new()?.into_temp_path();
    let mut archive = Archive::create(&added)?;
    for program in programs {
        let name = program.file_name().context("a program without a name")?.to_string_lossy();
        let contents = fs::read(program).with_context(|| format!("read {}", program.display()))?;
        archive.file(&format!("bin/{name}"), 0o755, &contents)?;
    }
    archive.finish()?;
    let mut both = fs::read(base).with_context(|| format!("read {}", base.display()))?;
    both.resize(both.len().next_multiple_of(4), 0);
    both.extend(fs::read(&added)?);
    fs::write(&added, both).context("write the initramfs")?;
    Ok(added)
}
