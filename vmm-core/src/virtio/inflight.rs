//! The memory in which a backend records what it has taken and not answered (vhost-user specification, "Inflight I/O
//! tracking"): made by the first incarnation after DRIVER_OK, handed to each later one, and dropped with the driver's
//! set-up at the reset of the device.
//!
//! The core keeps the descriptor and never maps it. A backend is hostile, and so may be what it hands over: what no
//! successor could use is refused at once.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;

use nix::fcntl::{FcntlArg, FdFlag, SealFlag, fcntl};
use vhost::vhost_user::message::VhostUserInflight;
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use super::incarnation::{BackendError, at};

/// The most bytes that a region may have, and at which it may end in its file.
const LARGEST: u64 = 1 << 20;

/// Bytes of a queue's header, and of each of its entries.
const HEADER: u64 = 16;
const ENTRY: u64 = 16;

/// mmap(2) takes offsets that are multiples of this, in bytes.
const PAGE: u64 = 4096;

/// One region for all queues of a device.
pub struct Region {
    file: File,
    place: VhostUserInflight,
}

impl Region {
    /// Asks a backend for a new one, for `queues` queues of up to `size` descriptors.
    ///
    /// # Errors
    /// [`BackendError::Request`] for GET_INFLIGHT_FD, [`BackendError::Absurd`] if the answer is no such region.
    pub fn get(frontend: &mut Frontend, queues: u16, size: u16) -> Result<Self, BackendError> {
        let wanted = VhostUserInflight::new(0, 0, queues, size);
        let (place, file) = frontend.get_inflight_fd(&wanted).map_err(at("GET_INFLIGHT_FD"))?;
        fcntl(&file, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(io::Error::from)?;
        let absurd = |what: String| Err(BackendError::Absurd(format!("GET_INFLIGHT_FD with {what}")));
        if (place.num_queues, place.queue_size) != (queues, size) {
            let (others, other) = (place.num_queues, place.queue_size);
            return absurd(format!("{others} queues of {other} descriptors instead of {queues} of {size}"));
        }
        let least = u64::from(queues) * (HEADER + ENTRY * u64::from(size));
        let end = place.mmap_offset.checked_add(place.mmap_size).filter(|end| *end <= LARGEST);
        let (Some(end), true, true) = (end, place.mmap_size >= least, place.mmap_offset.is_multiple_of(PAGE)) else {
            return absurd(format!(
                "{} bytes at {:#x}: at least {least} are needed, at a page's start, within {LARGEST}",
                place.mmap_size, place.mmap_offset
            ));
        };
        // Only memory has seals: no descriptor of a disk or a pipe, which would keep that from being released, passes. And
        // nobody could map what is sealed against writing.
        let harmless = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        match fcntl(&file, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_retain) {
            Ok(seals) if seals.contains(SealFlag::F_SEAL_SHRINK) && harmless.contains(seals) => {}
            _ => {
                return absurd(String::from(
                    "a descriptor that is not memory sealed against shrinking, and no further",
                ));
            }
        }
        match (&file).seek(SeekFrom::End(0)) {
            Ok(length) if length >= end => Ok(Self { file, place }),
            _ => absurd(format!("a file that ends before {end:#x}")),
        }
    }

    /// Gives it to a backend.
    ///
    /// # Errors
    /// [`BackendError::Request`] for SET_INFLIGHT_FD.
    pub fn set(&self, frontend: &mut Frontend) -> Result<(), BackendError> {
        frontend.set_inflight_fd(&self.place, self.file.as_raw_fd()).map_err(at("SET_INFLIGHT_FD"))
    }
}
