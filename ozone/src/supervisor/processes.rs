//! The children of one incarnation of a machine, and the one loop that waits for any of them.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use protocol::{Channel, FromBackend, FromCore, LinkError, ToBackend, ToCore};

use super::Setting;
use super::log_pipe::LogPipe;
use super::signals::Signals;
use crate::control::message::{Answer, Request};
use crate::control::server::{ClientId, Heard, Server};
use crate::exit::Death;
use crate::jail::{JailError, Jailed, Progress};
use crate::notify::Notify;
use crate::process::Process;
use crate::report::{self, Room};
use crate::trace::Trace;

/// How long a child that has closed its channel may take to end.
const CLOSED_PATIENCE: Duration = Duration::from_secs(2);

/// How many messages of one child are taken at a look.
const MESSAGES: usize = 32;

/// ozone's end of a child's control channel.
#[derive(Debug)]
pub enum Link {
    /// The core's.
    Core(Channel<ToCore, FromCore>),
    /// A backend's.
    Backend(Channel<ToBackend, FromBackend>),
}

/// A message from a child.
#[derive(Debug)]
pub enum Message {
    /// From the core.
    Core(FromCore),
    /// From a backend.
    Backend(FromBackend),
}

impl Link {
    fn receive(&self) -> Result<Message, LinkError> {
        match self {
            Self::Core(channel) => channel.try_receive().map(Message::Core),
            Self::Backend(channel) => channel.try_receive().map(Message::Backend),
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        match self {
            Self::Core(channel) => channel.as_fd(),
            Self::Backend(channel) => channel.as_fd(),
        }
    }
}

/// One child.
#[derive(Debug)]
pub struct Child {
    /// Its name.
    pub process: Process,
    jailed: Jailed,
    /// How far it is with its jail; `None` once it runs its executable.
    progress: Option<Progress>,
    /// Reads as closed when all that the process began has ended.
    sentinel: Option<OwnedFd>,
    /// The core's end of its vhost-user socket, to see it hung up.
    peer: Option<OwnedFd>,
    /// `None` once either side has closed it.
    link: Option<Link>,
    log: LogPipe,
    /// When the other side closed the link.
    closed: Option<Instant>,
    /// How it ended, once that has been told.
    ended: bool,
}

impl Child {
    /// Puts the parts of a child together.
    pub fn new(process: Process, jailed: Jailed, link: Link, log: LogPipe) -> Self {
        let (link, closed) = (Some(link), None);
        Self { process, jailed, progress: None, sentinel: None, peer: None, link, log, closed, ended: false }
    }

    /// A child on its way through its jail.
    pub fn entering(process: Process, (jailed, progress): (Jailed, Progress), link: Link, log: LogPipe) -> Self {
        Self { progress: Some(progress), ..Self::new(process, jailed, link, log) }
    }

    /// The process id, while it is there.
    pub fn pid(&self) -> Option<i32> {
        (!self.ended).then(|| self.jailed.pid().as_raw())
    }

    /// Adds its way through the jail to a trace.
    pub fn trace(&self, trace: &Trace) {
        trace.jailed(self.jailed.pid(), &self.process, self.jailed.steps());
    }
}

/// Something that happened. Children are named by their place: 0 is the core.
#[derive(Debug)]
pub enum Event {
    /// A signal to `ozone`.
    Signal(Signal),
    /// A child says something.
    Message(usize, Message),
    /// A child's channel is of no use any more, though the child lives.
    Broken(usize, LinkError),
    /// A child failed at a step of its jail. Its end follows.
    NotJailed(usize, JailError),
    /// A child has ended. All that it had said has been told before.
    Died(usize, Death),
    /// A child has closed its vhost-user socket, though it lives.
    HungUp(usize),
    /// All that a child which has ended had begun has ended too.
    Drained(usize),
    /// Someone outside asks for something.
    Asked(ClientId, Request),
    /// Someone outside does not wait for the answer any more.
    Left(ClientId),
    /// Nothing until the deadline.
    Deadline,
}

/// The children of one incarnation. Dropping them ends them, without grace.
#[derive(Debug)]
pub struct Processes<'a> {
    children: Vec<Child>,
    signals: &'a Signals,
    server: Option<&'a Server>,
    notify: &'a Notify,
    pending: VecDeque<Event>,
}

