//! What the kernel says about the processes of a VM: one row each, read from /proc.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// The namespaces that a jailed process has to itself.
pub const PROMISED_NAMESPACES: [&str; 8] = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];

/// A memfd mapping of this size or more is guest memory; the smaller ones are a process's own.
const GUEST_MEMORY_KIB: u64 = 1024;

/// One process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Process {
    /// What it is in the VM: `ozone`, or the name that `ozone` gave it, such as `blk/disk0`.
    pub role: String,
    /// Its process id as seen from outside its namespace.
    pub pid: i32,
    /// Its real user id.
    pub uid: u32,
    /// Its capability sets.
    pub capabilities: Capabilities,
    /// Its system call filters.
    pub seccomp: Seccomp,
    /// True if it and its children can gain no privileges.
    pub no_new_privs: bool,
    /// The namespaces shared neither with the observer nor with another process of the table.
    pub own_namespaces: Vec<String>,
    /// How many descriptors of each kind are open.
    pub descriptors: BTreeMap<String, u32>,
    /// Memory that it shares with no other process, in KiB, guest memory left out.
    pub private_kib: u64,
}

/// The capability sets, in hexadecimal as the kernel prints them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// In force.
    pub effective: String,
    /// May be put in force.
    pub permitted: String,
    /// May be kept by a program that has them too.
    pub inheritable: String,
    /// The most that an exec can give.
    pub bounding: String,
    /// Kept by any exec.
    pub ambient: String,
}

impl Capabilities {
    /// True if every set is empty.
    #[must_use]
    pub fn are_empty(&self) -> bool {
        let sets = [&self.effective, &self.permitted, &self.inheritable, &self.bounding, &self.ambient];
        sets.iter().all(|set| set.bytes().all(|digit| digit == b'0'))
    }
}

/// The system call filters of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seccomp {
    /// 0 for none, 2 for filters.
    pub mode: u32,
    /// How many filters are stacked.
    pub filters: u32,
}

/// Reads the rows of `root` and all its descendants, in the order of their ids.
pub fn read(root: i32) -> Result<Vec<Process>> {
    let pids = descendants(root)?;
    let observer = namespaces(Path::new("/proc/self"))?;
    let mut seen = BTreeMap::new();
    for pid in &pids {
        match namespaces(&directory(*pid)) {
            Ok(namespaces) => drop(seen.insert(*pid, namespaces)),
            // It ended while we looked.
            Err(_) if !is_alive(*pid) => {}
            Err(error) => return Err(error),
        }
    }
    seen.keys()
        .map(|pid| {
            let own = PROMISED_NAMESPACES
                .into_iter()
                .filter(|name| {
                    let mine = seen.get(pid).and_then(|it| it.get(name));
                    let shared = |(other, theirs): (&i32, &BTreeMap<_, _>)| other != pid && theirs.get(name) == mine;
                    mine.is_some() && mine != observer.get(name) && !seen.iter().any(shared)
                })
                .map(str::to_owned)
                .collect();
            process(*pid, *pid == root, own).with_context(|| format!("read process {pid}"))
        })
        .collect()
}

fn process(pid: i32, is_root: bool, own_namespaces: Vec<String>) -> Result<Process> {
    let directory = directory(pid);
    let status = fs::read_to_string(directory.join("status"))?;
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .map(str::trim)
            .with_context(|| format!("no {name} in its status"))
    };
    let uid = field("Uid")?.split_whitespace().next().context("no uid")?.parse()?;
    let set = |name| Ok::<_, anyhow::Error>(field(name)?.to_owned());
    Ok(Process {
        role: role(&fs::read(directory.join("cmdline"))?, field("Name")?, is_root),
        pid,
        uid,
        capabilities: Capabilities {
            effective: set("CapEff")?,
            permitted: set("CapPrm")?,
            inheritable: set("CapInh")?,
            bounding: set("CapBnd")?,
            ambient: set("CapAmb")?,
        },
        seccomp: Seccomp { mode: field("Seccomp")?.parse()?, filters: field("Seccomp_filters")?.parse()? },
        no_new_privs: field("NoNewPrivs")? == "1",
        own_namespaces,
        descriptors: descriptors(&directory)?,
        private_kib: private_kib(&fs::read_to_string(directory.join("smaps"))?),
    })
}

