//! The disk's image. Its last sector is not the guest's: it counts the starts of the backend.

use std::os::fd::OwnedFd;

use nix::unistd::{Whence, lseek};

use crate::sys;

/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// An open image.
#[derive(Debug)]
pub struct Image {
    /// The image itself.
    pub file: OwnedFd,
    /// What the guest sees, in sectors.
    pub capacity: u64,
    /// Which start of the disk's backend this is, from 1.
    pub start: u64,
}

impl Image {
    /// Counts this start.
    pub fn open(file: OwnedFd) -> Result<Self, String> {
        let text = |errno| format!("the image: {errno}");
        let sectors = u64::try_from(lseek(&file, 0, Whence::SeekEnd).map_err(text)?).unwrap_or(0) / SECTOR;
        let capacity = sectors.checked_sub(1).ok_or("the image has no sector to count in")?;
        let counter = i64::try_from(capacity * SECTOR).map_err(|_| "the image is too large")?;
        let mut word = [0; 8];
        sys::read_at(&file, &mut word, counter).map_err(text)?;
        let start = u64::from_ne_bytes(word) + 1;
        sys::write_at(&file, &start.to_ne_bytes(), counter).map_err(text)?;
        Ok(Self { file, capacity, start })
    }
}
