//! Control groups (cgroup v2, cgroups(7)): that of a process, and what the host's hierarchy offers.

use std::fs;
use std::io;
use std::path::Path;

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use nix::sys::statvfs::FsFlags;

use crate::spec::limits::MOUNT;

/// The control group of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Its path from the root of the hierarchy, as `/proc/PID/cgroup` tells it.
    pub path: String,
    /// The processes in it, but those that are the kernel's own: KVM has a thread for each machine in the group of who made it
    /// (Linux virt/kvm/kvm_main.c, kvm_vm_create_worker_thread).
    pub members: Vec<i32>,
    /// Its `pids.max`, a number or `max`; nothing if the controller is not enabled for it.
    pub most_processes: Option<String>,
}

/// The host's hierarchy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// Whether groups can be made in it at all.
    pub is_writable: bool,
    /// Whether there is the controller of the number of processes.
    pub counts_processes: bool,
}

impl Hierarchy {
    /// Looks for it where `ozone run` does; there is none if the host has the first version there, or both.
    pub fn find() -> Option<Self> {
        let statistics = statfs(MOUNT).ok().filter(|it| it.filesystem_type() == CGROUP2_SUPER_MAGIC)?;
        let controllers = fs::read_to_string(format!("{MOUNT}/cgroup.controllers")).unwrap_or_default();
        Some(Self {
            is_writable: !statistics.flags().contains(FsFlags::ST_RDONLY),
            counts_processes: controllers.split_whitespace().any(|controller| controller == "pids"),
        })
    }
}

impl Group {
    /// Reads the group that `/proc/PID/cgroup` names in this text.
    ///
    /// # Errors
    /// What open(2) and read(2) say; `NotFound` for a process that is in no group of the second version.
    pub fn read(text: &str) -> io::Result<Self> {
        let path = own_path(text).ok_or(io::ErrorKind::NotFound)?;
        let file = |name: &str| fs::read_to_string(format!("{MOUNT}{path}/{name}"));
        let members = file("cgroup.procs")?;
        let members = members.lines().filter_map(|line| line.parse().ok()).filter(|pid| !is_of_kernel(*pid)).collect();
        let most_processes = match file("pids.max") {
            Ok(most) => Some(most.trim().to_owned()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        Ok(Self { path: path.to_owned(), members, most_processes })
    }

    /// Whether it is the root of the hierarchy that the reader sees, or beyond it.
    pub fn is_outermost(&self) -> bool {
        self.path == "/" || self.path.starts_with("/..")
    }

    /// The path of the group that it is in.
    pub fn parent(&self) -> &str {
        self.path.rsplit_once('/').map_or("", |(parent, _)| parent)
    }

    /// The path of the group that this one is in.
    pub fn grandparent(&self) -> &str {
        self.parent().rsplit_once('/').map_or("", |(grandparent, _)| grandparent)
    }
}

/// The path that `/proc/PID/cgroup` names in this text, if the mounted hierarchy does not have it. The group of a process that
/// runs is there: so whoever reads this sees another part of the hierarchy mounted than its own cgroup namespace begins with.
pub fn elsewhere(text: &str) -> Option<&str> {
    let path = own_path(text).filter(|path| !path.starts_with("/.."))?;
    (Hierarchy::find().is_some() && !Path::new(&format!("{MOUNT}{path}")).exists()).then_some(path)
}

/// Whether a process is the kernel's own; one that cannot be seen is taken for a user's.
fn is_of_kernel(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|text| has_kernels_flag(&text))
}

/// Whether this is the `/proc/PID/stat` of a kernel's thread: the seventh field after the name has its flags (proc(5)).
fn has_kernels_flag(text: &str) -> bool {
    /// PF_KTHREAD (Linux include/linux/sched.h).
    const OF_KERNEL: u32 = 0x0020_0000;
    let flags = text.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(6)?.parse::<u32>().ok());
    flags.is_some_and(|flags| flags & OF_KERNEL != 0)
}

/// The line of the second version's hierarchy has the number 0 and no controller (cgroups(7), "/proc files").
fn own_path(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("0::"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The group of a process as a machine gives it.
    pub fn of(pid: i32) -> Group {
        let path = format!("/ozone/web1/jailed/{pid}");
        Group { path, members: vec![pid], most_processes: Some("320".to_owned()) }
    }

    #[test]
    fn the_path_is_that_of_the_second_version() {
        assert_eq!(own_path("9:name=systemd:/a\n0::/ozone/web1/jailed/core\n"), Some("/ozone/web1/jailed/core"));
        assert_eq!(own_path("9:name=systemd:/a\n1:cpu:/0::/b\n"), None);
    }

    #[test]
    fn a_group_that_is_not_mounted_here_is_told_from_one_outside() {
        let there = Hierarchy::find().is_some();
        assert_eq!(elsewhere("0::/no/such/group\n"), there.then_some("/no/such/group"));
        assert_eq!(elsewhere("0::/../outside\n"), None);
        assert_eq!(elsewhere("9:name=systemd:/a\n"), None);
        assert_eq!(elsewhere(&fs::read_to_string("/proc/self/cgroup").unwrap()), None);
    }

    #[test]
    fn groups_above_are_told_by_the_path() {
        assert_eq!((of(99).parent(), of(99).grandparent()), ("/ozone/web1/jailed", "/ozone/web1"));
        assert!(!of(99).is_outermost());
        let at = |path: &str| Group { path: path.to_owned(), ..of(99) };
        assert!(at("/").is_outermost() && at("/../other").is_outermost());
        assert_eq!((at("/").parent(), at("/").grandparent()), ("", ""));
    }

    #[test]
    fn a_thread_of_the_kernels_is_told_from_a_process() {
        // A name may hold anything.
        assert!(has_kernels_flag("101 (kvm-nx-) 1 2 -recov) S 2 0 0 0 -1 2129984 0 0 0 0 0 0"));
        assert!(!has_kernels_flag("99 (core) S 97 99 99 0 -1 4194560 0 0 0 0 0 0"));
        assert!(!is_of_kernel(std::process::id().cast_signed()));
        // No process has this id.
        assert!(!is_of_kernel(i32::MAX));
    }

    #[test]
    fn the_group_of_this_process_is_read_where_there_are_groups() {
        let read = Group::read(&fs::read_to_string("/proc/self/cgroup").unwrap());
        if Hierarchy::find().is_some() {
            assert!(read.unwrap().members.contains(&std::process::id().cast_signed()));
        } else {
            assert_eq!(read.unwrap_err().kind(), io::ErrorKind::NotFound);
        }
    }
}
