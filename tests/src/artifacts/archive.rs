//! Initramfs archives (cpio, newc format).

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use cpio::newc::{Builder, trailer};

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// An archive being written. Parents must be added before what lies in them.
pub struct Archive {
    output: BufWriter<File>,
    entries: u32,
}

impl Archive {
    /// Starts an archive at `path`.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self { output: BufWriter::new(file), entries: 0 })
    }

    /// Adds a directory.
    pub fn directory(&mut self, name: &str) -> Result<()> {
        self.entry(name, DIRECTORY | 0o755, (0, 0), &[])
    }

    /// Adds a file.
    pub fn file(&mut self, name: &str, permissions: u32, contents: &[u8]) -> Result<()> {
        self.entry(name, FILE | permissions, (0, 0), contents)
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, name: &str, target: &str) -> Result<()> {
        self.entry(name, SYMLINK | 0o777, (0, 0), target.as_bytes())
    }

    /// Adds a character device.
    pub fn character_device(&mut self, name: &str, device: (u32, u32)) -> Result<()> {
        self.entry(name, CHARACTER_DEVICE | 0o600, device, &[])
    }

    /// Ends the archive.
    pub fn finish(self) -> Result<()> {
        trailer(self.output)?.flush()?;
        Ok(())
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), contents: &[u8]) -> Result<()> {
        self.entries += 1;
        let mut writer = Builder::new(name)
            .ino(self.entries)
            .nlink(1)
            .mode(mode)
            .rdev_major(device.0)
            .rdev_minor(device.1)
            .write(&mut self.output, u32::try_from(contents.len())?);
        writer.write_all(contents)?;
        writer.finish()?;
        Ok(())
    }
}
