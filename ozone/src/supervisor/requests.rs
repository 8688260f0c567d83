//! What is asked of a running machine from outside, and who waits for the answer.

use std::time::Instant;

use protocol::{DeviceId, ToCore};

use super::device::State;
use super::machine::Machine;
use crate::control::message::{Answer, DeviceStatus, MachineState, Request, Status};
use crate::control::server::ClientId;
use crate::exit::Ending;

/// Clients that wait. There are no more than the server lets in.
#[derive(Debug, Default)]
pub struct Waits(Vec<Wait>);

#[derive(Debug)]
struct Wait {
    client: ClientId,
    until: Until,
}

/// What a client waits for.
#[derive(Debug)]
enum Until {
    /// The devices with these indices serve.
    Up(Vec<usize>),
    /// The vCPUs are in this state.
    State(MachineState),
}

impl Machine<'_> {
    /// A client asks for something.
    pub(super) fn asked(&mut self, client: ClientId, request: Request) -> Result<(), Ending> {
        match request {
            Request::Status => {
                let status = self.status();
                self.processes.answer(client, &Answer::Status(status));
            }
            Request::Usage => {
                let none = || Answer::Refused(String::from("it runs without cgroups; it said why when it started"));
                let answer = self.setting.cgroups.usage().map_or_else(none, Answer::Usage);
                self.processes.answer(client, &answer);
            }
            Request::Pause => self.rest(client, MachineState::Paused)?,
            Request::Resume => self.rest(client, MachineState::Running)?,
            Request::Restart { devices } => match self.indices(&devices) {
                Ok(indices) => {
                    for index in &indices {
                        self.restart(index + 1)?;
                    }
                    self.waits.0.push(Wait { client, until: Until::Up(indices) });
                    self.settle_waits();
                }
                Err(id) => {
                    let known: Vec<&str> = self.setting.spec.devices.iter().map(|device| device.id.as_str()).collect();
                    let reason = format!("it has no device '{id}'; its devices are {}", known.join(", "));
                    self.processes.answer(client, &Answer::Refused(reason));
                }
            },
        }
        Ok(())
    }

    /// The indices of devices, of all if none is named; or the first name that is none's.
    fn indices(&self, devices: &[DeviceId]) -> Result<Vec<usize>, DeviceId> {
        if devices.is_empty() {
            return Ok((0..self.devices.len()).collect());
        }
        let mut indices = Vec::with_capacity(devices.len());
        for id in devices {
            let index = self.index_of(id).ok_or_else(|| id.clone())?;
            if !indices.contains(&index) {
                indices.push(index);
            }
        }
        Ok(indices)
    }

    /// Brings the vCPUs to rest, or to run.
    fn rest(&mut self, client: ClientId, wanted: MachineState) -> Result<(), Ending> {
        let (message, on_the_way) = match wanted {
            MachineState::Paused => (ToCore::Pause, MachineState::Pausing),
            _ => (ToCore::Resume, MachineState::Resuming),
        };
        if self.state == wanted {
            self.processes.answer(client, &Answer::Done);
            return Ok(());
        }
        if self.state != on_the_way {
            if matches!(self.state, MachineState::Pausing | MachineState::Resuming) {
                let reason = String::from("it is on its way from one state to another; ask again");
                self.processes.answer(client, &Answer::Refused(reason));
                return Ok(());
            }
            self.send_core(&message)?;
            self.state = on_the_way;
        }
        self.waits.0.push(Wait { client, until: Until::State(wanted) });
        Ok(())
    }

    /// The core has come from one state to the next.
    pub(super) fn rests(&mut self, from: MachineState, to: MachineState) -> Result<(), Ending> {
        if self.state != from {
            return Err(self.unexpected(0, format!("{to:?}")));
        }
        self.state = to;
        let now = Instant::now();
        self.devices.iter_mut().for_each(|device| device.rearm(now));
        self.settle_waits();
        Ok(())
    }

    /// Answers whoever has waited long enough.
    pub(super) fn settle_waits(&mut self) {
        let waits = std::mem::take(&mut self.waits.0);
        for wait in waits {
            let up =
                |index: &usize| self.devices.get(*index).is_some_and(|device| matches!(device.state, State::Up { .. }));
            let done = match &wait.until {
                Until::Up(indices) => indices.iter().all(up),
                Until::State(state) => self.state == *state,
            };
            if done {
                self.processes.answer(wait.client, &Answer::Done);
            } else {
                self.waits.0.push(wait);
            }
        }
    }

    /// A client has gone.
    pub(super) fn forget_wait(&mut self, client: ClientId) {
        self.waits.0.retain(|wait| wait.client != client);
    }

    /// A device will not come back by itself.
    pub(super) fn refuse_waits_for(&mut self, index: usize) {
        let cause = self.devices.get(index).and_then(|device| device.loss.as_ref()).map(|loss| loss.cause.clone());
        let name = self.processes.name(index + 1);
        let hopeless = |wait: &Wait| matches!(&wait.until, Until::Up(indices) if indices.contains(&index));
        for wait in std::mem::take(&mut self.waits.0) {
            if hopeless(&wait) {
                let reason = format!("{name} was lost again: {}", cause.as_deref().unwrap_or("no reason given"));
                self.processes.answer(wait.client, &Answer::Refused(reason));
            } else {
                self.waits.0.push(wait);
            }
        }
    }

    /// Nobody will be answered any more.
    pub(super) fn forget_waits(&mut self, reason: &str) {
        for wait in std::mem::take(&mut self.waits.0) {
            self.processes.answer(wait.client, &Answer::Refused(reason.to_owned()));
        }
    }

    fn status(&self) -> Status {
        let pid = |place: usize| self.processes.get(place).and_then(super::processes::Child::pid);
        let uid = |place: usize| self.setting.uids.identity(u8::try_from(place).unwrap_or(u8::MAX)).uid();
        let device = |(index, (device, known)): (usize, (&crate::spec::Device, &super::device::Device))| {
            let tally = self.setting.tallies.add(index, |_| {});
            let milliseconds = |time: std::time::Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
            let under_way = known.loss.as_ref().map_or_else(Default::default, |loss| loss.at.elapsed());
            DeviceStatus {
                id: device.id.clone(),
                kind: device.kind(),
                state: known.word(),
                pid: pid(index + 1),
                uid: uid(index + 1),
                restarts: tally.restarts,
                cause: known.loss.as_ref().map(|loss| loss.cause.clone()).or(tally.cause),
                delay_ms: milliseconds(tally.delay),
                away_ms: tally.away.map(milliseconds),
                away_total_ms: milliseconds(tally.away_total + under_way),
                reexecuted: tally.reexecuted,
            }
        };
        let devices = self.setting.spec.devices.iter().zip(&self.devices).enumerate().map(device).collect();
        Status {
            name: self.setting.spec.name.clone().unwrap_or_default(),
            state: self.state,
            pid: std::process::id().cast_signed(),
            core_pid: pid(0).unwrap_or_default(),
            core_uid: uid(0),
            devices,
        }
    }
}
