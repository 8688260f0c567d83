//! `ozone audit`: which promises about a running machine's processes hold.
//!
//! The processes are found through the machine's control socket; everything else is asked of the kernel, and nothing is taken
//! from the machine's description or from the jail's plan. [`facts`] reads without an opinion, [`promises`] judges without
//! reading, and [`report`] shows what came of it.

use nix::errno::Errno;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use protocol::{DeviceKind, Fault};
use seccomp::Role;

use crate::control::client;
use crate::control::message::{Answer, DeviceState, Request, Status};
use crate::runtime;

pub mod descriptor;
pub mod facts;
pub mod group;
pub mod memory;
pub mod promises;
pub mod report;
pub mod status;
mod sys;

use facts::{Facts, Namespaces, Pin, Seen, Users};
use group::Hierarchy;
use promises::Around;
use report::{Process, Report};

/// Examines the machine `name` of this user.
///
/// # Errors
/// An input fault for a machine that is not there; a host fault when its processes cannot be found.
pub fn examine(name: &str) -> Result<Report, Fault> {
    let first = Round::read(name)?;
    // A process was replaced while it was read: what was read may be of the last one, of the next, or of both.
    let round = if first.is_whole { first } else { Round::read(name)? };
    round.report(name)
}

/// One process of the machine, as the machine tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Told {
    name: String,
    /// None for `ozone`, which is not jailed.
    role: Option<Role>,
    pid: Option<i32>,
    /// What it is, when it is not judged.
    absent: Option<String>,
}

/// A process that was told, and what was read of it while it was held on to.
struct Read {
    told: Told,
    found: Option<(Pin, Facts)>,
}

impl Read {
    fn new(told: &Told) -> Result<Self, Fault> {
        let found = match told.pid.filter(|_| told.absent.is_none()).map(|pid| (pid, Pin::new(pid))) {
            Some((pid, Ok(pin))) => Some((pin, Facts::read(pid))),
            Some((_, Err(Errno::ESRCH))) | None => None,
            Some((pid, Err(errno))) => return Err(Fault::host(format!("pidfd_open {pid}: {}", errno.desc()))),
        };
        Ok(Self { told: told.clone(), found })
    }

    fn facts(&self) -> Option<&Facts> {
        self.found.as_ref().map(|(_, facts)| facts)
    }

    /// Whether what was read is of the process that was told: it still runs, and is a child of `ozone`, which another one that
    /// was given the id before it was held on to is not.
    fn is_sound(&self, ozone: i32) -> bool {
        let Some((pin, facts)) = &self.found else { return self.told.absent.is_some() };
        pin.is_alive() && (self.told.role.is_none() || facts.parent().is_none_or(|parent| parent == ozone))
    }
}

/// Everything that was read of a machine at one time.
struct Round {
    processes: Vec<Read>,
    init: Option<Namespaces>,
    users: Seen<Users>,
    /// Whether every process was the same one from the beginning to the end.
    is_whole: bool,
}

impl Round {
    fn read(name: &str) -> Result<Self, Fault> {
        let status = ask(name)?;
        let told = processes(&status);
        let mut processes_read = told.iter().map(Read::new).collect::<Result<Vec<_>, _>>()?;
        let users = facts::users();
        let mut is_whole = processes(&ask(name)?) == told;
        for read in &mut processes_read {
            if !read.is_sound(status.pid) {
                read.found = None;
                is_whole = false;
            }
        }
        Ok(Self { processes: processes_read, init: facts::namespaces(1).ok(), users, is_whole })
    }

    fn report(self, name: &str) -> Result<Report, Fault> {
        let of = |role: Option<Role>| {
            let found = self.processes.iter().find(|read| read.told.role == role);
            found.and_then(Read::facts)
        };
        let jailed = self.processes.iter().filter(|read| read.told.role.is_some());
        let children: Vec<&Facts> = jailed.filter_map(Read::facts).collect();
        let Some((ozone, core)) = of(None).zip(of(Some(Role::Core))) else {
            return Err(Fault::host(format!("machine '{name}': it started anew while it was read, twice; ask again")));
        };
        let around = Around {
            ozone,
            core,
            children: &children,
            init: self.init.as_ref(),
            users: &self.users,
            offers_user_namespaces: facts::offers_user_namespaces(),
            hierarchy: Hierarchy::find(),
        };
        let process = |read: &Read| {
            let judged = read.facts().map(|facts| match read.told.role {
                Some(role) => promises::of_child(role, facts, around),
                None => promises::of_ozone(around),
            });
            let replaced = || "it was replaced while it was read, twice".to_owned();
            Process {
                name: read.told.name.clone(),
                pid: read.told.pid,
                absent: judged.is_none().then(|| read.told.absent.clone().unwrap_or_else(replaced)),
                promises: judged.unwrap_or_default(),
                descriptors: read.facts().and_then(|facts| facts.descriptors.clone().ok()).unwrap_or_default(),
                limits: read.facts().and_then(|facts| facts.limits.clone().ok()).unwrap_or_default(),
            }
        };
        Ok(Report::new(name, self.processes.iter().map(process).collect()))
    }
}

