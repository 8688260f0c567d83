//! The jail: what a child of `ozone` may still do is decided here, before its first instruction.
//!
//! [`Plan`] is plain data; [`steps::list`] makes the straight list of steps of it, with the reason beside each;
//! one function runs the list in the child between clone3 and execveat. A failing step is reported to the
//! parent by its index and errno over a pipe that closes by itself when execveat succeeds.
//! If a trace is wanted, so is every step that succeeds. `ozone jail` makes a list of its own ([`Birth`]).

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{Pid, pipe2};
use seccompiler::BpfProgram;

use protocol::Fault;
use protocol::trace::now;

use crate::process::Process;

mod clone;
mod ground;
pub mod limits;
mod procfs;
pub mod steps;
mod sys;
mod user;

pub use ground::{Ground, Layers};
use limits::Limit;
use steps::{Described, Planned, Report};
pub(crate) use sys::{mount_over_root, set_securebits, tmpfs};

/// Who the child is to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// `ozone` runs as root: a uid and an equal gid that no other process of the host has.
    Own(u32),
    /// `ozone` runs as an ordinary user: its own uid and gid, seen inside a user namespace as 65534.
    Mapped {
        /// The effective uid of `ozone`.
        uid: u32,
        /// The effective gid of `ozone`.
        gid: u32,
    },
}

/// Where a child's empty root comes from.
#[derive(Clone, Copy, Debug)]
pub enum Root<'a> {
    /// A mount namespace that holds nothing else, made once for all children ([`Ground`]).
    Made(BorrowedFd<'a>),
    /// The child makes it of a copy of the host's mounts.
    Fresh,
}

impl Identity {
    /// Its uid on the host.
    pub fn uid(self) -> u32 {
        match self {
            Self::Own(uid) | Self::Mapped { uid, .. } => uid,
        }
    }
}

/// Everything that is decided about one child before it exists.
#[derive(Debug)]
pub struct Plan<'a> {
    /// Its name: the first argument, and the subject of every message about it.
    pub process: Process,
    /// The executable, static, opened with O_PATH.
    pub executable: BorrowedFd<'a>,
    /// Who it is to the host.
    pub identity: Identity,
    /// What the kernel offers.
    pub layers: Layers,
    /// Where its root comes from.
    pub root: Root<'a>,
    /// A `/proc` of the pid namespace that `ozone` is in, where a process writes its own user map.
    pub proc: BorrowedFd<'a>,
    /// The directory of the control group that it is born in; without one it is in that of `ozone`.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// Its resource limits.
    pub limits: Vec<Limit>,
    /// The seccomp filters, in the order of their installation.
    pub filters: Vec<BpfProgram>,
    /// `/dev/null`, for descriptors 0 and 1.
    pub null: BorrowedFd<'a>,
    /// The write end of the log pipe, for descriptor 2.
    pub log: BorrowedFd<'a>,
    /// The child's end of the control channel, for descriptor 3.
    pub control: BorrowedFd<'a>,
    /// Whether the child reports when each step was done.
    pub trace: bool,
}

/// Why a child could not be put in its jail.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// Another thread could hold a lock of the C library in the moment of the clone.
    #[error("jail of {process}: ozone has {threads} threads where one is allowed")]
    Threads {
        /// The child.
        process: String,
        /// How many there are.
        threads: usize,
    },
    /// The pipe for the report of failures could not be made.
    #[error("jail of {process}: make a pipe: {errno}")]
    Pipe {
        /// The child.
        process: String,
        /// What pipe2(2) says.
        errno: Errno,
    },
    /// clone3(2) failed.
    #[error("jail of {process}: clone3 into new namespaces: {errno}{}", clone_remedy(*.errno))]
    Clone {
        /// The child.
        process: String,
        /// What clone3(2) says.
        errno: Errno,
    },
    /// What all children share could not be made.
    #[error("empty root for all jails: {step}: {errno}{}", steps::remedy(.step, *.errno))]
    Ground {
        /// The step's name.
        step: &'static str,
        /// What the system call says.
        errno: Errno,
    },
    /// A step failed in the child.
    #[error("jail of {process}: {step}: {errno}{remedy}")]
    Step {
        /// The child.
        process: String,
        /// The step's name, and what it is about.
        step: String,
        /// What the system call says.
        errno: Errno,
        /// What to do about it, where something can be done.
        remedy: String,
    },
    /// The child neither ran its executable nor said why not.
    #[error("jail of {process}: no answer within {} s", .after.as_secs())]
    Silent {
        /// The child.
        process: String,
        /// How long it was waited for.
        after: Duration,
    },
}

