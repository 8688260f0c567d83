//! The control queue, of which one command is offered: how many queue pairs to use (virtio 1.2, section 5.1.6.5.5).
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::sync::Arc;

use virtio_backend::{Chain, Next, QueueHandler, Ring, RingError};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_F_MQ, VIRTIO_NET_OK,
};

use crate::device::Pairs;

/// How many commands are carried out before the queue looks whether it is to stop.
const BATCH: usize = 16;

/// The handler of the control queue.
pub struct Control {
    pairs: Arc<Pairs>,
    begun: bool,
}

impl Control {
    /// A queue that decides how many of `pairs` are used.
    pub fn new(pairs: Arc<Pairs>) -> Self {
        Self { pairs, begun: false }
    }

    fn answer(&self, ring: &mut Ring, mut chain: Chain) -> Result<(), RingError> {
        if chain.writable.is_empty() {
            return Err(RingError::NoAnswer(chain.head));
        }
        let mut command = [0; 4];
        let length = chain.readable.read(&mut command);
        let [class, kind, low, high] = command;
        let known = (length, u32::from(class), u32::from(kind));
        let done = known == (4, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET)
            && chain.readable.is_empty()
            && self.pairs.use_first(u16::from_le_bytes([low, high]).into());
        let code = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        chain.writable.write(&[u8::try_from(code).unwrap_or(u8::MAX)]);
        ring.complete(chain.head, 1)
    }
}

impl QueueHandler for Control {
    fn start(&mut self, _features: u64) {
        self.begun = false;
    }

    fn run(&mut self, ring: &mut Ring) -> Result<Next, RingError> {
        // A driver begins with one pair (virtio 1.2, section 5.1.6.5.5). One that goes on with a successor of the process that
        // it told how many it uses does not tell that again: it has sent commands before.
        if !std::mem::replace(&mut self.begun, true) && ring.next_available() == 0 {
            self.pairs.use_first(1);
        }
        ring.quiet()?;
        for _ in 0..BATCH {
            let Some(chain) = ring.pop()? else {
                return Ok(if ring.listen()? { Next::Again } else { Next::Wait });
            };
            self.answer(ring, chain)?;
            ring.signal()?;
        }
        Ok(Next::Again)
    }
}

/// The queue behind the first pair: without VIRTIO_NET_F_MQ it is the control queue, whatever it is else
/// (virtio 1.2, section 5.1.2).
pub struct Third {
    control: Control,
    otherwise: Box<dyn QueueHandler>,
    is_control: bool,
}

impl Third {
    /// The control queue for a driver without several pairs, `otherwise` for one with.
    pub fn new(control: Control, otherwise: Box<dyn QueueHandler>) -> Self {
        Self { control, otherwise, is_control: false }
    }

    fn active(&mut self) -> &mut dyn QueueHandler {
        if self.is_control { &mut self.control } else { self.otherwise.as_mut() }
    }
}

impl QueueHandler for Third {
    fn sources(&self) -> Vec<std::os::fd::BorrowedFd<'_>> {
        self.otherwise.sources()
    }

    fn ready(&mut self, index: usize) {
        self.otherwise.ready(index);
    }

    fn start(&mut self, features: u64) {
        self.is_control = features & (1 << VIRTIO_NET_F_MQ) == 0;
        self.active().start(features);
    }

    fn run(&mut self, ring: &mut Ring) -> Result<Next, RingError> {
        self.active().run(ring)
    }

    fn stop(&mut self, ring: &mut Ring) -> Result<(), RingError> {
        self.active().stop(ring)
    }
}
