//! The thread that serves one virtqueue.
//!
//! It exists before the run filter is installed, since nothing can start a thread afterwards, and waits until it is given
//! a ring. Stopping is a round trip: when [`Worker::stop`] returns, the thread no longer touches guest memory.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use protocol::{Fault, FromBackend};

use crate::descriptor::{Call, Wake};
use crate::device::{Next, QueueHandler};
use crate::heartbeat::{Pulse, Watched};
use crate::outbox::Outbox;
use crate::ring::{Ring, RingError};
use crate::threads;
use protocol::log::Rare;

/// How long a stop waits before it looks whether the thread hangs in a call.
const PATIENCE: Duration = Duration::from_millis(100);

/// What a wake-up is for. Sources of the handler follow.
const STOP: u64 = 0;
const KICK: u64 = 1;
const NUDGE: u64 = 2;
const SOURCES: u64 = 3;

/// A ring to be served, and the descriptors that go with it.
#[derive(Debug)]
pub struct Job {
    /// The ring.
    pub ring: Ring,
    /// What the driver kicks.
    pub kick: Arc<File>,
    /// What tells the core that the driver broke the rules (VHOST_USER_SET_VRING_ERR).
    pub error: Option<Arc<Call>>,
    /// What the driver accepted.
    pub features: u64,
}

/// A queue's thread, seen from outside.
pub struct Worker {
    jobs: Sender<Job>,
    stopped: Receiver<u16>,
    stop: Arc<Wake>,
    /// What the thread may be hanging in while a ring runs.
    calls: Vec<Arc<Call>>,
    running: bool,
    violations: Arc<AtomicU64>,
    pulse: Arc<Pulse>,
    nudge: Arc<Wake>,
}

struct Thread {
    name: String,
    /// The queue's number.
    queue: u16,
    outbox: Outbox,
    handler: Box<dyn QueueHandler>,
    epoll: Epoll,
    stop: Arc<Wake>,
    violations: Arc<AtomicU64>,
    reported: Rare,
    pulse: Arc<Pulse>,
    nudge: Arc<Wake>,
}

impl Worker {
    /// Starts the thread of the queue with this number, which tells `outbox` when the driver breaks the queue's rules.
    ///
    /// # Errors
    /// A host that lacks threads or descriptors.
    pub fn spawn(queue: u16, handler: Box<dyn QueueHandler>, outbox: Outbox) -> Result<Self, Fault> {
        let name = format!("queue-{queue}");
        let fault = |errno| Fault::host(format!("prepare {name}: {errno}"));
        let stop = Arc::new(Wake::new().map_err(fault)?);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(fault)?;
        epoll.add(stop.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, STOP)).map_err(fault)?;
        let nudge = Arc::new(Wake::new().map_err(fault)?);
        epoll.add(nudge.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, NUDGE)).map_err(fault)?;
        for (index, source) in (SOURCES..).zip(handler.sources()) {
            let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, index);
            epoll.add(source, event).map_err(fault)?;
        }
        let violations = Arc::new(AtomicU64::new(0));
        let pulse = handler.pulse();
        // Until it has a ring, it waits for one.
        pulse.rest(true);
        let (jobs, incoming) = channel();
        let (outgoing, stopped) = channel();
        let mut thread = Thread {
            name: name.clone(),
            queue,
            outbox,
            handler,
            epoll,
            stop: Arc::clone(&stop),
            violations: Arc::clone(&violations),
            reported: Rare::default(),
            pulse: Arc::clone(&pulse),
            nudge: Arc::clone(&nudge),
        };
        let body = move || {
            while let Ok(job) = incoming.recv() {
                thread.pulse.rest(false);
                let next_available = thread.serve(job);
                thread.pulse.rest(true);
                if outgoing.send(next_available).is_err() {
                    break;
                }
            }
        };
        threads::start(&name, body)?;
        Ok(Self { jobs, stopped, stop, calls: Vec::new(), running: false, violations, pulse, nudge })
    }

    /// Serves `job`; a ring that runs is stopped first.
    pub fn start(&mut self, job: Job, call: Option<Arc<Call>>) {
        let _ = self.stop();
        self.calls = call.into_iter().chain(job.error.clone()).collect();
        self.running = self.jobs.send(job).is_ok();
    }

    /// Stops the ring and returns the index of its next available entry; `None` if none runs.
    ///
    /// It waits for the requests in flight, as long as the host takes for them.
    pub fn stop(&mut self) -> Option<u16> {
        if !self.running {
            return None;
        }
        self.running = false;
        self.stop.raise();
        loop {
            match self.stopped.recv_timeout(PATIENCE) {
                Ok(next_available) => return Some(next_available),
                Err(RecvTimeoutError::Disconnected) => return None,
                // The core may have filled a call's counter up, which would hold the thread for ever.
                Err(RecvTimeoutError::Timeout) => self.calls.iter().for_each(|call| call.release()),
            }
        }
    }

    /// What tells whether the thread goes round.
    pub(crate) fn watched(&self) -> Watched {
        Watched { pulse: Arc::clone(&self.pulse), nudge: Arc::clone(&self.nudge) }
    }

    /// How often a ring was given up for a violation of its rules.
    pub fn violations(&self) -> u64 {
        self.violations.load(Ordering::Relaxed)
    }
}

impl Thread {
    fn serve(&mut self, mut job: Job) -> u16 {
        // Edge-triggered, a kick needs no reading: see the module `descriptor`.
        let kick = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, KICK);
        let watched = self.epoll.add(job.kick.as_fd(), kick);
        if let Err(errno) = watched {
            log::error!("{}: the kick descriptor cannot be watched: {errno}", self.name);
            self.stop.lower();
            return job.ring.next_available();
        }
        self.handler.start(job.features);
        let outcome = self.work(&mut job.ring);
        // The open file description lives on in the core, and with it the registration, if it is not taken back.
        let _ = self.epoll.delete(job.kick.as_fd());
        if let Err(error) = outcome {
            self.violations.fetch_add(1, Ordering::Relaxed);
            if let Some(count) = self.reported.again() {
                let name = &self.name;
                log::error!("{name}: violation {count}, the queue is given up until a reset: {error}");
            }
            // Once for each start of the ring, which the driver cannot have without a reset of the device.
            self.outbox.send(FromBackend::Violated { queue: self.queue });
            if let Some(call) = &job.error {
                call.signal();
            }
            // There is nothing to go round for until the stop.
            self.pulse.rest(true);
            self.stop.lower();
            self.pulse.rest(false);
        }
        if let Err(error) = self.handler.stop(&mut job.ring) {
            log::warn!("{}: stopping: {error}", self.name);
        }
        job.ring.next_available()
    }

    /// Serves the ring until it is stopped or breaks the rules.
    fn work(&mut self, ring: &mut Ring) -> Result<(), RingError> {
        ring.check()?;
        let mut events = [EpollEvent::empty(); 8];
        loop {
            let timeout = match self.handler.run(ring)? {
                Next::Again => EpollTimeout::ZERO,
                Next::Wait => EpollTimeout::NONE,
            };
            let count = match self.epoll.wait(&mut events, timeout) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(errno) => {
                    log::error!("{}: wait for events: {errno}", self.name);
                    self.stop.lower();
                    return Ok(());
                }
            };
            self.pulse.beat();
            for event in events.iter().take(count) {
                match event.data() {
                    STOP => {
                        self.stop.lower();
                        return Ok(());
                    }
                    KICK => {}
                    NUDGE => self.nudge.lower(),
                    source => self.handler.ready(usize::try_from(source.saturating_sub(SOURCES)).unwrap_or(0)),
                }
            }
        }
    }
}
