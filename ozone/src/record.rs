//! The record of how a run ended: what `--status-file` holds, and the line before the last in words.

use std::fmt::Write as _;
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::sys::resource::{Usage, UsageWho, getrusage};
use nix::sys::signal::Signal;
use nix::sys::time::{TimeVal, TimeValLike};
use nix::sys::wait::WaitStatus;
use protocol::{DeviceId, DeviceKind, Fault, FaultKind};
use seccomp::forbidden::Call;
use serde::Serialize;

use crate::cgroup::Cgroups;
use crate::exit::{Death, Ending};
use crate::landlock::Domain;
use crate::report::{self, Level};
use crate::resources::status_file::StatusFile;
use crate::spec::VmSpec;
use crate::spec::size;
use crate::supervisor::Tallies;
use crate::time::rfc3339;

/// The version of the format. Keys may be added without a new one.
pub const VERSION: u32 = 1;

/// Why a run ended, in a word that stays the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// The guest switched itself off.
    PowerOff,
    /// The guest reset itself, which was to be the end.
    Reboot,
    /// The user left the console.
    Left,
    /// The guest's kernel panicked.
    Panic,
    /// A vCPU ended in a triple fault.
    TripleFault,
    /// The core ended.
    CoreDied,
    /// A backend ended, or the core lost it.
    BackendDied,
    /// The core or a backend made a system call that its role may not.
    ForbiddenSyscall,
    /// The kernel killed processes because memory was short.
    OomKill,
    /// A signal to `ozone`.
    Signal,
    /// What was asked for cannot be.
    InputError,
    /// The host lacks something or refused it.
    HostError,
    /// A defect of ozone.
    InternalError,
}

/// The record.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Record<'a> {
    version: u32,
    name: Option<&'a str>,
    /// The process id of `ozone`.
    pid: u32,
    cause: Cause,
    /// The last line.
    message: String,
    exit_code: u8,
    /// The process that the cause is about.
    process: Option<String>,
    /// The signal that ended it, or `ozone`.
    signal: Option<&'static str>,
    /// The forbidden call, as far as the process said which.
    system_call: Option<SystemCall>,
    started: String,
    ended: String,
    wall_ms: u64,
    /// Processor time of every process of the machine, `ozone` included.
    cpu_ms: u64,
    memory: Memory,
    /// How often the guest was started again because it had reset itself.
    guest_resets: u64,
    devices: &'a [Device],
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct SystemCall {
    number: i64,
    name: Option<&'static str>,
}

/// The most memory that was used.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Memory {
    peak_bytes: u64,
    of: MemoryOf,
}

/// Whose memory it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum MemoryOf {
    /// The machine's control group: everything that is charged to it, once (cgroup-v2.rst, memory.peak).
    Cgroup,
    /// The largest of the processes, which as a rule is the core with the memory that its guest has touched. A sum would count
    /// the guest's memory once for each process that it is shared with.
    LargestProcess,
}

/// What happened to a device.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Device {
    id: DeviceId,
    kind: DeviceKind,
    restarts: u64,
    causes: Vec<CauseCount>,
    reexecuted: u64,
    away_ms: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct CauseCount {
    cause: String,
    count: u64,
}

/// What is to be recorded, as far as it is known.
#[derive(Debug)]
pub struct Recorder {
    started: SystemTime,
    since: Instant,
    traced: u64,
    file: Option<StatusFile>,
    name: Option<String>,
    /// Whether the guest has run.
    ran: bool,
    resets: u64,
    /// The peak that the machine's control group tells.
    memory: Option<u64>,
    devices: Vec<Device>,
}

impl Recorder {
    /// A run begins.
    pub fn begin() -> Self {
        Self {
            started: SystemTime::now(),
            since: Instant::now(),
            traced: protocol::trace::now(),
            file: None,
            name: None,
            ran: false,
            resets: 0,
            memory: None,
            devices: Vec::new(),
        }
    }

    /// The record is about this machine and goes there.
    pub fn keep(&mut self, name: Option<&str>, file: Option<StatusFile>) {
        (self.name, self.file) = (name.map(str::to_owned), file);
    }

