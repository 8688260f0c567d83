//! What the jails of a machine stand on. It is made once, before `ozone` confines itself and cannot make it any more.
//!
//! As root this is a mount namespace with nothing in it but an empty read-only root. A process in a Landlock domain may not
//! mount, and neither may its children; but it may enter such a namespace and copy it.

use std::convert::Infallible;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::libc;
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Pid, setresgid};

use super::steps::{self, Planned, Report};
use super::{Identity, JailError, Jailed, Root, clone, procfs, sys, user};
use crate::landlock::{self, BitFlags, Domain, Right};
use crate::report;

/// How long the process that makes the empty root may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the running kernel offers of the layers that not every host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layers {
    /// Time namespaces (CONFIG_TIME_NS).
    pub time: bool,
    /// User namespaces.
    pub user: bool,
    /// Landlock.
    pub landlock: bool,
}

/// What all children of a machine share.
#[derive(Debug)]
pub struct Ground {
    /// A `/proc` that has processes and nothing else.
    proc: OwnedFd,
    /// The mount namespace with the empty root; an ordinary user's children each make their own.
    root: Option<OwnedFd>,
    layers: Layers,
}

impl Ground {
    /// Makes it; `identity` is that of one of the children.
    ///
    /// # Errors
    /// [`JailError::Ground`] names the step that failed; nothing is left behind.
    pub fn make(identity: Identity) -> Result<Self, JailError> {
        let failed = |step| move |errno| JailError::Ground { step, errno };
        let layers =
            Layers { time: Path::new("/proc/self/ns/time").exists(), user: true, landlock: landlock::is_available() };
        let Identity::Own(id) = identity else {
            // In its user namespace it could mount no /proc of the pid namespace that ozone is in.
            return Ok(Self { proc: host_proc().map_err(failed("open /proc"))?, root: None, layers });
        };
        // Where the host's own has something mounted over it, as in a container, no other can be had.
        let (proc, writable) = match sys::processes() {
            Ok(proc) => (proc, true),
            Err(_) => (host_proc().map_err(failed("open /proc"))?, false),
        };
        let (root, user) = make_root(proc.as_fd(), id)?;
        let layers = Layers { user: user && writable, ..layers };
        Ok(Self { proc, root: Some(root), layers })
    }

    /// Says which layers this host does not have.
    pub fn announce(&self) {
        let lacks = |what: &str, why: &str| report::say(&format!("this host has no {what}: {why}"));
        if !self.layers.landlock {
            lacks("Landlock", "file systems are out of reach by mount namespaces and filters alone");
        }
        if !self.layers.time {
            lacks("time namespaces", "the processes see how long it is up");
        }
        if !self.layers.user {
            lacks("user namespaces for root's machines", "see user.max_user_namespaces in sysctl");
        }
    }

    /// What is read of the children, and what they write of themselves.
    ///
    /// # Errors
    /// See [`Domain::allow`].
    pub fn allow(&self, domain: &mut Domain) -> Result<(), Errno> {
        let written = if self.layers.user { Right::WriteFile.into() } else { BitFlags::empty() };
        domain.allow(&self.proc, written | Right::ReadFile)
    }

    /// Whether a debugger holds a process (proc_pid_status(5), TracerPid).
    pub fn is_traced(&self, pid: Pid) -> bool {
        procfs::status(self.proc.as_fd(), &pid.to_string(), "TracerPid").is_some_and(|tracer| tracer != "0")
    }

    /// Where a child's root comes from.
    pub fn root(&self) -> Root<'_> {
        self.root.as_ref().map_or(Root::Fresh, |root| Root::Made(root.as_fd()))
    }

    /// What the kernel offers.
    pub fn layers(&self) -> Layers {
        self.layers
    }
}

impl AsFd for Ground {
    /// The `/proc` of processes.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.proc.as_fd()
    }
}

fn host_proc() -> Result<OwnedFd, Errno> {
    open("/proc", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
}

/// Has a process make the namespace, and try whether it can have a user namespace as `id` too; it is gone afterwards.
fn make_root(proc: BorrowedFd<'_>, id: u32) -> Result<(OwnedFd, bool), JailError> {
    let failed = |step| move |errno| JailError::Ground { step, errno };
    let io = |error: std::io::Error| error.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw);
    if procfs::threads(proc) != 1 {
        return Err(failed("clone3, with one thread")(Errno::EBUSY));
    }
    let (ours, theirs) = UnixStream::pair().map_err(|error| failed("socketpair")(io(error)))?;
    for end in [&ours, &theirs] {
        end.set_read_timeout(Some(PATIENCE)).map_err(|error| failed("setsockopt")(io(error)))?;
    }
    let steps = steps::empty_root();
    let flags = u64::from(libc::CLONE_NEWNS.unsigned_abs());
    let child = || maker(&steps, &theirs, proc, id);
    let (pid, pidfd) = clone::into_namespaces(flags, None, child).map_err(failed("clone3"))?;
    // Dropped, and the process with it, on every way out.
    let _maker = Jailed { pid, pidfd, status: None, steps: Vec::new() };
    // Its end is read as one.
    drop(theirs);
    let told = || -> Result<Report, JailError> {
        let mut bytes = [0; steps::REPORT];
        (&ours).read_exact(&mut bytes).map_err(|error| failed("await its maker")(io(error)))?;
        Report::parse(&bytes).ok_or(failed("await its maker")(Errno::EPROTO))
    };
    if let Report { index, errno: Some(errno), .. } = told()? {
        let step = steps.get(index).map_or("an unknown step", |planned| planned.step.name());
        return Err(failed(step)(errno));
    }
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let root = openat(proc, format!("{pid}/ns/mnt").as_str(), flags, Mode::empty());
    let root = root.map_err(failed("open its namespace"))?;
    (&ours).write_all(b"\n").map_err(|error| failed("release its maker")(io(error)))?;
    Ok((root, told()?.errno.is_none()))
}

/// The process that makes the namespace: it says so, waits until it is held, and tries the other thing.
fn maker(steps: &[Planned<'_>], link: &UnixStream, proc: BorrowedFd<'_>, id: u32) -> Infallible {
    let tell = |index, errno| {
        let mut link = link;
        let _ = link.write_all(&Report { index, errno, at: 0 }.to_bytes());
    };
    // It has a copy of the other end too, so that it would not read of the end of ozone.
    if let Err(errno) = prctl::set_pdeathsig(Signal::SIGKILL) {
        tell(steps.len(), Some(errno));
        sys::exit_at_once();
    }
    for (index, planned) in steps.iter().enumerate() {
        if let Err(errno) = steps::perform(&planned.step, link.as_fd()) {
            tell(index, Some(errno));
            sys::exit_at_once();
        }
    }
    tell(steps.len(), None);
    let mut link = link;
    if link.read(&mut [0]).is_ok_and(|length| length == 1) {
        let gid = Gid::from_raw(id);
        tell(steps.len(), setresgid(gid, gid, gid).and_then(|()| user::namespace(proc, id)).err());
    }
    sys::exit_at_once()
}
