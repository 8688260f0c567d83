//! Memory shared with a device's backend, as a guest's is: a sealed memfd.
//!
//! The other process changes it at any time, so all access is through atomics.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use vhost::VhostUserMemoryRegionInfo;

/// Where the memory is in the addresses that rings are named by in vhost-user.
pub const USER: u64 = 0x7000_0000_0000;

/// Guest physical memory from address 0 on, present and zero.
#[derive(Debug)]
pub struct Memory {
    base: NonNull<u8>,
    size: usize,
    file: File,
}

// SAFETY: the mapping belongs to the value for as long as it lives, and is accessed through atomics alone.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

/// What any bytes are a valid value of, and what may be shared with another process.
trait Shared {}
impl Shared for AtomicU8 {}
impl Shared for AtomicU16 {}
impl Shared for AtomicU32 {}
impl Shared for AtomicU64 {}

impl Memory {
    /// `size` bytes, whole pages.
    ///
    /// # Errors
    /// No memory, or a size that is none.
    pub fn new(size: usize) -> Result<Self> {
        let file = File::from(memfd_create(c"load", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC)?);
        file.set_len(size as u64)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(seals)).context("seal the memory")?;
        let length = size.try_into().context("memory of no bytes")?;
        // Faults are no part of what is measured: the pages are there from the start.
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { mmap(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags, &file, 0) };
        Ok(Self { base: base.context("map the memory")?.cast(), size, file })
    }

    /// The memory as one region of VHOST_USER_SET_MEM_TABLE.
    #[must_use]
    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: self.size as u64,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// The file that the memory is.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// How many bytes there are.
    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }

    /// `count` values from byte `at` on; panics if they are not in the memory, or not aligned.
    fn slice<T: Shared>(&self, at: usize, count: usize) -> &[T] {
        let end = count.checked_mul(size_of::<T>()).and_then(|bytes| bytes.checked_add(at));
        assert!(end.is_some_and(|end| end <= self.size) && at.is_multiple_of(align_of::<T>()), "{count} at {at:#x}");
        // SAFETY: the range is within the mapping, which is as aligned as a page; any bytes are a valid `T`, and atomics may
        // be shared with whoever else has the memory.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(at).cast(), count) }
    }

    /// One byte.
    #[must_use]
    pub fn u8(&self, at: usize) -> &AtomicU8 {
        &self.slice(at, 1)[0]
    }

    /// Two bytes.
    #[must_use]
    pub fn u16(&self, at: usize) -> &AtomicU16 {
        &self.slice(at, 1)[0]
    }

    /// Four bytes.
    #[must_use]
    pub fn u32(&self, at: usize) -> &AtomicU32 {
        &self.slice(at, 1)[0]
    }

    /// Eight bytes.
    #[must_use]
    pub fn u64(&self, at: usize) -> &AtomicU64 {
        &self.slice(at, 1)[0]
    }

    /// `bytes / 8` words from byte `at` on.
    #[must_use]
    pub fn words(&self, at: usize, bytes: usize) -> &[AtomicU64] {
        self.slice(at, bytes / 8)
    }

    /// Copies `bytes` to byte `at`.
    pub fn put(&self, at: usize, bytes: &[u8]) {
        for (place, byte) in self.slice::<AtomicU8>(at, bytes.len()).iter().zip(bytes) {
            place.store(*byte, std::sync::atomic::Ordering::Relaxed);
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by this value, and nothing that borrows from it is left.
        let _ = unsafe { munmap(self.base.cast(), self.size) };
    }
}
