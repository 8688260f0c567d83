//! One incarnation of a machine, from no process to no process. A launch is a restart from nothing.
//!
//! [`Spawned`] → [`Booting`] → [`Running`]: each phase is a type that holds all children and ends them when it is dropped.
//! The supervisor has one thread and never waits for a child: every send either succeeds at once or ends the child, and
//! everything awaited has a deadline.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use protocol::{Boot, Fault, FaultKind, FromBackend, FromCore, LinkError, Slot, ToCore};

use crate::cgroup::Cgroups;
use crate::control::server::Server;
use crate::exit::Ending;
use crate::jail::{Ground, JailError};
use crate::notify::Notify;
use crate::process::Process;
use crate::resources::{ResourceError, Resources};
use crate::spec::VmSpec;
use crate::spec::policy::{OnFail, Restart};
use crate::trace::Trace;
use crate::uids::Uids;

mod backoff;
mod device;
mod drain;
mod ending;
mod events;
mod heartbeat;
mod log_pipe;
mod machine;
mod processes;
mod requests;
mod restart;
mod signals;
mod spawn;
mod telling;

pub use backoff::Backoff;
pub use device::Tallies;
use machine::Machine;
use processes::{Child, Event, Message};
pub use signals::Signals;
use spawn::Entered;

/// How long a child may take to become its executable.
const JAIL_PATIENCE: Duration = Duration::from_secs(10);

/// How long backends may take to be ready.
const READY_PATIENCE: Duration = Duration::from_secs(10);

/// How long the machine may take to run: reading a kernel on an emulated host is slow.
const BOOT_PATIENCE: Duration = Duration::from_secs(30);

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

/// What a machine runs with, from one reset of its guest to the next.
#[derive(Clone, Copy, Debug)]
pub struct Setting<'a> {
    /// Whether a guest has run with it before.
    pub again: bool,
    /// What it is.
    pub spec: &'a VmSpec,
    /// All of the host that it uses.
    pub resources: &'a Resources,
    /// The users of its processes.
    pub uids: &'a Uids,
    /// What their jails stand on.
    pub ground: &'a Ground,
    /// The control groups of its processes.
    pub cgroups: &'a Cgroups,
    /// Signals to `ozone`.
    pub signals: &'a Signals,
    /// Where it is spoken to from outside, if it has a name.
    pub server: Option<&'a Server>,
    /// The service manager, if there is one.
    pub notify: &'a Notify,
    /// What happens to its devices.
    pub tallies: &'a Tallies,
    /// Who did what, if that is wanted.
    pub trace: &'a Trace,
}

impl Setting<'_> {
    /// Whether the machine goes on when this process is lost.
    pub fn outlives(&self, process: &Process) -> bool {
        let Process::Backend { device, .. } = process else { return false };
        let lost = self.spec.devices.iter().find(|known| known.id == *device);
        lost.is_some_and(|lost| lost.policy.on_fail != OnFail::StopVm && lost.policy.restart != Restart::Never)
    }
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
    pub fn launch(setting: Setting<'a>) -> Result<Self, Ending> {
        let Setting { spec, trace, .. } = setting;
        // All of them at once: making namespaces takes the kernel a while, and the children do not need each other.
        let mut entering = Vec::new();
        for place in 0..=spec.devices.len() {
            let start = trace.now();
            let entered = spawn::enter(&setting, place, trace.is_wanted())?;
            trace.done(start, &format_args!("start {}", entered.process));
            entering.push(entered);
        }
        let start = trace.now();
        let mut children = Vec::new();
        for Entered { process, child, link, log } in entering {
            let jailed = child.wait(JAIL_PATIENCE).map_err(SupervisorError::from)?;
            children.push(Child::new(process, jailed, link, log));
        }
        trace.done(start, &"await jails");
        trace.begin();
        for child in &children {
            child.trace(trace);
        }
        Ok(Self { machine: Machine::new(setting, children) })
    }

    /// Tells the core what machine to make and every backend what to serve.
    ///
    /// # Errors
    /// The [`Ending`] this means; no process is left.
    pub fn boot(mut self) -> Result<Booting<'a>, Ending> {
        let Setting { spec, resources, trace, .. } = self.machine.setting;
        let begin = trace.now();
        let (serial_out, serial_in) = pipe2(OFlag::O_CLOEXEC).map_err(spawn::make("pipe", &Process::Core))?;
        let duplicate = |fd: &OwnedFd| {
            let failed = spawn::make("duplicate a descriptor", &Process::Core);
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

        self.machine.serial = Some(serial_out);
        let mut prepared = Vec::new();
        for host in &resources.devices {
            prepared.push(self.machine.prepare(host)?);
        }
        let mut devices = Vec::new();
        for (place, prepared) in (1..).zip(prepared) {
            let core = self.machine.start_device(place, prepared, false)?;
            devices.push(BootingDevice::Starting(core));
        }
        trace.done(begin, &"send first messages");
        Ok(Booting { machine: self.machine, devices, started: Instant::now() })
    }
}

impl<'a> Booting<'a> {
    /// Attaches each device as its backend is ready, and starts the vCPUs when all are.
    ///
    /// # Errors
    /// The [`Ending`] this means; no process is left.
    pub fn attach(mut self) -> Result<Running<'a>, Ending> {
        let start = self.machine.setting.trace.now();
        let outcome = self.until_running();
        self.machine.setting.trace.done(start, &"await running");
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
        let (Some(device), Some(spec)) = (device, self.machine.setting.spec.devices.get(index)) else {
            return Err(self.machine.unexpected(place, "Ready"));
        };
        match std::mem::replace(device, BootingDevice::Attaching) {
            BootingDevice::Starting(socket) => self.machine.attach(spec, socket)?,
            _ => return Err(self.machine.unexpected(place, "a second Ready")),
        }
        if self.machine.is_on_terminal(place) {
            self.machine.tell_size()?;
        }
        if self.all(|device| !matches!(device, BootingDevice::Starting(_))) {
            self.machine.send_core(&ToCore::Run)?;
        }
        Ok(())
    }

    fn attached(&mut self, id: &protocol::DeviceId) -> Result<(), Ending> {
        let index = self.machine.setting.spec.devices.iter().position(|device| device.id == *id);
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
        match waiting.and_then(|index| self.machine.setting.spec.devices.get(index)) {
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
        let Err(ending) = self.machine.run();
        self.machine.end(&ending);
        ending
    }
}