impl From<JailError> for Fault {
    fn from(error: JailError) -> Self {
        Fault::host(error.to_string())
    }
}

fn clone_remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::EPERM | Errno::ENOSPC | Errno::EUSERS => {
            " (this user may not make user namespaces: see user.max_user_namespaces and \
             kernel.unprivileged_userns_clone in sysctl, or run ozone as root)"
        }
        Errno::EAGAIN => " (pids.max of its cgroup or one above it is reached, or RLIMIT_NPROC)",
        Errno::ENODEV => " (its cgroup was removed)",
        Errno::ENOSYS => " (ozone needs Linux 5.14 or later, and a container runtime that permits clone3)",
        _ => "",
    }
}

/// A child that has been cloned and is on its way through the steps. Dropping it ends it.
#[derive(Debug)]
pub struct Entering {
    jailed: Jailed,
    progress: Progress,
}

/// How far a child is with the steps. Its descriptor is readable when there is news.
#[derive(Debug)]
pub struct Progress {
    process: String,
    steps: Vec<Described>,
    status: File,
    /// When the last step was done, if a trace is wanted.
    last: u64,
    /// The steps that were done, from when until when, likewise.
    done: Vec<(&'static str, u64, u64)>,
}

/// A child in its jail, running its own executable. Dropping it ends it.
#[derive(Debug)]
pub struct Jailed {
    pid: Pid,
    /// Names the process for as long as it is held (pidfd_open(2)), so that no other can be meant.
    pidfd: OwnedFd,
    status: Option<WaitStatus>,
    /// What it did before its executable, from when until when; empty unless a trace is wanted.
    steps: Vec<(&'static str, u64, u64)>,
}

/// How long a killed child may take to be gone. It may be waiting for a device of the host.
const KILL_PATIENCE: Duration = Duration::from_secs(5);

/// A child as a list of steps.
#[derive(Debug)]
pub struct Birth<'a> {
    /// Its name, the subject of every message about it.
    pub name: String,
    /// A `/proc` of the pid namespace that `ozone` is in.
    pub proc: BorrowedFd<'a>,
    /// The namespaces that it is born into (flags of clone3(2)).
    pub namespaces: u64,
    /// The directory of the control group that it is born in; without one it is in that of `ozone`.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// What it does to itself, the last of which is to become its executable.
    pub steps: Vec<Planned<'a>>,
    /// Whether the child reports when each step was done.
    pub trace: bool,
}

/// Clones a child that walks through the steps of `plan` and then becomes its executable.
///
/// # Errors
/// [`JailError`], without a child left behind.
pub fn spawn(plan: &Plan<'_>) -> Result<Entering, JailError> {
    bear(Birth {
        name: plan.process.to_string(),
        proc: plan.proc,
        namespaces: steps::namespaces(plan),
        cgroup: plan.cgroup,
        steps: steps::list(plan),
        trace: plan.trace,
    })
}

/// Clones a child that walks through its steps.
///
/// # Errors
/// [`JailError`], without a child left behind.
pub fn bear(birth: Birth<'_>) -> Result<Entering, JailError> {
    let Birth { name: process, proc, namespaces, cgroup, steps, trace } = birth;
    // The child runs ordinary code, the allocator included, between clone3 and execveat. That is sound exactly when
    // no other thread can be in the middle of anything at the moment of the clone.
    let threads = procfs::threads(proc);
    if threads != 1 {
        return Err(JailError::Threads { process, threads });
    }
    let (reader, writer) = match pipe2(OFlag::O_CLOEXEC) {
        Ok(pipe) => pipe,
        Err(errno) => return Err(JailError::Pipe { process, errno }),
    };
    let cloned = if trace { now() } else { 0 };
    let child = || steps::run(trace, &steps, writer.as_fd());
    let (pid, pidfd) = match clone::into_namespaces(namespaces, cgroup, child) {
        Ok(born) => born,
        Err(errno) => return Err(JailError::Clone { process, errno }),
    };
    let jailed = Jailed { pid, pidfd, status: None, steps: Vec::new() };
    let steps = steps.iter().map(|planned| planned.step.described()).collect();
    let progress = Progress { process, steps, status: File::from(reader), last: cloned, done: Vec::new() };
    Ok(Entering { jailed, progress })
}

impl Entering {
    /// Waits until the child has become its executable.
    ///
    /// # Errors
    /// [`JailError::Step`] names the step that failed. The child is gone then.
    pub fn wait(mut self, patience: Duration) -> Result<Jailed, JailError> {
        let deadline = Instant::now() + patience;
        loop {
            if !readable(self.progress.as_fd(), deadline) {
                return Err(JailError::Silent { process: self.progress.process, after: patience });
            }
            if let Some(outcome) = self.progress.look() {
                outcome?;
                self.jailed.steps = self.progress.done;
                return Ok(self.jailed);
            }
        }
    }

