//! Messages to `ozone`, and the end of the process, from any thread.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use protocol::FromBackend;

use crate::descriptor::Wake;

/// What the main thread is asked to do.
pub(crate) enum Errand {
    /// Send this.
    Send(FromBackend),
    /// End the process in good order, for this reason.
    End(String),
}

/// The way from any thread to the main thread, which alone speaks on the control channel.
#[derive(Clone)]
pub struct Outbox {
    errands: Sender<Errand>,
    wake: Arc<Wake>,
}

impl Outbox {
    pub(crate) fn new() -> nix::Result<(Self, Receiver<Errand>, Arc<Wake>)> {
        let wake = Arc::new(Wake::new()?);
        let (errands, receiver) = channel();
        Ok((Self { errands, wake: Arc::clone(&wake) }, receiver, wake))
    }

    /// Sends a message to `ozone`, in time.
    pub fn send(&self, message: FromBackend) {
        self.post(Errand::Send(message));
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
