//! A device's registers and memory that a device may reach, mapped into a program of the guest.
#![allow(unsafe_code)]

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous};

const PAGE: usize = 4096;

const READ_WRITE: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

/// One page of registers. They stay mapped until the program ends.
#[derive(Debug)]
pub struct Registers(NonNull<u32>);

impl Registers {
    /// Maps the page at this physical address.
    pub fn map(address: u64) -> Result<Self> {
        let memory = File::options().read(true).write(true).custom_flags(libc::O_SYNC).open("/dev/mem");
        let memory = memory.context("open /dev/mem")?;
        let length = NonZeroUsize::new(PAGE).context("no page")?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { mmap(None, length, READ_WRITE, MapFlags::MAP_SHARED, memory, address.cast_signed()) };
        Ok(Self(base.context("map the registers")?.cast()))
    }

    /// Reads the register at `offset`, a multiple of four.
    pub fn read(&self, offset: usize) -> u32 {
        // SAFETY: `place` is within the page, which stays mapped.
        u32::from_le(unsafe { self.place(offset).read_volatile() })
    }

    /// Writes the register at `offset`, a multiple of four.
    pub fn write(&self, offset: usize, value: u32) {
        // SAFETY: `place` is within the page, which stays mapped.
        unsafe { self.place(offset).write_volatile(value.to_le()) }
    }

    fn place(&self, offset: usize) -> NonNull<u32> {
        assert!(offset < PAGE && offset.is_multiple_of(4), "no register at {offset:#x}");
        // SAFETY: the offset was just checked to be within the page.
        unsafe { self.0.add(offset / 4) }
    }
}

/// Pages that are in memory and stay there until the program ends, one after the other for it, anywhere for a device.
#[derive(Debug)]
pub struct Memory {
    base: NonNull<u8>,
    pages: usize,
}

impl Memory {
    /// So many zeroed pages.
    pub fn new(pages: usize) -> Result<Self> {
        let length = NonZeroUsize::new(pages * PAGE).context("no pages")?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_LOCKED | MapFlags::MAP_POPULATE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { mmap_anonymous(None, length, READ_WRITE, flags) };
        let memory = Self { base: base.context("memory that stays")?.cast(), pages };
        // Touched: a page that was only mapped could still be another one when it is first written.
        memory.fill(0);
        Ok(memory)
    }

    /// Where the pages are for a device (Linux, admin-guide/mm/pagemap).
    pub fn physical(&self) -> Result<Vec<u64>> {
        let map = File::open("/proc/self/pagemap").context("open /proc/self/pagemap")?;
        let first = self.base.as_ptr() as u64 / PAGE as u64;
        let page = |number: u64| {
            let mut entry = [0; 8];
            map.read_exact_at(&mut entry, number * 8).context("read /proc/self/pagemap")?;
            let entry = u64::from_ne_bytes(entry);
            let frame = entry & ((1 << 55) - 1);
            ensure!(entry >> 63 == 1 && frame != 0, "a page is not in memory, or its place is not told");
            Ok(frame * PAGE as u64)
        };
        (first..first + self.pages as u64).map(page).collect()
    }

    /// A device writes at any time, so all access is through atomics.
    fn bytes(&self) -> &[AtomicU8] {
        // SAFETY: the mapping is never undone, and any byte is a valid AtomicU8.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast(), self.pages * PAGE) }
    }

    /// Sets every byte.
    pub fn fill(&self, byte: u8) {
        self.bytes().iter().for_each(|place| place.store(byte, Ordering::Relaxed));
    }

    /// How many bytes are not `byte`.
    pub fn other_than(&self, byte: u8) -> usize {
        self.bytes().iter().filter(|place| place.load(Ordering::Relaxed) != byte).count()
    }

    /// Two bytes at a multiple of two.
    pub fn u16(&self, at: usize) -> u16 {
        self.atomic_u16(at).load(Ordering::Acquire)
    }

    /// Sets two bytes at a multiple of two, after all that was set before.
    pub fn put_u16(&self, at: usize, value: u16) {
        self.atomic_u16(at).store(value, Ordering::Release);
    }

    /// Sets eight bytes at a multiple of eight.
    pub fn put_u64(&self, at: usize, value: u64) {
        assert!(at + 8 <= self.pages * PAGE && at.is_multiple_of(8), "no word at {at}");
        // SAFETY: within the mapping and aligned, as was just checked; the mapping is never undone.
        let place = unsafe { AtomicU64::from_ptr(self.base.as_ptr().add(at).cast()) };
        place.store(value, Ordering::Relaxed);
    }

    fn atomic_u16(&self, at: usize) -> &AtomicU16 {
        assert!(at + 2 <= self.pages * PAGE && at.is_multiple_of(2), "no half-word at {at}");
        // SAFETY: within the mapping and aligned, as was just checked; the mapping is never undone.
        unsafe { AtomicU16::from_ptr(self.base.as_ptr().add(at).cast()) }
    }
}