    /// The child, and how far it is, for someone who has more to wait for.
    pub fn follow(self) -> (Jailed, Progress) {
        (self.jailed, self.progress)
    }
}

impl Progress {
    /// Takes the news that are there. Nothing while the child is on its way; then whether it has become its executable.
    pub fn look(&mut self) -> Option<Result<(), JailError>> {
        while readable(self.status.as_fd(), Instant::now()) {
            // A report is one write and as long as this read, so it is read whole.
            let mut report = [0; steps::REPORT];
            let length = match self.status.read(&mut report) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                other => other.unwrap_or(0),
            };
            let Some(Report { index, errno, at }) = Report::parse(report.get(..length).unwrap_or_default()) else {
                return Some(Ok(()));
            };
            let step = index.checked_sub(1).and_then(|index| self.steps.get(index));
            if let Some(errno) = errno {
                let title = step.map_or_else(|| "an unknown step".to_owned(), Described::title);
                let remedy = step.map(|step| step.remedy(errno)).unwrap_or_default();
                return Some(Err(JailError::Step { process: self.process.clone(), step: title, errno, remedy }));
            }
            // 0 is the child's birth.
            let name = if index == 0 { "clone3" } else { step.map_or("an unknown step", |step| step.name) };
            self.done.push((name, std::mem::replace(&mut self.last, at), at));
        }
        None
    }
}

impl AsFd for Progress {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.status.as_fd()
    }
}

impl Jailed {
    /// The process id, for messages and /proc only: signals go through the descriptor.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// What it did before its executable, from when until when; nothing unless a trace is wanted.
    pub fn steps(&self) -> &[(&'static str, u64, u64)] {
        &self.steps
    }

    /// Sends SIGKILL; to a process that has ended already that is nothing.
    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
    }

    /// Sends a signal; to a process that has ended already that is nothing.
    pub fn signal(&self, signal: Signal) {
        if self.status.is_none() {
            let _ = sys::pidfd_signal(self.pidfd.as_fd(), signal);
        }
    }

    /// How the process ended, if it has by `deadline`; the descriptor polls as readable then.
    pub fn reap(&mut self, deadline: Instant) -> Option<WaitStatus> {
        if self.status.is_none() && readable(self.pidfd.as_fd(), deadline) {
            // __WALL: whatever signal the child was made with (waitpid(2)).
            let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::__WALL;
            self.status = waitid(Id::PIDFd(self.pidfd.as_fd()), flags).ok();
        }
        self.status
    }
}

impl AsFd for Jailed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Jailed {
    fn drop(&mut self) {
        self.kill();
        let _ = self.reap(Instant::now() + KILL_PATIENCE);
    }
}

/// Waits until `fd` is readable or hung up; `false` at the deadline.
fn readable(fd: BorrowedFd<'_>, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(_) => {}
        }
    }
}
