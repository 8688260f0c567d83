//! Files on their way into the host: a tar archive on a disk, which is many times faster than a serial port.

use std::fs::{self, File};
use std::io::{BufWriter, Seek, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use agent::layout;
use anyhow::{Context, Result, ensure};

use crate::paths;

/// A file to put into the host.
#[derive(Clone, Debug)]
pub struct Put {
    /// The file on this machine.
    pub from: PathBuf,
    /// Absolute path in the host; the permissions stay the same.
    pub to: String,
}

impl Put {
    /// An executable that the host shall find in its PATH, under the same name.
    #[must_use]
    pub fn executable(from: PathBuf) -> Self {
        let name = from.file_name().unwrap_or_default().to_string_lossy();
        Self { to: super::executable(&name), from }
    }
}

/// An archive in a file without a name: it goes away with the last process that holds it.
#[derive(Debug)]
pub struct Parcel {
    file: File,
    bytes: u64,
}

impl Parcel {
    /// Packs `files`.
    pub fn pack(files: &[Put]) -> Result<Self> {
        fs::create_dir_all(paths::cache())?;
        let mut file = tempfile::tempfile_in(paths::cache()).context("make a parcel")?;
        let mut bytes = 0;
        if !files.is_empty() {
            let mut archive = tar::Builder::new(BufWriter::with_capacity(1 << 20, &mut file));
            for put in files {
                let mut from = File::open(&put.from).with_context(|| format!("open {}", put.from.display()))?;
                archive
                    .append_file(put.to.trim_start_matches('/'), &mut from)
                    .with_context(|| format!("pack {}", put.from.display()))?;
            }
            archive.into_inner()?.flush()?;
            bytes = file.stream_position()?;
        }
        ensure!(bytes <= layout::PARCEL_BYTES, "too much to put into the test host: {bytes} bytes");
        file.set_len(layout::PARCEL_BYTES)?;
        Ok(Self { file, bytes })
    }

    /// Length of the archive.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A descriptor for QEMU.
    pub fn descriptor(&self) -> Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }
}
