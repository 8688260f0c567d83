//! When what was done, told to `ozone` by any thread, if it asked for that.

use protocol::trace::{Mark, Point, now};

use crate::event::{Event, Events};

/// Where a thread tells what it did.
#[derive(Clone)]
pub struct Tracer(Option<Events>);

impl Tracer {
    /// Tells through `events` if it is `wanted`, else does nothing.
    pub fn new(wanted: bool, events: &Events) -> Self {
        Self(wanted.then(|| events.clone()))
    }

    /// The time, if it is wanted.
    pub fn now(&self) -> u64 {
        if self.0.is_some() { now() } else { 0 }
    }

    /// `point` was begun at `start` and is done. Never waits.
    pub fn done(&self, start: u64, point: impl FnOnce() -> Point) {
        self.tell(|| Mark { point: point(), start, end: now() });
    }

    /// `point` has just come about. Never waits.
    pub fn reached(&self, point: impl FnOnce() -> Point) {
        self.tell(|| {
            let now = now();
            Mark { point: point(), start: now, end: now }
        });
    }

    fn tell(&self, mark: impl FnOnce() -> Mark) {
        if let Some(events) = &self.0 {
            // A receiver that is gone means that the machine is ending.
            let _ = events.send(Event::Trace(mark()));
        }
    }
}
