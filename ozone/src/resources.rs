//! Every host path becomes a descriptor here and nowhere else, before any process starts.
//!
//! What is made for the run (taps, sockets, locks) lives as long as [`Resources`]; what belongs to one incarnation of a
//! process is made afresh by [`HostDevice::prepare`].

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::pipe2;
use protocol::{BlkSpec, ConsoleSpec, DeviceSpec, Fault, FaultKind, NetSpec};

use crate::directory::walk;
use crate::ioctl;
use crate::journal::{Journal, JournalError};
use crate::landlock::{self, Domain, Right};
use crate::process::Process;
use crate::report;
use crate::spec::{DeviceConfig, Given, Tap, VmSpec, size};
use crate::uids::Uids;

pub mod console;
pub mod disk;
mod executables;
pub mod status_file;
pub mod tap;
pub mod terminal;

use executables::Executables;

/// Why something of the host cannot be had: whose doing it is, which argument or thing, and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{subject}: {problem}")]
pub struct ResourceError {
    kind: FaultKind,
    subject: String,
    problem: String,
}

impl ResourceError {
    /// The argument `subject` cannot be what it is.
    fn input(subject: impl fmt::Display, problem: impl Into<String>) -> Self {
        Self { kind: FaultKind::Input, subject: subject.to_string(), problem: problem.into() }
    }

    /// The host lacks something.
    fn host(subject: impl fmt::Display, problem: impl Into<String>) -> Self {
        Self { kind: FaultKind::Host, subject: subject.to_string(), problem: problem.into() }
    }
}

impl From<JournalError> for ResourceError {
    fn from(error: JournalError) -> Self {
        let Fault { kind, message } = Fault::from(error);
        Self { kind, subject: "journal".to_owned(), problem: message }
    }
}

impl From<ResourceError> for Fault {
    fn from(error: ResourceError) -> Self {
        Fault { kind: error.kind, message: error.to_string() }
    }
}

/// What an I/O error says, without the number that the standard library adds.
pub(crate) fn said(error: &io::Error) -> String {
    error.raw_os_error().map_or_else(|| error.to_string(), |errno| Errno::from_raw(errno).desc().to_owned())
}

/// Everything of the host that a machine uses.
#[derive(Debug)]
pub struct Resources {
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// The kernel image.
    pub kernel: OwnedFd,
    /// The initial ramdisk.
    pub initrd: Option<OwnedFd>,
    /// `/dev/null`.
    pub null: OwnedFd,
    /// The host side of each device, in the order of the spec.
    pub devices: Vec<HostDevice>,
    executables: Executables,
}

/// The host side of one device.
#[derive(Debug)]
pub enum HostDevice {
    /// A disk's image.
    Disk(disk::Image),
    /// A network interface's tap.
    Net(tap::Taps),
    /// Where a console's bytes go.
    Console(console::Place),
}

/// What the next process of a device is handed, if nothing that an earlier one began is in its way.
#[derive(Debug)]
pub struct Prepared {
    image: Option<disk::Fresh>,
}

impl Prepared {
    /// Whether nothing is in its way any more; asked again and again until then.
    ///
    /// # Errors
    /// [`ResourceError`] when the host cannot say.
    pub fn is_free(&self) -> Result<bool, ResourceError> {
        self.image.as_ref().map_or(Ok(true), disk::Fresh::is_drained)
    }
}

/// A device for one process, and what tells when everything that this process began has ended.
#[derive(Debug)]
pub struct Incarnation {
    /// What the process serves.
    pub spec: DeviceSpec,
    /// The read end of a pipe that only this process, and what it has asked the kernel for, holds the other end of.
    pub sentinel: Option<OwnedFd>,
}

impl HostDevice {
    /// Makes ready what belongs to one process alone.
    ///
    /// # Errors
    /// [`ResourceError`] when the host no longer gives what it gave before.
    pub fn prepare(&self) -> Result<Prepared, ResourceError> {
        let image = match self {
            Self::Disk(image) => Some(image.fresh()?),
            Self::Net(_) | Self::Console(_) => None,
        };
        Ok(Prepared { image })
    }

