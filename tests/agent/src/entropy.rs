//! Two hosts resumed from one snapshot must not draw the same random numbers.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};

nix::ioctl_none!(reseed, b'R', 0x07);

/// Mixes `bytes` into the kernel's pool and makes the generator draw from it at once.
pub fn add(bytes: &[u8]) -> Result<()> {
    fs::write("/dev/urandom", bytes).context("write /dev/urandom")?;
    let device = File::open("/dev/urandom").context("open /dev/urandom")?;
    // SAFETY: RNDRESEEDCRNG takes no argument and touches no memory of ours; the descriptor is open.
    unsafe { reseed(device.as_raw_fd()) }.context("reseed")?;
    Ok(())
}
