//! A receive queue: from the tap to the guest (virtio 1.2, section 5.1.6.3).
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::errno::Errno;
use virtio_backend::buffers::{self, Scratch};
use virtio_backend::{Buffers, Chain, Next, QueueHandler, Rare, Ring, RingError};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_MRG_RXBUF};

use crate::tap::Tap;

/// Size of the header in front of each packet in bytes (section 5.1.6).
pub const HEADER: usize = 12;

/// The longest packet that the kernel makes for a guest that takes segments of more than the MTU, in bytes.
const LARGEST: usize = 65_536 + 14;

/// What an Ethernet header adds to the MTU, a VLAN tag included, in bytes.
const ETHERNET: usize = 18;

/// How many packets are received before the queue looks whether it is to stop.
const BATCH: usize = 128;

/// A chain that was taken and not used yet.
struct Room {
    head: u16,
    /// Where the header goes, once the chain is to be a packet's first.
    header: Option<Buffers>,
    data: Buffers,
    length: usize,
}

impl Room {
    /// Sets the header's place apart; `false` if it does not fit.
    fn split_header(&mut self) -> bool {
        if self.header.is_none() {
            if self.length < HEADER {
                return false;
            }
            let data = self.data.split_off(HEADER);
            self.header = Some(std::mem::replace(&mut self.data, data));
        }
        true
    }
}

/// The handler of one receive queue.
pub struct Receive {
    tap: Arc<Tap>,
    mtu: usize,
    /// Whether the tap may have a packet.
    readable: bool,
    /// Whether a packet may be divided among chains (section 5.1.6.4).
    mergeable: bool,
    /// The longest packet to be expected, in bytes.
    largest: usize,
    rooms: VecDeque<Room>,
    used: Vec<(u16, u32)>,
    /// Where the rest of a packet goes that does not fit.
    spare: Vec<u8>,
    scratch: Scratch,
    dropped: u64,
    failed: u64,
    reported: Rare,
}

/// What became of an attempt to receive.
enum Received {
    Packet,
    Nothing,
}

impl Receive {
    /// A queue that receives from `tap`.
    pub fn new(tap: Arc<Tap>, mtu: u16) -> Self {
        Self {
            tap,
            mtu: mtu.into(),
            readable: true,
            mergeable: false,
            largest: LARGEST,
            rooms: VecDeque::new(),
            used: Vec::new(),
            spare: vec![0; LARGEST],
            scratch: Scratch::default(),
            dropped: 0,
            failed: 0,
            reported: Rare::default(),
        }
    }

    /// Takes chains until the longest packet would fit, or the driver has no more.
    fn gather(&mut self, ring: &mut Ring) -> Result<(), RingError> {
        let mut room = self.rooms.iter().fold(0_usize, |sum, room| sum.saturating_add(room.data.len()));
        while self.rooms.is_empty() || (self.mergeable && room < self.largest) {
            let Some(Chain { head, writable, .. }) = ring.pop()? else { break };
            room = room.saturating_add(writable.len());
            self.rooms.push_back(Room { head, header: None, length: writable.len(), data: writable });
        }
        Ok(())
    }

    fn put_back(&mut self, ring: &mut Ring) {
        ring.unpop(self.rooms.iter().map(|room| room.head));
        self.rooms.clear();
    }

