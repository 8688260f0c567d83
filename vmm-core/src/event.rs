//! What the core's main thread waits for: one queue, fed by every other thread.

use std::sync::mpsc::Sender;

use protocol::trace::Mark;
use protocol::{Cause, DeviceId, Fault, LinkError, ToCore};

/// One thing that happened.
#[derive(Debug)]
pub enum Event {
    /// `ozone` sent a message, or the channel ended.
    Control(Result<ToCore, LinkError>),
    /// A device's backend answered the handshake.
    Attached(DeviceId),
    /// A device's backend broke the protocol, went away or missed a deadline.
    Lost(DeviceId, String),
    /// The machine ended by the guest's doing.
    End(Cause),
    /// A thread of the core cannot go on.
    Failed(Fault),
    /// A step of the launch was done.
    Trace(Mark),
}

/// Where threads report to.
pub type Events = Sender<Event>;
