//! What the kernel says of one process, read without an opinion.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::sys::statvfs::FsFlags;
use serde::Serialize;

use super::descriptor::{self, Descriptor};
use super::group::{self, Group};
use super::memory::{self, Mapping};
use super::status::Status;
use super::sys;

/// Something that was looked for, or why it was not seen.
pub type Seen<T> = Result<T, Unseen>;

/// Why something was not seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unseen {
    /// Only root may look: an ordinary user is shown neither the descriptors nor the environment of what is not dumpable. Or it
    /// lies outside of what is mounted here.
    Denied(String),
    /// It is not there, or makes no sense.
    Failed(String),
}

/// Namespaces by kind, as `/proc/PID/ns` names them (namespaces(7)).
pub type Namespaces = BTreeMap<&'static str, String>;

const NAMESPACES: [&str; 8] = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];

/// The ids of the processes that each uid of the host has.
pub type Users = BTreeMap<u32, BTreeSet<i32>>;

/// One process.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Its id, as the reader sees it.
    pub pid: i32,
    /// The status of every thread.
    pub threads: Seen<Vec<Status>>,
    /// Its namespaces.
    pub namespaces: Seen<Namespaces>,
    /// How long each range of its user namespace's uid map is (user_namespaces(7)).
    pub user_map: Seen<Vec<u32>>,
    /// Its root directory.
    pub root: Seen<Root>,
    /// The owner of its files in `/proc`: root's when it is not dumpable, its own uid otherwise (proc(5)).
    pub owner: Seen<u32>,
    /// Its resource limits.
    pub limits: Seen<Vec<Limit>>,
    /// Its session.
    pub session: Seen<Session>,
    /// How many bytes its environment has.
    pub environment: Seen<usize>,
    /// Its open descriptors.
    pub descriptors: Seen<Vec<Descriptor>>,
    /// Its mappings.
    pub mappings: Seen<Vec<Mapping>>,
    /// The file it executes.
    pub executable: Seen<Executable>,
    /// Its control group.
    pub group: Seen<Group>,
}

/// A root directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    /// Every mount of the mount namespace.
    pub mounts: Vec<Mount>,
    /// Whether statfs(2) says that it is a tmpfs.
    pub is_tmpfs: bool,
    /// Whether statfs(2) says that it is read-only.
    pub is_read_only: bool,
    /// The names in it.
    pub entries: Vec<String>,
    /// Whether the working directory is the same.
    pub is_working_directory: bool,
}

/// A line of `/proc/PID/mountinfo` (proc(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is.
    pub place: String,
    /// The options of the mount.
    pub options: Vec<String>,
    /// The file system's kind.
    pub kind: String,
}

/// A line of `/proc/PID/limits`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Limit {
    /// What is limited, as the kernel calls it.
    pub name: String,
    /// The soft limit, a number or `unlimited`.
    pub soft: String,
    /// The hard limit.
    pub hard: String,
}

/// From `/proc/PID/stat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session {
    /// The id of the session's first process (setsid(2)).
    pub leader: i32,
    /// The device number of the controlling terminal, 0 without one.
    pub terminal: i32,
}

/// An executable and who may change it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Executable {
    /// Its path.
    pub path: String,
    /// Its owner.
    pub uid: u32,
    /// Its mode bits.
    pub mode: u32,
}

impl Facts {
    /// Reads all of a process. Whether it was the same process all the time is for a [`Pin`] to say.
    pub fn read(pid: i32) -> Self {
        Self {
            pid,
            threads: said("status", threads(pid)).and_then(|texts| parse_threads(&texts).map_err(Unseen::Failed)),
            namespaces: said("ns", namespaces(pid)),
            user_map: text(pid, "uid_map").map(|text| parse_user_map(&text)),
            root: said("root", root(pid)),
            owner: said("environ", fs::metadata(path(pid, "environ")).map(|it| it.uid())),
            limits: text(pid, "limits").map(|text| parse_limits(&text)),
            session: text(pid, "stat")
                .and_then(|text| parse_stat(&text).ok_or(Unseen::Failed("stat makes no sense".to_owned()))),
            environment: said("environ", fs::read(path(pid, "environ")).map(|it| it.len())),
            descriptors: said("fd", descriptor::read(pid)),
            mappings: text(pid, "smaps").and_then(|text| memory::parse(&text).map_err(Unseen::Failed)),
            executable: said("exe", executable(pid)),
            group: group(pid),
        }
    }

