//! Signs of life of a backend: it is asked for one now and then, and is lost when it gives none.

use std::time::{Duration, Instant};

/// How long after a sign of life the next one is asked for.
const INTERVAL: Duration = Duration::from_secs(5);

/// How long it may take. A process of a busy host may not get a processor for seconds.
const PATIENCE: Duration = Duration::from_secs(15);

/// What is asked of one process.
#[derive(Debug)]
pub struct Heartbeat {
    number: u64,
    /// When the question under way was put.
    asked: Option<Instant>,
    /// When the next one is.
    next: Instant,
}

/// What has to be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// Nothing.
    Nothing,
    /// Ask, with this number.
    Ask(u64),
    /// Take it for lost.
    Lost,
}

impl Heartbeat {
    /// A process that has just begun to serve is asked at once.
    pub fn new(now: Instant) -> Self {
        Self { number: 0, asked: None, next: now }
    }

    /// How long a sign of life may take, in seconds.
    pub fn patience() -> u64 {
        PATIENCE.as_secs()
    }

    /// When something has to be done.
    pub fn deadline(&self) -> Instant {
        self.asked.map_or(self.next, |asked| asked + PATIENCE)
    }

    /// What has to be done at `now`. A question counts as put.
    pub fn due(&mut self, now: Instant) -> Due {
        if now < self.deadline() {
            return Due::Nothing;
        }
        if self.asked.is_some() {
            return Due::Lost;
        }
        self.number = self.number.wrapping_add(1);
        self.asked = Some(now);
        Due::Ask(self.number)
    }

    /// The process answered the question of this number; `false` if that is not the one under way.
    pub fn alive(&mut self, number: u64, now: Instant) -> bool {
        let awaited = self.asked.is_some() && number == self.number;
        if awaited {
            self.asked = None;
            self.next = now + INTERVAL;
        }
        awaited
    }

    /// The time does not count: the machine is paused, or a debugger holds the process. A question under way is put again.
    pub fn suspend(&mut self, now: Instant) {
        self.next = now + INTERVAL;
        if self.asked.is_some() {
            self.asked = Some(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_asked_at_intervals_and_lost_when_it_does_not_answer() {
        let start = Instant::now();
        let mut heartbeat = Heartbeat::new(start);
        assert_eq!(heartbeat.due(start), Due::Ask(1));
        assert_eq!(heartbeat.due(start), Due::Nothing);
        assert!(!heartbeat.alive(7, start), "an answer to nothing");
        assert!(heartbeat.alive(1, start));
        assert!(!heartbeat.alive(1, start), "an answer twice");
        assert_eq!(heartbeat.due(start + INTERVAL / 2), Due::Nothing);
        let later = start + INTERVAL;
        assert_eq!(heartbeat.due(later), Due::Ask(2));
        assert_eq!(heartbeat.due(later + PATIENCE / 2), Due::Nothing);
        assert_eq!(heartbeat.due(later + PATIENCE), Due::Lost);
    }

    #[test]
    fn suspended_time_does_not_count() {
        let start = Instant::now();
        let mut heartbeat = Heartbeat::new(start);
        assert_eq!(heartbeat.due(start), Due::Ask(1));
        heartbeat.suspend(start + PATIENCE);
        assert_eq!(heartbeat.due(start + PATIENCE), Due::Nothing);
        assert!(heartbeat.alive(1, start + PATIENCE + PATIENCE / 2), "the answer may still come");
    }
}
