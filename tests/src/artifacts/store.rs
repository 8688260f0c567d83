//! A directory per recipe and input, made once: built under a lock, beside its final name, then renamed, so
//! that a build that was killed leaves nothing half-made.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::{paths, progress};

/// A short name that stands for all of `inputs`.
#[must_use]
pub fn key<'a>(inputs: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new();
    for input in inputs {
        hash.update((input.len() as u64).to_le_bytes());
        hash.update(input);
    }
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// Returns the directory `kind-key` in the cache, which `make` fills if it is not there yet.
/// Directories of the same kind with another key are removed unless they are in use.
pub fn directory(kind: &str, key: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<Stored> {
    let cache = paths::cache();
    fs::create_dir_all(&cache).with_context(|| format!("make {}", cache.display()))?;
    let lock = File::create(cache.join(format!("{kind}.lock")))?;
    progress::step(&format!("wait for another process that makes the {kind}"), || lock.lock())
        .with_context(|| format!("lock the {kind}"))?;
    let path = cache.join(format!("{kind}-{key}"));
    if !path.exists() {
        let unfinished = cache.join(format!("{kind}.unfinished"));
        remove(&unfinished)?;
        fs::create_dir(&unfinished)?;
        progress::step(&format!("make the {kind}"), || make(&unfinished))?;
        File::create(unfinished.join(".in-use"))?;
        fs::rename(&unfinished, &path)?;
    }
    let in_use = File::open(path.join(".in-use"))?;
    in_use.lock_shared()?;
    remove_others(&cache, kind, &path)?;
    Ok(Stored { path, _in_use: in_use })
}

/// A directory of the cache, kept from removal as long as this value lives.
#[derive(Debug)]
pub struct Stored {
    path: PathBuf,
    _in_use: File,
}

impl Stored {
    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The newest few are kept: branches that differ in an input take turns.
const KEPT: usize = 3;

fn remove_others(cache: &Path, kind: &str, current: &Path) -> Result<()> {
    let mut others = Vec::new();
    for entry in fs::read_dir(cache)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_kind = name
            .strip_prefix(kind)
            .and_then(|rest| rest.strip_prefix('-'))
            .is_some_and(|key| key.len() == 16 && key.bytes().all(|byte| byte.is_ascii_hexdigit()));
        if is_kind && entry.path() != current {
            others.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    others.sort();
    let surplus = (others.len() + 1).saturating_sub(KEPT);
    for (_, path) in others.into_iter().take(surplus) {
        let free = File::open(path.join(".in-use")).is_ok_and(|file| file.try_lock().is_ok());
        if free {
            remove(&path)?;
        }
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
