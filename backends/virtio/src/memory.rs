//! Guest memory as the core hands it over: checked, then mapped.
//!
//! A region is mapped only if its descriptor is a memfd that is large enough and can never shrink: otherwise any access
//! could end the process with SIGBUS.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::mman::{MmapAdvise, madvise};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap};

use crate::descriptor;

/// What records writes to guest memory. Nothing needs it yet; every write goes through it already.
pub type Dirty = ();

/// The memory of the guest.
pub type Memory = GuestMemoryMmap<Dirty>;

/// The most regions of guest memory (VHOST_USER_GET_MAX_MEM_SLOTS).
pub const SLOTS: usize = 32;

/// Why a region was refused.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Empty, or its end does not fit the address space.
    #[error("the memory region at {0:#x} is empty or too long")]
    Bounds(u64),
    /// Two regions have addresses in common.
    #[error("the memory regions overlap: {0}")]
    Overlap(#[from] GuestRegionCollectionError),
    /// Two regions overlap in the addresses of the core.
    #[error("the memory regions overlap in the addresses of the front-end")]
    UserOverlap,
    /// There are too many.
    #[error("more than {SLOTS} memory regions")]
    Slots,
    /// The descriptor cannot be asked.
    #[error("ask for the {what} of the memory region at {guest:#x}: {errno}")]
    Ask {
        /// Which property.
        what: &'static str,
        /// The region's guest physical address.
        guest: u64,
        /// What the kernel said.
        errno: Errno,
    },
    /// The descriptor may shrink.
    #[error("the memory region at {0:#x} is not sealed against shrinking")]
    Unsealed(u64),
    /// The descriptor is too small.
    #[error("the memory region at {guest:#x} ends behind its file, which has {size} bytes")]
    Beyond {
        /// The region's guest physical address.
        guest: u64,
        /// The size of the file in bytes.
        size: u64,
    },
    /// The kernel refused to map it.
    #[error("map the memory region at {guest:#x}: {error}")]
    Map {
        /// The region's guest physical address.
        guest: u64,
        /// What the kernel said.
        error: String,
    },
    /// No region has these addresses.
    #[error("there is no memory region at {0:#x}")]
    Unknown(u64),
}

/// Where a region is, in the three address spaces that the front-end speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Guest physical address.
    pub guest: u64,
    /// Length in bytes.
    pub size: u64,
    /// Address in the core, the one in which it names rings.
    pub user: u64,
    /// Offset in the descriptor.
    pub offset: u64,
}

impl Place {
    fn check(&self) -> Result<(), MemoryError> {
        let ends = [self.guest, self.user, self.offset].map(|start| start.checked_add(self.size));
        if self.size == 0 || ends.contains(&None) || i64::try_from(self.offset.saturating_add(self.size)).is_err() {
            return Err(MemoryError::Bounds(self.guest));
        }
        Ok(())
    }

    fn user_overlaps(&self, other: &Self) -> bool {
        self.user < other.user.saturating_add(other.size) && other.user < self.user.saturating_add(self.size)
    }
}

/// The regions in force.
#[derive(Clone, Debug, Default)]
pub struct Table {
    places: Vec<Place>,
    memory: Memory,
}

impl Table {
    /// This table with one more region.
    ///
    /// # Errors
    /// [`MemoryError`]; this table is as before.
    pub fn with(&self, place: Place, file: File) -> Result<Self, MemoryError> {
        place.check()?;
        if self.places.len() >= SLOTS {
            return Err(MemoryError::Slots);
        }
        if self.places.iter().any(|other| place.user_overlaps(other)) {
            return Err(MemoryError::UserOverlap);
        }
        let region = map(&place, file)?;
        let memory = self.memory.insert_region(region.into())?;
        let mut places = self.places.clone();
        places.push(place);
        Ok(Self { places, memory })
    }

    /// This table without one of its regions.
    ///
    /// # Errors
    /// [`MemoryError::Unknown`]; this table is as before.
    pub fn without(&self, place: Place) -> Result<Self, MemoryError> {
        // The offset is not compared: the specification identifies a region by its addresses and size
        // (vhost-user, VHOST_USER_REM_MEM_REG).
        let same = |other: &Place| (other.guest, other.user, other.size) == (place.guest, place.user, place.size);
        if !self.places.iter().any(same) {
            return Err(MemoryError::Unknown(place.guest));
        }
        let (memory, _) = self.memory.remove_region(GuestAddress(place.guest), place.size)?;
        let places = self.places.iter().copied().filter(|other| !same(other)).collect();
        Ok(Self { places, memory })
    }

