//! A device's process is lost and another takes its place, while the guest runs.
//!
//! lost → ended → drained → (its time comes) → started → ready → attached. A step that fails is a loss again, with a longer
//! delay; there is no last attempt. What one device is going through holds up no other, and not the core.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use protocol::{DeviceId, FromBackend, ToBackend, ToCore};

use super::device::{CORE_PATIENCE, Device, Loss, READY_PATIENCE, State};
use super::drain::{Drain, Look};
use super::heartbeat::{Due, Heartbeat};
use super::machine::Machine;
use super::processes::{Child, Message};
use super::spawn;
use crate::control::message::MachineState;
use crate::exit::{Death, Ending};
use crate::report;
use crate::resources::{Prepared, terminal};
use crate::spec;
use crate::spec::policy::{OnFail, Restart};

/// How long a process that is let go of may take to end in good order: a console writes its last bytes.
const LEAVE_PATIENCE: Duration = Duration::from_millis(1500);

/// How long a process that has closed its vhost-user socket may take to end: what ended it says more.
const HANGUP_PATIENCE: Duration = Duration::from_millis(100);

/// When a killed process has not ended after so long, it is said.
const OVERDUE: Duration = Duration::from_secs(10);

/// How long a process that ended in good order is let be: as a rule the whole machine is coming to its end.
const SETTLE: Duration = Duration::from_millis(200);

/// How long it takes until the host is asked again for what it did not give.
const RETRY: Duration = Duration::from_secs(1);

impl<'a> Machine<'a> {
    /// What has to be done by now.
    pub(super) fn tick(&mut self, now: Instant) -> Result<(), Ending> {
        for place in 1..=self.devices.len() {
            let Some(device) = self.device(place) else { continue };
            if device.deadline().is_none_or(|deadline| deadline > now) {
                continue;
            }
            match &mut device.state {
                State::Up { hung_up: Some(_), .. } => {
                    self.lose(place, String::from("it closed its vhost-user socket"))?;
                }
                State::Up { .. } => self.check_life(place, now)?,
                State::Leaving { .. } => {
                    device.state = State::Ending { overdue: Some(now + OVERDUE) };
                    self.kill(place);
                }
                State::Ending { overdue } => {
                    *overdue = None;
                    let name = self.processes.name(place);
                    report::warn(&format!("[{name}] killed and not gone yet: the host is busy with its requests"));
                }
                State::Draining { .. } => self.look_at_drain(place)?,
                State::Waiting { .. } => self.start(place)?,
                State::Starting { .. } => {
                    self.lose(place, format!("not ready within {} s", READY_PATIENCE.as_secs()))?;
                }
                State::Attaching { .. } => {
                    self.lose(place, format!("not attached within {} s", CORE_PATIENCE.as_secs()))?;
                }
                State::Detaching { .. } => {
                    self.lose(place, format!("not detached within {} s", CORE_PATIENCE.as_secs()))?;
                }
            }
        }
        Ok(())
    }

    fn check_life(&mut self, place: usize, now: Instant) -> Result<(), Ending> {
        let suspended = self.state != MachineState::Running;
        let Some(State::Up { heartbeat, .. }) = self.device(place).map(|device| &mut device.state) else {
            return Ok(());
        };
        if suspended {
            heartbeat.suspend(now);
            return Ok(());
        }
        match heartbeat.due(now) {
            Due::Nothing => Ok(()),
            // One that does not read is found by its silence.
            Due::Ask(number) => {
                let _ = self.processes.send_backend(place, &ToBackend::Ping { number });
                Ok(())
            }
            Due::Lost if self.is_traced(place) => {
                if let Some(State::Up { heartbeat, .. }) = self.device(place).map(|device| &mut device.state) {
                    heartbeat.suspend(now);
                }
                Ok(())
            }
            Due::Lost => self.lose(place, format!("no sign of life within {} s", Heartbeat::patience())),
        }
    }

    /// Whether a debugger holds a process: its time does not count then.
    fn is_traced(&self, place: usize) -> bool {
        let pid = self.processes.get(place).and_then(Child::pid);
        pid.is_some_and(|pid| self.setting.ground.is_traced(Pid::from_raw(pid)))
    }

