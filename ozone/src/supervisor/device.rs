//! What the supervisor knows of one device: how far its process is, and what has happened to it.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::backoff::Backoff;
use super::drain::Drain;
use super::heartbeat::Heartbeat;
use super::processes::Child;
use crate::control::message::DeviceState;
use crate::resources::Prepared;

/// How long a fresh process may take until it serves.
pub const READY_PATIENCE: Duration = Duration::from_secs(10);

/// How long the core may take to stop a device's queues, or to connect to a backend: longer than it gives the backend.
pub const CORE_PATIENCE: Duration = Duration::from_secs(40);

/// How far the process of a device is.
#[derive(Debug)]
pub enum State {
    /// It serves.
    Up {
        /// Since when.
        since: Instant,
        /// Its signs of life.
        heartbeat: Heartbeat,
        /// When it has to have ended, if it has closed its vhost-user socket.
        hung_up: Option<Instant>,
    },
    /// The core stops its queues, because it is to be replaced.
    Detaching {
        /// Until when.
        deadline: Instant,
    },
    /// It was told to end, and does so in good order, if it does.
    Leaving {
        /// Until when.
        deadline: Instant,
    },
    /// It was ended, and its end is awaited.
    Ending {
        /// When its end is overdue, until that has been said.
        overdue: Option<Instant>,
    },
    /// It has ended; what it began may still be under way.
    Draining {
        /// How far that is.
        drain: Drain,
        /// The next process, on its way through its jail meanwhile and told nothing.
        next: Option<Box<Child>>,
        /// Whether it was tried to start that.
        tried: bool,
    },
    /// The next process waits for its time.
    Waiting {
        /// What it is handed.
        prepared: Option<Prepared>,
        /// The process, if it is in its jail already.
        next: Option<Box<Child>>,
        /// When it is started; never, before it is asked for.
        until: Option<Instant>,
    },
    /// The next process is on its way.
    Starting {
        /// The core's end of its vhost-user socket.
        socket: OwnedFd,
        /// Whether it serves the other end.
        ready: bool,
        /// Until when.
        deadline: Instant,
    },
    /// The core is connecting to it.
    Attaching {
        /// Until when.
        deadline: Instant,
    },
}

impl State {
    /// A process that serves from now on.
    pub fn up(now: Instant) -> Self {
        Self::Up { since: now, heartbeat: Heartbeat::new(now), hung_up: None }
    }
}

/// How many messages a process may send in a [`WINDOW`]: far more than a healthy one has to say.
const MESSAGES: u32 = 1000;

/// What [`MESSAGES`] are counted in.
const WINDOW: Duration = Duration::from_secs(1);

/// Messages that a process may still send.
#[derive(Debug)]
pub struct Budget {
    left: u32,
    since: Instant,
}

impl Budget {
    /// A full one.
    pub fn new(now: Instant) -> Self {
        Self { left: MESSAGES, since: now }
    }

    /// Counts one message; `false` for one too many.
    pub fn count(&mut self, now: Instant) -> bool {
        if now.saturating_duration_since(self.since) >= WINDOW {
            *self = Self::new(now);
        }
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                true
            }
            None => false,
        }
    }
}

/// A loss that has not been made good.
#[derive(Debug)]
pub struct Loss {
    /// When the device was lost.
    pub at: Instant,
    /// Why, or why the attempt after that failed.
    pub cause: String,
    /// Whether the user asked for it.
    pub by_hand: bool,
    /// Whether the process ended in good order.
    pub orderly: bool,
    /// How long the next process had to wait, not counting what it took to end the one before.
    pub delay: Duration,
    /// Whether it has been said.
    pub told: bool,
}

/// How many different causes are counted; the last of them stands for all further ones, since a hostile process has any number.
pub const CAUSES: usize = 16;

/// What has happened to a device since `ozone` started.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// How often a process was replaced by one that served.
    pub restarts: u64,
    /// Why it was lost last.
    pub cause: Option<String>,
    /// Why it was lost each time, and how often; no more than [`CAUSES`] different ones.
    pub causes: Vec<(String, u64)>,
    /// How long the next process had to wait for its time then.
    pub delay: Duration,
    /// How long it was away the last time.
    pub away: Option<Duration>,
    /// How long it has been away altogether.
    pub away_total: Duration,
    /// Requests that were carried out again.
    pub reexecuted: u64,
}

impl Tally {
    /// A process that was lost for this cause has been replaced by one that serves, after this time.
    pub fn replaced(&mut self, cause: &str, away: Duration, delay: Duration) {
        self.restarts = self.restarts.saturating_add(1);
        self.cause = Some(cause.to_owned());
        self.away = Some(away);
        self.delay = delay;
        self.away_total = self.away_total.saturating_add(away);
        let full = self.causes.len() >= CAUSES - 1;
        let cause = if full && !self.causes.iter().any(|(known, _)| known == cause) { "others" } else { cause };
        match self.causes.iter_mut().find(|(known, _)| known == cause) {
            Some((_, count)) => *count = count.saturating_add(1),
            None => self.causes.push((cause.to_owned(), 1)),
        }
    }
}

