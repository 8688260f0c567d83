//! What the core's main thread waits for: one queue, fed by every other thread.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;

use protocol::trace::Mark;
use protocol::{Cause, DeviceId, Fault, LinkError, ToCore};

/// One thing that happened.
#[derive(Debug)]
pub enum Event {
    /// `ozone` sent a message, or the channel ended.
    Control(Result<ToCore, LinkError>),
    /// A device's backend answered the handshake and serves the queues, if the driver is ready.
    Attached(DeviceId),
    /// A device's queues are stopped, and its backend is not spoken to any more.
    Detached(DeviceId),
    /// It is noted that nothing of a device's last backend is under way.
    Gone(DeviceId),
    /// A device's backend broke the protocol, went away or missed a deadline.
    Lost(DeviceId, String),
    /// A device's queues are stopped for a pause or started after it, or its backend is away.
    QueuesDone,
    /// The gate was closed and no vCPU was in the guest.
    VcpusHeld,
    /// Something was asked of a backend: its time runs.
    Conversation,
    /// The machine ended by the guest's doing.
    End(Cause),
    /// A thread of the core cannot go on.
    Failed(Fault),
    /// A step of the launch was done.
    Trace(Mark),
}

/// Where threads report to.
pub type Events = Sender<Event>;

/// Tells once that the guest ended the machine: what it does after that means nothing, however often it does it.
pub struct Ending {
    events: Events,
    told: AtomicBool,
}

impl Ending {
    /// Reports to `events`.
    pub fn new(events: Events) -> Self {
        Self { events, told: AtomicBool::new(false) }
    }

    /// The machine has ended.
    pub fn tell(&self, cause: Cause) {
        if !self.told.swap(true, Ordering::Relaxed) {
            // A receiver that is gone means that the machine is ending already.
            let _ = self.events.send(Event::End(cause));
        }
    }
}
