//! One incarnation of a machine, from no process to no process. A launch is a restart from nothing.
//!
//! [`Spawned`] → [`Booting`] → [`Running`]: each phase is a type that holds all children and ends them when it is dropped.
//! The supervisor has one thread and never waits for a child: every send either succeeds at once or ends the child, and
//! everything awaited has a deadline.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::pipe2;
use protocol::{
    Attach, Boot, Cause, Channel, Fault, FaultKind, FromBackend, FromCore, LinkError, Slot, Start, ToBackend, ToCore,
};

use crate::exit::Ending;
use crate::jail::{self, JailError, Plan, limits};
use crate::process::Process;
use crate::report;
use crate::resources::{HostDevice, ResourceError, Resources, console::Place, terminal::Terminal};
use crate::spec::VmSpec;
use crate::trace::Trace;
use crate::uids::Uids;

mod log_pipe;
mod processes;
mod signals;

use log_pipe::LogPipe;
use processes::{Child, Event, Link, Message, Processes};
pub use signals::Signals;

/// How long a child may take to become its executable.
const JAIL_PATIENCE: Duration = Duration::from_secs(10);

/// How long backends may take to be ready.
const READY_PATIENCE: Duration = Duration::from_secs(10);

/// How long the machine may take to run: reading a kernel on an emulated host is slow.
const BOOT_PATIENCE: Duration = Duration::from_secs(30);

/// How long a better explanation of a backend's end is waited for: when the core dies, its backends see that first.
const SETTLE: Duration = Duration::from_millis(100);

/// How long it is waited for when a backend ended cleanly, which it does only when the core hangs up: the core is dead, or
/// about to say whom it lost. A large guest's memory takes a while to be given back.
const SETTLE_AFTER_HANGUP: Duration = Duration::from_secs(5);

/// How long the last output of a machine that came to its end by itself may take.
const GRACE: Duration = Duration::from_secs(1);

/// What goes wrong in the supervisor itself.
#[derive(Debug, thiserror::Error)]
enum SupervisorError {
    #[error(transparent)]
    Jail(#[from] JailError),
    #[error("seccomp filters of {process}: {error}")]
    Filter { process: Process, error: seccomp::FilterError },
    #[error("{operation} for {process}: {errno}")]
    Make { operation: &'static str, process: Process, errno: Errno },
    #[error("{process}: {error}")]
    Link { process: String, error: LinkError },
    #[error("{process} does not read its control channel")]
    Deaf { process: String },
    #[error("{process} broke the protocol: {what} was not expected")]
    Unexpected { process: String, what: String },
    #[error("{process} was not ready within {seconds} s")]
    NotReady { process: String, seconds: u64 },
    #[error("the machine did not run within {seconds} s: awaited {awaited} from core")]
    NotRunning { awaited: String, seconds: u64 },
}

impl From<SupervisorError> for Ending {
    fn from(error: SupervisorError) -> Self {
        let kind = match &error {
            SupervisorError::Jail(_) | SupervisorError::Make { .. } => FaultKind::Host,
            _ => FaultKind::Internal,
        };
        Ending::Fault(Fault { kind, message: error.to_string() })
    }
}

impl From<ResourceError> for Ending {
    fn from(error: ResourceError) -> Self {
        Ending::Fault(error.into())
    }
}

/// What every phase has at hand.
#[derive(Debug)]
struct Machine<'a> {
    spec: &'a VmSpec,
    resources: &'a Resources,
    processes: Processes<'a>,
    trace: &'a Trace,
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

/// Every process is in its jail and runs its executable; none has been told anything.
#[derive(Debug)]
pub struct Spawned<'a> {
    machine: Machine<'a>,
}

/// The core makes the machine and the backends open their devices.
#[derive(Debug)]
pub struct Booting<'a> {
    machine: Machine<'a>,
    devices: Vec<BootingDevice>,
    /// When the last of the processes was told what to do.
    started: Instant,
}

