//! The executables that a machine consists of, and that none of its roles could have written.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};
use protocol::DeviceKind;

use super::{ResourceError, said};
use crate::process::Process;
use crate::spec::VmSpec;

/// Who may write a file besides its owner (inode(7)). Without the group's bit no entry of an access control list lets anyone
/// write either (acl(5)).
const OTHERS: u32 = 0o022;

/// `ozone` itself and the executables of the roles, opened with O_PATH; of the devices' only those that are needed.
#[derive(Debug)]
pub struct Executables {
    ozone: Executable,
    core: Executable,
    devices: Vec<(DeviceKind, Executable)>,
}

#[derive(Debug)]
struct Executable {
    fd: OwnedFd,
    path: PathBuf,
}

impl Executables {
    /// Opens what `spec` needs, all of it from the directory of `ozone`.
    ///
    /// # Errors
    /// [`ResourceError`] naming an executable that is not there, or that its group or everyone may write.
    pub fn open(spec: &VmSpec) -> Result<Self, ResourceError> {
        let own =
            fs::read_link("/proc/self/exe").map_err(|error| ResourceError::host("/proc/self/exe", said(&error)))?;
        let directory = own.parent().unwrap_or(Path::new("/"));
        let core = Executable::open("vmm-core", directory)?;
        let mut devices: Vec<(DeviceKind, Executable)> = Vec::new();
        for device in &spec.devices {
            let kind = device.kind();
            if devices.iter().all(|(other, _)| *other != kind) {
                devices.push((kind, Executable::open(&format!("ozone-{}", kind.role()), directory)?));
            }
        }
        Ok(Self { ozone: Executable::own(own)?, core, devices })
    }

    /// The executable of a process.
    pub fn of(&self, process: &Process) -> &OwnedFd {
        let wanted = match process {
            Process::Core => None,
            Process::Backend { kind, .. } => self.devices.iter().find(|(other, _)| other == kind),
        };
        &wanted.map_or(&self.core, |(_, executable)| executable).fd
    }

    /// All that are executed from now on.
    pub fn of_roles(&self) -> impl Iterator<Item = &OwnedFd> {
        self.devices.iter().map(|(_, executable)| executable).chain([&self.core]).map(|executable| &executable.fd)
    }

    /// Refuses those that belong to a uid of which `is_a_roles` says that the machine's processes have it.
    ///
    /// # Errors
    /// [`ResourceError`] naming the executable.
    pub fn refuse_those_of(&self, is_a_roles: impl Fn(u32) -> bool) -> Result<(), ResourceError> {
        let all = self.devices.iter().map(|(_, executable)| executable).chain([&self.core, &self.ozone]);
        for executable in all {
            let uid = executable.stat()?.st_uid;
            if is_a_roles(uid) {
                let problem =
                    format!("it belongs to uid {uid}, which a process of this machine has; give it to root with chown");
                return Err(executable.fault(problem));
            }
        }
        Ok(())
    }
}

impl Executable {
    fn open(name: &str, directory: &Path) -> Result<Self, ResourceError> {
        let path = directory.join(name);
        let advised = |problem: &str| {
            let advice = "the executables of one release belong into one directory";
            fault(&path, format!("{problem}; {advice}"))
        };
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let fd = open(&path, flags, Mode::empty()).map_err(|errno| advised(errno.desc()))?;
        let executable = Self { fd, path: path.clone() };
        if SFlag::from_bits_truncate(executable.stat()?.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
            return Err(advised("not a file"));
        }
        executable.refuse_open_to_others()
    }

    /// `ozone` itself, of which the path may lead elsewhere by now.
    fn own(path: PathBuf) -> Result<Self, ResourceError> {
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let fd = open("/proc/self/exe", flags, Mode::empty()).map_err(|errno| fault(&path, errno.desc().to_owned()))?;
        Self { fd, path }.refuse_open_to_others()
    }

    fn refuse_open_to_others(self) -> Result<Self, ResourceError> {
        let mode = self.stat()?.st_mode & 0o7777;
        if mode & OTHERS != 0 {
            let problem =
                format!("others than its owner may write it (mode {mode:04o}); take that away with chmod go-w");
            return Err(self.fault(problem));
        }
        Ok(self)
    }

    fn stat(&self) -> Result<FileStat, ResourceError> {
        fstat(&self.fd).map_err(|errno| self.fault(errno.desc().to_owned()))
    }

    fn fault(&self, problem: String) -> ResourceError {
        fault(&self.path, problem)
    }
}

fn fault(path: &Path, problem: String) -> ResourceError {
    ResourceError::host(format!("executable {}", path.display()), problem)
}
