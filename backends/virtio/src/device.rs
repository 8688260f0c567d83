//! What a device is to the rest of this library.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use protocol::ToBackend;

use crate::heartbeat::Pulse;
use crate::ring::{Ring, RingError};

/// The part of a device that is not a queue: what it offers and what its configuration space says.
///
/// It is shared by the thread that answers the core and the one that answers `ozone`.
pub trait Device: Send + Sync + 'static {
    /// The feature bits of the device's kind. Those of the ring and the transport are not its business.
    fn features(&self) -> u64;

    /// The configuration space (virtio 1.2, section 2.5), as far as the device has one. What follows reads as zero.
    fn config(&self) -> Vec<u8>;

    /// The driver accepted these features. No queue runs.
    fn negotiated(&self, features: u64) {
        let _ = features;
    }

    /// Whether what a queue has in flight is recorded for the process after this one (VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD).
    ///
    /// A device whose chains end in any order needs that. One that hands back every chain in the order in which it took
    /// them, and returns the others when it stops ([`Ring::unpop`]), does not: whatever a process that was killed had taken
    /// and not given back begins at the index of the used ring, which is where the core has the next one begin. Network
    /// interface and console are such devices, and have to stay so.
    fn tracks_inflight(&self) -> bool {
        false
    }

    /// A message of `ozone` other than the first; `false` if the device expects no such message.
    fn message(&self, message: &ToBackend) -> bool {
        let _ = message;
        false
    }

    /// The process is about to end in good order. What takes long is given up after a second or so.
    fn close(&self) {}
}

/// A device that is ready to be served: itself, and one handler per virtqueue in the order of the queues.
pub struct Opened<D> {
    /// The device.
    pub device: D,
    /// Its virtqueues.
    pub queues: Vec<Box<dyn QueueHandler>>,
}

/// One virtqueue of a device. Every method is called on the queue's own thread.
///
/// A handler sees only started rings. Between [`start`](Self::start) and [`stop`](Self::stop) it may hold chains that it
/// has not completed yet; when `stop` returns it holds none.
pub trait QueueHandler: Send {
    /// Descriptors of the host side that wake the queue: asked once, before the queue's first start.
    ///
    /// They are watched edge-triggered (epoll(7)): after [`ready`](Self::ready) the handler has to remember that there is
    /// something until the descriptor answers EAGAIN.
    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// Source `index` of [`sources`](Self::sources) has become readable.
    fn ready(&mut self, index: usize) {
        let _ = index;
    }

    /// What the queue's thread shows of itself: asked once, before the queue's first start. A handler that waits for the
    /// host's storage does so in [`Pulse::storage`]; nothing else may be waited for outside of the thread's own loop.
    fn pulse(&self) -> Arc<Pulse> {
        Arc::default()
    }

    /// The ring starts; `features` are those that the driver accepted.
    fn start(&mut self, features: u64) {
        let _ = features;
    }

    /// Does a bounded amount of work: called after the start, after every kick and after every [`ready`](Self::ready).
    ///
    /// # Errors
    /// A violation of the ring's rules, after which the ring is not touched again until it is restarted.
    fn run(&mut self, ring: &mut Ring) -> Result<Next, RingError>;

    /// The ring stops: finishes every request that was begun, and returns what was only looked at.
    ///
    /// # Errors
    /// As for [`run`](Self::run).
    fn stop(&mut self, ring: &mut Ring) -> Result<(), RingError> {
        let _ = ring;
        Ok(())
    }
}

/// What a queue waits for after [`QueueHandler::run`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// A kick or a source.
    Wait,
    /// Nothing: there is more to do now.
    Again,
}
