//! Messages to `ozone`, and the end of the process, from any thread.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use protocol::{Channel, FromBackend, LinkError, ToBackend};

use crate::descriptor::Wake;

/// The control channel.
pub(crate) type Control = Channel<FromBackend, ToBackend>;

/// What the main thread is asked to do.
pub(crate) enum Errand {
    /// Send this.
    Send(FromBackend),
    /// End the process in good order, for this reason.
    End(String),
}

/// The way from any thread to the main thread, which speaks on the control channel, and to that channel itself.
#[derive(Clone)]
pub struct Outbox {
    control: Arc<Control>,
    errands: Sender<Errand>,
    wake: Arc<Wake>,
}

impl Outbox {
    pub(crate) fn new(control: Arc<Control>) -> nix::Result<(Self, Receiver<Errand>, Arc<Wake>)> {
        let wake = Arc::new(Wake::new()?);
        let (errands, receiver) = channel();
        Ok((Self { control, errands, wake: Arc::clone(&wake) }, receiver, wake))
    }

    /// Sends a message to `ozone`, in time.
    pub fn send(&self, message: FromBackend) {
        self.post(Errand::Send(message));
    }

    /// Sends a message to `ozone` that has left this process when this returns, whatever becomes of it then. It may overtake
    /// those of [`send`](Self::send). Nothing is waited for: `false` if `ozone` does not read, and so will not hear of it.
    #[must_use]
    pub fn send_now(&self, message: &FromBackend) -> bool {
        // The main thread finds out what is wrong with a channel that is of no use any more.
        !matches!(self.control.try_send(message), Err(LinkError::WouldBlock))
    }

    /// Ends the process with exit code 0; `reason` goes to the log.
    pub fn end(&self, reason: impl Into<String>) {
        self.post(Errand::End(reason.into()));
    }

    fn post(&self, errand: Errand) {
        // When the receiver is gone the process is ending already.
        if self.errands.send(errand).is_ok() {
            self.wake.raise();
        }
    }
}