/// How far a device is.
#[derive(Debug)]
enum BootingDevice {
    /// Its backend is opening it; the core's end of its vhost-user socket waits here.
    Starting(OwnedFd),
    /// The core has been told of it.
    Attaching,
    /// The core is connected to it.
    Attached,
}

/// The vCPUs run.
#[derive(Debug)]
pub struct Running<'a> {
    machine: Machine<'a>,
}

impl<'a> Spawned<'a> {
    /// Makes every process of the machine.
    ///
    /// # Errors
    /// The [`Ending`] this means; no process is left.
    pub fn launch(
        spec: &'a VmSpec,
        resources: &'a Resources,
        uids: &Uids,
        signals: &'a Signals,
        trace: &'a Trace,
    ) -> Result<Self, Ending> {
        let backends = spec
            .devices
            .iter()
            .map(|device| (device.slot + 1, Process::Backend { kind: device.kind(), device: device.id.clone() }));
        // All of them at once: making namespaces takes the kernel a while, and the children do not need each other.
        let mut entering = Vec::new();
        for (place, process) in std::iter::once((0, Process::Core)).chain(backends) {
            let start = trace.now();
            let entered = enter(spec, resources, uids, trace, place, process)?;
            trace.done(start, &format_args!("start {}", entered.0));
            entering.push(entered);
        }
        let start = trace.now();
        let mut children = Vec::new();
        for (process, child, link, log) in entering {
            let jailed = child.wait(JAIL_PATIENCE).map_err(SupervisorError::from)?;
            children.push(Child::new(process, jailed, link, log));
        }
        trace.done(start, &"await jails");
        trace.begin();
        for child in &children {
            child.trace(trace);
        }
        let processes = Processes::new(children, signals);
        Ok(Self { machine: Machine { spec, resources, processes, trace, size: Size::Taken } })
    }

    /// Tells the core what machine to make and every backend what to serve.
    ///
    /// # Errors
    /// The [`Ending`] this means; no process is left.
    pub fn boot(mut self) -> Result<Booting<'a>, Ending> {
        let Machine { spec, resources, trace, .. } = self.machine;
        let begin = trace.now();
        let (serial_out, serial_in) = pipe2(OFlag::O_CLOEXEC).map_err(make("pipe", &Process::Core))?;
        let duplicate = |fd: &OwnedFd| {
            let failed = make("duplicate a descriptor", &Process::Core);
            fd.try_clone().map_err(|error| failed(error.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw)))
        };
        let slots = spec.devices.iter().map(|device| Slot {
            device: device.id.clone(),
            kind: device.kind(),
            slot: device.slot,
        });
        let boot = Boot {
            machine: spec.machine,
            kvm: duplicate(&resources.kvm)?.into(),
            kernel: duplicate(&resources.kernel)?.into(),
            initrd: resources.initrd.as_ref().map(duplicate).transpose()?.map(Into::into),
            command_line: spec.append.clone(),
            cpus: spec.cpus.value,
            cpu: spec.cpu,
            memory: spec.memory.value,
            slots: slots.collect(),
            serial: serial_in.into(),
            trace: trace.is_wanted(),
        };
        // ozone's copy of the write end goes with the message: the console reads the end of the serial output when the
        // core has ended.
        self.machine.send_core(&ToCore::Boot(boot))?;

        let mut serial = Some(serial_out);
        let mut specs = Vec::new();
        for host in &resources.devices {
            let serial = if matches!(host, HostDevice::Console(_)) { serial.take() } else { None };
            // No backend has been told anything, so whatever happens while a disk is waited for is the end, or nothing.
            let machine = &mut self.machine;
            let pause = |time| match machine.processes.next(Some(Instant::now() + time)) {
                Event::Deadline => Ok(()),
                event => machine.other(event, false),
            };
            specs.push(host.incarnation(serial, pause)?);
        }

        let mut devices = Vec::new();
        for (place, spec) in (1..).zip(specs) {
            let process = || self.machine.processes.name(place);
            let failed = |errno| SupervisorError::Link { process: process(), error: LinkError::Send(errno) };
            let (core, backend) =
                socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC).map_err(failed)?;
            let start = Start { socket: backend.into(), spec, trace: trace.is_wanted() };
            self.machine.send_backend(place, &ToBackend::Start(start))?;
            devices.push(BootingDevice::Starting(core));
        }
        trace.done(begin, &"send first messages");
        Ok(Booting { machine: self.machine, devices, started: Instant::now() })
    }
}