/// A child's name is its first argument: the kernel's own name for it (comm) ends after 15 bytes. `ozone`'s first argument
/// is whatever its user typed.
fn role(arguments: &[u8], comm: &str, is_root: bool) -> String {
    match arguments.split(|byte| *byte == 0).next() {
        Some(name) if !is_root && !name.is_empty() => String::from_utf8_lossy(name).into_owned(),
        _ => comm.to_owned(),
    }
}

fn directory(pid: i32) -> PathBuf {
    Path::new("/proc").join(pid.to_string())
}

/// `root` and every process below it.
pub fn descendants(root: i32) -> Result<BTreeSet<i32>> {
    let mut parents = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        let Ok(pid) = entry?.file_name().to_string_lossy().parse::<i32>() else { continue };
        // A process may end while we look.
        let Ok(stat) = fs::read_to_string(directory(pid).join("stat")) else { continue };
        if let Some(parent) = parent(&stat) {
            parents.insert(pid, parent);
        }
    }
    let mut found = BTreeSet::from([root]);
    loop {
        let before = found.len();
        let children = parents.iter().filter(|(_, parent)| found.contains(parent)).map(|(pid, _)| *pid);
        let children: Vec<_> = children.collect();
        found.extend(children);
        if found.len() == before {
            return Ok(found);
        }
    }
}

/// False for a process that is gone, or dead and not yet reaped.
fn is_alive(pid: i32) -> bool {
    fs::read_to_string(directory(pid).join("stat"))
        .is_ok_and(|stat| !stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with(['Z', 'X'])))
}

/// The fourth field; the second, in parentheses, may hold anything.
fn parent(stat: &str) -> Option<i32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

fn namespaces(directory: &Path) -> Result<BTreeMap<&'static str, PathBuf>> {
    PROMISED_NAMESPACES
        .into_iter()
        .map(|name| {
            let link = directory.join("ns").join(name);
            let target = fs::read_link(&link).with_context(|| format!("read {}", link.display()))?;
            Ok((name, target))
        })
        .collect()
}

fn descriptors(directory: &Path) -> Result<BTreeMap<String, u32>> {
    let mut kinds = BTreeMap::new();
    for entry in fs::read_dir(directory.join("fd"))? {
        // A descriptor may be closed while we look.
        if let Ok(target) = fs::read_link(entry?.path()) {
            *kinds.entry(kind(&target.to_string_lossy()).to_owned()).or_insert(0) += 1;
        }
    }
    Ok(kinds)
}

/// What a link in /proc/PID/fd stands for.
fn kind(target: &str) -> &str {
    if let Some(name) = target.strip_prefix("anon_inode:") {
        let name = name.trim_matches(['[', ']']);
        return name.split(':').next().unwrap_or(name);
    }
    match target {
        "/dev/kvm" => "kvm",
        "/dev/net/tun" => "tap",
        "/dev/null" => "null",
        _ if target.starts_with("socket:") => "socket",
        _ if target.starts_with("pipe:") => "pipe",
        _ if target.starts_with("/memfd:") => "memfd",
        _ if target.starts_with("/dev/pts/") || target.starts_with("/dev/tty") => "terminal",
        _ => "file",
    }
}

/// Adds up the private parts of all mappings but guest memory.
fn private_kib(smaps: &str) -> u64 {
    let mut total = 0;
    let (mut is_memfd, mut is_guest) = (false, false);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        let Some(field) = first.strip_suffix(':') else {
            is_memfd = line.contains(" /memfd:");
            continue;
        };
        let kib: u64 = words.next().and_then(|it| it.parse().ok()).unwrap_or(0);
        match field {
            "Size" => is_guest = is_memfd && kib >= GUEST_MEMORY_KIB,
            "Private_Clean" | "Private_Dirty" if !is_guest => total += kib,
            _ => {}
        }
    }
    total
}