    /// The parent's id.
    pub fn parent(&self) -> Option<i32> {
        self.threads.as_ref().ok()?.first().map(|thread| thread.parent)
    }

    /// The effective uid.
    pub fn user(&self) -> Option<u32> {
        self.threads.as_ref().ok()?.first().map(|thread| thread.uids[1])
    }
}

/// A process that is held on to, so that another one with its id is not taken for it.
#[derive(Debug)]
pub struct Pin(OwnedFd);

impl Pin {
    /// Takes hold of a process.
    ///
    /// # Errors
    /// `ESRCH` if there is none.
    pub fn new(pid: i32) -> Result<Self, Errno> {
        sys::pidfd_open(pid).map(Self)
    }

    /// Whether the process still runs: whatever was read under its id since [`Self::new`] is then its own.
    pub fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO) == Ok(0)
    }
}

/// The processes of every uid of the host, but those that have ended.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn users() -> Seen<Users> {
    let mut users = Users::new();
    for entry in said("", fs::read_dir("/proc"))? {
        let Ok(pid) = said("", entry)?.file_name().to_string_lossy().parse::<i32>() else { continue };
        // A process may end while we look.
        let Some(status) = text(pid, "status").ok().and_then(|text| Status::parse(&text).ok()) else { continue };
        if !status.has_ended() {
            for uid in status.uids {
                users.entry(uid).or_default().insert(pid);
            }
        }
    }
    Ok(users)
}

/// The namespaces of a process.
///
/// # Errors
/// What the kernel says.
pub fn namespaces(pid: i32) -> io::Result<Namespaces> {
    // By name: to list the directory takes more rights than to read what is in it.
    let one = |kind: &'static str| match fs::read_link(path(pid, &format!("ns/{kind}"))) {
        Ok(target) => Some(Ok((kind, target.to_string_lossy().into_owned()))),
        // Every kernel has the others.
        Err(error) if kind == "time" && error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => Some(Err(error)),
    };
    NAMESPACES.into_iter().filter_map(one).collect()
}

/// Whether this host has user namespaces for anyone (namespaces(7), `/proc/sys/user`).
pub fn offers_user_namespaces() -> bool {
    fs::read_to_string("/proc/sys/user/max_user_namespaces").is_ok_and(|most| most.trim() != "0")
}

fn path(pid: i32, name: &str) -> String {
    format!("/proc/{pid}/{name}")
}

fn text(pid: i32, name: &str) -> Seen<String> {
    said(name, fs::read_to_string(path(pid, name)))
}

fn said<T>(what: &str, outcome: io::Result<T>) -> Seen<T> {
    outcome.map_err(|error| {
        let why = format!("/proc/PID/{what} cannot be read: {}", crate::resources::said(&error));
        if error.kind() == io::ErrorKind::PermissionDenied { Unseen::Denied(why) } else { Unseen::Failed(why) }
    })
}

fn group(pid: i32) -> Seen<Group> {
    let text = text(pid, "cgroup")?;
    match group::elsewhere(&text) {
        Some(path) => Err(Unseen::Denied(format!("its cgroup {path} is not in the hierarchy that is mounted here"))),
        None => said("cgroup", Group::read(&text)),
    }
}

