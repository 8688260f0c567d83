//! What is asked of a device's backend, and when: one attendant thread per device.
//!
//! A backend that never answers holds up this thread alone, until the main thread hangs up ([`super::conversation`]).
//! When a conversation is lost the guest notices nothing: its kicks gather in their descriptors, what the driver set up is
//! kept, and the next incarnation is told it anew ([`super::replay`]).

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

use protocol::Fault;
use protocol::log::Rare;
use protocol::trace::Point;

use super::device::{Activation, Device, Offer};
use super::handshake::{self, Greeting};
use super::incarnation::{BackendError, Incarnation};
use super::replay::{ReplayError, Setup};
use super::signals::QueueEvents;
use crate::event::{Event, Events};
use crate::memory::Memory;
use crate::trace::Tracer;

/// What an attendant is asked to do.
#[derive(Debug)]
pub enum Command {
    /// Greet the backend behind this socket. Nothing of an earlier one is under way any more.
    Attach(OwnedFd),
    /// Stop the queues and let go of the backend in good order.
    Detach,
    /// The backend has ended; what it began may be under way still.
    Dead,
    /// The backend has ended, and nothing of it is under way any more.
    Gone,
    /// Have the driver reset the device; what was in flight is not carried out again.
    Break,
    /// The driver is ready: start the queues.
    Start(Activation),
    /// The driver reset the device: stop the queues, then answer.
    Stop(Sender<()>),
    /// The machine is paused: stop the queues, and start none before [`Command::Resume`].
    Pause,
    /// The pause is over.
    Resume,
    /// The configuration space is another now.
    ReadConfig,
}

/// Connects the signals of the queue with this number to the machine.
pub type Wire = Box<dyn Fn(usize, &QueueEvents) -> Result<(), Fault> + Send>;

/// Takes from the calling thread what only the first backend's signals need. It is called once.
pub type Confine = Box<dyn FnOnce() -> Result<(), Fault> + Send>;

/// How it stands with the device's backend.
enum Backend {
    /// There is none, and nothing of an earlier one is under way.
    Away,
    /// It answers.
    Here(Incarnation),
    /// It is not spoken to any more, but may still be at work in guest memory: no reset is answered before it is gone.
    Lost,
}

/// The thread's state.
pub struct Attendant {
    device: Arc<Device>,
    memory: Memory,
    wire: Wire,
    /// Until the first backend is attached.
    confine: Option<Confine>,
    events: Events,
    tracer: Tracer,
    backend: Backend,
    /// From DRIVER_OK to the reset of the device.
    setup: Option<Setup>,
    paused: bool,
    /// Resets that wait for queues which did not stop: nobody may answer them before the backend is gone.
    unstopped: Vec<Sender<()>>,
    /// Whether a pause waits likewise.
    pausing: bool,
    breaks: Rare,
}

impl Attendant {
    /// An attendant without a backend.
    pub fn new(
        device: Arc<Device>,
        memory: Memory,
        wire: Wire,
        confine: Confine,
        events: Events,
        tracer: Tracer,
    ) -> Self {
        Self {
            device,
            memory,
            wire,
            confine: Some(confine),
            events,
            tracer,
            backend: Backend::Away,
            setup: None,
            paused: false,
            unstopped: Vec::new(),
            pausing: false,
            breaks: Rare::default(),
        }
    }

    /// Serves commands until the device is gone.
    pub fn serve(mut self, commands: &Receiver<Command>) {
        for command in commands {
            if let Err(error) = self.obey(command) {
                self.lose(error);
            }
            self.device.done();
        }
    }

    fn obey(&mut self, command: Command) -> Result<(), BackendError> {
        match command {
            Command::Attach(socket) => {
                self.gone();
                let start = self.tracer.now();
                self.attach(socket)?;
                // No vCPU runs before every device has been attached.
                self.confine.take().map_or(Ok(()), |confine| confine()).map_err(BackendError::Host)?;
                self.tracer.done(start, || Point::Handshake(self.device.id.clone()));
                self.tell(Event::Attached(self.device.id.clone()));
            }
            Command::Detach => {
                self.stop()?;
                // For one that was lost, that has been the answer.
                if !matches!(self.backend, Backend::Lost) {
                    self.gone();
                    self.tell(Event::Detached(self.device.id.clone()));
                }
            }
            Command::Dead => self.let_go(),
            Command::Gone => {
                self.gone();
                self.tell(Event::Gone(self.device.id.clone()));
            }
            Command::Break => {
                self.setup = None;
                self.device.fail();
                self.stop()?;
            }
            Command::Start(activation) => {
                self.setup = Some(Setup::new(activation));
                self.hand_over()?;
            }
            Command::Stop(stopped) => {
                self.setup = None;
                let outcome = self.stop();
                if matches!((&outcome, &self.backend), (Ok(()), Backend::Away | Backend::Here(_))) {
                    let _ = stopped.send(());
                } else {
                    self.unstopped.push(stopped);
                }
                outcome?;
            }
            Command::Pause => {
                self.paused = true;
                if let Err(error) = self.stop() {
                    self.lose(error);
                }
                // What a lost one has begun may reach guest memory as long as it is not gone.
                self.pausing = matches!(self.backend, Backend::Lost);
                if !self.pausing {
                    self.tell(Event::QueuesDone);
                }
            }
            Command::Resume => {
                self.paused = false;
                if let Err(error) = self.hand_over() {
                    self.lose(error);
                }
                self.tell(Event::QueuesDone);
            }
            Command::ReadConfig => {
                // One that is attached later is asked then.
                if let Backend::Here(incarnation) = &mut self.backend {
                    self.device.change_config(incarnation.config(self.device.kind)?);
                }
            }
        }
        Ok(())
    }

