//! The life of a jail: made, watched over, and removed.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use caps::Capability;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, chdir, getegid, geteuid, pipe2, setsid};
use protocol::Fault;

use super::host::{self, Host};
use super::options::Options;
use super::record::{self, Record};
use super::spec::{self, Caller, JailSpec};
use super::steps::{self, Descriptors};
use super::sys;
use crate::cgroup::Cgroups;
use crate::confine;
use crate::jail::{self, Birth, JailError, Jailed};
use crate::journal::point;
use crate::report;
use crate::supervisor::Signals;

/// How long the steps may take: file systems of a network may be among the sources.
const STEPS_PATIENCE: Duration = Duration::from_secs(60);

/// The signals that are passed on to the program.
const PASSED_ON: [Signal; 7] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
];

/// What `ozone` keeps once the program runs, and what for (capabilities(7)).
const KEPT: [Capability; 2] = [
    // Signals to the jail's first process, which has another uid.
    Capability::CAP_KILL,
    // A control group may be in one that is delegated to another user.
    Capability::CAP_DAC_OVERRIDE,
];

/// What came of `ozone jail`.
#[derive(Debug)]
pub struct Outcome {
    /// The exit code.
    pub code: u8,
    /// What is printed on standard output.
    pub output: String,
    /// The last line, if there is something to say.
    pub line: Option<String>,
}

impl Outcome {
    fn new(code: u8) -> Self {
        Self { code, output: String::new(), line: None }
    }

    /// How the program ended, passed on: its exit code, or 128 and the signal. The status is that of wait(2).
    fn of(name: &str, status: i32) -> Self {
        if libc::WIFEXITED(status) {
            Self::new(u8::try_from(libc::WEXITSTATUS(status)).unwrap_or(u8::MAX))
        } else {
            Self::of_signal(name, libc::WTERMSIG(status))
        }
    }

    fn of_signal(name: &str, number: i32) -> Self {
        // Real-time signals have no name.
        let signal = Signal::try_from(number).map_or_else(|_| format!("signal {number}"), |it| it.to_string());
        let why = if number == libc::SIGSYS { "; a seccomp filter does that" } else { "" };
        let line = Some(format!("{name} was ended by {signal}{why}"));
        Self { line, ..Self::new(128_u8.saturating_add(u8::try_from(number).unwrap_or(0))) }
    }
}

/// Puts a program in a jail and waits for its end, or returns when it runs, or removes what an earlier jail left.
///
/// # Errors
/// A fault when there is no jail; nothing is left behind then.
pub fn run(options: &Options) -> Result<Outcome, Fault> {
    sys::close_leaked();
    if options.clean_resource {
        record::clean(&spec::name(options)?)?;
        return Ok(Outcome::new(0));
    }
    let here = std::env::current_dir()
        .map_err(|error| Fault::host(format!("the current directory: {}", crate::resources::said(&error))))?;
    let (uid, gid) = (geteuid(), getegid());
    let ordinary = (!uid.is_root()).then(|| Caller { uid: uid.as_raw(), gid: gid.as_raw() });
    let spec = spec::load(options, &here, ordinary)?;
    let host = Host::open(&spec, uid.is_root())?;
    host::announce(&spec);
    supervise(&spec, &host)
}

fn failed(what: &'static str) -> impl Fn(Errno) -> Fault {
    move |errno| Fault::host(format!("{what}: {}", errno.desc()))
}

/// Makes the jail, waits for the program's end and removes everything; in the background, if that is asked for.
fn supervise(spec: &JailSpec, host: &Host) -> Result<Outcome, Fault> {
    let signals = Signals::take_these(PASSED_ON).map_err(failed("signalfd"))?;
    // Dropped in the opposite order: the processes, their group, the record of it.
    let record = Record::open(&spec.name)?;
    let cgroups = Cgroups::make_for_program(&spec.name, &spec.place, spec.settings.clone(), |path| {
        record.note_cgroup(path).map_err(Fault::from)
    })?;
    point(format_args!("the control group made"));
    let ready = if spec.daemonize {
        match go_to_background()? {
            // Now: in a group that is left to ozone there may be nobody else when controllers are enabled in it.
            Place::Background(ready) => Some(ready),
            Place::Foreground { child, reader } => {
                // They are the other's.
                std::mem::forget((record, cgroups));
                return wait_for_background(&spec.name, child, reader);
            }
        }
    } else {
        None
    };
    let (ending, their_ending) = pipe2(OFlag::O_CLOEXEC).map_err(failed("pipe"))?;
    let mut jailed = bear(spec, host, &cgroups, their_ending)?;
    record.note_pid(jailed.pid())?;
    confine::keep(&KEPT)?;
    point(format_args!("the program runs, and ozone is confined"));
    if let Some(ready) = ready {
        detach(host, ready, jailed.pid())?;
    }
    let status = wait(&mut jailed, &signals);
    point(format_args!("the program has ended"));
    let outcome = match (ended(ending), status) {
        (Some(status), _) => Outcome::of(&spec.name, status),
        // The first process was killed from outside, by the kernel for want of memory or by someone's hand.
        (None, Some(WaitStatus::Signaled(_, signal, _))) => Outcome::of_signal(&spec.name, signal as i32),
        (None, other) => {
            return Err(Fault::internal(format!("jail of {}: its first process ended: {other:?}", spec.name)));
        }
    };
    cgroups.tell_program_kills();
    Ok(outcome)
}