/// Clones one child into its jail.
fn enter(
    spec: &VmSpec,
    resources: &Resources,
    uids: &Uids,
    trace: &Trace,
    place: u8,
    process: Process,
) -> Result<(Process, jail::Entering, Link, LogPipe), SupervisorError> {
    let role = process.role();
    let (log, log_end) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(make("pipe", &process))?;
    let failed = |error| SupervisorError::Link { process: process.to_string(), error };
    let (link, control) = match process {
        Process::Core => Channel::pair().map(|(ours, theirs)| (Link::Core(ours), theirs)).map_err(failed)?,
        Process::Backend { .. } => {
            Channel::pair().map(|(ours, theirs)| (Link::Backend(ours), theirs)).map_err(failed)?
        }
    };
    let start = trace.now();
    let filters =
        seccomp::launch_filters(role).map_err(|error| SupervisorError::Filter { process: process.clone(), error })?;
    trace.done(start, &"compile filters");
    let plan = Plan {
        executable: resources.executable(&process).as_fd(),
        identity: uids.identity(place),
        limits: limits::for_role(role, spec.memory.value.size),
        filters,
        null: resources.null.as_fd(),
        log: log_end.as_fd(),
        control: control.as_fd(),
        trace: trace.is_wanted(),
        process,
    };
    let entering = jail::spawn(&plan)?;
    Ok((plan.process, entering, link, LogPipe::new(log)))
}

fn make(operation: &'static str, process: &Process) -> impl Fn(Errno) -> SupervisorError {
    let process = process.clone();
    move |errno| SupervisorError::Make { operation, process: process.clone(), errno }
}

impl<'a> Booting<'a> {
    /// Attaches each device as its backend is ready, and starts the vCPUs when all are.
    ///
    /// # Errors
    /// The [`Ending`] this means; no process is left.
    pub fn attach(mut self) -> Result<Running<'a>, Ending> {
        let start = self.machine.trace.now();
        let outcome = self.until_running();
        self.machine.trace.done(start, &"await running");
        match outcome {
            Ok(()) => Ok(Running { machine: self.machine }),
            Err(ending) => {
                self.machine.end(&ending);
                Err(ending)
            }
        }
    }

    fn until_running(&mut self) -> Result<(), Ending> {
        loop {
            let starting = self.devices.iter().position(|device| matches!(device, BootingDevice::Starting(_)));
            let patience = if starting.is_some() { READY_PATIENCE } else { BOOT_PATIENCE };
            let event = self.machine.processes.next(Some(self.started + patience));
            match event {
                Event::Message(place, Message::Backend(FromBackend::Ready)) => self.ready(place)?,
                Event::Message(0, Message::Core(FromCore::Attached { device })) => self.attached(&device)?,
                Event::Message(0, Message::Core(FromCore::Running)) if self.all(BootingDevice::is_attached) => {
                    return Ok(());
                }
                Event::Deadline => {
                    let seconds = patience.as_secs();
                    return Err(match starting {
                        Some(index) => {
                            SupervisorError::NotReady { process: self.machine.processes.name(index + 1), seconds }
                        }
                        None => SupervisorError::NotRunning { awaited: self.awaited(), seconds },
                    }
                    .into());
                }
                // The machine can come to its end at once, before the core has said that it runs.
                other => self.machine.other(other, self.all(BootingDevice::is_attached))?,
            }
        }
    }

    fn all(&self, is: fn(&BootingDevice) -> bool) -> bool {
        self.devices.iter().all(is)
    }

    /// A backend serves its socket: the core may connect to it.
    fn ready(&mut self, place: usize) -> Result<(), Ending> {
        let index = place.wrapping_sub(1);
        let device = self.devices.get_mut(index);
        let (Some(device), Some(spec)) = (device, self.machine.spec.devices.get(index)) else {
            return Err(self.machine.unexpected(place, "Ready"));
        };
        match std::mem::replace(device, BootingDevice::Attaching) {
            BootingDevice::Starting(socket) => {
                let attach =
                    Attach { device: spec.id.clone(), kind: spec.kind(), slot: spec.slot, socket: socket.into() };
                self.machine.send_core(&ToCore::Attach(attach))?;
            }
            _ => return Err(self.machine.unexpected(place, "a second Ready")),
        }
        if matches!(self.machine.resources.devices.get(index), Some(HostDevice::Console(Place::Terminal(_)))) {
            self.machine.tell_size()?;
        }
        if self.all(|device| !matches!(device, BootingDevice::Starting(_))) {
            self.machine.send_core(&ToCore::Run)?;
        }
        Ok(())
    }

    fn attached(&mut self, id: &protocol::DeviceId) -> Result<(), Ending> {
        let index = self.machine.spec.devices.iter().position(|device| device.id == *id);
        match index.and_then(|index| self.devices.get_mut(index)) {
            Some(device @ BootingDevice::Attaching) => {
                *device = BootingDevice::Attached;
                Ok(())
            }
            _ => Err(self.machine.unexpected(0, format!("Attached of {id}"))),
        }
    }

    fn awaited(&self) -> String {
        let waiting = self.devices.iter().position(|device| !device.is_attached());
        match waiting.and_then(|index| self.machine.spec.devices.get(index)) {
            Some(device) => format!("Attached of {}", device.id),
            None => "Running".to_owned(),
        }
    }
}

