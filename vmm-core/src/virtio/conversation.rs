//! How long a backend may take to answer, and how one that does not is hung up on.
//!
//! Only the attendant talks to the backend, and it may be stuck in a read for ever: the vhost crate has no deadline of its
//! own. The main thread keeps the time and shuts the socket down under that read.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long a backend may take for all that a driver asked of it at once.
pub const PATIENCE: Duration = Duration::from_secs(8);

/// How long it may take if queues are to be stopped, which waits for all that they have begun on the host's storage. Less
/// than a reset waits for it.
pub const STOP_PATIENCE: Duration = Duration::from_secs(25);

/// What is under way with one backend.
#[derive(Debug)]
pub struct Conversation {
    pending: usize,
    since: Option<Instant>,
    /// For what is being asked now.
    patience: Duration,
    socket: Option<UnixStream>,
    overdue: bool,
}

impl Default for Conversation {
    fn default() -> Self {
        Self { pending: 0, since: None, patience: PATIENCE, socket: None, overdue: false }
    }
}

impl Conversation {
    /// There is one more thing to ask.
    pub fn begin(&mut self) {
        self.pending = self.pending.saturating_add(1);
        self.since.get_or_insert_with(Instant::now);
    }

    /// One thing was answered. The time for the next one counts from now.
    pub fn end(&mut self) {
        self.pending = self.pending.saturating_sub(1);
        self.since = (self.pending > 0).then(Instant::now);
        self.patience = PATIENCE;
    }

    /// What is being asked now stops queues. The main thread need not hear of it: it looks again when it thinks that the time
    /// is over.
    pub fn stops_queues(&mut self) {
        self.patience = STOP_PATIENCE;
    }

    /// How long the backend may take for what is being asked now.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// It is held over this socket, of which `socket` is a duplicate.
    pub fn over(&mut self, socket: UnixStream) {
        self.socket = Some(socket);
        self.overdue = false;
    }

    /// It has ended: the other side is told so.
    pub fn close(&mut self) {
        if let Some(socket) = self.socket.take() {
            // Fails when the other side is gone already.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// When the backend has to have answered.
    pub fn deadline(&self) -> Option<Instant> {
        self.since.map(|since| since + self.patience)
    }

    /// Ends the conversation if its deadline has passed.
    pub fn hang_up_if_overdue(&mut self, now: Instant) {
        if self.deadline().is_some_and(|deadline| deadline <= now) {
            self.overdue = true;
            // Once: the attendant ends what is pending.
            self.since = None;
            self.close();
        }
    }

    /// Whether it was hung up on.
    pub fn is_overdue(&self) -> bool {
        self.overdue
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_silent_backend_is_hung_up_on_once_its_time_is_over() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut conversation = Conversation::default();
        conversation.over(ours.try_clone().unwrap());
        conversation.hang_up_if_overdue(Instant::now() + PATIENCE * 2);
        assert!(!conversation.is_overdue(), "nothing was asked");
        conversation.begin();
        let deadline = conversation.deadline().unwrap();
        conversation.hang_up_if_overdue(deadline - Duration::from_secs(1));
        assert!(!conversation.is_overdue());
        conversation.hang_up_if_overdue(deadline);
        assert!(conversation.is_overdue());
        assert_eq!((&ours).read(&mut [0; 1]).unwrap(), 0, "a blocked read ends");
        assert_eq!(conversation.deadline(), None);
    }

    #[test]
    fn queues_that_are_stopped_are_given_more_time_than_anything_else() {
        let mut conversation = Conversation::default();
        conversation.begin();
        conversation.begin();
        let usual = conversation.deadline().unwrap();
        conversation.stops_queues();
        assert_eq!(conversation.deadline(), Some(usual + (STOP_PATIENCE - PATIENCE)));
        conversation.hang_up_if_overdue(usual);
        assert!(!conversation.is_overdue());
        conversation.end();
        assert_eq!(conversation.patience(), PATIENCE, "what is asked next stops none");
    }

    #[test]
    fn an_answer_stops_the_clock() {
        let mut conversation = Conversation::default();
        conversation.begin();
        conversation.begin();
        conversation.end();
        assert!(conversation.deadline().is_some(), "one thing is still pending");
        conversation.end();
        assert_eq!(conversation.deadline(), None);
    }
}
