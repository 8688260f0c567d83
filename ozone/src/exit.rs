//! How a run ends: the one list of exit codes, and the last line.

use std::fmt;

use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use protocol::{Fault, FaultKind};
use seccomp::forbidden::Call;

use crate::process::Process;
use crate::report::Level;

/// The exit codes as the help text shows them.
pub const CODES: &str = "\
Exit codes:
  0      the guest switched itself off, reset itself with --no-reboot, or was left with Ctrl-A x
  1      'ozone audit' found a promise that does not hold; 'ozone gc' could not remove something
  2      what you asked for cannot be: an option, a file, the spec
  3      the host lacks something or refused it
  4      a defect of ozone
  10     the guest's kernel panicked
  11     a virtual processor ended in a triple fault
  12     the core process died
  13     a device's process died
  14     the kernel killed the machine's processes because memory was short
  128+n  signal n ended the run: 129 SIGHUP, 130 SIGINT, 131 SIGQUIT, 143 SIGTERM

Signals: SIGTERM, SIGINT, SIGHUP and SIGQUIT end the machine at once; SIGPWR presses the guest's power button.";

/// The exit code of `ozone audit` when a promise does not hold, and of `ozone gc` when something stays; no other command has it.
pub const BROKEN: u8 = 1;

/// How a run ended.
#[derive(Debug)]
pub enum Ending {
    /// The guest switched itself off.
    PowerOff,
    /// The guest reset itself.
    Reset,
    /// The user left the console with Ctrl-A x.
    Left,
    /// The guest's kernel panicked.
    Panic,
    /// A vCPU ended in a triple fault.
    TripleFault,
    /// The core ended without a word.
    CoreDied(Death),
    /// A backend ended, or the core lost it.
    BackendDied {
        /// Which.
        process: Process,
        /// How it ended, or what the core says.
        how: String,
        /// The kernel's word, if it is that which is told.
        death: Option<Death>,
    },
    /// The kernel killed processes of the machine because memory was short.
    OomKill(OomKill),
    /// A signal to `ozone`.
    Signal(Signal),
    /// Something stood in the way, and whose doing it is.
    Fault(Fault),
}

impl Ending {
    /// The exit code; [`CODES`] lists them.
    pub fn code(&self) -> u8 {
        match self {
            Self::PowerOff | Self::Reset | Self::Left => 0,
            Self::Fault(Fault { kind: FaultKind::Input, .. }) => 2,
            Self::Fault(Fault { kind: FaultKind::Host, .. }) => 3,
            Self::Fault(Fault { kind: FaultKind::Internal, .. }) => 4,
            Self::Panic => 10,
            Self::TripleFault => 11,
            Self::CoreDied(_) => 12,
            Self::BackendDied { .. } => 13,
            Self::OomKill(_) => 14,
            Self::Signal(signal) => 128_u8.saturating_add(u8::try_from(*signal as i32).unwrap_or(0)),
        }
    }

    /// The same, or what is behind it: if the kernel killed processes because memory was short, whatever else was seen of that
    /// came of it. What the guest or the user did is left as it is.
    pub fn with_oom_kill(self, kill: Option<OomKill>) -> Self {
        match (self, kill) {
            (Self::CoreDied(death), Some(kill)) if death.is_by(Signal::SIGKILL) => Self::OomKill(kill),
            (Self::BackendDied { .. }, Some(kill)) => Self::OomKill(kill),
            (Self::Fault(Fault { kind: FaultKind::Host | FaultKind::Internal, .. }), Some(kill)) => Self::OomKill(kill),
            (other, _) => other,
        }
    }

    /// How much the last line matters.
    pub fn level(&self) -> Level {
        match self {
            Self::PowerOff | Self::Reset | Self::Left | Self::Signal(_) => Level::Info,
            _ => Level::Error,
        }
    }

    /// Whether the machine came to its end by itself, so that its last output is worth waiting for.
    pub fn is_orderly(&self) -> bool {
        matches!(self, Self::PowerOff | Self::Reset | Self::Panic | Self::TripleFault)
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => formatter.write_str("the guest switched itself off"),
            Self::Reset => formatter.write_str("the guest reset itself"),
            Self::Left => formatter.write_str("left with Ctrl-A x; the guest was ended"),
            Self::Panic => formatter.write_str("the guest's kernel panicked"),
            Self::TripleFault => formatter.write_str("the guest ended in a triple fault"),
            Self::CoreDied(death) => write!(formatter, "core died: {death}"),
            Self::BackendDied { process, how, .. } => write!(formatter, "{process} died: {how}"),
            Self::OomKill(kill) => write!(formatter, "{kill}"),
            Self::Signal(signal) => write!(formatter, "ended by {signal}"),
            Self::Fault(fault) => write!(formatter, "{fault}"),
        }
    }
}

/// What is known of processes that the kernel killed because memory was short (cgroup-v2.rst, memory.events).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OomKill {
    /// How many it killed.
    pub processes: u64,
    /// The machine's limit in bytes, if it has one.
    pub limit: Option<u64>,
}

