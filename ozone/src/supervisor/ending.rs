//! What an event means for the whole machine: nothing, or its end, and which of several explanations is the best.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use protocol::{Cause, Fault, FromBackend, FromCore};

use super::SupervisorError;
use super::machine::Machine;
use super::processes::{Event, Message};
use crate::exit::Ending;
use crate::process::Process;
use crate::report;

/// How long a better explanation of a backend's end is waited for: when the core dies, its backends see that first.
const SETTLE: Duration = Duration::from_millis(100);

/// How long it is waited for when a backend ended cleanly, which it does only when the core hangs up: the core is dead, or
/// about to say whom it lost. A large guest's memory takes a while to be given back.
const SETTLE_AFTER_HANGUP: Duration = Duration::from_secs(5);

/// How much an ending explains; of several at the same time the one with the least number is told.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    /// The machine's own end, the user's wish, or the core's.
    Whole,
    /// A backend says why it cannot go on.
    BackendSays,
    /// A backend ended without a word.
    BackendDied,
    /// The core has lost a backend, or would if it asked it anything.
    CoreLost,
    /// A backend ended in good order, as each does when the core lets go of it.
    BackendLeft,
}

impl Machine<'_> {
    /// The ending that an event means by itself.
    pub(super) fn meaning(&self, event: Event, may_exit: bool) -> Option<(Rank, Ending)> {
        let process = |place: usize| self.processes.get(place).map(|child| child.process.clone());
        Some(match event {
            Event::Deadline
            | Event::Signal(Signal::SIGWINCH | Signal::SIGPWR)
            | Event::Drained(_)
            | Event::Asked(..)
            | Event::Left(_) => return None,
            // It is part of a restart, and its end follows.
            Event::NotJailed(..) => return None,
            Event::Signal(signal) => (Rank::Whole, Ending::Signal(signal)),
            Event::Message(0, Message::Core(FromCore::Exited(cause))) if may_exit => {
                let ending = match cause {
                    Cause::PowerOff => Ending::PowerOff,
                    Cause::Reset => Ending::Reset,
                    Cause::Panic => Ending::Panic,
                    Cause::TripleFault => Ending::TripleFault,
                };
                (Rank::Whole, ending)
            }
            Event::Message(0, Message::Core(FromCore::Failed(fault))) => (Rank::Whole, failed(fault)),
            Event::Message(0, Message::Core(FromCore::Lost { device, reason })) => {
                match self.setting.spec.devices.iter().find(|known| known.id == device) {
                    Some(known) => {
                        let process = Process::Backend { kind: known.kind(), device };
                        let how = format!("the core lost it: {}", report::harmless(&reason));
                        (Rank::CoreLost, Ending::BackendDied { process, how, death: None })
                    }
                    None => (Rank::Whole, self.unexpected(0, "Lost of an unknown device")),
                }
            }
            Event::Message(_, Message::Backend(FromBackend::Failed(fault))) => (Rank::BackendSays, failed(fault)),
            Event::Message(place, Message::Backend(FromBackend::Leave)) if self.is_on_terminal(place) => {
                (Rank::Whole, Ending::Left)
            }
            Event::Message(place, message) => (Rank::Whole, self.unexpected(place, kind_of(&message))),
            Event::Broken(place, error) => {
                let process = self.processes.name(place);
                (Rank::Whole, SupervisorError::Link { process, error }.into())
            }
            // If it has died, that says more.
            Event::HungUp(place) => {
                let how = String::from("it closed its vhost-user socket");
                (Rank::CoreLost, Ending::BackendDied { process: process(place)?, how, death: None })
            }
            Event::Died(0, death) => (Rank::Whole, Ending::CoreDied(death)),
            Event::Died(place, death) => {
                let rank = if death.is_orderly() { Rank::BackendLeft } else { Rank::BackendDied };
                (rank, Ending::BackendDied { process: process(place)?, how: death.to_string(), death: Some(death) })
            }
        })
    }

    /// The end of the machine, since the process of a device was lost whose loss means that.
    pub(super) fn ends_with(&mut self, place: usize, how: String) -> Ending {
        match self.processes.get(place).map(|child| child.process.clone()) {
            Some(process) => self.settle(Rank::BackendDied, Ending::BackendDied { process, how, death: None }, true),
            None => self.unexpected(place, "a loss"),
        }
    }

    /// Waits a moment for what explains an ending better.
    pub(super) fn settle(&mut self, mut rank: Rank, mut ending: Ending, may_exit: bool) -> Ending {
        let start = Instant::now();
        while rank > Rank::Whole {
            let patience = if rank == Rank::BackendLeft { SETTLE_AFTER_HANGUP } else { SETTLE };
            let event = self.processes.next(Some(start + patience));
            if matches!(event, Event::Deadline) {
                break;
            }
            // The launch goes on for the others; what they say of it explains nothing.
            if matches!(&event, Event::Message(_, message) if is_progress(message)) {
                continue;
            }
            if let Some((other, explained)) = self.meaning(event, may_exit)
                && other < rank
            {
                (rank, ending) = (other, explained);
            }
        }
        ending
    }
}

/// A child's own fault, its text made harmless.
fn failed(fault: Fault) -> Ending {
    Ending::Fault(Fault { kind: fault.kind, message: report::harmless(&fault.message) })
}

/// Whether a message only tells how far the launch is.
fn is_progress(message: &Message) -> bool {
    matches!(
        message,
        Message::Core(
            FromCore::Attached { .. }
                | FromCore::Detached { .. }
                | FromCore::Gone { .. }
                | FromCore::Paused
                | FromCore::Resumed
                | FromCore::Running
                | FromCore::Trace(_)
        ) | Message::Backend(
            FromBackend::Ready
                | FromBackend::Resized
                | FromBackend::Alive { .. }
                | FromBackend::Resubmitted { .. }
                | FromBackend::Pairs { .. }
                | FromBackend::Violated { .. }
                | FromBackend::Trace(_)
        )
    )
}

/// The name of a message.
pub fn kind_of(message: &Message) -> &'static str {
    match message {
        Message::Core(FromCore::Attached { .. }) => "Attached",
        Message::Core(FromCore::Detached { .. }) => "Detached",
        Message::Core(FromCore::Gone { .. }) => "Gone",
        Message::Core(FromCore::Paused) => "Paused",
        Message::Core(FromCore::Resumed) => "Resumed",
        Message::Core(FromCore::Running) => "Running",
        Message::Core(FromCore::Lost { .. }) => "Lost",
        Message::Core(FromCore::Exited(_)) => "Exited",
        Message::Core(FromCore::Failed(_)) => "Failed",
        Message::Core(FromCore::Trace(_)) | Message::Backend(FromBackend::Trace(_)) => "Trace",
        Message::Backend(FromBackend::Ready) => "Ready",
        Message::Backend(FromBackend::Failed(_)) => "Failed",
        Message::Backend(FromBackend::Leave) => "Leave",
        Message::Backend(FromBackend::Resized) => "Resized",
        Message::Backend(FromBackend::Alive { .. }) => "Alive",
        Message::Backend(FromBackend::Resubmitted { .. }) => "Resubmitted",
        Message::Backend(FromBackend::Pairs { .. }) => "Pairs",
        Message::Backend(FromBackend::Violated { .. }) => "Violated",
    }
}
