//! A started split virtqueue (virtio 1.2, section 2.7): the one place where chains are taken and handed back, and where
//! that is recorded for the process after this one ([`crate::inflight`]).
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{Ordering, compiler_fence, fence};

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_AVAIL_F_NO_INTERRUPT};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::chain::{Chain, ChainError};
#[cfg(feature = "crash-points")]
use crate::crash::{Point, pass};
use crate::descriptor::Call;
use crate::inflight::{Part, ResumeError, Tracker};
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
    /// A chain that the device has already was made available once more.
    #[error("chain {0} was made available while the device had it")]
    Twice(u16),
    /// The queue cannot go on from where it is said to be.
    #[error("{0}")]
    Resume(#[from] ResumeError),
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
    /// The index of the next available entry to take, as VHOST_USER_SET_VRING_BASE has it: chains that an earlier process
    /// had taken and not given back lie behind it.
    pub next_available: u16,
}

/// Who has a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    /// The driver.
    No,
    /// The device, which took it from the available ring.
    Taken,
    /// The device, and an earlier process took it.
    Resubmitted,
}

/// A started virtqueue.
#[derive(Debug)]
pub struct Ring {
    queue: Queue,
    memory: Arc<Memory>,
    call: Option<Arc<Call>>,
    /// The used index up to which the driver has been interrupted or did not want to be.
    signalled: u16,
    /// Who has the chain that begins with a descriptor.
    held: Vec<Held>,
    tracker: Option<Tracker>,
    /// Chains that an earlier process had taken and not given back: they come before those of the available ring.
    resubmit: VecDeque<u16>,
    /// Why the ring cannot go on from where it is said to be.
    unsound: Option<ResumeError>,
}

impl Ring {
    /// Starts a virtqueue. The used ring goes on where its index in guest memory says; what an earlier process left in
    /// flight is in `record`.
    ///
    /// # Errors
    /// A size or an address that cannot be. What the driver or an earlier process did wrong is [`check`](Self::check)'s.
    pub fn new(
        shape: Shape,
        features: u64,
        memory: Arc<Memory>,
        call: Option<Arc<Call>>,
        record: Option<Part>,
    ) -> Result<Self, virtio_queue::Error> {
        let mut queue = Queue::new(LARGEST)?;
        queue.try_set_size(shape.size)?;
        queue.try_set_desc_table_address(shape.descriptors)?;
        queue.try_set_avail_ring_address(shape.available)?;
        queue.try_set_used_ring_address(shape.used)?;
        queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        queue.set_ready(true);
        if !queue.is_valid(memory.as_ref()) {
            return Err(virtio_queue::Error::QueueNotReady);
        }
        let (base, used) = (shape.next_available, queue.used_idx(memory.as_ref(), Ordering::Acquire)?.0);
        queue.set_next_used(used);
        let resumed = match record {
            Some(record) => record.resume(base, used).map(|(tracker, heads)| (Some(tracker), heads)),
            // Without a record nothing is known of what is between the two, but the queue has to have room for it.
            None if base.wrapping_sub(used) > shape.size => Err(ResumeError::Base { base, used }),
            None => Ok((None, Vec::new())),
        };
        let (unsound, tracker, heads) = match resumed {
            Ok((tracker, heads)) => (None, tracker, heads),
            Err(error) => (Some(error), None, Vec::new()),
        };
        let resubmit = VecDeque::from(heads);
        queue.set_next_avail(base.wrapping_add(u16::try_from(resubmit.len()).unwrap_or(0)));
        let held = vec![Held::No; shape.size.into()];
        Ok(Self { queue, memory, call, signalled: used, held, tracker, resubmit, unsound })
    }

    /// Whether the ring can go on from where it was said to be: asked once, before anything is taken.
    ///
    /// # Errors
    /// [`RingError::Resume`].
    pub fn check(&self) -> Result<(), RingError> {
        self.unsound.map_or(Ok(()), |error| Err(error.into()))
    }

    /// How many chains that an earlier process had taken are still to be taken again.
    pub fn resubmissions(&self) -> u32 {
        u32::try_from(self.resubmit.len()).unwrap_or(u32::MAX)
    }