    /// Leaves it what putting the record in its place takes.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn allow(&self, domain: &mut Domain) -> Result<(), Errno> {
        self.file.as_ref().map_or(Ok(()), |file| file.allow(domain))
    }

    /// When the run began; see [`protocol::trace::now`].
    pub fn started(&self) -> u64 {
        self.traced
    }

    /// The guest has run.
    pub fn ran(&mut self) {
        self.ran = true;
    }

    /// The machine has ended before it was said to run: a guest can be that fast.
    pub fn ended(&mut self, ending: &Ending) {
        self.ran |= ending.is_orderly();
    }

    /// The guest has reset itself and is started again.
    pub fn reset(&mut self) {
        self.resets = self.resets.saturating_add(1);
    }

    /// The machine has ended; what is known of it is about to be forgotten.
    pub fn gather(&mut self, spec: &VmSpec, tallies: &Tallies, cgroups: &Cgroups) {
        self.memory = cgroups.usage().and_then(|usage| usage.memory?.peak);
        let device = |(index, device): (usize, &crate::spec::Device)| {
            let tally = tallies.add(index, |_| {});
            Device {
                id: device.id.clone(),
                kind: device.kind(),
                restarts: tally.restarts,
                causes: tally.causes.into_iter().map(|(cause, count)| CauseCount { cause, count }).collect(),
                reexecuted: tally.reexecuted,
                away_ms: milliseconds(tally.away_total),
            }
        };
        self.devices = spec.devices.iter().enumerate().map(device).collect();
    }

    /// Says in a line what the run took, and writes the record. Every process of the machine but this one has been reaped.
    pub fn end(self, ending: &Ending) {
        let wall = self.since.elapsed();
        let usage = [UsageWho::RUSAGE_SELF, UsageWho::RUSAGE_CHILDREN].map(|who| getrusage(who).ok());
        let cpu = usage.iter().flatten().map(processor_time).sum();
        let largest = usage.iter().flatten().map(Usage::max_rss).max().unwrap_or(0);
        let memory = match self.memory {
            Some(peak) => Memory { peak_bytes: peak, of: MemoryOf::Cgroup },
            // Kilobytes (getrusage(2)).
            None => Memory { peak_bytes: largest.unsigned_abs().saturating_mul(1024), of: MemoryOf::LargestProcess },
        };
        if self.ran {
            report::say_last(Level::Info, &self.words(wall, cpu, memory));
        }
        let Some(file) = self.file else { return };
        let why = Why::of(ending);
        let record = Record {
            version: VERSION,
            name: self.name.as_deref(),
            pid: std::process::id(),
            cause: why.cause,
            message: ending.to_string(),
            exit_code: ending.code(),
            process: why.process,
            signal: why.signal.map(Signal::as_str),
            system_call: why.call.map(|call| SystemCall { number: call.number(), name: call.name() }),
            started: rfc3339(self.started),
            ended: rfc3339(SystemTime::now()),
            wall_ms: milliseconds(wall),
            cpu_ms: milliseconds(cpu),
            memory,
            guest_resets: self.resets,
            devices: &self.devices,
        };
        let text = serde_json::to_string_pretty(&record).map(|text| text + "\n");
        let written = match text {
            Ok(text) => file.write(text.as_bytes()).map_err(|error| error.to_string()),
            Err(error) => Err(format!("write the record: {error}")),
        };
        if let Err(problem) = written {
            report::say_last(Level::Warn, &problem);
        }
    }

    /// One short line.
    fn words(&self, wall: Duration, cpu: Duration, memory: Memory) -> String {
        let mut text = format!("ran for {}, {} of processor time", seconds(wall), seconds(cpu));
        let whose = if memory.of == MemoryOf::Cgroup { "" } else { " in its largest process" };
        let _ = write!(text, ", at most {} of memory{whose}", size::rounded(memory.peak_bytes));
        if self.resets > 0 {
            let _ = write!(text, "; guest resets: {}", self.resets);
        }
        let restarted = self.devices.iter().filter(|device| device.restarts > 0);
        let list: Vec<String> = restarted.map(|it| format!("{}/{} {}", it.kind.role(), it.id, it.restarts)).collect();
        if !list.is_empty() {
            let _ = write!(text, "; restarts: {}", list.join(", "));
        }
        text
    }
}

/// What an ending comes to.
#[derive(Debug)]
struct Why {
    cause: Cause,
    process: Option<String>,
    signal: Option<Signal>,
    call: Option<Call>,
}

impl Why {
    fn of(ending: &Ending) -> Self {
        let plain = |cause| Self { cause, process: None, signal: None, call: None };
        match ending {
            Ending::PowerOff => plain(Cause::PowerOff),
            Ending::Reset => plain(Cause::Reboot),
            Ending::Left => plain(Cause::Left),
            Ending::Panic => plain(Cause::Panic),
            Ending::TripleFault => plain(Cause::TripleFault),
            Ending::OomKill(_) => plain(Cause::OomKill),
            Ending::Signal(signal) => Self { signal: Some(*signal), ..plain(Cause::Signal) },
            Ending::CoreDied(death) => Self::death(Cause::CoreDied, "core".to_owned(), Some(*death)),
            Ending::BackendDied { process, death, .. } => Self::death(Cause::BackendDied, process.to_string(), *death),
            Ending::Fault(Fault { kind, .. }) => plain(match kind {
                FaultKind::Input => Cause::InputError,
                FaultKind::Host => Cause::HostError,
                FaultKind::Internal => Cause::InternalError,
            }),
        }
    }