impl BootingDevice {
    fn is_attached(&self) -> bool {
        matches!(self, Self::Attached)
    }
}

impl Running<'_> {
    /// Watches over the machine until it ends.
    pub fn supervise(mut self) -> Ending {
        loop {
            let event = self.machine.processes.next(None);
            if let Err(ending) = self.machine.other(event, true) {
                self.machine.end(&ending);
                return ending;
            }
        }
    }
}

/// How much an ending explains; of several at the same time the one with the least number is told.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    /// The machine's own end, the user's wish, or the core's.
    Whole,
    /// A backend says why it cannot go on.
    BackendSays,
    /// A backend ended without a word.
    BackendDied,
    /// The core has lost a backend.
    CoreLost,
    /// A backend ended in good order, as each does when the core lets go of it.
    BackendLeft,
}

impl<'a> Machine<'a> {
    /// What an event means that no phase awaits: nothing, or the end.
    fn other(&mut self, event: Event, may_exit: bool) -> Result<(), Ending> {
        let event = match event {
            Event::Signal(Signal::SIGWINCH) => return self.tell_size(),
            Event::Message(place, Message::Backend(FromBackend::Resized))
                if self.size != Size::Taken && self.is_on_terminal(place) =>
            {
                return self.size_taken(place);
            }
            Event::Signal(Signal::SIGPWR) => return self.send_core(&ToCore::PowerButton),
            Event::Message(
                place,
                Message::Core(FromCore::Trace(marks)) | Message::Backend(FromBackend::Trace(marks)),
            ) if self.trace.is_wanted() => {
                self.trace.told(place, &marks);
                return Ok(());
            }
            event => event,
        };
        let Some((rank, ending)) = self.meaning(event, may_exit) else { return Ok(()) };
        // A restart of the backend alone takes the place of this when a device's process is what ended.
        Err(self.settle(rank, ending, may_exit))
    }