    /// The memory of all regions.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The guest physical address for an address of the core.
    pub fn translate(&self, user: u64) -> Option<GuestAddress> {
        self.places.iter().find_map(|place| {
            let offset = user.checked_sub(place.user).filter(|&offset| offset < place.size)?;
            place.guest.checked_add(offset).map(GuestAddress)
        })
    }
}

fn map(place: &Place, file: File) -> Result<GuestRegionMmap<Dirty>, MemoryError> {
    let guest = place.guest;
    let seals =
        fcntl(file.as_fd(), FcntlArg::F_GET_SEALS).map_err(|errno| MemoryError::Ask { what: "seals", guest, errno })?;
    if !SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK) {
        return Err(MemoryError::Unsealed(guest));
    }
    let status = descriptor::status(file.as_fd()).map_err(|errno| MemoryError::Ask { what: "size", guest, errno })?;
    let size = u64::try_from(status.st_size).unwrap_or(0);
    if place.offset.saturating_add(place.size) > size {
        return Err(MemoryError::Beyond { guest, size });
    }
    let length = usize::try_from(place.size).map_err(|_| MemoryError::Bounds(guest))?;
    let region = MmapRegionBuilder::<Dirty>::new(length)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::new(file, place.offset))
        .build()
        .map_err(|error| MemoryError::Map { guest, error: error.to_string() })?;
    if let Some(start) = NonNull::new(region.as_ptr().cast()) {
        // A guest's memory has no place in a core file; where the kernel does not know the advice there is no dump either,
        // for the process is not dumpable.
        // SAFETY: the range is exactly the mapping made above, and this advice changes no byte of it.
        let _ = unsafe { madvise(start, length, MmapAdvise::MADV_DONTDUMP) };
    }
    GuestRegionMmap::new(region, GuestAddress(guest)).ok_or(MemoryError::Bounds(guest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};

    fn memfd(size: u64, seals: SealFlag) -> File {
        let file = File::from(memfd_create(c"guest", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(size).unwrap();
        fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(seals)).unwrap();
        file
    }

    fn place(guest: u64, size: u64, user: u64) -> Place {
        Place { guest, size, user, offset: 0 }
    }

    fn sealed(size: u64) -> File {
        memfd(size, SealFlag::F_SEAL_SHRINK)
    }

    #[test]
    fn a_sealed_memfd_is_mapped_and_translates() {
        let table = Table::default().with(place(0x1000, 0x2000, 0x7000_0000), sealed(0x2000)).unwrap();
        assert_eq!(table.translate(0x7000_0010), Some(GuestAddress(0x1010)));
        assert_eq!(table.translate(0x7000_2000), None);
        assert_eq!(table.translate(0x6fff_ffff), None);
    }

    #[test]
    fn what_could_shrink_or_is_too_small_is_refused() {
        let table = Table::default();
        let unsealed = memfd(0x1000, SealFlag::F_SEAL_GROW);
        assert!(matches!(table.with(place(0, 0x1000, 0), unsealed), Err(MemoryError::Unsealed(0))));
        assert!(matches!(table.with(place(0, 0x1001, 0), sealed(0x1000)), Err(MemoryError::Beyond { .. })));
        let null = File::open("/dev/null").unwrap();
        assert!(matches!(table.with(place(0, 0x1000, 0), null), Err(MemoryError::Ask { what: "seals", .. })));
    }

    #[test]
    fn impossible_and_overlapping_regions_are_refused() {
        let table = Table::default().with(place(0x1000, 0x1000, 0x10_0000), sealed(0x1000)).unwrap();
        for bad in [place(0x8000, 0, 0), place(u64::MAX, 0x1000, 0), place(0x8000, 0x1000, u64::MAX)] {
            assert!(matches!(table.with(bad, sealed(0x1000)), Err(MemoryError::Bounds(_))), "{bad:?}");
        }
        assert!(matches!(table.with(place(0x1800, 0x1000, 0), sealed(0x1000)), Err(MemoryError::Overlap(_))));
        assert!(matches!(table.with(place(0x8000, 0x1000, 0x10_0800), sealed(0x1000)), Err(MemoryError::UserOverlap)));
    }

    #[test]
    fn regions_come_and_go() {
        let first = place(0, 0x1000, 0x10_0000);
        let table = Table::default().with(first, sealed(0x1000)).unwrap();
        let table = table.with(place(0x1000, 0x1000, 0x20_0000), sealed(0x1000)).unwrap();
        let table = table.without(first).unwrap();
        assert_eq!(table.translate(0x10_0000), None);
        assert!(matches!(table.without(first), Err(MemoryError::Unknown(0))));
    }
}