    fn death(cause: Cause, process: String, death: Option<Death>) -> Self {
        let process = Some(process);
        let signal = match death.map(|death| death.status) {
            Some(WaitStatus::Signaled(_, signal, _)) => Some(signal),
            _ => None,
        };
        match signal {
            // No table has a call that sends this signal.
            Some(Signal::SIGSYS) => {
                let call = death.and_then(|death| death.reported);
                Self { cause: Cause::ForbiddenSyscall, process, signal, call }
            }
            _ => Self { cause, process, signal, call: None },
        }
    }
}

fn processor_time(usage: &Usage) -> Duration {
    let microseconds = |time: TimeVal| Duration::from_micros(time.num_microseconds().unsigned_abs());
    microseconds(usage.user_time()) + microseconds(usage.system_time())
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn seconds(time: Duration) -> String {
    format!("{}.{:03} s", time.as_secs(), time.subsec_millis())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::OomKill;
    use crate::process::Process;
    use nix::unistd::Pid;

    fn died(signal: Signal) -> Death {
        let reported = Call::reported_by("error forbidden system call 41 (socket)");
        Death { status: WaitStatus::Signaled(Pid::from_raw(1), signal, false), reported }
    }

    #[test]
    fn every_ending_has_its_cause() {
        let disk =
            || Process::Backend { kind: DeviceKind::Blk, device: DeviceId::try_from("disk0".to_owned()).unwrap() };
        let lost = |death| Ending::BackendDied { process: disk(), how: String::new(), death };
        let endings = [
            (Ending::PowerOff, "power-off", None),
            (Ending::Reset, "reboot", None),
            (Ending::Left, "left", None),
            (Ending::Panic, "panic", None),
            (Ending::TripleFault, "triple-fault", None),
            (Ending::CoreDied(died(Signal::SIGKILL)), "core-died", Some("core")),
            (Ending::CoreDied(died(Signal::SIGSYS)), "forbidden-syscall", Some("core")),
            (lost(None), "backend-died", Some("blk/disk0")),
            (lost(Some(died(Signal::SIGSEGV))), "backend-died", Some("blk/disk0")),
            (lost(Some(died(Signal::SIGSYS))), "forbidden-syscall", Some("blk/disk0")),
            (Ending::OomKill(OomKill { processes: 1, limit: None }), "oom-kill", None),
            (Ending::Signal(Signal::SIGTERM), "signal", None),
            (Ending::Fault(Fault::input("")), "input-error", None),
            (Ending::Fault(Fault::host("")), "host-error", None),
            (Ending::Fault(Fault::internal("")), "internal-error", None),
        ];
        for (ending, cause, process) in endings {
            let why = Why::of(&ending);
            assert_eq!(serde_json::to_value(why.cause).unwrap(), cause, "{ending:?}");
            assert_eq!(why.process.as_deref(), process, "{ending:?}");
            // A process that did not die of the signal may say what it likes.
            assert_eq!(why.call.is_some(), cause == "forbidden-syscall", "{ending:?}");
        }
        assert_eq!(Why::of(&lost(Some(died(Signal::SIGSEGV)))).signal, Some(Signal::SIGSEGV));
    }

    #[test]
    fn the_line_is_short_and_says_what_happened() {
        let mut recorder = Recorder::begin();
        let memory = |of| Memory { peak_bytes: 300 << 20, of };
        let (wall, cpu) = (Duration::from_millis(61_005), Duration::from_millis(2));
        assert_eq!(
            recorder.words(wall, cpu, memory(MemoryOf::Cgroup)),
            "ran for 61.005 s, 0.002 s of processor time, at most 300 MiB of memory"
        );
        recorder.reset();
        let device = |id: &str, restarts| Device {
            id: DeviceId::try_from(id.to_owned()).unwrap(),
            kind: DeviceKind::Blk,
            restarts,
            causes: Vec::new(),
            reexecuted: 0,
            away_ms: 0,
        };
        recorder.devices = vec![device("disk0", 2), device("disk1", 0)];
        assert_eq!(
            recorder.words(wall, cpu, memory(MemoryOf::LargestProcess)),
            "ran for 61.005 s, 0.002 s of processor time, at most 300 MiB of memory in its largest process; \
             guest resets: 1; restarts: blk/disk0 2"
        );
    }
}
