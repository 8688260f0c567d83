//! Guest memory: one sealed memfd per memory slot, mapped here and handed to the backends.
#![allow(unsafe_code)]

use std::fs::File;
use std::ptr::NonNull;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MmapAdvise, madvise};
use nix::unistd::ftruncate;
use protocol::Fault;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::arch::layout;

/// The guest's memory as this process sees it.
pub type Memory = GuestMemoryMmap<()>;

/// Makes guest memory of `size` bytes at the addresses that the board gives it.
///
/// Each range is a memfd of its own that can neither shrink nor grow, so that no process that maps it can be ended with
/// SIGBUS by another one. It is kept out of core dumps and asks for huge pages where the host has them for shared memory.
///
/// # Errors
/// A host fault: no memory or no address space.
pub fn create(size: u64) -> Result<Memory, Fault> {
    let ranges = layout::memory_ranges(size);
    let mut files = Vec::with_capacity(ranges.len());
    for (slot, range) in ranges.iter().enumerate() {
        let length = usize::try_from(range.end - range.start).map_err(|_| Fault::internal("guest memory range"))?;
        files.push((GuestAddress(range.start), length, Some(FileOffset::new(sealed(slot, length)?, 0))));
    }
    let memory = Memory::from_ranges_with_files(files)
        .map_err(|error| Fault::host(format!("map {size} bytes of guest memory: {error}; give the guest less")))?;
    for region in memory.iter() {
        advise(region, MmapAdvise::MADV_DONTDUMP)
            .map_err(|errno| Fault::host(format!("keep guest memory out of core dumps: {errno}")))?;
        // Answered with EINVAL by kernels without huge pages: then there are none.
        let _ = advise(region, MmapAdvise::MADV_HUGEPAGE);
    }
    Ok(memory)
}

fn advise(region: &vm_memory::GuestRegionMmap<()>, advice: MmapAdvise) -> nix::Result<()> {
    let start = NonNull::new(region.as_ptr().cast()).ok_or(nix::errno::Errno::EINVAL)?;
    // SAFETY: start and size are those of one mapping that `region` owns, and neither advice changes its contents.
    unsafe { madvise(start, region.size(), advice) }
}

fn sealed(slot: usize, length: usize) -> Result<File, Fault> {
    let fail = |step: &str, errno: nix::errno::Errno| {
        Fault::host(format!("{step} for {length} bytes of guest memory: {errno}; give the guest less memory"))
    };
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let name = format!("guest-memory-{slot}");
    let file = memfd_create(name.as_str(), flags).map_err(|errno| fail("memfd_create", errno))?;
    let size = i64::try_from(length).map_err(|_| Fault::internal("guest memory range"))?;
    ftruncate(&file, size).map_err(|errno| fail("ftruncate", errno))?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(|errno| fail("F_ADD_SEALS", errno))?;
    Ok(File::from(file))
}

/// Gives `memory` to the machine, one KVM memory slot per range.
///
/// # Errors
/// What KVM_SET_USER_MEMORY_REGION answers.
pub fn give_to(vm: &VmFd, memory: &Memory) -> Result<(), Fault> {
    for (slot, region) in memory.iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: u32::try_from(slot).map_err(|_| Fault::internal("memory slot number"))?,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the range is one shared mapping of exactly this size, and the machine keeps the mapping until
        // the process exits.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(|error| Fault::host(format!("KVM_SET_USER_MEMORY_REGION of slot {slot}: {error}")))?;
    }
    Ok(())
}