/// Every promise about a VM's processes that the rows break, in words; `root` is the supervisor.
#[must_use]
pub fn broken_promises(processes: &[Process], root: i32) -> Vec<String> {
    let mut broken = Vec::new();
    let mut users = BTreeSet::from([0]);
    let jailed: Vec<_> = processes.iter().filter(|process| process.pid != root).collect();
    if jailed.is_empty() {
        broken.push("the VM has no process of its own".to_owned());
    }
    for process in jailed {
        let mut check = |holds: bool, what: &str| {
            if !holds {
                broken.push(format!("{} ({}): {what}", process.role, process.pid));
            }
        };
        check(process.capabilities.are_empty(), "has capabilities");
        check(process.seccomp.mode == 2, "has no seccomp filter");
        check(process.no_new_privs, "can gain privileges");
        check(users.insert(process.uid), "has no user id of its own");
        for name in PROMISED_NAMESPACES {
            let own = process.own_namespaces.iter().any(|it| it == name);
            check(own, &format!("has no {name} namespace of its own"));
        }
    }
    broken
}

/// The rows as text for a person.
#[must_use]
pub fn table(processes: &[Process]) -> String {
    let header = [
        "role",
        "pid",
        "uid",
        "capabilities",
        "seccomp",
        "no new privs",
        "own namespaces",
        "private KiB",
        "descriptors",
    ];
    let mut lines = vec![header.map(str::to_owned)];
    lines.extend(processes.iter().map(|process| {
        let capabilities = &process.capabilities;
        let descriptors: Vec<_> = process.descriptors.iter().map(|(kind, n)| format!("{n} {kind}")).collect();
        let filters = &process.seccomp;
        [
            process.role.clone(),
            process.pid.to_string(),
            process.uid.to_string(),
            match capabilities.are_empty() {
                true => "none".to_owned(),
                false => format!("0x{}", capabilities.effective.trim_start_matches('0')),
            },
            match filters.mode {
                0 => "off".to_owned(),
                2 if filters.filters == 1 => "1 filter".to_owned(),
                2 => format!("{} filters", filters.filters),
                mode => format!("mode {mode}"),
            },
            if process.no_new_privs { "yes" } else { "no" }.to_owned(),
            match process.own_namespaces.is_empty() {
                true => "none".to_owned(),
                false => process.own_namespaces.join(" "),
            },
            process.private_kib.to_string(),
            descriptors.join(", "),
        ]
    }));
    let widths: [usize; 9] = std::array::from_fn(|column| {
        lines.iter().filter_map(|line| line.get(column)).map(String::len).max().unwrap_or(0)
    });
    let mut text = String::new();
    for line in &lines {
        let cells: Vec<_> = line.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        let _ = writeln!(text, "{}", cells.join("  ").trim_end());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_left_out() {
        let smaps = "\
55d0-55d1 r-xp 00000000 08:01 1 /usr/bin/vmm-core
Size:                  8 kB
Private_Clean:         3 kB
Private_Dirty:         4 kB
7f00-7f01 rw-s 00000000 00:01 2 /memfd:guest (deleted)
Size:             524288 kB
Private_Dirty:    100000 kB
7f02-7f03 rw-p 00000000 00:00 0
Size:                  8 kB
Private_Dirty:         8 kB
";
        assert_eq!(private_kib(smaps), 15);
    }

    #[test]
    fn descriptors_have_kinds() {
        assert_eq!(kind("anon_inode:[eventfd]"), "eventfd");
        assert_eq!(kind("anon_inode:kvm-vcpu:0"), "kvm-vcpu");
        assert_eq!(kind("/memfd:memory (deleted)"), "memfd");
        assert_eq!(kind("socket:[12]"), "socket");
    }

    #[test]
    fn an_ordinary_process_breaks_the_promises() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let rows = read(i32::try_from(child.id()).unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        let rows = rows.unwrap();
        assert_eq!(rows.len(), 1);
        assert!(!broken_promises(&rows, 0).is_empty());
        assert!(table(&rows).contains("private KiB"));
    }

    #[test]
    fn a_role_is_told_in_full() {
        assert_eq!(role(b"console/console0\0", "console/console", false), "console/console0");
        assert_eq!(role(b"/usr/bin/ozone\0run\0", "ozone", true), "ozone");
        assert_eq!(role(b"", "kworker/0:1", false), "kworker/0:1");
    }

    #[test]
    fn a_name_with_parentheses_does_not_hide_the_parent() {
        assert_eq!(parent("12 (a) b) S 7 1 1"), Some(7));
    }
}