    /// Takes the next chain: one that an earlier process had, or the next that the driver made available.
    ///
    /// # Errors
    /// A violation. The chain counts as not taken.
    pub fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        if let Some(&head) = self.resubmit.front() {
            let chain = self.walk(head)?;
            self.resubmit.pop_front();
            self.hold(head, Held::Resubmitted);
            return Ok(Some(chain));
        }
        let Some(head) = self.queue.iter(Arc::clone(&self.memory))?.next().map(|chain| chain.head_index()) else {
            return Ok(None);
        };
        let chain = match self.held.get(usize::from(head)) {
            Some(Held::Taken | Held::Resubmitted) => Err(RingError::Twice(head)),
            _ => self.walk(head),
        };
        match &chain {
            Ok(_) => {
                self.hold(head, Held::Taken);
                if let Some(tracker) = &mut self.tracker {
                    tracker.taken(head);
                }
                #[cfg(feature = "crash-points")]
                pass(Point::Fetch);
            }
            Err(_) => self.queue.go_to_previous_position(),
        }
        chain.map(Some)
    }

    fn walk(&self, head: u16) -> Result<Chain, RingError> {
        let table = GuestAddress(self.queue.desc_table());
        Chain::walk(&self.memory, table, self.queue.size(), head).map_err(|error| RingError::Chain(head, error))
    }

    /// Notes who has a chain; returns who had it.
    fn hold(&mut self, head: u16, by: Held) -> Held {
        self.held.get_mut(usize::from(head)).map_or(Held::No, |held| std::mem::replace(held, by))
    }

    /// Puts the chains taken last back, as if they had never been looked at: their heads in the order in which they were
    /// taken. None of them may be completed.
    pub fn unpop(&mut self, heads: impl DoubleEndedIterator<Item = u16>) {
        for head in heads.rev() {
            match self.hold(head, Held::No) {
                Held::No => {}
                Held::Taken => {
                    // Still recorded, it would be counted twice: among those in flight and in the available ring.
                    if let Some(tracker) = &mut self.tracker {
                        tracker.put_back(head);
                    }
                    self.queue.go_to_previous_position();
                }
                Held::Resubmitted => self.resubmit.push_front(head),
            }
        }
    }

    /// Hands a chain back to the driver, of which the device has written the first `written` bytes of the writable part.
    ///
    /// # Errors
    /// A used ring that is not in guest memory.
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), RingError> {
        self.complete_together(&[(head, written)])
    }

    /// Hands several chains back, as pairs of a head and the number of bytes written, so that the driver sees all of them
    /// or none: the parts of one packet (virtio 1.2, section 5.1.6.4), or what has come to its end at one time. They are
    /// chains that the device has, so there are no more of them than descriptors.
    ///
    /// # Errors
    /// As for [`complete`](Self::complete).
    pub fn complete_together(&mut self, chains: &[(u16, u32)]) -> Result<(), RingError> {
        if chains.is_empty() {
            return Ok(());
        }
        if let Some(tracker) = &mut self.tracker {
            chains.iter().for_each(|&(head, _)| tracker.about_to_publish(head));
        }
        let mut used = self.queue.next_used();
        for &(head, written) in chains {
            let slot = used.checked_rem(self.queue.size()).unwrap_or(0);
            // The ring begins with flags and index, an element has 8 bytes (section 2.7.8).
            let place = u64::from(slot).saturating_mul(8).saturating_add(4);
            let place = GuestAddress(self.queue.used_ring().saturating_add(place));
            let element = u64::from(head) | u64::from(written) << 32;
            self.memory.write_obj(element.to_le(), place).map_err(virtio_queue::Error::GuestMemory)?;
            #[cfg(feature = "crash-points")]
            pass(Point::Element);
            used = used.wrapping_add(1);
        }
        let index = GuestAddress(self.queue.used_ring().saturating_add(2));
        // The driver that reads the index has to find the elements; and if this process ends here, they come before it.
        self.memory.store(used.to_le(), index, Ordering::Release).map_err(virtio_queue::Error::GuestMemory)?;
        compiler_fence(Ordering::SeqCst);
        #[cfg(feature = "crash-points")]
        pass(Point::Index);
        self.queue.set_next_used(used);
        for &(head, _) in chains {
            self.hold(head, Held::No);
        }
        if let Some(tracker) = &mut self.tracker {
            tracker.published(chains.iter().map(|&(head, _)| head), used);
        }
        #[cfg(feature = "crash-points")]
        pass(Point::Commit);
        Ok(())
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

    /// The index of the next available entry, from which a queue with this record can go on (VHOST_USER_GET_VRING_BASE):
    /// with nothing in flight that of the used ring. What an earlier process had and this one did not come to lies behind
    /// it still.
    pub fn next_available(&self) -> u16 {
        self.queue.next_avail().wrapping_sub(u16::try_from(self.resubmit.len()).unwrap_or(0))
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
    use crate::inflight::{Inflight, Layout};
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
        let ring = Ring::new(shape, features, Arc::clone(&memory), Some(Arc::new(Call::new(file))), None).unwrap();
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
    fn a_chain_made_available_twice_is_a_violation() {
        let mut s = setup(0, 0);
        s.make_available(0, 3);
        s.make_available(1, 3);
        assert_eq!(s.ring.pop().unwrap().unwrap().head, 3);
        assert!(matches!(s.ring.pop(), Err(RingError::Twice(3))));
        assert_eq!(s.ring.next_available(), 1);
        s.ring.complete(3, 0).unwrap();
        assert_eq!(s.ring.pop().unwrap().unwrap().head, 3, "after it was given back it may come again");
        s.ring.unpop([3].into_iter());
        assert_eq!(s.ring.next_available(), 1);
        assert_eq!(s.ring.pop().unwrap().unwrap().head, 3);
    }

    /// A ring on the memory of `s` that goes on from `base` with what is recorded in `file`.
    fn tracked(s: &Setup, file: &std::fs::File, base: u16) -> Ring {
        let layout = Layout::new(1, SIZE, 1).unwrap();
        let inflight = Inflight::map(file.try_clone().unwrap(), layout.bytes() as u64, 0, layout).unwrap();
        let part = Arc::new(inflight).part(0, SIZE).unwrap();
        let shape = Shape {
            size: SIZE,
            descriptors: GuestAddress(TABLE),
            available: GuestAddress(AVAILABLE),
            used: GuestAddress(USED),
            next_available: base,
        };
        Ring::new(shape, 0, Arc::clone(&s.memory), None, Some(part)).unwrap()
    }

    fn heads(ring: &mut Ring) -> Vec<u16> {
        std::iter::from_fn(|| ring.pop().unwrap().map(|chain| chain.head)).collect()
    }

    #[test]
    fn a_successor_takes_what_was_in_flight_and_then_what_is_available() {
        let s = setup(0, 65_533);
        let file = Layout::new(1, SIZE, 1).unwrap().make().unwrap();
        (0..5).for_each(|n| s.make_available(65_533_u16.wrapping_add(n), 5 - n));
        let mut first = tracked(&s, &file, 65_533);
        (0..4).for_each(|n| assert_eq!(first.pop().unwrap().unwrap().head, 5 - n));
        first.complete_together(&[(3, 0), (5, 0)]).unwrap();
        drop(first);
        // The driver uses what it was given back, over the entries of what is in flight.
        s.make_available(2, 3);
        let mut second = tracked(&s, &file, 65_535);
        assert_eq!((second.resubmissions(), second.next_available()), (2, 65_535));
        assert_eq!(second.pop().unwrap().unwrap().head, 4);
        assert_eq!(second.next_available(), 0, "one of two");
        second.unpop([4].into_iter());
        assert_eq!(heads(&mut second), [4, 2, 1, 3]);
        second.complete_together(&[(1, 0), (2, 0), (3, 0), (4, 0)]).unwrap();
        assert_eq!(second.next_available(), 3);
        drop(second);
        let mut third = tracked(&s, &file, 3);
        assert_eq!((third.resubmissions(), heads(&mut third)), (0, vec![]));
    }

    #[test]
    fn a_place_that_nobody_can_go_on_from_is_a_violation() {
        let s = setup(0, 7);
        let file = Layout::new(1, SIZE, 1).unwrap().make().unwrap();
        assert!(matches!(tracked(&s, &file, 6).check(), Err(RingError::Resume(ResumeError::Base { .. }))));
        tracked(&s, &file, 7).check().unwrap();
        s.memory.write_obj(7 + SIZE + 1, GuestAddress(USED + 2)).unwrap();
        let ring = tracked(&s, &file, 7 + SIZE + 1);
        assert!(matches!(ring.check(), Err(RingError::Resume(ResumeError::Batch(_)))));
        assert_eq!(ring.next_available(), 7 + SIZE + 1);
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
            assert!(Ring::new(shape, 0, Arc::clone(&memory), None, None).is_err(), "{shape:?}");
        }
    }
}
