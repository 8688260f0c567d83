//! A started split virtqueue (virtio 1.2, section 2.7): the one place where chains are taken and handed back.
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_AVAIL_F_NO_INTERRUPT};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::chain::{Chain, ChainError};
use crate::descriptor::Call;
use crate::memory::Memory;

/// The largest queue that is accepted, in descriptors.
pub const LARGEST: u16 = 1024;

/// How the driver broke the rules of a virtqueue.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The rings themselves: their place, or an index that jumped.
    #[error("{0}")]
    Ring(#[from] virtio_queue::Error),
    /// A descriptor chain.
    #[error("chain {0}: {1}")]
    Chain(u16, ChainError),
    /// A request that gives the device no way to answer it.
    #[error("request {0} has no room for an answer")]
    NoAnswer(u16),
}

/// Where a virtqueue is and how it goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Number of descriptors: a power of two, at most [`LARGEST`].
    pub size: u16,
    /// The descriptor table.
    pub descriptors: GuestAddress,
    /// The available ring.
    pub available: GuestAddress,
    /// The used ring.
    pub used: GuestAddress,
    /// The index of the next available entry to take.
    pub next_available: u16,
}

/// A started virtqueue.
#[derive(Debug)]
pub struct Ring {
    queue: Queue,
    memory: Arc<Memory>,
    call: Option<Arc<Call>>,
    /// The used index up to which the driver has been interrupted or did not want to be.
    signalled: u16,
}

impl Ring {
    /// Starts a virtqueue. The used ring goes on where its index in guest memory says.
    ///
    /// # Errors
    /// A size or an address that cannot be.
    pub fn new(
        shape: Shape,
        features: u64,
        memory: Arc<Memory>,
        call: Option<Arc<Call>>,
    ) -> Result<Self, virtio_queue::Error> {
        let mut queue = Queue::new(LARGEST)?;
        queue.try_set_size(shape.size)?;
        queue.try_set_desc_table_address(shape.descriptors)?;
        queue.try_set_avail_ring_address(shape.available)?;
        queue.try_set_used_ring_address(shape.used)?;
        queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        queue.set_next_avail(shape.next_available);
        queue.set_ready(true);
        if !queue.is_valid(memory.as_ref()) {
            return Err(virtio_queue::Error::QueueNotReady);
        }
        queue.set_next_used(queue.used_idx(memory.as_ref(), Ordering::Acquire)?.0);
        let signalled = queue.next_used();
        Ok(Self { queue, memory, call, signalled })
    }