/// The tallies of a machine's devices, in their order. They outlive resets of the guest.
#[derive(Debug)]
pub struct Tallies(RefCell<Vec<Tally>>);

impl Tallies {
    /// Nothing has happened to any of `count` devices.
    pub fn new(count: usize) -> Self {
        Self(RefCell::new(vec![Tally::default(); count]))
    }

    /// Adds to the tally of a device, and returns it as it is then.
    pub fn add(&self, index: usize, add: impl FnOnce(&mut Tally)) -> Tally {
        let mut tallies = self.0.borrow_mut();
        tallies
            .get_mut(index)
            .map(|tally| {
                add(tally);
                tally.clone()
            })
            .unwrap_or_default()
    }
}

/// One device.
#[derive(Debug)]
pub struct Device {
    /// How far its process is.
    pub state: State,
    /// What was lost and is not back yet.
    pub loss: Option<Loss>,
    /// A loss that was made good and is told with the first sign of life, and how long the device was away.
    pub back: Option<(Loss, Duration)>,
    /// Requests that were carried out again since the last loss.
    pub reexecuted: u64,
    /// How long failures wait.
    pub backoff: Backoff,
    /// Queue pairs that the driver of a network interface uses.
    pub pairs: u16,
    /// Ends of processes that the core was told of and has not noted yet.
    pub parting: u32,
    /// Messages that its process may still send.
    messages: Budget,
}

impl Device {
    /// A device whose process serves.
    pub fn up(now: Instant) -> Self {
        Self {
            state: State::up(now),
            loss: None,
            back: None,
            reexecuted: 0,
            backoff: Backoff::default(),
            pairs: 1,
            parting: 0,
            messages: Budget::new(now),
        }
    }

    /// When something has to be done about it.
    pub fn deadline(&self) -> Option<Instant> {
        match &self.state {
            State::Up { heartbeat, hung_up, .. } => Some(hung_up.unwrap_or_else(|| heartbeat.deadline())),
            State::Ending { overdue } => *overdue,
            State::Draining { drain, .. } => Some(drain.deadline()),
            State::Waiting { until, .. } => *until,
            State::Detaching { deadline }
            | State::Leaving { deadline }
            | State::Starting { deadline, .. }
            | State::Attaching { deadline } => Some(*deadline),
        }
    }

    /// `ozone` did not run for a while, and perhaps nothing did: whatever is awaited gets its time anew.
    pub fn rearm(&mut self, now: Instant) {
        match &mut self.state {
            State::Up { heartbeat, .. } => heartbeat.suspend(now),
            State::Starting { deadline, .. } => *deadline = now + READY_PATIENCE,
            State::Detaching { deadline } | State::Attaching { deadline } => *deadline = now + CORE_PATIENCE,
            State::Leaving { .. } | State::Ending { .. } | State::Draining { .. } | State::Waiting { .. } => {}
        }
    }

    /// Counts a message of its process; `false` for one too many.
    pub fn hears(&mut self, now: Instant) -> bool {
        self.messages.count(now)
    }

    /// The state in a word.
    pub fn word(&self) -> DeviceState {
        match &self.state {
            State::Up { .. } => DeviceState::Up,
            State::Detaching { .. } => DeviceState::Detaching,
            State::Leaving { .. } | State::Ending { .. } => DeviceState::Ending,
            State::Draining { .. } => DeviceState::Draining,
            State::Waiting { until: Some(_), .. } => DeviceState::Waiting,
            State::Waiting { until: None, .. } => DeviceState::Away,
            State::Starting { .. } => DeviceState::Starting,
            State::Attaching { .. } => DeviceState::Attaching,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_counted_and_bounded() {
        let mut tally = Tally::default();
        for number in 0..100 {
            tally.replaced("killed by SIGKILL", Duration::from_millis(1), Duration::ZERO);
            tally.replaced(&format!("the core lost it: {number}"), Duration::from_millis(1), Duration::ZERO);
        }
        assert_eq!((tally.restarts, tally.away_total), (200, Duration::from_millis(200)));
        assert_eq!(tally.causes.len(), CAUSES);
        assert_eq!(tally.causes[0], ("killed by SIGKILL".to_owned(), 100));
        assert_eq!(tally.causes[CAUSES - 1].0, "others");
        assert_eq!(tally.causes.iter().map(|(_, count)| count).sum::<u64>(), 200);
    }
}