    /// Receives one packet into the chains that were gathered, of which there is at least one.
    fn receive(&mut self, ring: &mut Ring) -> Result<Received, RingError> {
        let Some(first) = self.rooms.front_mut() else { return Ok(Received::Nothing) };
        if !first.split_header() {
            return self.discard_first(ring);
        }
        let room = self.rooms.iter().fold(0_usize, |sum, room| sum.saturating_add(room.data.len()));
        let mut header = [0; HEADER];
        let targets = self.rooms.iter_mut().map(|room| &mut room.data);
        let length = match buffers::receive(self.tap.as_fd(), &mut header, targets, &mut self.spare, &mut self.scratch)
        {
            Ok(length) => length,
            Err(Errno::EINTR) => return Ok(Received::Packet),
            Err(Errno::E2BIG) => return self.discard_first(ring),
            Err(errno) => {
                // A tap that is down says so, and comes back with an edge.
                self.readable = false;
                if errno != Errno::EAGAIN {
                    self.failed = self.failed.saturating_add(1);
                }
                return Ok(Received::Nothing);
            }
        };
        match length.checked_sub(HEADER) {
            Some(data) if data <= room => self.hand_over(ring, header, data)?,
            _ => {
                self.dropped = self.dropped.saturating_add(1);
                self.put_back(ring);
            }
        }
        Ok(Received::Packet)
    }

    /// Gives the chains back that a packet of `data` bytes was put into.
    fn hand_over(&mut self, ring: &mut Ring, mut header: [u8; HEADER], data: usize) -> Result<(), RingError> {
        let mut left = data;
        let mut place = None;
        self.used.clear();
        while let Some(mut room) = self.rooms.pop_front() {
            let taken = room.header.take();
            let before = if taken.is_some() { HEADER } else { 0 };
            let written = room.length.saturating_sub(before).min(left);
            left = left.saturating_sub(written);
            place = place.or(taken);
            self.used.push((room.head, u32::try_from(written.saturating_add(before)).unwrap_or(u32::MAX)));
            if left == 0 {
                break;
            }
        }
        // The last field is the number of chains, little-endian; without mergeable buffers it is 1.
        let [.., low, high] = &mut header;
        [*low, *high] = u16::try_from(self.used.len()).unwrap_or(u16::MAX).to_le_bytes();
        if let Some(mut place) = place {
            place.write(&header);
        }
        ring.complete_together(&self.used)
    }

    /// Gives a chain back that no packet could be put into.
    fn discard_first(&mut self, ring: &mut Ring) -> Result<Received, RingError> {
        if let Some(room) = self.rooms.pop_front() {
            self.dropped = self.dropped.saturating_add(1);
            ring.complete(room.head, 0)?;
        }
        Ok(Received::Packet)
    }
}

impl QueueHandler for Receive {
    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.tap.as_fd()]
    }

    fn ready(&mut self, _index: usize) {
        self.readable = true;
    }

    fn start(&mut self, features: u64) {
        let accepted = |feature: u32| features & (1 << feature) != 0;
        self.mergeable = accepted(VIRTIO_NET_F_MRG_RXBUF);
        let segments = accepted(VIRTIO_NET_F_GUEST_TSO4) || accepted(VIRTIO_NET_F_GUEST_TSO6);
        self.largest = if segments { LARGEST } else { self.mtu.saturating_add(ETHERNET) }.saturating_add(HEADER);
        self.readable = true;
    }

    fn run(&mut self, ring: &mut Ring) -> Result<Next, RingError> {
        ring.quiet()?;
        let mut next = Next::Again;
        for _ in 0..BATCH {
            if !self.readable {
                // The tap's next packet is what to wait for, not a kick.
                next = Next::Wait;
                break;
            }
            self.gather(ring)?;
            if self.rooms.is_empty() {
                if !ring.listen()? {
                    next = Next::Wait;
                    break;
                }
                continue;
            }
            if matches!(self.receive(ring)?, Received::Nothing) {
                next = Next::Wait;
                break;
            }
        }
        ring.signal()?;
        Ok(next)
    }

    fn stop(&mut self, ring: &mut Ring) -> Result<(), RingError> {
        self.put_back(ring);
        if (self.dropped > 0 || self.failed > 0) && self.reported.again().is_some() {
            log::warn!("receive queue: {} packets dropped, {} failures of the tap", self.dropped, self.failed);
            (self.dropped, self.failed) = (0, 0);
        }
        Ok(())
    }
}