/// Which of two processes this is.
enum Place {
    /// The one that stays with the jail, and where it says that the program runs.
    Background(OwnedFd),
    /// The one that its caller waits for.
    Foreground { child: Pid, reader: OwnedFd },
}

fn go_to_background() -> Result<Place, Fault> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC).map_err(failed("pipe"))?;
    match sys::fork().map_err(failed("fork"))? {
        None => {
            setsid().map_err(failed("setsid"))?;
            Ok(Place::Background(writer))
        }
        Some(child) => Ok(Place::Foreground { child, reader }),
    }
}

/// What the process in the background says: that the program runs, or why not.
fn wait_for_background(name: &str, child: Pid, reader: OwnedFd) -> Result<Outcome, Fault> {
    // Signals are the other's to pass on; this one can be ended by them.
    sys::block_signals(false).map_err(failed("sigprocmask"))?;
    let mut pid = String::new();
    let _ = File::from(reader).read_to_string(&mut pid);
    if pid.ends_with('\n') {
        return Ok(Outcome { output: pid, ..Outcome::new(0) });
    }
    // It has said why.
    match waitpid(child, None) {
        Ok(WaitStatus::Exited(_, code)) => Ok(Outcome::new(u8::try_from(code).unwrap_or(u8::MAX))),
        other => Err(Fault::internal(format!("jail of {name}: ozone in the background ended: {other:?}"))),
    }
}

/// Clones the child and waits until it is the program.
fn bear(spec: &JailSpec, host: &Host, cgroups: &Cgroups, ending: OwnedFd) -> Result<Jailed, Fault> {
    let root = geteuid().is_root();
    let (input, output, error) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    let standard = if spec.daemonize { [host.null.as_fd(); 3] } else { [input.as_fd(), output.as_fd(), error.as_fd()] };
    let descriptors = Descriptors { standard, ending: ending.as_fd() };
    let birth = Birth {
        name: spec.name.clone(),
        proc: host.proc.as_fd(),
        namespaces: steps::namespaces(spec, root),
        cgroup: cgroups.leaf(0),
        steps: steps::list(spec, host, descriptors, root),
        trace: false,
    };
    let born = jail::bear(birth).and_then(|entering| {
        point(format_args!("the jail's first process cloned"));
        entering.wait(STEPS_PATIENCE)
    });
    point(format_args!("the program runs, or cannot"));
    born.map_err(|error| match error {
        JailError::Step { ref step, .. } if step.starts_with("execute ") => Fault::input(error.to_string()),
        error => Fault::host(error.to_string()),
    })
}

/// Lets go of whatever its caller waits for, and says that the program runs.
fn detach(host: &Host, ready: OwnedFd, pid: Pid) -> Result<(), Fault> {
    sys::replace_standard(host.null.as_fd()).map_err(failed("dup2"))?;
    // Whoever reads what the caller's standard error leads to waits for its end.
    report::begin_anew();
    chdir("/").map_err(failed("chdir"))?;
    // A caller that has ended does not hear it.
    let _ = File::from(ready).write_all(format!("{pid}\n").as_bytes());
    Ok(())
}

/// Passes signals on until the jail's first process is gone.
fn wait(jailed: &mut Jailed, signals: &Signals) -> Option<WaitStatus> {
    loop {
        {
            let mut fds = [signals.as_fd(), jailed.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            let _ = poll(&mut fds, PollTimeout::NONE);
        }
        while let Some(signal) = signals.next() {
            jailed.signal(signal);
        }
        if let Some(status) = jailed.reap(Instant::now()) {
            return Some(status);
        }
    }
}

/// How the program ended, as the first process tells it: the status of wait(2).
fn ended(ending: OwnedFd) -> Option<i32> {
    let mut status = [0; 4];
    File::from(ending).read_exact(&mut status).ok()?;
    Some(i32::from_ne_bytes(status))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_end_has_its_code() {
        let of = |status| {
            let outcome = Outcome::of("web1", status);
            (outcome.code, outcome.line.unwrap_or_default())
        };
        assert_eq!(of(0), (0, String::new()));
        assert_eq!(of(255 << 8), (255, String::new()));
        assert_eq!(of(libc::SIGTERM), (143, "web1 was ended by SIGTERM".into()));
        assert_eq!(of(libc::SIGSEGV | 0x80), (139, "web1 was ended by SIGSEGV".into()));
        assert_eq!(of(libc::SIGSYS), (159, "web1 was ended by SIGSYS; a seccomp filter does that".into()));
        assert_eq!(of(40), (168, "web1 was ended by signal 40".into()));
    }
}
