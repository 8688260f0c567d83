//! A bounded buffer of bytes between the threads of the host side and those of the queues.
//!
//! Host threads wait in its methods. A queue's thread waits for its events instead, together with its kick.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use virtio_backend::descriptor::Wake;

/// Bytes that a buffer holds at most.
pub const CAPACITY: usize = 64 * 1024;

#[derive(Default)]
struct State {
    bytes: VecDeque<u8>,
    /// Someone was refused room and wants to hear of some.
    room_wanted: bool,
    /// Bytes were taken by [`Buffer::wait`] and are not dealt with yet.
    busy: bool,
}

/// The buffer.
pub struct Buffer {
    state: Mutex<State>,
    changed: Condvar,
    filled: Wake,
    emptied: Wake,
}

impl Buffer {
    /// An empty buffer.
    ///
    /// # Errors
    /// What eventfd(2) answers.
    pub fn new() -> nix::Result<Self> {
        Ok(Self { state: Mutex::default(), changed: Condvar::new(), filled: Wake::new()?, emptied: Wake::new()? })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Raised when there is something where there was nothing.
    pub fn filled(&self) -> BorrowedFd<'_> {
        self.filled.as_fd()
    }

    /// Raised when there is room after [`push`](Self::push) or [`has_room`](Self::has_room) said that there is none.
    pub fn emptied(&self) -> &Wake {
        &self.emptied
    }

    /// Puts in as many bytes as there is room for, and returns how many.
    pub fn push(&self, bytes: &[u8]) -> usize {
        let mut state = self.state();
        let count = bytes.len().min(CAPACITY.saturating_sub(state.bytes.len()));
        let (now, later) = bytes.split_at(count);
        let was_empty = state.bytes.is_empty();
        state.bytes.extend(now);
        state.room_wanted |= !later.is_empty();
        if was_empty && count > 0 {
            self.changed.notify_all();
            self.filled.raise();
        }
        count
    }

    /// Whether there is room for `count` bytes; if not, [`emptied`](Self::emptied) will be raised when there is more.
    pub fn has_room(&self, count: usize) -> bool {
        let mut state = self.state();
        let room = state.bytes.len().saturating_add(count) <= CAPACITY;
        state.room_wanted |= !room;
        room
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.state().bytes.is_empty()
    }

    /// Puts all of `bytes` in, and waits for room as long as it takes.
    pub fn push_all(&self, mut bytes: &[u8]) {
        loop {
            let count = self.push(bytes);
            bytes = bytes.get(count..).unwrap_or_default();
            if bytes.is_empty() {
                return;
            }
            let full = |state: &mut State| state.bytes.len() >= CAPACITY;
            drop(self.changed.wait_while(self.state(), full));
        }
    }

    /// Takes bytes out, as many as there are and fit, and returns how many.
    pub fn pop(&self, into: &mut [u8]) -> usize {
        let mut state = self.state();
        self.take(&mut state, into)
    }

    /// Waits until there are bytes, and takes them out. The buffer counts as busy until the next call.
    pub fn wait(&self, into: &mut [u8]) -> usize {
        let mut state = self.state();
        state.busy = false;
        self.changed.notify_all();
        let empty = |state: &mut State| state.bytes.is_empty();
        let mut state = self.changed.wait_while(state, empty).unwrap_or_else(PoisonError::into_inner);
        state.busy = true;
        self.take(&mut state, into)
    }

    /// Waits until all that was put in has been dealt with, or until `deadline`; whether it has.
    pub fn settle(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let unsettled = |state: &mut State| state.busy || !state.bytes.is_empty();
        let outcome = self.changed.wait_timeout_while(self.state(), left, unsettled);
        !outcome.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    fn take(&self, state: &mut State, into: &mut [u8]) -> usize {
        let count = into.len().min(state.bytes.len());
        into.iter_mut().zip(state.bytes.drain(..count)).for_each(|(to, from)| *to = from);
        if count > 0 {
            self.changed.notify_all();
            if std::mem::take(&mut state.room_wanted) {
                self.emptied.raise();
            }
        }
        count
    }
}

/// How long the end of the process waits for output that was not written yet.
pub const LAST_WORDS: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags};
    use std::sync::Arc;

    fn raised(fd: BorrowedFd<'_>) -> bool {
        virtio_backend::descriptor::wait(&mut [PollFd::new(fd, PollFlags::POLLIN)], Some(Duration::ZERO)) == Ok(1)
    }

    #[test]
    fn it_is_bounded_and_tells_of_room_and_of_bytes() {
        let buffer = Buffer::new().unwrap();
        assert!(buffer.has_room(1) && !raised(buffer.filled()));
        assert_eq!(buffer.push(&vec![7; CAPACITY + 1]), CAPACITY);
        assert!(!buffer.has_room(1) && raised(buffer.filled()) && !raised(buffer.emptied().as_fd()));
        assert_eq!(buffer.pop(&mut [0; 10]), 10);
        assert!(raised(buffer.emptied().as_fd()));
        assert_eq!(buffer.push(&[8; 11]), 10);
    }

    #[test]
    fn all_bytes_arrive_in_order_through_a_full_buffer() {
        let buffer = Arc::new(Buffer::new().unwrap());
        let bytes: Vec<u8> = (0..3 * CAPACITY).map(|index| index.to_le_bytes()[0]).collect();
        let (writer, sent) = (Arc::clone(&buffer), bytes.clone());
        let thread = std::thread::spawn(move || writer.push_all(&sent));
        let mut received: Vec<u8> = Vec::new();
        while received.len() < bytes.len() {
            let mut chunk = [0; 1000];
            let count = buffer.wait(&mut chunk);
            received.extend(&chunk[..count]);
        }
        assert_eq!(received, bytes);
        thread.join().unwrap();
        assert!(!buffer.settle(Instant::now()), "the last chunk is not dealt with");
    }
}