    /// Takes the next chain that the driver made available.
    ///
    /// # Errors
    /// A violation. The chain counts as not taken.
    pub fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        let table = GuestAddress(self.queue.desc_table());
        let size = self.queue.size();
        let Some(head) = self.queue.iter(Arc::clone(&self.memory))?.next().map(|chain| chain.head_index()) else {
            return Ok(None);
        };
        match Chain::walk(&self.memory, table, size, head) {
            Ok(chain) => Ok(Some(chain)),
            Err(error) => {
                self.queue.go_to_previous_position();
                Err(RingError::Chain(head, error))
            }
        }
    }

    /// Puts the last `count` chains taken back, as if they had never been looked at. None of them may be completed.
    pub fn unpop(&mut self, count: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// Hands a chain back to the driver, of which the device has written the first `written` bytes of the writable part.
    ///
    /// # Errors
    /// A used ring that is not in guest memory.
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), RingError> {
        Ok(self.queue.add_used(self.memory.as_ref(), head, written)?)
    }

    /// Hands several chains back so that the driver sees all of them or none, as the parts of one packet
    /// (virtio 1.2, section 5.1.6.4).
    ///
    /// # Errors
    /// As for [`complete`](Self::complete).
    pub fn complete_together(&mut self, chains: &[(u16, u32)]) -> Result<(), RingError> {
        let Some((&(last, written), others)) = chains.split_last() else { return Ok(()) };
        for &(head, written) in others {
            let slot = self.queue.next_used().checked_rem(self.queue.size()).unwrap_or(0);
            // The ring begins with flags and index, an element has 8 bytes (section 2.7.8).
            let place = u64::from(slot).saturating_mul(8).saturating_add(4);
            let place = GuestAddress(self.queue.used_ring().saturating_add(place));
            let element = u64::from(head) | u64::from(written) << 32;
            self.memory.write_obj(element.to_le(), place).map_err(virtio_queue::Error::GuestMemory)?;
            self.queue.set_next_used(self.queue.next_used().wrapping_add(1));
        }
        self.complete(last, written)
    }

    /// Interrupts the driver for what has been completed since the last time, unless it asked not to be
    /// (virtio 1.2, sections 2.7.7 and 2.7.10).
    ///
    /// virtio-queue's own answer leaves out VIRTQ_AVAIL_F_NO_INTERRUPT and does not see what was completed together.
    ///
    /// # Errors
    /// An available ring that is not in guest memory.
    pub fn signal(&mut self) -> Result<(), RingError> {
        let (old, new) = (self.signalled, self.queue.next_used());
        let Some(call) = self.call.as_ref().filter(|_| old != new) else { return Ok(()) };
        self.signalled = new;
        // What was completed has to be visible before the driver's wish is read: it writes the wish, then looks.
        fence(Ordering::SeqCst);
        let event_index = self.queue.event_idx_enabled();
        // The available ring begins with its flags and ends with the index of the event (section 2.7.6).
        let offset = if event_index { u64::from(self.queue.size()).saturating_mul(2).saturating_add(4) } else { 0 };
        let place = GuestAddress(self.queue.avail_ring().saturating_add(offset));
        let wish: u16 = self.memory.load(place, Ordering::Relaxed).map_err(virtio_queue::Error::GuestMemory)?;
        let wish = u16::from_le(wish);
        let wanted = if event_index {
            new.wrapping_sub(wish).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            u32::from(wish) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        if wanted {
            call.signal();
        }
        Ok(())
    }

    /// Asks the driver for no kicks while the queue is being worked on (virtio 1.2, section 2.7.10).
    ///
    /// # Errors
    /// A used ring that is not in guest memory.
    pub fn quiet(&mut self) -> Result<(), RingError> {
        Ok(self.queue.disable_notification(self.memory.as_ref())?)
    }

    /// Asks the driver for a kick; `true` if something was made available meanwhile for which none will come.
    ///
    /// # Errors
    /// A ring that is not in guest memory.
    pub fn listen(&mut self) -> Result<bool, RingError> {
        Ok(self.queue.enable_notification(self.memory.as_ref())?)
    }

    /// The index of the next available entry (VHOST_USER_GET_VRING_BASE).
    pub fn next_available(&self) -> u16 {
        self.queue.next_avail()
    }

    /// The number of descriptors.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod tests {
    use super::*;
    use nix::sys::eventfd::{EfdFlags, EventFd};
    use std::os::fd::AsFd;
    use virtio_queue::desc::split::Descriptor;

    const TABLE: u64 = 0x1000;
    const AVAILABLE: u64 = 0x2000;
    const USED: u64 = 0x3000;
    const SIZE: u16 = 8;

    struct Setup {
        memory: Arc<Memory>,
        ring: Ring,
        call: EventFd,
    }

    fn setup(features: u64, next_available: u16) -> Setup {
        let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap());
        for index in 0..u64::from(SIZE) {
            memory.write_obj(Descriptor::new(0x4000, 8, 2, 0), GuestAddress(TABLE + 16 * index)).unwrap();
        }
        memory.write_obj(next_available, GuestAddress(AVAILABLE + 2)).unwrap();
        memory.write_obj(next_available, GuestAddress(USED + 2)).unwrap();
        let call = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        let shape = Shape {
            size: SIZE,
            descriptors: GuestAddress(TABLE),
            available: GuestAddress(AVAILABLE),
            used: GuestAddress(USED),
            next_available,
        };
        let file = call.as_fd().try_clone_to_owned().unwrap().into();
        let ring = Ring::new(shape, features, Arc::clone(&memory), Some(Arc::new(Call::new(file)))).unwrap();
        Setup { memory, ring, call }
    }

    impl Setup {
        fn make_available(&self, index: u16, head: u16) {
            let slot = AVAILABLE + 4 + 2 * u64::from(index % SIZE);
            self.memory.write_obj(head, GuestAddress(slot)).unwrap();
            self.memory.write_obj(index.wrapping_add(1), GuestAddress(AVAILABLE + 2)).unwrap();
        }

        fn called(&self) -> bool {
            self.call.read().is_ok()
        }
    }

    #[test]
    fn chains_go_round_across_the_wrap_of_the_indexes() {
        let mut s = setup(0, u16::MAX);
        s.make_available(u16::MAX, 3);
        let chain = s.ring.pop().unwrap().unwrap();
        assert_eq!((chain.head, chain.writable.len()), (3, 8));
        s.ring.complete(3, 8).unwrap();
        assert_eq!(s.memory.read_obj::<[u32; 2]>(GuestAddress(USED + 4 + 8 * 7)).unwrap(), [3, 8]);
        assert_eq!(s.memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 0);
        assert!(s.ring.pop().unwrap().is_none());
        assert_eq!(s.ring.next_available(), 0);
    }

    #[test]
    fn a_broken_chain_is_not_taken() {
        let mut s = setup(0, 0);
        s.make_available(0, SIZE);
        assert!(matches!(s.ring.pop(), Err(RingError::Chain(SIZE, ChainError::Index(SIZE)))));
        assert_eq!(s.ring.next_available(), 0);
    }

    #[test]
    fn an_index_that_jumped_is_a_violation() {
        let mut s = setup(0, 0);
        s.memory.write_obj(SIZE + 1, GuestAddress(AVAILABLE + 2)).unwrap();
        assert!(matches!(s.ring.pop(), Err(RingError::Ring(_))));
    }

    #[test]
    fn the_interrupt_flag_is_obeyed() {
        let mut s = setup(0, 0);
        s.ring.complete(0, 0).unwrap();
        s.ring.signal().unwrap();
        assert!(s.called());
        s.memory.write_obj(1_u16, GuestAddress(AVAILABLE)).unwrap();
        s.ring.complete(0, 0).unwrap();
        s.ring.signal().unwrap();
        assert!(!s.called());
    }

    #[test]
    fn the_event_index_is_obeyed() {
        let mut s = setup(1 << VIRTIO_RING_F_EVENT_IDX, 0);
        let used_event = GuestAddress(AVAILABLE + 4 + 2 * u64::from(SIZE));
        s.memory.write_obj(1_u16, used_event).unwrap();
        s.ring.complete(0, 0).unwrap();
        s.ring.signal().unwrap();
        assert!(!s.called(), "used index 1 has not passed event 1");
        s.ring.complete(1, 0).unwrap();
        s.ring.signal().unwrap();
        assert!(s.called(), "used index 2 has");
        assert!(!s.ring.listen().unwrap());
        let avail_event = GuestAddress(USED + 4 + 8 * u64::from(SIZE));
        assert_eq!(s.memory.read_obj::<u16>(avail_event).unwrap(), 0);
        s.make_available(0, 0);
        assert!(s.ring.listen().unwrap(), "an entry without a kick");
    }

    #[test]
    fn chains_completed_together_appear_at_once_and_interrupt_once() {
        let mut s = setup(1 << VIRTIO_RING_F_EVENT_IDX, u16::MAX);
        let used_event = GuestAddress(AVAILABLE + 4 + 2 * u64::from(SIZE));
        s.memory.write_obj(0_u16, used_event).unwrap();
        s.ring.complete_together(&[(1, 10), (2, 20), (3, 30)]).unwrap();
        assert_eq!(s.memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 2);
        let element = |slot: u64| s.memory.read_obj::<[u32; 2]>(GuestAddress(USED + 4 + 8 * slot)).unwrap();
        assert_eq!([element(7), element(0), element(1)], [[1, 10], [2, 20], [3, 30]]);
        s.ring.signal().unwrap();
        assert!(s.called());
        s.ring.signal().unwrap();
        assert!(!s.called(), "nothing new");
    }

    #[test]
    fn impossible_places_are_refused() {
        let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap());
        let good = Shape {
            size: SIZE,
            descriptors: GuestAddress(TABLE),
            available: GuestAddress(AVAILABLE),
            used: GuestAddress(USED),
            next_available: 0,
        };
        let bad = [
            Shape { size: 0, ..good },
            Shape { size: 7, ..good },
            Shape { size: 2048, ..good },
            Shape { descriptors: GuestAddress(TABLE + 1), ..good },
            Shape { descriptors: GuestAddress(0xfff0), ..good },
            Shape { available: GuestAddress(0xfff8), ..good },
            Shape { used: GuestAddress(0x10000), ..good },
        ];
        for shape in bad {
            assert!(Ring::new(shape, 0, Arc::clone(&memory), None).is_err(), "{shape:?}");
        }
    }
}