    /// The process of a device is of no use any more: it is ended, and the next one will take its place.
    pub(super) fn lose(&mut self, place: usize, cause: String) -> Result<(), Ending> {
        self.tell_back(place);
        let now = Instant::now();
        let on_fail = self.spec_of(place).map(|spec| spec.policy.on_fail);
        let Some(device) = self.device(place) else { return Ok(()) };
        let served = match &device.state {
            State::Up { since, .. } => Some(now.saturating_duration_since(*since)),
            State::Leaving { .. } | State::Ending { .. } | State::Draining { .. } | State::Waiting { .. } => {
                return Ok(());
            }
            _ => None,
        };
        if served.is_some() && on_fail == Some(OnFail::StopVm) {
            return Err(self.ends_with(place, cause));
        }
        let Some(device) = self.device(place) else { return Ok(()) };
        let by_hand = matches!(device.state, State::Detaching { .. });
        let delay = if by_hand { Duration::ZERO } else { device.backoff.after(served) };
        match &mut device.loss {
            // It failed on its way back, whoever asked for that.
            Some(loss) if served.is_none() && !by_hand => {
                (loss.cause, loss.delay, loss.told, loss.by_hand) = (cause, delay, false, false);
            }
            Some(loss) => (loss.cause, loss.told) = (cause, false),
            None => {
                device.reexecuted = 0;
                device.loss = Some(Loss { at: now, cause, by_hand, orderly: false, delay, told: false });
            }
        }
        device.state = State::Ending { overdue: Some(now + OVERDUE) };
        self.kill(place);
        self.tell_loss(place);
        if served.is_some() { self.needs_reset(place) } else { Ok(()) }
    }

    /// A loss is the first of a device: its driver is told, if that is the policy.
    fn needs_reset(&self, place: usize) -> Result<(), Ending> {
        match self.spec_of(place) {
            Some(spec) if spec.policy.on_fail == OnFail::NeedsReset => {
                self.send_core(&ToCore::NeedsReset { device: spec.id.clone() })
            }
            _ => Ok(()),
        }
    }

    /// Ends a process. Of what it had said last, one thing is for its successor.
    fn kill(&mut self, place: usize) {
        for message in self.processes.kill(place) {
            if let Message::Backend(FromBackend::Pairs { pairs }) = message {
                self.note_pairs(place, pairs);
            }
        }
    }

    /// The driver of a network interface uses so many queue pairs; `false` if there are not so many.
    pub(super) fn note_pairs(&mut self, place: usize, pairs: u16) -> bool {
        let host = self.setting.resources.devices.get(place.wrapping_sub(1));
        let known = host.is_some_and(|host| (1..=host.most_pairs()).contains(&pairs));
        if let Some(device) = self.device(place).filter(|_| known) {
            device.pairs = pairs;
        }
        known
    }

    /// A process has closed its vhost-user socket.
    pub(super) fn hung_up(&mut self, place: usize) {
        if let Some(State::Up { hung_up, .. }) = self.device(place).map(|device| &mut device.state) {
            *hung_up = Some(Instant::now() + HANGUP_PATIENCE);
        }
    }

    /// The core says that it has lost a backend whose process had ended in good order a moment before: it did so because the
    /// core let go of it, which is no good order.
    pub(super) fn lost_after_all(&mut self, place: usize, cause: String) -> Result<(), Ending> {
        let restarts = self.spec_of(place).is_some_and(|spec| spec.policy.restart != Restart::Never);
        let Some(device) = self.device(place) else { return Ok(()) };
        let Some(loss) = device.loss.as_mut().filter(|loss| loss.orderly) else { return Ok(()) };
        (loss.orderly, loss.cause, loss.told) = (false, cause, false);
        if let State::Waiting { until: until @ None, .. } = &mut device.state
            && restarts
        {
            *until = Some(Instant::now() + loss.delay);
        }
        Ok(())
    }

    /// The process of a device has ended.
    pub(super) fn died(&mut self, place: usize, death: Death) -> Result<(), Ending> {
        let now = Instant::now();
        if self.is_on_terminal(place) {
            // Whoever sits there has the terminal as it was until the next console takes it.
            terminal::restore();
        }
        let Some(device) = self.device(place) else { return Ok(()) };
        match device.state {
            State::Ending { .. } | State::Leaving { .. } => {}
            State::Up { .. } if death.is_orderly() => self.left(place, death)?,
            _ => self.lose(place, death.to_string())?,
        }
        let Some(spec) = self.spec_of(place) else { return Ok(()) };
        self.send_core(&ToCore::Dead { device: spec.id.clone() })?;
        // It is dead: nothing but what it had said is left of it.
        self.kill(place);
        if let Some(device) = self.device(place) {
            device.state = State::Draining { drain: Drain::new(now), next: None, tried: false };
        }
        self.look_at_drain(place)
    }

    /// A process that served has ended in good order, which is told later: as a rule it is the machine that ends.
    fn left(&mut self, place: usize, death: Death) -> Result<(), Ending> {
        self.tell_back(place);
        let Some(device) = self.device(place) else { return Ok(()) };
        let delay = SETTLE.max(device.backoff.after(None));
        let (at, cause) = (Instant::now(), death.to_string());
        device.reexecuted = 0;
        device.loss = Some(Loss { at, cause, by_hand: false, orderly: true, delay, told: true });
        self.needs_reset(place)
    }

