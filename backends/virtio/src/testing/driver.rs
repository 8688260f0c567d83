//! Guest memory and virtqueues as a driver, or something worse, would write them.
//!
//! Guest physical memory begins at 0. Queue `n` is in the 16 KiB from `0x4000 * (n + 1)` on; what follows [`Guest::FREE`]
//! is the test's own.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::poll::{PollFd, PollFlags};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::{VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, FileOffset, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::DEADLINE;
use crate::descriptor::wait;
use crate::memory::Memory;

/// Where guest memory is in the addresses of the front-end.
pub const USER: u64 = 0x7000_0000_0000;

/// VIRTQ_DESC_F_NEXT.
pub const NEXT: u16 = 1;

/// VIRTQ_DESC_F_WRITE.
pub const WRITE: u16 = 2;

/// VIRTQ_DESC_F_INDIRECT.
const INDIRECT: u16 = 4;

/// The memory of a guest.
pub struct Guest {
    /// The memory.
    pub memory: Memory,
    file: File,
    size: u64,
}

impl Guest {
    /// The first guest physical address that no queue uses.
    pub const FREE: u64 = 0x10_0000;

    /// `size` bytes, sealed as the core does it.
    pub fn new(size: u64) -> Self {
        Self::sealed(size, SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL)
    }

    /// `size` bytes with other seals.
    pub fn sealed(size: u64, seals: SealFlag) -> Self {
        let fd = memfd_create(c"guest", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(size).unwrap();
        fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(seals)).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let ranges = [(GuestAddress(0), usize::try_from(size).unwrap(), Some(offset))];
        Self { memory: Memory::from_ranges_with_files(ranges).unwrap(), file, size }
    }

    /// The memory as one region of VHOST_USER_SET_MEM_TABLE.
    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: self.size,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// The file that the memory is.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Puts bytes into memory.
    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// Takes bytes out of memory.
    pub fn get(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

/// The driver's half of a split virtqueue.
pub struct Queue {
    /// Which queue of the device it is.
    pub index: usize,
    /// Number of descriptors.
    pub size: u16,
    /// What the driver kicks.
    pub kick: EventFd,
    /// What the device signals.
    pub call: EventFd,
    /// The index of the next available entry.
    pub next_available: u16,
    next_used: u16,
}

impl Queue {
    /// Queue `index` with empty rings in `guest`.
    pub fn new(guest: &Guest, index: usize, size: u16) -> Self {
        let queue = Self {
            index,
            size,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
            next_available: 0,
            next_used: 0,
        };
        guest.put(queue.table(), &[0; 0x4000]);
        queue
    }

    /// The descriptor table.
    pub fn table(&self) -> u64 {
        0x4000 * (self.index as u64 + 1)
    }

    /// The available ring.
    pub fn available(&self) -> u64 {
        self.table() + 0x2000
    }

    /// The used ring.
    pub fn used(&self) -> u64 {
        self.table() + 0x3000
    }

    /// Its places, for VHOST_USER_SET_VRING_ADDR.
    pub fn places(&self) -> VringConfigData {
        VringConfigData {
            queue_max_size: self.size,
            queue_size: self.size,
            flags: 0,
            desc_table_addr: USER + self.table(),
            used_ring_addr: USER + self.used(),
            avail_ring_addr: USER + self.available(),
            log_addr: None,
        }
    }

    /// Writes a descriptor of any table.
    pub fn describe(&self, guest: &Guest, table: u64, index: u16, fields: (u64, u32, u16, u16)) {
        let (address, length, flags, next) = fields;
        let place = GuestAddress(table + 16 * u64::from(index));
        guest.memory.write_obj(Descriptor::new(address, length, flags, next), place).unwrap();
    }

    /// Describes a chain from descriptor `head` on: its buffers as `(address, length, flags)`.
    pub fn chain(&self, guest: &Guest, table: u64, head: u16, parts: &[(u64, u32, u16)]) {
        for (index, &(address, length, flags)) in (head..).zip(parts) {
            let last = usize::from(index - head) + 1 == parts.len();
            let flags = if last { flags } else { flags | NEXT };
            self.describe(guest, table, index, (address, length, flags, if last { 0 } else { index + 1 }));
        }
    }

    /// Makes the chain that begins with descriptor `head` available, without a kick.
    pub fn offer(&mut self, guest: &Guest, head: u16) {
        let slot = self.available() + 4 + 2 * u64::from(self.next_available % self.size);
        guest.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.next_available = self.next_available.wrapping_add(1);
        self.publish(guest, self.next_available);
    }

    /// Writes the index of the available ring.
    pub fn publish(&self, guest: &Guest, index: u16) {
        guest.memory.store(index, GuestAddress(self.available() + 2), Ordering::SeqCst).unwrap();
    }

    /// Describes a chain from descriptor `head` on, makes it available and kicks.
    pub fn send(&mut self, guest: &Guest, head: u16, parts: &[(u64, u32, u16)]) {
        self.chain(guest, self.table(), head, parts);
        self.offer(guest, head);
        self.kick.write(1).unwrap();
    }

    /// The same through an indirect table at `table`.
    pub fn send_indirect(&mut self, guest: &Guest, head: u16, table: u64, parts: &[(u64, u32, u16)]) {
        self.chain(guest, table, 0, parts);
        let length = 16 * u32::try_from(parts.len()).unwrap();
        self.describe(guest, self.table(), head, (table, length, INDIRECT, 0));
        self.offer(guest, head);
        self.kick.write(1).unwrap();
    }

    /// The index that the device has got to.
    pub fn used_index(&self, guest: &Guest) -> u16 {
        guest.memory.load(GuestAddress(self.used() + 2), Ordering::SeqCst).unwrap()
    }

    /// The next used element, if there is one: head and bytes written.
    pub fn poll(&mut self, guest: &Guest) -> Option<(u32, u32)> {
        if self.used_index(guest) == self.next_used {
            return None;
        }
        let slot = self.used() + 4 + 8 * u64::from(self.next_used % self.size);
        self.next_used = self.next_used.wrapping_add(1);
        let [head, written]: [u32; 2] = guest.memory.read_obj(GuestAddress(slot)).unwrap();
        Some((head, written))
    }

    /// Waits for the next used element, whether or not there is an interrupt.
    pub fn next(&mut self, guest: &Guest) -> (u32, u32) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(element) = self.poll(guest) {
                return element;
            }
            assert!(Instant::now() < deadline, "queue {}: no used element came", self.index);
            self.interrupted(5);
        }
    }

    /// Whether an interrupt comes within so many milliseconds.
    pub fn interrupted(&self, milliseconds: u16) -> bool {
        // SAFETY: the eventfd lives as long as the borrow of `self`.
        let call = unsafe { std::os::fd::BorrowedFd::borrow_raw(self.call.as_raw_fd()) };
        wait(&mut [PollFd::new(call, PollFlags::POLLIN)], Some(Duration::from_millis(milliseconds.into()))).unwrap();
        self.call.read().is_ok()
    }
}
