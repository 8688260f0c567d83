//! A transmit queue: from the guest to the tap (virtio 1.2, section 5.1.6.2).
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::os::fd::AsFd;
use std::sync::Arc;

use nix::errno::Errno;
use virtio_backend::{Next, QueueHandler, Rare, Ring, RingError};

use crate::receive::HEADER;
use crate::tap::Tap;

/// How many packets are sent before the queue looks whether it is to stop.
const BATCH: usize = 128;

/// The handler of one transmit queue.
pub struct Transmit {
    tap: Arc<Tap>,
    /// Packets for which the tap had no room.
    dropped: u64,
    /// Packets that were none, or that the tap refused.
    refused: u64,
    reported: Rare,
}

impl Transmit {
    /// A queue that sends to `tap`.
    pub fn new(tap: Arc<Tap>) -> Self {
        Self { tap, dropped: 0, refused: 0, reported: Rare::default() }
    }
}

impl QueueHandler for Transmit {
    fn run(&mut self, ring: &mut Ring) -> Result<Next, RingError> {
        ring.quiet()?;
        let mut next = Next::Again;
        for _ in 0..BATCH {
            let Some(mut chain) = ring.pop()? else {
                if !ring.listen()? {
                    next = Next::Wait;
                    break;
                }
                continue;
            };
            let outcome =
                if chain.readable.len() > HEADER { chain.readable.send(self.tap.as_fd()) } else { Err(Errno::EINVAL) };
            match outcome {
                Ok(_) => {}
                // A frame may be lost at any time; to wait for room would be to let one guest fill the host's queues.
                Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM) => self.dropped = self.dropped.saturating_add(1),
                Err(_) => self.refused = self.refused.saturating_add(1),
            }
            ring.complete(chain.head, 0)?;
        }
        ring.signal()?;
        Ok(next)
    }

    fn stop(&mut self, _ring: &mut Ring) -> Result<(), RingError> {
        if (self.dropped > 0 || self.refused > 0) && self.reported.again().is_some() {
            log::warn!("transmit queue: {} packets dropped, {} refused by the tap", self.dropped, self.refused);
            (self.dropped, self.refused) = (0, 0);
        }
        Ok(())
    }
}