/// What a polled descriptor belongs to.
#[derive(Clone, Copy)]
enum Source {
    Signals,
    Log(usize),
    Link(usize),
    Jail(usize),
    Process(usize),
    Sentinel(usize),
    Peer(usize),
    Listener,
    Client(ClientId),
    Report,
}

impl<'a> Processes<'a> {
    /// The children, the core first.
    pub fn new(children: Vec<Child>, setting: Setting<'a>) -> Self {
        let Setting { signals, server, notify, .. } = setting;
        Self { children, signals, server, notify, pending: VecDeque::new() }
    }

    /// Puts another child in the place of one that has ended.
    pub fn replace(&mut self, place: usize, mut child: Child) {
        if let Some(old) = self.children.get_mut(place) {
            old.log.finish(&old.process, old.jailed.pid());
            child.log.succeed(&old.log);
            *old = child;
        }
    }

    /// Whether nothing has happened that has not been told.
    pub fn is_idle(&self) -> bool {
        self.pending.is_empty()
    }

    /// Gives a child that which tells when all it began has ended.
    pub fn set_sentinel(&mut self, place: usize, sentinel: Option<OwnedFd>) {
        if let Some(child) = self.children.get_mut(place) {
            child.sentinel = sentinel;
        }
    }

    /// Watches over the vhost-user socket of a child, of which this is the other end.
    pub fn set_peer(&mut self, place: usize, peer: OwnedFd) {
        if let Some(child) = self.children.get_mut(place) {
            child.peer = Some(peer);
        }
    }

    /// Whether a child can be sent anything.
    pub fn is_linked(&self, place: usize) -> bool {
        self.get(place).is_some_and(|child| child.link.is_some())
    }

    /// Closes the channel of a child, which ends then in good order, if it does.
    pub fn dismiss(&mut self, place: usize) {
        if let Some(child) = self.children.get_mut(place) {
            (child.link, child.closed, child.peer) = (None, None, None);
        }
    }

    /// Whether a child that has ended has nothing under way any more.
    pub fn is_drained(&self, place: usize) -> bool {
        self.get(place).is_none_or(|child| child.ended && child.sentinel.is_none())
    }

    /// Ends a child, of which nothing but its end is told any more. Returns what it had said and nobody had heard.
    pub fn kill(&mut self, place: usize) -> Vec<Message> {
        let mut unheard = Vec::new();
        let events = std::mem::take(&mut self.pending);
        for event in events {
            match event {
                Event::Message(at, message) if at == place => unheard.push(message),
                Event::Broken(at, _) | Event::NotJailed(at, _) | Event::HungUp(at) if at == place => {}
                other => self.pending.push_back(other),
            }
        }
        if let Some(child) = self.children.get_mut(place) {
            let link = child.link.take();
            let words = link.iter().flat_map(|link| std::iter::from_fn(|| link.receive().ok()));
            unheard.extend(words.take(MESSAGES));
            (child.closed, child.progress, child.peer) = (None, None, None);
            child.jailed.kill();
        }
        unheard
    }

    /// Answers a client and lets it go.
    pub fn answer(&self, client: ClientId, answer: &Answer) {
        if let Some(server) = self.server {
            server.answer(client, answer);
        }
    }

    /// The child at a place.
    pub fn get(&self, place: usize) -> Option<&Child> {
        self.children.get(place)
    }

    /// The name of the child at a place.
    pub fn name(&self, place: usize) -> String {
        self.get(place).map_or_else(|| "an unknown child".to_owned(), |child| child.process.to_string())
    }

    /// Sends to the core, without waiting for room.
    ///
    /// # Errors
    /// See [`Channel::try_send`]. A core that has gone is no error: its end is told as an event.
    pub fn send_core(&self, message: &ToCore) -> Result<(), LinkError> {
        match self.get(0).and_then(|child| child.link.as_ref()) {
            Some(Link::Core(channel)) => gone_is_fine(channel.try_send(message)),
            _ => Ok(()),
        }
    }

    /// Sends to a backend, without waiting for room.
    ///
    /// # Errors
    /// See [`Channel::try_send`]. A backend that has gone is no error: its end is told as an event.
    pub fn send_backend(&self, place: usize, message: &ToBackend) -> Result<(), LinkError> {
        match self.get(place).and_then(|child| child.link.as_ref()) {
            Some(Link::Backend(channel)) => gone_is_fine(channel.try_send(message)),
            _ => Ok(()),
        }
    }