    /// Looks whether what the last process began has ended.
    pub(super) fn look_at_drain(&mut self, place: usize) -> Result<(), Ending> {
        let now = Instant::now();
        let index = place.wrapping_sub(1);
        let ended = self.processes.is_drained(place);
        let Some(host) = self.setting.resources.devices.get(index) else { return Ok(()) };
        let Some(State::Draining { drain, next, tried }) = self.device(place).map(|device| &mut device.state) else {
            return Ok(());
        };
        match drain.look(host, ended, now) {
            Look::Free(prepared) => {
                let next = next.take();
                self.drained(place, prepared, next)
            }
            Look::Waits(complaint) => {
                let enter = !std::mem::replace(tried, true);
                if let Some(error) = complaint {
                    report::warn(&format!("[{}] {error}", self.processes.name(place)));
                }
                if enter {
                    self.enter_early(place);
                }
                Ok(())
            }
        }
    }

    /// Sends the next process of a device into its jail while the last one's requests end, if it is to start at once.
    fn enter_early(&mut self, place: usize) {
        let restart = self.spec_of(place).map(|spec| spec.policy.restart);
        let at_once = |loss: &Loss| loss.by_hand || (loss.delay.is_zero() && restart != Some(Restart::Never));
        if !self.device(place).is_some_and(|device| device.loss.as_ref().is_some_and(at_once)) {
            return;
        }
        // What is in the way is told when it is started in earnest.
        if let Ok(child) = self.enter(place)
            && let Some(State::Draining { next, .. }) = self.device(place).map(|device| &mut device.state)
        {
            *next = Some(Box::new(child));
        }
    }

    fn enter(&self, place: usize) -> Result<Child, Ending> {
        let entered = spawn::enter(&self.setting, place, false)?;
        Ok(Child::entering(entered.process, entered.child.follow(), entered.link, entered.log))
    }

    /// Nothing of the last process is under way: the core may let go of what waits for that, and the next one can come.
    fn drained(&mut self, place: usize, prepared: Prepared, next: Option<Box<Child>>) -> Result<(), Ending> {
        let Some(spec) = self.spec_of(place) else { return Ok(()) };
        self.send_core(&ToCore::Gone { device: spec.id.clone() })?;
        let restart = spec.policy.restart;
        let now = Instant::now();
        let Some(device) = self.device(place) else { return Ok(()) };
        device.parting = device.parting.saturating_add(1);
        let until = match &device.loss {
            Some(loss) if loss.by_hand => Some(now),
            _ if restart == Restart::Never => None,
            Some(loss) if loss.orderly && restart == Restart::OnFailure => None,
            Some(loss) => Some(now + loss.delay),
            None => Some(now),
        };
        device.state = State::Waiting { prepared: Some(prepared), next, until };
        if until.is_none() {
            if let Some(loss) = &mut device.loss {
                loss.told &= !loss.orderly;
            }
            self.tell_loss(place);
            self.refuse_waits_for(place.wrapping_sub(1));
        }
        self.tick(now)
    }

    /// Starts the next process of a device.
    fn start(&mut self, place: usize) -> Result<(), Ending> {
        let now = Instant::now();
        let Some(device) = self.device(place) else { return Ok(()) };
        let State::Waiting { prepared, next, .. } = &mut device.state else { return Ok(()) };
        let (prepared, next) = (prepared.take(), next.take());
        let Some(prepared) = prepared else {
            device.state = State::Draining { drain: Drain::new(now), next: None, tried: false };
            return self.look_at_drain(place);
        };
        if let Some(loss) = device.loss.as_mut().filter(|loss| loss.orderly && !loss.by_hand) {
            // It was the device alone after all.
            loss.told = false;
            loss.orderly = false;
        }
        self.tell_loss(place);
        self.forget_size(place);
        match self.spawn(place, prepared, next) {
            Ok(socket) => {
                if let Some(device) = self.device(place) {
                    device.state = State::Starting { socket, ready: false, deadline: now + READY_PATIENCE };
                }
                Ok(())
            }
            Err(ending) => {
                self.kill(place);
                let Some(device) = self.device(place) else { return Ok(()) };
                let delay = device.backoff.after(None).max(RETRY);
                if let Some(loss) = &mut device.loss {
                    (loss.cause, loss.delay, loss.told) = (ending.to_string(), delay, false);
                }
                device.state = State::Waiting { prepared: None, next: None, until: Some(now + delay) };
                self.tell_loss(place);
                Ok(())
            }
        }
    }

