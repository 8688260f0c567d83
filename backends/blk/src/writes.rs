//! Which writes may be under way together, past the page cache.
//!
//! A write of parts of blocks reads them, changes them and writes them back. A write of whole blocks that came to its end in
//! between would be undone, and one that was begun before would undo it. So the former is alone, whichever queues the others
//! are of; it is rare, and which blocks they touch is not looked at.
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// The writes of one image.
///
/// Whoever waits here has no write of whole blocks under way: two that waited for each other would do so for ever.
#[derive(Debug, Default)]
pub struct Writes {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Of whole blocks, under way.
    whole: usize,
    /// Of parts of blocks, under way or waiting.
    partial: usize,
    /// Whether one of the latter is under way.
    alone: bool,
}

/// Leave for a write of whole blocks, until it is dropped.
#[derive(Debug)]
pub struct Whole(Arc<Writes>);

impl Writes {
    /// Lets a write of whole blocks begin; none while one of parts is under way, or waits.
    pub fn try_whole(self: &Arc<Self>) -> Option<Whole> {
        let mut state = self.state();
        (state.partial == 0).then(|| {
            state.whole = state.whole.saturating_add(1);
            Whole(Arc::clone(self))
        })
    }

    /// Waits until a write of whole blocks may begin.
    pub fn whole(self: &Arc<Self>) -> Whole {
        let waiting = |state: &mut State| state.partial > 0;
        let mut state = self.changed.wait_while(self.state(), waiting).unwrap_or_else(PoisonError::into_inner);
        state.whole = state.whole.saturating_add(1);
        Whole(Arc::clone(self))
    }

    /// Carries out `write`, of parts of blocks, while no other write is under way.
    pub fn alone<T>(&self, write: impl FnOnce() -> T) -> T {
        let mut state = self.state();
        state.partial = state.partial.saturating_add(1);
        let waiting = |state: &mut State| state.whole > 0 || state.alone;
        let mut state = self.changed.wait_while(state, waiting).unwrap_or_else(PoisonError::into_inner);
        state.alone = true;
        drop(state);
        let outcome = write();
        let mut state = self.state();
        state.alone = false;
        state.partial = state.partial.saturating_sub(1);
        drop(state);
        self.changed.notify_all();
        outcome
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Whole {
    fn drop(&mut self) {
        let last = {
            let mut state = self.0.state();
            state.whole = state.whole.saturating_sub(1);
            state.whole == 0
        };
        if last {
            self.0.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;
    use std::time::{Duration, Instant};

    const DEADLINE: Duration = Duration::from_secs(20);

    #[test]
    fn a_write_of_parts_waits_for_the_others_and_holds_later_ones_back() {
        let writes = Arc::new(Writes::default());
        let earlier = [writes.try_whole().unwrap(), writes.whole()];
        let (done, outcome) = channel();
        let thread = |number: u32, partial: bool| {
            let (writes, done) = (Arc::clone(&writes), done.clone());
            std::thread::spawn(move || {
                if partial {
                    writes.alone(|| done.send(number).unwrap());
                } else {
                    let _whole = writes.whole();
                    done.send(number).unwrap();
                }
            });
        };
        thread(1, true);
        let begun = Instant::now();
        while writes.try_whole().is_some() {
            assert!(begun.elapsed() < DEADLINE, "a later write is not held back");
            std::thread::yield_now();
        }
        thread(2, false);
        let [first, second] = earlier;
        drop(first);
        assert!(outcome.recv_timeout(Duration::from_millis(20)).is_err(), "one is still under way");
        drop(second);
        for number in [1, 2] {
            assert_eq!(outcome.recv_timeout(DEADLINE), Ok(number), "write {number} is not carried out");
        }
    }
}
