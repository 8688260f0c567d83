//! What the machine's processes say while it runs, and what each of them means by it.

use std::time::Instant;

use protocol::{DeviceKind, FromBackend, FromCore, ToCore};

use super::device::{CORE_PATIENCE, Device, State};
use super::ending::kind_of;
use super::machine::Machine;
use super::processes::{Event, Message};
use crate::control::message::MachineState;
use crate::exit::Ending;
use crate::report;
use crate::spec::policy::OnFail;

impl Machine<'_> {
    /// Goes on with one event while the machine runs.
    pub(super) fn handle(&mut self, event: Event) -> Result<(), Ending> {
        if let Event::Message(place, _) = &event
            && !self.hears(*place)
        {
            return match place {
                0 => Err(self.unexpected(0, "a flood of messages")),
                place => self.lose(*place, String::from("it floods its control channel")),
            };
        }
        if self.is_fatal(&event) {
            return self.other(event, true);
        }
        match event {
            Event::Message(0, Message::Core(message)) => self.core_says(message),
            Event::Message(place, Message::Backend(message)) => self.backend_says(place, message),
            Event::NotJailed(place, error) => self.lose(place, error.to_string()),
            Event::Broken(place, error) if place > 0 => self.lose(place, error.to_string()),
            Event::Died(place, death) if place > 0 => self.died(place, death),
            Event::HungUp(place) => {
                self.hung_up(place);
                Ok(())
            }
            Event::Drained(place) => self.look_at_drain(place),
            Event::Left(client) => {
                self.forget_wait(client);
                Ok(())
            }
            Event::Asked(client, request) => self.asked(client, request),
            event => self.other(event, true),
        }
    }

    /// Whether this is the first news of a loss that ends the machine.
    fn is_fatal(&self, event: &Event) -> bool {
        let (place, is_loss) = match event {
            Event::Message(0, Message::Core(FromCore::Lost { device, .. })) => {
                (self.index_of(device).map_or(0, |index| index + 1), true)
            }
            Event::Message(place, Message::Backend(FromBackend::Failed(_))) => (*place, true),
            Event::Broken(place, _) | Event::Died(place, _) => (*place, true),
            _ => (0, false),
        };
        let policy = |index: usize| self.setting.spec.devices.get(index).map(|device| device.policy.on_fail);
        let index = place.wrapping_sub(1);
        is_loss
            && policy(index) == Some(OnFail::StopVm)
            && self.devices.get(index).is_some_and(|device| device.loss.is_none())
    }

    fn core_says(&mut self, message: FromCore) -> Result<(), Ending> {
        match message {
            FromCore::Attached { device } => {
                let index = self.index_of(&device);
                let attaching = |device: &&mut Device| matches!(device.state, State::Attaching { .. });
                match index.and_then(|index| self.devices.get_mut(index)).filter(attaching) {
                    Some(_) => self.attached(index.map_or(0, |index| index + 1)),
                    // It was given up in the meantime.
                    None if index.is_some() => Ok(()),
                    None => Err(self.unexpected(0, "Attached of an unknown device")),
                }
            }
            FromCore::Detached { device } => self.detached(&device),
            FromCore::Gone { device } => self.parted(&device),
            FromCore::Lost { device, reason } => match self.index_of(&device) {
                Some(index) => {
                    let serves = self.devices.get(index).is_some_and(|device| {
                        matches!(device.state, State::Up { .. } | State::Detaching { .. } | State::Attaching { .. })
                    });
                    let cause = format!("the core lost it: {}", report::harmless(&reason));
                    // Else it is known already, and what the core says of it is of the last process.
                    if serves { self.lose(index + 1, cause) } else { self.lost_after_all(index + 1, cause) }
                }
                None => Err(self.unexpected(0, "Lost of an unknown device")),
            },
            FromCore::Paused => self.rests(MachineState::Pausing, MachineState::Paused),
            FromCore::Resumed => self.rests(MachineState::Resuming, MachineState::Running),
            other => self.other(Event::Message(0, Message::Core(other)), true),
        }
    }

    fn backend_says(&mut self, place: usize, message: FromBackend) -> Result<(), Ending> {
        let on_terminal = self.is_on_terminal(place);
        let awaits_size = self.awaits_size(place);
        let traced = self.setting.trace.is_wanted();
        let now = Instant::now();
        let is_net = self.spec_of(place).is_some_and(|spec| spec.kind() == DeviceKind::Net);
        if let FromBackend::Pairs { pairs } = message
            && is_net
            && self.note_pairs(place, pairs)
        {
            return Ok(());
        }
        let Some(device) = self.device(place) else { return Ok(()) };
        match (message, &mut device.state) {
            (FromBackend::Ready, State::Starting { ready, deadline, .. }) if !*ready => {
                *ready = true;
                // From here on it is the core that is waited for.
                *deadline = now + CORE_PATIENCE;
                self.ready(place)
            }
            (FromBackend::Alive { number }, State::Up { heartbeat, .. }) => {
                if heartbeat.alive(number, now) {
                    self.tell_back(place);
                    Ok(())
                } else {
                    self.lose(
                        place,
                        String::from("it broke the protocol: it gave a sign of life that was not asked for"),
                    )
                }
            }
            // It was asked while it served.
            (FromBackend::Alive { .. } | FromBackend::Resubmitted { .. }, State::Detaching { .. }) => Ok(()),
            (FromBackend::Violated { .. }, State::Up { .. } | State::Attaching { .. } | State::Detaching { .. }) => {
                self.violated(place)
            }
            (FromBackend::Resubmitted { requests }, State::Up { .. } | State::Attaching { .. }) => {
                device.reexecuted = device.reexecuted.saturating_add(requests.into());
                let tallies = self.setting.tallies;
                tallies.add(place.wrapping_sub(1), |tally| {
                    tally.reexecuted = tally.reexecuted.saturating_add(requests.into());
                });
                Ok(())
            }
            (FromBackend::Failed(fault), _) => {
                let reason = report::harmless(&fault.message);
                self.lose(place, reason)
            }
            (FromBackend::Resized, _) if awaits_size => self.size_taken(place),
            (FromBackend::Leave, _) if on_terminal => Err(Ending::Left),
            (message @ FromBackend::Trace(_), _) if traced => {
                self.other(Event::Message(place, Message::Backend(message)), true)
            }
            (message, _) => {
                let what = kind_of(&Message::Backend(message));
                self.lose(place, format!("it broke the protocol: {what} was not expected"))
            }
        }
    }

    /// A driver broke the rules of a queue: it is told so, by way of the device's status.
    fn violated(&mut self, place: usize) -> Result<(), Ending> {
        match self.spec_of(place) {
            Some(spec) => self.send_core(&ToCore::NeedsReset { device: spec.id.clone() }),
            None => Ok(()),
        }
    }

    /// Counts a message of the process at `place`; `false` for one too many.
    fn hears(&mut self, place: usize) -> bool {
        let now = Instant::now();
        match self.device(place) {
            Some(device) => device.hears(now),
            None => self.core_messages.count(now),
        }
    }
}
