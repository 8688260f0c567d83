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

/// How far the process of a device is.
#[derive(Debug)]
pub enum State {
    /// It serves.
    Up {
        /// Since when.
        since: Instant,
        /// Its signs of life.
        heartbeat: Heartbeat,
    },
    /// The core stops its queues, because it is to be replaced.
    Detaching {
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

/// What has happened to a device since `ozone` started.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// How often a process was replaced by one that served.
    pub restarts: u64,
    /// Why it was lost last.
    pub cause: Option<String>,
    /// How long it was away the last time.
    pub away: Option<Duration>,
    /// How long it has been away altogether.
    pub away_total: Duration,
    /// Requests that were carried out again.
    pub reexecuted: u64,
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
}

impl Device {
    /// A device whose process serves.
    pub fn up(now: Instant) -> Self {
        Self {
            state: State::Up { since: now, heartbeat: Heartbeat::new(now) },
            loss: None,
            back: None,
            reexecuted: 0,
            backoff: Backoff::default(),
            pairs: 1,
            parting: 0,
        }
    }

    /// When something has to be done about it.
    pub fn deadline(&self) -> Option<Instant> {
        match &self.state {
            State::Up { heartbeat, .. } => Some(heartbeat.deadline()),
            State::Ending { overdue } => *overdue,
            State::Draining { drain, .. } => Some(drain.deadline()),
            State::Waiting { until, .. } => *until,
            State::Detaching { deadline } | State::Starting { deadline, .. } | State::Attaching { deadline } => {
                Some(*deadline)
            }
        }
    }

    /// The state in a word.
    pub fn word(&self) -> DeviceState {
        match &self.state {
            State::Up { .. } => DeviceState::Up,
            State::Detaching { .. } => DeviceState::Detaching,
            State::Ending { .. } => DeviceState::Ending,
            State::Draining { .. } => DeviceState::Draining,
            State::Waiting { until: Some(_), .. } => DeviceState::Waiting,
            State::Waiting { until: None, .. } => DeviceState::Away,
            State::Starting { .. } => DeviceState::Starting,
            State::Attaching { .. } => DeviceState::Attaching,
        }
    }
}