    /// The ending that an event means by itself.
    fn meaning(&self, event: Event, may_exit: bool) -> Option<(Rank, Ending)> {
        let process = |place: usize| self.processes.get(place).map(|child| child.process.clone());
        Some(match event {
            Event::Deadline | Event::Signal(Signal::SIGWINCH | Signal::SIGPWR) => return None,
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
                match self.spec.devices.iter().find(|known| known.id == device) {
                    Some(known) => {
                        let process = Process::Backend { kind: known.kind(), device };
                        let how = format!("the core lost it: {}", report::harmless(&reason));
                        (Rank::CoreLost, Ending::BackendDied { process, how })
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
            Event::Died(0, death) => (Rank::Whole, Ending::CoreDied(death)),
            Event::Died(place, death) => {
                let rank = if death.is_orderly() { Rank::BackendLeft } else { Rank::BackendDied };
                (rank, Ending::BackendDied { process: process(place)?, how: death.to_string() })
            }
        })
    }

    /// Waits a moment for what explains an ending better.
    fn settle(&mut self, mut rank: Rank, mut ending: Ending, may_exit: bool) -> Ending {
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

    /// Ends every process. What the machine said last is worth waiting for if it came to its end by itself.
    fn end(&mut self, ending: &Ending) {
        let consoles = (1..).zip(&self.resources.devices).filter(|(_, host)| matches!(host, HostDevice::Console(_)));
        // The core first: the consoles read the serial port's output to its end.
        let graced: Vec<usize> = std::iter::once(0).chain(consoles.map(|(place, _)| place)).collect();
        self.processes.end(if ending.is_orderly() { &graced } else { &[] }, GRACE);
    }

    fn is_on_terminal(&self, place: usize) -> bool {
        let device = self.resources.devices.get(place.wrapping_sub(1));
        matches!(device, Some(HostDevice::Console(Place::Terminal(_))))
    }

    /// Tells the console on the terminal how large that is, as soon as it has taken an earlier size.
    fn tell_size(&mut self) -> Result<(), Ending> {
        let Some((columns, rows)) = self.resources.terminal().and_then(Terminal::size) else { return Ok(()) };
        let Some(place) = (1..=self.resources.devices.len()).find(|place| self.is_on_terminal(*place)) else {
            return Ok(());
        };
        if self.size == Size::Taken {
            self.size = Size::Told;
            self.send_backend(place, &ToBackend::Resize { columns, rows })
        } else {
            self.size = Size::Outdated;
            Ok(())
        }
    }

    /// The console at `place` has taken its terminal's size: only now the core finds it there.
    fn size_taken(&mut self, place: usize) -> Result<(), Ending> {
        let told = std::mem::replace(&mut self.size, Size::Taken);
        if let Some(device) = self.spec.devices.get(place.wrapping_sub(1)) {
            self.send_core(&ToCore::ConfigChanged { device: device.id.clone() })?;
        }
        if told == Size::Outdated { self.tell_size() } else { Ok(()) }
    }

    fn send_core(&self, message: &ToCore) -> Result<(), Ending> {
        self.processes.send_core(message).map_err(|error| self.not_sent(0, error))
    }

    fn send_backend(&self, place: usize, message: &ToBackend) -> Result<(), Ending> {
        self.processes.send_backend(place, message).map_err(|error| self.not_sent(place, error))
    }

    fn not_sent(&self, place: usize, error: LinkError) -> Ending {
        let process = self.processes.name(place);
        match error {
            LinkError::WouldBlock => SupervisorError::Deaf { process }.into(),
            error => SupervisorError::Link { process, error }.into(),
        }
    }

    fn unexpected(&self, place: usize, what: impl fmt::Display) -> Ending {
        SupervisorError::Unexpected { process: self.processes.name(place), what: what.to_string() }.into()
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
        Message::Core(FromCore::Attached { .. } | FromCore::Running | FromCore::Trace(_))
            | Message::Backend(
                FromBackend::Ready | FromBackend::Resized | FromBackend::Resubmitted { .. } | FromBackend::Trace(_)
            )
    )
}

fn kind_of(message: &Message) -> &'static str {
    match message {
        Message::Core(FromCore::Attached { .. }) => "Attached",
        Message::Core(FromCore::Detached { .. }) => "Detached",
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
    }
}