/// Asks the machine how it is. `ozone` is the process that the kernel says is at the socket's other end.
fn ask(name: &str) -> Result<Status, Fault> {
    let fault = |problem: String| Fault::host(format!("machine '{name}': {problem}"));
    // Without a directory there is no machine, which the client says best.
    let Some(directory) = runtime::directory() else {
        return client::ask(name, &Request::Status).and(Err(fault("it has no directory".to_owned())));
    };
    let channel = client::connect(&directory, name)?;
    let peer = getsockopt(&channel, PeerCredentials).map_err(|errno| fault(errno.desc().to_owned()))?.pid();
    let answer = channel.send(&Request::Status).and_then(|()| channel.receive());
    match answer.map_err(|error| fault(error.to_string()))? {
        Answer::Status(status) if status.pid == peer => Ok(status),
        Answer::Status(status) => {
            Err(fault(format!("ozone calls itself process {} and is {peer} from here: ask where it runs", status.pid)))
        }
        Answer::Refused(reason) => Err(Fault::input(format!("machine '{name}': {reason}"))),
        Answer::Done | Answer::Usage(_) => Err(fault("it answers something else than what it is asked".to_owned())),
    }
}

/// The processes of a machine, `ozone` first and the core next.
fn processes(status: &Status) -> Vec<Told> {
    let present = |name: &str, role, pid| Told { name: name.to_owned(), role, pid: Some(pid), absent: None };
    let mut told = vec![present("ozone", None, status.pid), present("core", Some(Role::Core), status.core_pid)];
    for device in &status.devices {
        let role = match device.kind {
            DeviceKind::Blk => Role::Blk,
            DeviceKind::Net => Role::Net,
            DeviceKind::Console => Role::Console,
        };
        // Before it says that it is ready it is on its way through its jail.
        let serves = matches!(device.state, DeviceState::Up | DeviceState::Attaching | DeviceState::Detaching);
        let absent = (!serves || device.pid.is_none()).then(|| format!("it is {:?}", device.state).to_lowercase());
        let name = format!("{}/{}", device.kind.role(), device.id);
        told.push(Told { name, role: Some(role), pid: device.pid, absent });
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::message::{DeviceStatus, MachineState};

    #[test]
    fn a_device_is_judged_while_it_has_a_process_that_serves() {
        let device = |state, pid| DeviceStatus {
            id: String::from("disk0").try_into().unwrap(),
            kind: DeviceKind::Blk,
            state,
            pid,
            uid: 7,
            restarts: 0,
            cause: None,
            away_ms: None,
            away_total_ms: 0,
            delay_ms: 0,
            reexecuted: 0,
        };
        let devices = vec![
            device(DeviceState::Up, Some(3)),
            device(DeviceState::Starting, Some(4)),
            device(DeviceState::Away, None),
        ];
        let name = "web1".to_owned();
        let told = processes(&Status { name, state: MachineState::Running, pid: 1, core_pid: 2, core_uid: 7, devices });
        let absent: Vec<Option<&str>> = told.iter().map(|told| told.absent.as_deref()).collect();
        assert_eq!(absent, [None, None, None, Some("it is starting"), Some("it is away")]);
        assert_eq!((told[0].role, told[1].role, told[2].role), (None, Some(Role::Core), Some(Role::Blk)));
        assert_eq!((told[1].name.as_str(), told[2].name.as_str()), ("core", "blk/disk0"));
    }

    #[test]
    fn a_process_of_somebody_else_is_not_taken_for_a_child() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let (own, pid) = (std::process::id().cast_signed(), child.id().cast_signed());
        let told = Told { name: "core".to_owned(), role: Some(Role::Core), pid: Some(pid), absent: None };
        let read = Read::new(&told).unwrap();
        assert!(read.is_sound(own));
        assert!(!read.is_sound(1));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!read.is_sound(own), "it has ended");
        assert!(!Read::new(&told).unwrap().is_sound(own), "it is gone");
    }
}