    /// What a process is handed: what was prepared for it, once that is free. `serial` goes to a console, `pairs` are those
    /// that the driver of a network interface uses; a `successor` comes after another process of the same machine.
    ///
    /// # Errors
    /// [`ResourceError`] for want of descriptors.
    pub fn hand_over(
        &self,
        prepared: Prepared,
        serial: Option<OwnedFd>,
        pairs: u16,
        successor: bool,
    ) -> Result<Incarnation, ResourceError> {
        let copy =
            |fd: &OwnedFd| fd.try_clone().map_err(|error| ResourceError::host("duplicate a descriptor", said(&error)));
        let spec = match (self, prepared.image) {
            (Self::Disk(image), Some(fresh)) => {
                let (reader, writer) =
                    pipe2(OFlag::O_CLOEXEC).map_err(|errno| ResourceError::host("make a pipe", errno.desc()))?;
                let spec = DeviceSpec::Blk(BlkSpec {
                    image: fresh.into_fd().into(),
                    sentinel: writer.into(),
                    direct: image.direct,
                    successor,
                    read_only: image.read_only,
                    serial: image.serial.clone(),
                    queues: image.queues,
                });
                return Ok(Incarnation { spec, sentinel: Some(reader) });
            }
            (Self::Disk(_), None) => return Err(ResourceError::host("a disk", "was not prepared")),
            (Self::Net(taps), _) => DeviceSpec::Net(NetSpec {
                taps: taps.queues.iter().map(|queue| copy(queue).map(Into::into)).collect::<Result<_, _>>()?,
                pairs,
                mac: taps.mac,
                mtu: taps.mtu,
            }),
            (Self::Console(place), _) => {
                DeviceSpec::Console(ConsoleSpec { host: place.host(copy)?, serial: serial.map(Into::into) })
            }
        };
        Ok(Incarnation { spec, sentinel: None })
    }

    /// The most queue pairs of a network interface; 1 for what is none.
    pub fn most_pairs(&self) -> u16 {
        match self {
            Self::Net(taps) => u16::try_from(taps.queues.len()).unwrap_or(u16::MAX),
            Self::Disk(_) | Self::Console(_) => 1,
        }
    }

    /// What is said when something stays in the way.
    pub fn draining(&self, seconds: u64) -> Option<ResourceError> {
        match self {
            Self::Disk(image) => Some(image.draining(seconds)),
            Self::Net(_) | Self::Console(_) => None,
        }
    }
}

impl Resources {
    /// Opens everything that `spec` names. What changes the host (sockets, taps) comes last.
    ///
    /// # Errors
    /// [`ResourceError`] naming the argument; nothing is left behind.
    pub fn open(spec: &VmSpec, journal: &Journal) -> Result<Self, ResourceError> {
        let kernel = open_image(&spec.kernel)?;
        let initrd = spec.initrd.as_ref().map(open_image).transpose()?;
        let images = disk::open_all(spec)?;
        check_memory(spec)?;
        let kvm = open_kvm(spec)?;
        let null = File::options().read(true).write(true).open("/dev/null");
        let null = null.map_err(|error| ResourceError::host("/dev/null", said(&error)))?;
        let executables = Executables::open(spec)?;

        let mut images = images.into_iter();
        let mut devices = Vec::new();
        for device in &spec.devices {
            let host = match &device.config {
                DeviceConfig::Disk(_) => images.next().map(HostDevice::Disk),
                DeviceConfig::Net(net) => Some(HostDevice::Net(tap::open(net, &device.argument, journal)?)),
                DeviceConfig::Console(place) => {
                    Some(HostDevice::Console(console::open(place, &device.argument, journal)?))
                }
            };
            devices.extend(host);
        }
        Ok(Self { kvm, kernel, initrd, null: null.into(), devices, executables })
    }

    /// What is opened again for a device's next process, or removed at the end.
    ///
    /// # Errors
    /// See [`Domain::allow`].
    pub fn allow(&self, domain: &mut Domain) -> Result<(), Errno> {
        for executable in self.executables.of_roles() {
            domain.allow(executable, landlock::execution())?;
        }
        for device in &self.devices {
            match device {
                HostDevice::Disk(image) if image.read_only => domain.allow(image, Right::ReadFile)?,
                HostDevice::Disk(image) => domain.allow(image, Right::ReadFile | Right::WriteFile)?,
                HostDevice::Console(console::Place::Socket(listener)) => listener.allow(domain)?,
                HostDevice::Net(_) | HostDevice::Console(_) => {}
            }
        }
        Ok(())
    }

    /// The executable of a process.
    pub fn executable(&self, process: &Process) -> &OwnedFd {
        self.executables.of(process)
    }

    /// Refuses executables that belong to one of the uids that the machine's processes have.
    ///
    /// # Errors
    /// [`ResourceError`] naming the executable.
    pub fn refuse_executables_of(&self, uids: &Uids) -> Result<(), ResourceError> {
        self.executables.refuse_those_of(|uid| uids.has(uid))
    }

    /// Says what was made for the run and cannot be known beforehand.
    pub fn announce(&self, spec: &VmSpec) {
        for (device, host) in spec.devices.iter().zip(&self.devices) {
            let role = device.kind().role();
            match (host, &device.config) {
                (HostDevice::Console(console::Place::Pty { path, .. }), _) => {
                    report::say(&format!("[{role}/{}] on {path}", device.id));
                }
                (HostDevice::Net(taps), DeviceConfig::Net(net)) if matches!(net.tap, Tap::Made(_)) => {
                    report::say(&format!("[{role}/{}] on the new tap {}", device.id, taps.name));
                }
                _ => {}
            }
        }
    }