/// The status of every thread, the first one first.
fn threads(pid: i32) -> io::Result<Vec<String>> {
    let mut ids: Vec<i32> = Vec::new();
    for entry in fs::read_dir(path(pid, "task"))? {
        ids.extend(entry?.file_name().to_string_lossy().parse::<i32>());
    }
    ids.sort_by_key(|id| (*id != pid, *id));
    let mut texts = Vec::with_capacity(ids.len());
    for id in ids {
        match fs::read_to_string(path(pid, &format!("task/{id}/status"))) {
            Ok(text) => texts.push(text),
            // It ended while we looked.
            Err(error) if id != pid && matches!(error.raw_os_error(), Some(nix::libc::ENOENT | nix::libc::ESRCH)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(texts)
}

/// A thread that is about to end is none; the first one stays whatever it does.
fn parse_threads(texts: &[String]) -> Result<Vec<Status>, String> {
    let threads: Vec<Status> = texts.iter().map(|text| Status::parse(text)).collect::<Result<_, _>>()?;
    Ok(threads.into_iter().enumerate().filter(|(place, it)| *place == 0 || !it.has_ended()).map(|(_, it)| it).collect())
}

fn root(pid: i32) -> io::Result<Root> {
    let directory = path(pid, "root");
    let file_system = statfs(directory.as_str())?;
    let mut entries = Vec::new();
    for entry in fs::read_dir(&directory)? {
        entries.push(entry?.file_name().to_string_lossy().into_owned());
    }
    let (root, current) = (fs::metadata(&directory)?, fs::metadata(path(pid, "cwd"))?);
    Ok(Root {
        mounts: parse_mounts(&fs::read_to_string(path(pid, "mountinfo"))?),
        is_tmpfs: file_system.filesystem_type() == TMPFS_MAGIC,
        is_read_only: file_system.flags().contains(FsFlags::ST_RDONLY),
        entries,
        is_working_directory: (root.dev(), root.ino()) == (current.dev(), current.ino()),
    })
}

fn executable(pid: i32) -> io::Result<Executable> {
    let link = path(pid, "exe");
    let metadata = fs::metadata(&link)?;
    let path = fs::read_link(&link)?.to_string_lossy().into_owned();
    Ok(Executable { path, uid: metadata.uid(), mode: metadata.mode() & 0o7777 })
}

fn parse_user_map(text: &str) -> Vec<u32> {
    text.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse().ok()).collect()
}

fn parse_mounts(text: &str) -> Vec<Mount> {
    // A line that makes no sense stays a mount: one too many is found, one too few is not.
    let mount = |line: &str| {
        let word = |at: usize| line.split_whitespace().nth(at).unwrap_or_default();
        let kind = line.split_once(" - ").and_then(|(_, rest)| rest.split_whitespace().next());
        Mount {
            place: word(4).to_owned(),
            options: word(5).split(',').map(str::to_owned).collect(),
            kind: kind.unwrap_or_default().to_owned(),
        }
    };
    text.lines().map(mount).collect()
}

fn parse_limits(text: &str) -> Vec<Limit> {
    let limit = |line: &str| {
        // The name has a column of fixed width.
        let (name, rest) = line.split_at_checked(25)?;
        let mut words = rest.split_whitespace();
        let (soft, hard) = (words.next()?.to_owned(), words.next()?.to_owned());
        Some(Limit { name: name.trim().to_owned(), soft, hard })
    };
    text.lines().skip(1).filter_map(limit).collect()
}

/// The second field, in parentheses, may hold anything.
fn parse_stat(text: &str) -> Option<Session> {
    let mut words = text.rsplit_once(')')?.1.split_whitespace().skip(3);
    Some(Session { leader: words.next()?.parse().ok()?, terminal: words.next()?.parse().ok()? })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::audit::descriptor::{self, Kind};
    use crate::audit::{group, memory, status};

    const LIMITS: &str = "\
Limit                     Soft Limit           Hard Limit           Units     
Max file size             268435456            unlimited            bytes     
Max core file size        0                    0                    bytes     
Max processes             320                  320                  processes 
Max open files            1024                 1024                 files     
Max msgqueue size         0                    0                    bytes     
Max nice priority         0                    0                    
Max realtime priority     0                    0                    
";

    const MOUNTS: &str =
        "48 34 0:29 / / ro,nosuid,nodev,noexec,relatime - tmpfs none rw,size=4k,nr_inodes=1,mode=555,inode64\n";

    /// A core as it is in its jail, with namespaces numbered from `pid`.
    pub fn jailed(pid: i32) -> Facts {
        let uid = 0x7000_0000 + pid.unsigned_abs();
        let mut thread = Status::parse(status::tests::JAILED).unwrap();
        (thread.uids, thread.gids, thread.ids) = ([uid; 4], [uid; 4], vec![pid, 1]);
        let kinds = [Kind::Null, Kind::Null, Kind::Pipe, Kind::Socket, Kind::KvmVm, Kind::KvmVcpu, Kind::Memfd];
        Facts {
            pid,
            threads: Ok(vec![thread.clone(), thread]),
            namespaces: Ok(NAMESPACES.map(|kind| (kind, format!("{kind}:[{pid}]"))).into()),
            user_map: Ok(parse_user_map("     65534       1000          1\n")),
            root: Ok(Root {
                mounts: parse_mounts(MOUNTS),
                is_tmpfs: true,
                is_read_only: true,
                entries: Vec::new(),
                is_working_directory: true,
            }),
            owner: Ok(0),
            limits: Ok(parse_limits(LIMITS)),
            session: Ok(parse_stat(&format!("{pid} (co) re) S 97 {pid} {pid} 0 -1 4194560")).unwrap()),
            environment: Ok(0),
            descriptors: Ok((0..).zip(kinds).map(|(number, kind)| descriptor::tests::of(number, kind)).collect()),
            mappings: memory::parse(memory::tests::CORE).map_err(Unseen::Failed),
            executable: Ok(Executable { path: "/usr/bin/vmm-core".to_owned(), uid: 0, mode: 0o755 }),
            group: Ok(group::tests::of(pid)),
        }
    }

    #[test]
    fn the_texts_of_a_jailed_process_are_read() {
        let facts = jailed(99);
        let core = Limit { name: "Max core file size".to_owned(), soft: "0".to_owned(), hard: "0".to_owned() };
        assert_eq!(facts.limits.as_ref().unwrap()[1], core);
        assert_eq!(facts.limits.as_ref().unwrap()[0].hard, "unlimited");
        assert_eq!(facts.session, Ok(Session { leader: 99, terminal: 0 }));
        assert_eq!(facts.user_map, Ok(vec![1]));
        let [mount] = facts.root.unwrap().mounts.try_into().unwrap();
        assert_eq!((mount.place.as_str(), mount.kind.as_str()), ("/", "tmpfs"));
        assert!(mount.options.contains(&"noexec".to_owned()));
    }

    #[test]
    fn threads_that_end_are_left_out() {
        let runs = status::tests::JAILED.to_owned();
        let ends = runs.replace("Umask:	0077\n", "");
        assert_eq!(parse_threads(&[runs.clone(), ends.clone(), runs.clone()]).unwrap().len(), 2);
        assert_eq!(parse_threads(&[ends, runs]).unwrap().len(), 2);
    }

    #[test]
    fn this_process_is_read_in_full() {
        let pid = std::process::id().cast_signed();
        let pin = Pin::new(pid).unwrap();
        let facts = Facts::read(pid);
        assert!(facts.threads.is_ok() && facts.namespaces.is_ok() && facts.root.is_ok(), "{facts:?}");
        assert!(facts.limits.is_ok_and(|limits| limits.len() >= 16));
        assert!(facts.descriptors.is_ok() && facts.mappings.is_ok() && facts.executable.is_ok());
        assert!(pin.is_alive());
        let uid = facts.threads.unwrap()[0].uids[0];
        assert!(users().unwrap()[&uid].contains(&pid));
    }

    #[test]
    fn a_process_that_has_ended_is_told_from_one_that_runs() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let pin = Pin::new(child.id().cast_signed()).unwrap();
        assert!(pin.is_alive());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!pin.is_alive());
    }
}