    /// Greets a backend and, if the driver is ready, has it go on where an earlier one ended.
    fn attach(&mut self, socket: OwnedFd) -> Result<(), BackendError> {
        let socket = UnixStream::from(socket);
        self.device.conversation().over(socket.try_clone()?);
        let Greeting { incarnation, queues, config } = handshake::greet(socket, self.device.kind)?;
        self.accept(incarnation.features, queues)?;
        if let Some(setup) = &self.setup {
            setup.check(&incarnation, self.device.kind)?;
        }
        self.device.change_config(config);
        self.backend = Backend::Here(incarnation);
        self.hand_over()
    }

    /// Takes the first incarnation's offer for the device's. A later one may offer less than the guest was shown, as long as
    /// it offers what the driver accepted.
    fn accept(&self, features: u64, queues: usize) -> Result<(), BackendError> {
        if let Some(offer) = self.device.offer.get() {
            if offer.queues.len() > queues {
                return Err(BackendError::Absurd(format!("{queues} queues and had {} before", offer.queues.len())));
            }
            return Ok(());
        }
        let events = QueueEvents::of_device(queues)?;
        for (queue, signals) in events.iter().enumerate() {
            (self.wire)(queue, signals).map_err(BackendError::Host)?;
        }
        let offer = Offer { features, queues: events };
        self.device.offer.set(offer).map_err(|_| BackendError::Absurd(String::from("two offers at once")))
    }

    /// Starts the queues, if there is a backend and a driver and the machine is not paused.
    fn hand_over(&mut self) -> Result<(), BackendError> {
        if self.paused {
            return Ok(());
        }
        let (Backend::Here(incarnation), Some(setup), Some(offer)) =
            (&mut self.backend, &mut self.setup, self.device.offer.get())
        else {
            return Ok(());
        };
        setup.check(incarnation, self.device.kind)?;
        let reason = match setup.hand_over(incarnation, &self.memory, &offer.queues) {
            Ok(()) => return Ok(()),
            Err(ReplayError::Backend(error)) => return Err(error),
            Err(ReplayError::Driver(misplaced)) => misplaced.to_string(),
            Err(ReplayError::Record(error)) => format!("what an earlier backend left in flight is of no use: {error}"),
        };
        if let Some(times) = self.breaks.again() {
            log::warn!("{}: it needs a reset: {reason} ({times} times)", self.device.id);
        }
        // Until its next DRIVER_OK there is nothing to start.
        self.setup = None;
        self.device.fail();
        Ok(())
    }

    fn stop(&mut self) -> Result<(), BackendError> {
        match &mut self.backend {
            Backend::Here(incarnation) => {
                self.device.conversation().stops_queues();
                incarnation.stop()
            }
            Backend::Away | Backend::Lost => Ok(()),
        }
    }

    /// Nothing of any backend is under way: neither resets nor a pause need wait for one.
    fn gone(&mut self) {
        self.backend = Backend::Away;
        self.device.conversation().close();
        for stopped in self.unstopped.drain(..) {
            let _ = stopped.send(());
        }
        if std::mem::take(&mut self.pausing) {
            self.tell(Event::QueuesDone);
        }
    }

    /// Ends the conversation with a backend that may still be at work in guest memory. Nothing of the socket stays open, nor
    /// of what lies in it unread.
    fn let_go(&mut self) {
        if matches!(self.backend, Backend::Here(_)) {
            self.backend = Backend::Lost;
        }
        self.device.conversation().close();
    }

    /// The conversation has failed: it has no known position any more, and ends.
    fn lose(&mut self, error: BackendError) {
        self.backend = Backend::Lost;
        self.let_go();
        let (overdue, patience) = {
            let conversation = self.device.conversation();
            (conversation.is_overdue(), conversation.patience().as_secs())
        };
        let id = self.device.id.clone();
        self.tell(match error {
            BackendError::Host(fault) => Event::Failed(fault),
            error if overdue => Event::Lost(id, format!("it did not answer within {patience} s: {error}")),
            error => Event::Lost(id, error.to_string()),
        });
    }

    fn tell(&self, event: Event) {
        // A receiver that is gone means that the machine is ending.
        let _ = self.events.send(event);
    }
}

#[cfg(test)]
mod tests;