    /// The user's terminal, if a console is on it.
    pub fn terminal(&self) -> Option<&terminal::Terminal> {
        self.devices.iter().find_map(|device| match device {
            HostDevice::Console(console::Place::Terminal(terminal)) => Some(terminal),
            _ => None,
        })
    }
}

/// Opens the file of `--boot-trace`.
///
/// # Errors
/// [`ResourceError`] naming the option.
pub fn trace_file(path: Option<&str>) -> Result<Option<File>, ResourceError> {
    let Some(path) = path else { return Ok(None) };
    let wrong = |problem: String| ResourceError::input(format_args!("--boot-trace {}", path.escape_debug()), problem);
    let mode = Mode::from_bits_truncate(0o666);
    let file =
        walk::open_for_writing(Path::new(path), OFlag::empty(), mode).map_err(|error| wrong(error.to_string()))?;
    match file.metadata() {
        Ok(metadata) if metadata.is_file() => {}
        Ok(_) => return Err(wrong("is not a plain file".to_owned())),
        Err(error) => return Err(wrong(said(&error))),
    }
    // Not before it is known what it is.
    file.set_len(0).map_err(|error| wrong(said(&error)))?;
    Ok(Some(file))
}

/// Opens a kernel or an initial ramdisk. What is in it is for the jailed core to find out.
fn open_image(path: &Given<std::path::PathBuf>) -> Result<OwnedFd, ResourceError> {
    let wrong = |problem: String| ResourceError::input(path.argument.escape_debug(), problem);
    // Looked at before it is opened: the open of a FIFO waits for a writer, that of a device can do anything.
    let found = File::from(walk::hold(&path.value).map_err(|error| wrong(error.to_string()))?);
    let metadata = found.metadata().map_err(|error| wrong(said(&error)))?;
    if metadata.is_dir() {
        return Err(wrong("is a directory, not a file".to_owned()));
    }
    if !metadata.is_file() {
        let what = if metadata.file_type().is_fifo() { "a pipe" } else { "a device or socket" };
        return Err(wrong(format!("is {what}, not a file")));
    }
    if metadata.len() == 0 {
        return Err(wrong("is empty".to_owned()));
    }
    reopen(&found, OFlag::O_RDONLY).map_err(|errno| wrong(errno.desc().to_owned()))
}

fn check_memory(spec: &VmSpec) -> Result<(), ResourceError> {
    let host = nix::sys::sysinfo::sysinfo().map_err(|errno| ResourceError::host("sysinfo", errno.desc()))?.ram_total();
    if spec.memory.value.size > host {
        let total = size::rounded(host);
        return Err(ResourceError::input(&spec.memory.argument, format!("more than the {total} that this host has")));
    }
    Ok(())
}

fn open_kvm(spec: &VmSpec) -> Result<OwnedFd, ResourceError> {
    /// The one version there is (KVM API, KVM_GET_API_VERSION).
    const API: i32 = 12;
    let host = |problem: String| ResourceError::host("/dev/kvm", problem);
    let file = File::options().read(true).write(true).open("/dev/kvm").map_err(|error| {
        host(match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOENT | Errno::ENODEV | Errno::ENXIO) => {
                "this host has no KVM: enable virtualization in its firmware and load the module kvm_intel or kvm_amd"
                    .to_owned()
            }
            Some(Errno::EACCES | Errno::EPERM) => {
                format!("user {} has no rights on it: add the user to the group kvm", nix::unistd::geteuid())
            }
            _ => said(&error),
        })
    })?;
    let kvm = ioctl::kvm(&file).map_err(|error| host(said(&error)))?;
    match kvm.get_api_version() {
        API => {}
        -1 => return Err(host("it does not answer as KVM does: is it the device of the kvm module?".to_owned())),
        other => return Err(host(format!("KVM of API version {other}, where {API} is needed"))),
    }
    let most = kvm.get_max_vcpus();
    if usize::from(spec.cpus.value.max) > most {
        let problem = format!("this host's KVM supports at most {most} processors in a machine");
        return Err(ResourceError::input(&spec.cpus.argument, problem));
    }
    Ok(file.into())
}

/// Opens anew what a descriptor stands for, with an open file description of its own.
pub(crate) fn reopen(fd: impl AsFd, flags: OFlag) -> Result<OwnedFd, Errno> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    open(path.as_str(), flags | OFlag::O_CLOEXEC | OFlag::O_NOCTTY, Mode::empty())
}
