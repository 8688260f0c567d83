//! A machine's processes and what every phase does with them.

use std::convert::Infallible;
use std::fmt;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use protocol::{Attach, FromBackend, FromCore, LinkError, Start, ToBackend, ToCore};

use super::device::{Budget, Device};
use super::drain;
use super::processes::{Child, Event, Message, Processes};
use super::requests::Waits;
use super::{Setting, SupervisorError};
use crate::control::message::{Answer, MachineState};
use crate::exit::Ending;
use crate::report;
use crate::resources::{HostDevice, Prepared, console::Place, terminal::Terminal};
use crate::spec;

/// How long the last output of a machine that came to its end by itself may take.
const GRACE: Duration = Duration::from_secs(1);

/// How long what an earlier machine began may be in the way of a launch.
const DRAIN_PATIENCE: Duration = Duration::from_secs(10);

/// `ozone` looks at a deadline so much too late only if it was stopped, and perhaps the whole host with it.
const STOPPED: Duration = Duration::from_secs(1);

/// What every phase has at hand.
#[derive(Debug)]
pub struct Machine<'a> {
    /// What it runs with.
    pub setting: Setting<'a>,
    /// Its processes.
    pub processes: Processes<'a>,
    /// The read end of the serial port's pipe, for each process of the first console.
    pub serial: Option<OwnedFd>,
    /// Its devices in their order, once it runs.
    pub(super) devices: Vec<Device>,
    /// Whether its vCPUs run, once it does.
    pub(super) state: MachineState,
    /// Messages that the core may still send.
    pub(super) core_messages: Budget,
    /// Who outside waits for what.
    pub(super) waits: Waits,
    /// What the console on the terminal knows of its size.
    size: Size,
}

/// How far a console is with the size of its terminal. It is told one size at a time, however often that changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Size {
    /// It has the size that it was told last.
    Taken,
    /// It was told a size and has not taken it yet.
    Told,
    /// Likewise, and the terminal's size has changed since.
    Outdated,
}

impl<'a> Machine<'a> {
    /// A machine of these processes, the core first.
    pub fn new(setting: Setting<'a>, children: Vec<Child>) -> Self {
        Self {
            setting,
            processes: Processes::new(children, setting),
            serial: None,
            devices: Vec::new(),
            state: MachineState::Running,
            core_messages: Budget::new(Instant::now()),
            waits: Waits::default(),
            size: Size::Taken,
        }
    }

    /// Watches over it until it ends.
    pub fn run(&mut self) -> Result<Infallible, Ending> {
        let now = Instant::now();
        self.devices = self.setting.spec.devices.iter().map(|_| Device::up(now)).collect();
        self.setting.notify.ready();
        loop {
            let deadline = self.devices.iter().filter_map(Device::deadline).min();
            let event = self.processes.next(deadline);
            self.handle(event)?;
            let now = Instant::now();
            // Not before all that was said in time has been heard.
            if !self.processes.is_idle() {
                continue;
            }
            if deadline.is_some_and(|deadline| now > deadline + STOPPED) {
                self.devices.iter_mut().for_each(|device| device.rearm(now));
            }
            self.tick(now)?;
        }
    }

    /// What an event means that no phase awaits: nothing, or the end.
    pub fn other(&mut self, event: Event, may_exit: bool) -> Result<(), Ending> {
        let event = match event {
            Event::Signal(Signal::SIGWINCH) => return self.tell_size(),
            Event::Message(place, Message::Backend(FromBackend::Resized)) if self.awaits_size(place) => {
                return self.size_taken(place);
            }
            Event::Signal(Signal::SIGPWR) => return self.send_core(&ToCore::PowerButton),
            Event::Asked(client, _) => {
                let reason = String::from("it is starting; ask again when it runs");
                self.processes.answer(client, &Answer::Refused(reason));
                return Ok(());
            }
            Event::Message(
                place,
                Message::Core(FromCore::Trace(marks)) | Message::Backend(FromBackend::Trace(marks)),
            ) if self.setting.trace.is_wanted() => {
                self.setting.trace.told(place, &marks);
                return Ok(());
            }
            event => event,
        };
        let Some((rank, ending)) = self.meaning(event, may_exit) else { return Ok(()) };
        Err(self.settle(rank, ending, may_exit))
    }

    /// Makes ready what a device's first process is handed, and waits until it is free: for a guest that has run before,
    /// however long that takes.
    pub fn prepare(&mut self, host: &HostDevice) -> Result<Prepared, Ending> {
        let prepared = host.prepare()?;
        let mut deadline = Some(Instant::now() + DRAIN_PATIENCE);
        while !prepared.is_free()? {
            if deadline.is_some_and(|deadline| Instant::now() >= deadline)
                && let Some(error) = host.draining(DRAIN_PATIENCE.as_secs())
            {
                if !self.setting.again {
                    return Err(error.into());
                }
                report::warn(&error.to_string());
                deadline = None;
            }
            // No backend has been told anything, so whatever happens meanwhile is the end, or nothing.
            match self.processes.next(Some(Instant::now() + drain::LOOK)) {
                Event::Deadline => {}
                event => self.other(event, false)?,
            }
        }
        Ok(prepared)
    }