impl fmt::Display for OomKill {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let processes = self.processes;
        match self.limit {
            Some(limit) => write!(
                formatter,
                "the machine needed more memory than it may have, and the kernel killed its processes \
                 (memory.max {limit}, {processes} killed); give more with --limit memory.max=…"
            ),
            None => write!(
                formatter,
                "the host, or a cgroup above the machine's, was short of memory, and the kernel killed the machine's \
                 processes ({processes} killed)"
            ),
        }
    }
}

/// How a process ended.
#[derive(Clone, Copy, Debug)]
pub struct Death {
    /// By the kernel's word.
    pub status: WaitStatus,
    /// The forbidden system call that it reported last, by its own word.
    pub reported: Option<Call>,
}

impl Death {
    /// Whether this signal ended it.
    pub fn is_by(self, signal: Signal) -> bool {
        matches!(self.status, WaitStatus::Signaled(_, by, _) if by == signal)
    }

    /// Whether the process ended by itself and in good order.
    pub fn is_orderly(self) -> bool {
        matches!(self.status, WaitStatus::Exited(_, 0))
    }
}

impl fmt::Display for Death {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.status, self.reported) {
            // A process may claim a call that it did not make. But no table has a call that sends this signal: without a
            // forbidden one it does not die of it.
            (WaitStatus::Signaled(_, Signal::SIGSYS, _), Some(call)) => {
                write!(formatter, "made the forbidden system call {call}")
            }
            (WaitStatus::Signaled(_, Signal::SIGSYS, _), None) => {
                formatter.write_str("made a system call that its role may not, and did not say which (seccomp, SIGSYS)")
            }
            (WaitStatus::Signaled(_, signal, _), _) => write!(formatter, "killed by {signal}"),
            (WaitStatus::Exited(_, code), _) => write!(formatter, "exited with status {code}"),
            (other, _) => write!(formatter, "{other:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::Pid;

    #[test]
    fn every_code_is_in_the_list() {
        let death = Death { status: WaitStatus::Exited(Pid::from_raw(1), 1), reported: None };
        let endings = [
            Ending::PowerOff,
            Ending::Fault(Fault::input("")),
            Ending::Fault(Fault::host("")),
            Ending::Fault(Fault::internal("")),
            Ending::Panic,
            Ending::TripleFault,
            Ending::CoreDied(death),
            Ending::BackendDied { process: Process::Core, how: String::new(), death: None },
            Ending::OomKill(OomKill { processes: 1, limit: None }),
        ];
        let codes: Vec<u8> = endings.iter().map(Ending::code).collect();
        assert_eq!(codes, [0, 2, 3, 4, 10, 11, 12, 13, 14]);
        for code in codes.into_iter().chain([BROKEN]) {
            assert!(CODES.lines().any(|line| line.split_whitespace().next() == Some(&code.to_string())), "{code}");
        }
        assert_eq!(Ending::Signal(Signal::SIGTERM).code(), 143);
        assert_eq!(Ending::Signal(Signal::SIGHUP).code(), 129);
    }

    #[test]
    fn a_kill_for_memory_explains_what_came_of_it_and_nothing_else() {
        let kill = || Some(OomKill { processes: 3, limit: Some(4096) });
        let death = |signal| Death { status: WaitStatus::Signaled(Pid::from_raw(1), signal, false), reported: None };
        let code = |ending: Ending| ending.with_oom_kill(kill()).code();
        assert_eq!(code(Ending::CoreDied(death(Signal::SIGKILL))), 14);
        assert_eq!(code(Ending::BackendDied { process: Process::Core, how: String::new(), death: None }), 14);
        assert_eq!(code(Ending::Fault(Fault::host("no answer"))), 14);
        assert_eq!(code(Ending::CoreDied(death(Signal::SIGSYS))), 12);
        assert_eq!(code(Ending::PowerOff), 0);
        assert_eq!(code(Ending::Signal(Signal::SIGTERM)), 143);
        assert_eq!(code(Ending::Fault(Fault::input("--kernel"))), 2);
        assert_eq!(Ending::CoreDied(death(Signal::SIGKILL)).with_oom_kill(None).code(), 12);
        for limit in [Some(4096), None] {
            let text = OomKill { processes: 3, limit }.to_string();
            assert!(text.contains("3 killed") && text.lines().count() == 1, "{text}");
        }
    }

    #[test]
    fn a_forbidden_call_is_named() {
        let reported = Call::reported_by("error forbidden system call 41 (anything)");
        let signaled = |signal| WaitStatus::Signaled(Pid::from_raw(1), signal, false);
        let death = |status, reported| Death { status, reported }.to_string();
        assert_eq!(death(signaled(Signal::SIGSYS), reported), "made the forbidden system call socket (41)");
        assert!(death(signaled(Signal::SIGSYS), None).contains("did not say which"));
        assert_eq!(death(signaled(Signal::SIGKILL), reported), "killed by SIGKILL");
        assert_eq!(death(WaitStatus::Exited(Pid::from_raw(1), 159), reported), "exited with status 159");
    }
}
