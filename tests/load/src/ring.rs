//! The driver's half of a split virtqueue (virtio 1.2, section 2.7), made as Linux makes it: one descriptor per request,
//! which points to an indirect table, and notifications by event index where the device offers it.

use std::io;
use std::sync::atomic::{Ordering, fence};

use anyhow::Result;
use vhost::VringConfigData;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::memory::{Memory, USER};

/// Descriptors of each queue: what the product's virtio-mmio transport offers.
pub const SIZE: u16 = 256;

/// The device writes the buffer (VIRTQ_DESC_F_WRITE).
pub const WRITE: u16 = 2;

const NEXT: u16 = 1;
const INDIRECT: u16 = 4;

/// VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_RING_F_EVENT_IDX and VIRTIO_F_VERSION_1.
pub const FEATURES: u64 = 1 << 28 | EVENT_IDX | 1 << 32;

const EVENT_IDX: u64 = 1 << 29;

/// Bytes of memory that a queue takes.
pub const BYTES: usize = 0x4_0000;

/// Where in it the parts of the queue are, and the drawers: one per descriptor, for the indirect table and for whatever
/// else a request needs.
const AVAILABLE: usize = 0x2000;
const USED: usize = 0x3000;
const DRAWERS: usize = 0x4000;

/// Bytes in a drawer; the first [`EXTRA`] are the user's.
const DRAWER: usize = 512;

/// Bytes in front of the indirect table in a drawer.
pub const EXTRA: usize = 32;

/// The most buffers of one request.
pub const BUFFERS: usize = (DRAWER - EXTRA) / 16;

/// One buffer of a request: address, length, flags.
pub type Buffer = (usize, usize, u16);

/// One queue.
#[derive(Debug)]
pub struct Ring<'m> {
    memory: &'m Memory,
    base: usize,
    /// What the driver kicks.
    pub kick: EventFd,
    /// What the device signals.
    pub call: EventFd,
    event_index: bool,
    next_available: u16,
    published: u16,
    next_used: u16,
    /// How often the driver has kicked.
    pub kicks: u64,
}

impl<'m> Ring<'m> {
    /// Queue number `index` of a device.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn new(memory: &'m Memory, index: usize) -> Result<Self> {
        let (kick, call) = (EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?);
        let base = index * BYTES;
        Ok(Self {
            memory,
            base,
            kick,
            call,
            event_index: false,
            next_available: 0,
            published: 0,
            next_used: 0,
            kicks: 0,
        })
    }

    /// The features that were negotiated.
    pub fn accept(&mut self, features: u64) {
        self.event_index = features & EVENT_IDX != 0;
    }

    /// Its places, for VHOST_USER_SET_VRING_ADDR.
    #[must_use]
    pub fn places(&self) -> VringConfigData {
        let base = USER + self.base as u64;
        VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: base,
            used_ring_addr: base + USED as u64,
            avail_ring_addr: base + AVAILABLE as u64,
            log_addr: None,
        }
    }

    /// The address of the drawer of `head`, of which [`EXTRA`] bytes are free.
    #[must_use]
    pub fn drawer(&self, head: u16) -> usize {
        self.base + DRAWERS + DRAWER * usize::from(head)
    }

    /// Describes the request of `head`, once for as long as its buffers stay what they are.
    pub fn describe(&self, head: u16, buffers: &[Buffer]) {
        assert!((1..=BUFFERS).contains(&buffers.len()), "{} buffers", buffers.len());
        let place = self.base + 16 * usize::from(head);
        if let [buffer] = buffers {
            self.descriptor(place, *buffer, 0);
            return;
        }
        let table = self.drawer(head) + EXTRA;
        for (index, &(address, length, flags)) in buffers.iter().enumerate() {
            let more = index + 1 < buffers.len();
            let flags = if more { flags | NEXT } else { flags };
            self.descriptor(table + 16 * index, (address, length, flags), if more { index + 1 } else { 0 });
        }
        self.descriptor(place, (table, 16 * buffers.len(), INDIRECT), 0);
    }

    fn descriptor(&self, place: usize, (address, length, flags): Buffer, next: usize) {
        let rest = length as u64 | u64::from(flags) << 32 | (next as u64) << 48;
        self.memory.u64(place).store((address as u64).to_le(), Ordering::Relaxed);
        self.memory.u64(place + 8).store(rest.to_le(), Ordering::Relaxed);
    }

    /// Puts `head` into the available ring, where the device sees it after [`publish`](Self::publish).
    pub fn offer(&mut self, head: u16) {
        let slot = self.base + AVAILABLE + 4 + 2 * usize::from(self.next_available % SIZE);
        self.memory.u16(slot).store(head.to_le(), Ordering::Relaxed);
        self.next_available = self.next_available.wrapping_add(1);
    }

    /// Shows the device what was offered, and kicks it if it wishes (virtio 1.2, section 2.7.13.4.1).
    ///
    /// # Errors
    /// A kick that cannot be written.
    pub fn publish(&mut self) -> io::Result<()> {
        let (old, new) = (self.published, self.next_available);
        if old == new {
            return Ok(());
        }
        self.memory.u16(self.base + AVAILABLE + 2).store(new.to_le(), Ordering::Release);
        self.published = new;
        fence(Ordering::SeqCst);
        let wanted = if self.event_index {
            let event = self.memory.u16(self.base + USED + 4 + 8 * usize::from(SIZE)).load(Ordering::Relaxed);
            new.wrapping_sub(u16::from_le(event)).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            u16::from_le(self.memory.u16(self.base + USED).load(Ordering::Relaxed)) & 1 == 0
        };
        if wanted {
            self.kicks += 1;
            self.kick.write(1)?;
        }
        Ok(())
    }

    /// The next used element: the head, and the bytes written.
    pub fn reap(&mut self) -> Option<(u16, u32)> {
        if !self.pending() {
            return None;
        }
        let slot = self.base + USED + 4 + 8 * usize::from(self.next_used % SIZE);
        let head = u32::from_le(self.memory.u32(slot).load(Ordering::Relaxed));
        let written = u32::from_le(self.memory.u32(slot + 4).load(Ordering::Relaxed));
        self.next_used = self.next_used.wrapping_add(1);
        Some((u16::try_from(head).unwrap_or(u16::MAX), written))
    }

    fn pending(&self) -> bool {
        u16::from_le(self.memory.u16(self.base + USED + 2).load(Ordering::Acquire)) != self.next_used
    }

    /// Asks for an interrupt; `true` if there is something for which none will come.
    pub fn listen(&self) -> bool {
        self.wish(0, self.next_used);
        fence(Ordering::SeqCst);
        self.pending()
    }

    /// Asks for no interrupts. Has to be repeated every 32,000 requests.
    pub fn quiet(&self) {
        self.wish(1, self.next_used.wrapping_add(0x8000));
    }

    fn wish(&self, flags: u16, event: u16) {
        let (place, wish) =
            if self.event_index { (AVAILABLE + 4 + 2 * usize::from(SIZE), event) } else { (AVAILABLE, flags) };
        self.memory.u16(self.base + place).store(wish.to_le(), Ordering::Relaxed);
    }
}
