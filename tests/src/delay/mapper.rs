//! The device mapper's control device (linux/dm-ioctl.h), as far as one target per device needs it.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::libc;

const CONTROL: &str = "/dev/mapper/control";

const CREATE: u8 = 3;
const REMOVE: u8 = 4;
const RESUME: u8 = 6;
const LOAD: u8 = 9;

/// `struct dm_ioctl`.
const HEADER: usize = 312;
/// `struct dm_target_spec`.
const TARGET: usize = 40;
// Where things are in the header.
const DATA_SIZE: usize = 12;
const DATA_START: usize = 16;
const TARGETS: usize = 20;
const DEVICE: usize = 40;
const NAME: usize = 48;

/// Makes a device with one target over its whole length; returns its minor number.
pub fn create(name: &str, sectors: u64, kind: &str, parameters: &str) -> Result<u64> {
    let made = call(CREATE, name, &[], 0)?;
    let mut target = vec![0; TARGET];
    target[8..16].copy_from_slice(&sectors.to_ne_bytes());
    target[24..24 + kind.len()].copy_from_slice(kind.as_bytes());
    target.extend(parameters.as_bytes());
    target.resize((target.len() + 1).next_multiple_of(8), 0);
    let started = call(LOAD, name, &target, 1).and_then(|_| call(RESUME, name, &[], 0));
    if let Err(error) = started {
        let _ = remove(name);
        return Err(error);
    }
    // A device number as the kernel encodes it: the minor's bits are around the major's.
    Ok(made & 0xff | made >> 12 & 0xf_ff00)
}

/// Removes a device that nobody has open.
pub fn remove(name: &str) -> Result<()> {
    call(REMOVE, name, &[], 0).map(drop)
}

/// One command; returns the device's number.
fn call(command: u8, name: &str, data: &[u8], targets: u32) -> Result<u64> {
    ensure!(name.len() < 128, "'{name}' is too long for a name");
    let size = HEADER + data.len();
    let mut message = vec![0_u8; size];
    message[0..4].copy_from_slice(&4_u32.to_ne_bytes());
    message[DATA_SIZE..][..4].copy_from_slice(&u32::try_from(size)?.to_ne_bytes());
    message[DATA_START..][..4].copy_from_slice(&u32::try_from(HEADER)?.to_ne_bytes());
    message[TARGETS..][..4].copy_from_slice(&targets.to_ne_bytes());
    message[NAME..][..name.len()].copy_from_slice(name.as_bytes());
    message[HEADER..].copy_from_slice(data);
    let control = File::options().read(true).write(true).open(CONTROL).context("open the device mapper")?;
    let request = nix::request_code_readwrite!(0xfd, command, HEADER);
    // SAFETY: the kernel reads and writes at most the bytes that the header's data size names, which is the length of
    // `message`; it keeps no pointer to it.
    let outcome = unsafe { libc::ioctl(control.as_raw_fd(), request, message.as_mut_ptr()) };
    Errno::result(outcome).with_context(|| format!("device mapper, command {command} on {name}"))?;
    let number = message[DEVICE..].first_chunk::<8>().context("a short answer")?;
    Ok(u64::from_ne_bytes(*number))
}