    /// The next thing that happens until `deadline`.
    pub fn next(&mut self, deadline: Option<Instant>) -> Event {
        loop {
            if let Some(event) = self.pending.pop_front() {
                return event;
            }
            self.look(deadline);
            if self.pending.is_empty() && deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Event::Deadline;
            }
        }
    }

    /// Waits once for anything and queues what it means.
    fn look(&mut self, deadline: Option<Instant>) {
        let now = Instant::now();
        let mut wake = deadline;
        let mut wake_at = |at: Instant| wake = Some(wake.map_or(at, |wake: Instant| wake.min(at)));
        self.notify.tick(now);
        self.notify.deadline().into_iter().for_each(&mut wake_at);
        let stderr = std::io::stderr();
        let mut sources = vec![Source::Signals];
        let mut fds = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        match report::room(now) {
            Room::Needed => {
                sources.push(Source::Report);
                fds.push(PollFd::new(stderr.as_fd(), PollFlags::POLLOUT));
            }
            Room::NeededAt(until) => wake_at(until),
            Room::NotNeeded => {}
        }
        let clients = self.server.map(Server::clients);
        if let Some(listener) = self.server.and_then(Server::listener) {
            sources.push(Source::Listener);
            fds.push(PollFd::new(listener, PollFlags::POLLIN));
        }
        for client in clients.iter().flat_map(|clients| clients.iter()) {
            sources.push(Source::Client(client.id()));
            fds.push(PollFd::new(client.as_fd(), PollFlags::POLLIN));
        }
        for (place, child) in self.children.iter().enumerate() {
            let mut watch_for = |source, fd, flags| {
                sources.push(source);
                fds.push(PollFd::new(fd, flags));
            };
            let mut watch = |source, fd| watch_for(source, fd, PollFlags::POLLIN);
            if child.log.is_open() {
                match child.log.rests_until(now) {
                    Some(until) => wake_at(until),
                    None => watch(Source::Log(place), child.log.as_fd()),
                }
            }
            if let Some(link) = &child.link {
                watch(Source::Link(place), link.as_fd());
            }
            if let Some(progress) = &child.progress {
                watch(Source::Jail(place), progress.as_fd());
            }
            if let Some(peer) = &child.peer {
                watch_for(Source::Peer(place), peer.as_fd(), PollFlags::empty());
            }
            let mut watch = |source, fd| watch_for(source, fd, PollFlags::POLLIN);
            if !child.ended {
                watch(Source::Process(place), child.jailed.as_fd());
            } else if let Some(sentinel) = &child.sentinel {
                // Its end alone, which is always told: a backend may write into its end of the pipe.
                watch_for(Source::Sentinel(place), sentinel.as_fd(), PollFlags::empty());
            }
            if let Some(closed) = child.closed {
                wake_at(closed + CLOSED_PATIENCE);
            }
        }
        // Rounded up: a millisecond too early would be a busy loop until the deadline.
        let timeout = wake.map_or(PollTimeout::NONE, |wake| {
            let left = wake.saturating_duration_since(now) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        if poll(&mut fds, timeout).is_err() {
            return;
        }
        let ready = fds.iter().map(|fd| fd.any().unwrap_or(true));
        let ready: Vec<Source> = sources.into_iter().zip(ready).filter(|(_, ready)| *ready).map(|(it, _)| it).collect();
        drop(fds);
        drop(clients);
        let mut logs = Vec::new();
        for source in ready {
            match source {
                Source::Signals => self.pending.extend(self.signals.next().map(Event::Signal)),
                Source::Log(place) => logs.push(place),
                Source::Link(place) => self.receive(place),
                Source::Jail(place) => self.entered(place),
                Source::Process(place) => self.ended(place),
                Source::Sentinel(place) => {
                    if let Some(child) = self.children.get_mut(place) {
                        child.sentinel = None;
                        self.pending.push_back(Event::Drained(place));
                    }
                }
                Source::Peer(place) => {
                    if let Some(child) = self.children.get_mut(place) {
                        child.peer = None;
                        self.pending.push_back(Event::HungUp(place));
                    }
                }
                Source::Report => report::settle(),
                Source::Listener => self.server.into_iter().for_each(Server::accept),
                Source::Client(client) => {
                    self.pending.extend(match self.server.map(|server| server.receive(client)) {
                        Some(Heard::Request(request)) => Some(Event::Asked(client, request)),
                        Some(Heard::End) => Some(Event::Left(client)),
                        Some(Heard::Nothing) | None => None,
                    });
                }
            }
        }
        self.give_up_on_closed();
        // Lines wait for the next look when something has happened: if that was the end, they are told as such.
        if self.pending.is_empty() {
            for place in logs {
                if let Some(child) = self.children.get_mut(place) {
                    child.log.pump(&child.process, child.jailed.pid());
                }
            }
        }
    }

    /// Queues the messages that are there.
    fn receive(&mut self, place: usize) {
        let Some(child) = self.children.get_mut(place) else { return };
        for _ in 0..MESSAGES {
            let Some(link) = &child.link else { return };
            match link.receive() {
                Ok(message) => self.pending.push_back(Event::Message(place, message)),
                Err(LinkError::WouldBlock) => return,
                Err(LinkError::Closed) => {
                    child.link = None;
                    child.closed = (!child.ended).then(Instant::now);
                }
                Err(error) => {
                    child.link = None;
                    self.pending.push_back(Event::Broken(place, error));
                }
            }
        }
    }

    /// Queues the failure of a step of a child's jail.
    fn entered(&mut self, place: usize) {
        let Some(child) = self.children.get_mut(place) else { return };
        let Some(outcome) = child.progress.as_mut().and_then(Progress::look) else { return };
        child.progress = None;
        if let Err(error) = outcome {
            self.pending.push_back(Event::NotJailed(place, error));
        }
    }

    /// Queues the end of a child, after its last words.
    fn ended(&mut self, place: usize) {
        self.receive(place);
        let Some(child) = self.children.get_mut(place) else { return };
        child.log.pump(&child.process, child.jailed.pid());
        if let Some(status) = child.jailed.reap(Instant::now()) {
            child.ended = true;
            (child.closed, child.peer) = (None, None);
            let death = Death { status, reported: child.log.reported() };
            self.pending.push_back(Event::Died(place, death));
        }
    }

    fn give_up_on_closed(&mut self) {
        for (place, child) in self.children.iter_mut().enumerate() {
            if child.closed.is_some_and(|closed| closed.elapsed() >= CLOSED_PATIENCE) {
                child.closed = None;
                self.pending.push_back(Event::Broken(place, LinkError::Closed));
            }
        }
    }

    /// Ends every child and waits for it. The children at `graced` first get until `grace` from now to end by themselves,
    /// one after the other, with their channels closed.
    pub fn end(&mut self, graced: &[usize], grace: Duration) {
        self.pending.clear();
        for (place, child) in self.children.iter_mut().enumerate() {
            child.link = None;
            child.log.quiet();
            if !graced.contains(&place) {
                child.jailed.kill();
            }
        }
        let deadline = Instant::now() + grace;
        for place in graced {
            while let Some(child) = self.children.get_mut(*place) {
                child.log.pump(&child.process, child.jailed.pid());
                let step = Instant::now() + Duration::from_millis(20);
                if child.jailed.reap(step.min(deadline)).is_some() || Instant::now() >= deadline {
                    break;
                }
            }
        }
        for child in &self.children {
            child.jailed.kill();
        }
        let deadline = Instant::now() + Duration::from_secs(5);
        for child in &mut self.children {
            if child.jailed.reap(deadline).is_none() {
                report::warn(&format!(
                    "{} (process {}) does not end, though killed",
                    child.process,
                    child.jailed.pid()
                ));
            }
            child.log.finish(&child.process, child.jailed.pid());
        }
        self.children.clear();
    }
}

impl Drop for Processes<'_> {
    fn drop(&mut self) {
        // Nothing when they have been ended already.
        self.end(&[], Duration::ZERO);
    }
}

/// The end of a child is told by its pidfd, with the reason; that a message no longer reaches it says less.
fn gone_is_fine(result: Result<(), LinkError>) -> Result<(), LinkError> {
    match result {
        Err(LinkError::Closed) => Ok(()),
        other => other,
    }
}