    fn spawn(&mut self, place: usize, prepared: Prepared, next: Option<Box<Child>>) -> Result<OwnedFd, Ending> {
        let child = next.map_or_else(|| self.enter(place), |child| Ok(*child))?;
        self.processes.replace(place, child);
        self.start_device(place, prepared, true)
    }

    /// A fresh process serves its socket: the core may connect to it, once it has let go of the last one.
    pub(super) fn ready(&mut self, place: usize) -> Result<(), Ending> {
        let Some(spec) = self.spec_of(place) else { return Ok(()) };
        let Some(device) = self.device(place) else { return Ok(()) };
        if device.parting > 0 || !matches!(device.state, State::Starting { ready: true, .. }) {
            return Ok(());
        }
        let attaching = State::Attaching { deadline: Instant::now() + CORE_PATIENCE };
        if let State::Starting { socket, .. } = std::mem::replace(&mut device.state, attaching) {
            self.attach(spec, socket)?;
        }
        if self.is_on_terminal(place) { self.tell_size() } else { Ok(()) }
    }

    /// The core is connected to a fresh process, and its queues run if the driver is ready.
    pub(super) fn attached(&mut self, place: usize) -> Result<(), Ending> {
        let now = Instant::now();
        let Some(device) = self.device(place) else { return Ok(()) };
        device.state = State::up(now);
        if let Some(loss) = device.loss.take() {
            let away = now.saturating_duration_since(loss.at);
            let (cause, delay) = (loss.cause.clone(), loss.delay);
            device.back = Some((loss, away));
            self.setting.tallies.add(place.wrapping_sub(1), |tally| tally.replaced(&cause, away, delay));
        }
        self.settle_waits();
        Ok(())
    }

    /// The core has let go of a backend, as it was asked to.
    pub(super) fn detached(&mut self, id: &DeviceId) -> Result<(), Ending> {
        let place = self.index_of(id).map_or(0, |index| index + 1);
        let Some(device) = self.device(place) else {
            return Err(self.unexpected(0, "Detached of an unknown device"));
        };
        // Else it was lost in the meantime.
        if matches!(device.state, State::Detaching { .. }) {
            device.state = State::Leaving { deadline: Instant::now() + LEAVE_PATIENCE };
            self.processes.dismiss(place);
        }
        Ok(())
    }

    /// The core knows that nothing of a device's last process is under way: what it says from now on is about the next.
    pub(super) fn parted(&mut self, id: &DeviceId) -> Result<(), Ending> {
        let place = self.index_of(id).map_or(0, |index| index + 1);
        match self.device(place) {
            Some(device) if device.parting > 0 => {
                device.parting -= 1;
                self.ready(place)
            }
            _ => Err(self.unexpected(0, format!("Gone of {id}"))),
        }
    }

    /// Replaces a device's process, or starts the one that is waited for.
    pub(super) fn restart(&mut self, place: usize) -> Result<(), Ending> {
        let Some(spec) = self.spec_of(place) else { return Ok(()) };
        let now = Instant::now();
        let Some(device) = self.device(place) else { return Ok(()) };
        match &mut device.state {
            State::Up { .. } => {
                let cause = String::from("replaced by hand");
                let (by_hand, orderly, delay, told) = (true, false, Duration::ZERO, true);
                device.loss = Some(Loss { at: now, cause, by_hand, orderly, delay, told });
                device.reexecuted = 0;
                device.state = State::Detaching { deadline: now + CORE_PATIENCE };
                self.send_core(&ToCore::Detach { device: spec.id.clone() })
            }
            State::Waiting { until, .. } => {
                *until = Some(now);
                Ok(())
            }
            // Whatever the policy says: it is asked for now.
            State::Leaving { .. } | State::Ending { .. } | State::Draining { .. } => {
                if let Some(loss) = &mut device.loss {
                    loss.by_hand = true;
                }
                Ok(())
            }
            // It is on its way.
            State::Detaching { .. } | State::Starting { .. } | State::Attaching { .. } => Ok(()),
        }
    }

    pub(super) fn device(&mut self, place: usize) -> Option<&mut Device> {
        self.devices.get_mut(place.checked_sub(1)?)
    }

    pub(super) fn spec_of(&self, place: usize) -> Option<&'a spec::Device> {
        let spec: &'a spec::VmSpec = self.setting.spec;
        spec.devices.get(place.checked_sub(1)?)
    }

    /// The index of the device of that name.
    pub(super) fn index_of(&self, id: &DeviceId) -> Option<usize> {
        self.setting.spec.devices.iter().position(|device| device.id == *id)
    }
}