    /// Tells the process at `place` what it serves, and returns the core's end of its vhost-user socket.
    pub fn start_device(&mut self, place: usize, prepared: Prepared, successor: bool) -> Result<OwnedFd, Ending> {
        let Setting { resources, trace, .. } = self.setting;
        let failed = |error| SupervisorError::Link { process: self.processes.name(place), error };
        let Some(host) = resources.devices.get(place.wrapping_sub(1)) else {
            return Err(self.unexpected(place, "a device without a host side"));
        };
        let serial = self.serial.as_ref().filter(|_| self.is_first_console(place)).map(OwnedFd::try_clone);
        let serial = serial.transpose().map_err(|_| failed(LinkError::Send(nix::errno::Errno::EMFILE)))?;
        let pairs = self.devices.get(place.wrapping_sub(1)).map_or(1, |device| device.pairs);
        let incarnation = host.hand_over(prepared, serial, pairs, successor)?;
        let (core, backend) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)
            .map_err(|errno| failed(LinkError::Send(errno)))?;
        let trace = trace.is_wanted() && !successor;
        let start = Start { socket: backend.into(), spec: incarnation.spec, trace };
        self.processes.set_sentinel(place, incarnation.sentinel);
        self.send_backend(place, &ToBackend::Start(start))?;
        if let Ok(peer) = core.try_clone() {
            self.processes.set_peer(place, peer);
        }
        Ok(core)
    }

    /// Tells the core of a backend that serves its end of `socket`'s pair.
    pub fn attach(&self, device: &spec::Device, socket: OwnedFd) -> Result<(), Ending> {
        let socket = socket.into();
        let attach = Attach { device: device.id.clone(), kind: device.kind(), slot: device.slot, socket };
        self.send_core(&ToCore::Attach(attach))
    }

    /// Ends every process. What the machine said last is worth waiting for if it came to its end by itself.
    pub fn end(&mut self, ending: &Ending) {
        let devices = &self.setting.resources.devices;
        let consoles = (1..).zip(devices).filter(|(_, host)| matches!(host, HostDevice::Console(_)));
        // The core first: the consoles read the serial port's output to its end.
        let graced: Vec<usize> = std::iter::once(0).chain(consoles.map(|(place, _)| place)).collect();
        self.processes.end(if ending.is_orderly() { &graced } else { &[] }, GRACE);
        self.forget_waits("it ended or started again");
    }

    fn is_first_console(&self, place: usize) -> bool {
        let is_console = |host: &HostDevice| matches!(host, HostDevice::Console(_));
        self.setting.resources.devices.iter().position(is_console) == place.checked_sub(1)
    }

    /// Whether the device at `place` is a console on the user's terminal.
    pub fn is_on_terminal(&self, place: usize) -> bool {
        let device = self.setting.resources.devices.get(place.wrapping_sub(1));
        matches!(device, Some(HostDevice::Console(Place::Terminal(_))))
    }

    /// Whether the process at `place` was told a size of its terminal and has not taken it.
    pub fn awaits_size(&self, place: usize) -> bool {
        self.size != Size::Taken && self.is_on_terminal(place)
    }

    /// The console on the terminal is another process now, which reads the size for itself when it starts.
    pub fn forget_size(&mut self, place: usize) {
        if self.is_on_terminal(place) {
            self.size = Size::Taken;
        }
    }

    /// Tells the console on the terminal how large that is, as soon as it has taken an earlier size.
    pub fn tell_size(&mut self) -> Result<(), Ending> {
        let Some((columns, rows)) = self.setting.resources.terminal().and_then(Terminal::size) else { return Ok(()) };
        let count = self.setting.resources.devices.len();
        let Some(place) = (1..=count).find(|place| self.is_on_terminal(*place)) else { return Ok(()) };
        // One that is away asks for itself when it starts.
        if !self.processes.is_linked(place) {
            return Ok(());
        }
        if self.size == Size::Taken {
            self.size = Size::Told;
            self.send_backend(place, &ToBackend::Resize { columns, rows })
        } else {
            self.size = Size::Outdated;
            Ok(())
        }
    }

    /// The console at `place` has taken its terminal's size: only now the core finds it there.
    pub fn size_taken(&mut self, place: usize) -> Result<(), Ending> {
        let told = std::mem::replace(&mut self.size, Size::Taken);
        if let Some(device) = self.setting.spec.devices.get(place.wrapping_sub(1)) {
            self.send_core(&ToCore::ConfigChanged { device: device.id.clone() })?;
        }
        if told == Size::Outdated { self.tell_size() } else { Ok(()) }
    }

    /// Sends to the core, without waiting.
    pub fn send_core(&self, message: &ToCore) -> Result<(), Ending> {
        self.processes.send_core(message).map_err(|error| self.not_sent(0, error))
    }

    /// Sends to a backend, without waiting.
    pub fn send_backend(&self, place: usize, message: &ToBackend) -> Result<(), Ending> {
        self.processes.send_backend(place, message).map_err(|error| self.not_sent(place, error))
    }

    fn not_sent(&self, place: usize, error: LinkError) -> Ending {
        let process = self.processes.name(place);
        match error {
            LinkError::WouldBlock => SupervisorError::Deaf { process }.into(),
            error => SupervisorError::Link { process, error }.into(),
        }
    }

    /// The ending that something unexpected is.
    pub fn unexpected(&self, place: usize, what: impl fmt::Display) -> Ending {
        SupervisorError::Unexpected { process: self.processes.name(place), what: what.to_string() }.into()
    }
}
