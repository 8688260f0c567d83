//! Open descriptors: of what kind each is, and which kinds a role may hold.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use nix::libc;
use nix::sys::stat::{SFlag, major, minor};
use seccomp::Role;
use serde::{Serialize, Serializer};

use super::sys;

/// What a descriptor stands for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// `/dev/null`.
    Null,
    /// A unix socket.
    Socket,
    /// A socket of any other family, with its protocol.
    OtherSocket(String),
    /// A pipe without a name.
    Pipe,
    /// A pipe that a path names.
    Fifo,
    /// eventfd(2).
    Eventfd,
    /// epoll_create(2).
    Eventpoll,
    /// memfd_create(2).
    Memfd,
    /// io_uring_setup(2).
    IoUring,
    /// A virtual machine of KVM.
    KvmVm,
    /// A vCPU of KVM.
    KvmVcpu,
    /// `/dev/kvm`.
    Kvm,
    /// A queue of a tap, `/dev/net/tun`.
    Tap,
    /// The master of a pseudo-terminal.
    Pty,
    /// A terminal.
    Tty,
    /// A plain file that a path names.
    File,
    /// A block device.
    BlockDevice,
    /// A directory.
    Directory,
    /// Any other character device.
    Device,
    /// Any other file without a name, as the kernel calls it.
    Other(String),
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Null => "null",
            Self::Socket => "socket",
            Self::OtherSocket(protocol) => return write!(formatter, "socket of {protocol}"),
            Self::Pipe => "pipe",
            Self::Fifo => "fifo",
            Self::Eventfd => "eventfd",
            Self::Eventpoll => "eventpoll",
            Self::Memfd => "memfd",
            Self::IoUring => "io_uring",
            Self::KvmVm => "kvm-vm",
            Self::KvmVcpu => "kvm-vcpu",
            Self::Kvm => "kvm",
            Self::Tap => "tap",
            Self::Pty => "pty",
            Self::Tty => "tty",
            Self::File => "file",
            Self::BlockDevice => "block device",
            Self::Directory => "directory",
            Self::Device => "device",
            Self::Other(name) => name,
        })
    }
}

impl Serialize for Kind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// One open descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Descriptor {
    /// Its number.
    pub number: u32,
    /// What it stands for.
    pub kind: Kind,
    /// What the link in `/proc/PID/fd` says.
    pub target: String,
    /// Device and inode number of the file.
    #[serde(skip)]
    pub file: (u64, u64),
}

/// What fstat(2) tells of a descriptor's file, as far as its kind depends on it.
#[derive(Clone, Copy, Debug)]
struct FileFacts {
    mode: u32,
    device: u64,
    links: u64,
}

/// Reads `/proc/PID/fd`. A descriptor that is closed meanwhile is left out.
///
/// # Errors
/// What the kernel says.
pub fn read(pid: i32) -> io::Result<Vec<Descriptor>> {
    let directory = format!("/proc/{pid}/fd");
    let mut descriptors = Vec::new();
    for entry in fs::read_dir(&directory)? {
        let Ok(number) = entry?.file_name().to_string_lossy().parse() else { continue };
        match read_one(&format!("{directory}/{number}"), number) {
            Ok(descriptor) => descriptors.push(descriptor),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    descriptors.sort_by_key(|descriptor| descriptor.number);
    Ok(descriptors)
}

fn read_one(link: &str, number: u32) -> io::Result<Descriptor> {
    loop {
        let target = fs::read_link(link)?;
        let metadata = fs::metadata(link)?;
        let facts = FileFacts { mode: metadata.mode(), device: metadata.rdev(), links: metadata.nlink() };
        let target_text = target.to_string_lossy().into_owned();
        let protocol = || sys::socket_protocol(link).unwrap_or_else(|errno| format!("unknown protocol ({errno})"));
        let kind = kind(&target_text, facts, protocol);
        // The number may have come to stand for something else in between.
        if fs::read_link(link)? == target {
            return Ok(Descriptor { number, kind, target: target_text, file: (metadata.dev(), metadata.ino()) });
        }
    }
}

fn kind(target: &str, facts: FileFacts, protocol: impl FnOnce() -> String) -> Kind {
    match SFlag::from_bits_truncate(facts.mode & libc::S_IFMT) {
        SFlag::S_IFDIR => Kind::Directory,
        SFlag::S_IFBLK => Kind::BlockDevice,
        SFlag::S_IFIFO if target.starts_with("pipe:[") => Kind::Pipe,
        SFlag::S_IFIFO => Kind::Fifo,
        SFlag::S_IFSOCK => match protocol() {
            // Stream sockets have had a name of their own since Linux 5.15.
            protocol if matches!(protocol.as_str(), "UNIX" | "UNIX-STREAM") => Kind::Socket,
            protocol => Kind::OtherSocket(protocol),
        },
        // By number (Linux, Documentation/admin-guide/devices.txt): a name can be anything.
        SFlag::S_IFCHR => match (major(facts.device), minor(facts.device)) {
            (1, 3) => Kind::Null,
            (10, 232) => Kind::Kvm,
            (10, 200) => Kind::Tap,
            (5, 2) | (128..=135, _) => Kind::Pty,
            (4 | 5 | 136..=143, _) => Kind::Tty,
            _ => Kind::Device,
        },
        SFlag::S_IFREG if target.starts_with("/memfd:") && facts.links == 0 => Kind::Memfd,
        SFlag::S_IFREG if target.starts_with('/') => Kind::File,
        _ => match target.strip_prefix("anon_inode:").map(|name| name.trim_matches(['[', ']'])) {
            Some("eventfd") => Kind::Eventfd,
            Some("eventpoll") => Kind::Eventpoll,
            Some("io_uring") => Kind::IoUring,
            Some("kvm-vm") => Kind::KvmVm,
            Some(name) if name.starts_with("kvm-vcpu") => Kind::KvmVcpu,
            Some(name) => Kind::Other(name.to_owned()),
            None => Kind::Other(target.split(':').next().unwrap_or(target).to_owned()),
        },
    }
}

/// How many descriptors of each kind there are, in words.
pub fn tally(descriptors: &[Descriptor]) -> String {
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    for descriptor in descriptors {
        *kinds.entry(descriptor.kind.to_string()).or_default() += 1;
    }
    kinds.iter().map(|(kind, count)| format!("{count} {kind}")).collect::<Vec<_>>().join(", ")
}

/// Every descriptor that a role does not hold, with the reason, in words.
pub fn strangers(role: Role, descriptors: &[Descriptor]) -> Vec<String> {
    let mut counts: BTreeMap<&Kind, usize> = BTreeMap::new();
    let mut images = 0;
    let mut strangers = Vec::new();
    for descriptor in descriptors {
        let count = counts.entry(&descriptor.kind).or_default();
        *count += 1;
        // An image is one or the other.
        images += usize::from(matches!(descriptor.kind, Kind::File | Kind::BlockDevice));
        let most = most(role, &descriptor.kind);
        let found = format!("{} is a {}, {}", descriptor.number, descriptor.kind, descriptor.target);
        if most == 0 {
            strangers.push(found);
        } else if *count > most || role == Role::Blk && images > 1 {
            strangers.push(format!("{found}, one more than it holds"));
        }
    }
    strangers
}

/// How many descriptors of a kind a role holds at most, once it serves.
fn most(role: Role, kind: &Kind) -> usize {
    const ANY: usize = usize::MAX;
    match (role, kind) {
        (_, Kind::Eventfd | Kind::Memfd) => ANY,
        // Standard input and output; a console's host side may be one as well.
        (Role::Console, Kind::Null) => 4,
        (_, Kind::Null) => 2,
        (Role::Core, Kind::KvmVm) => 1,
        // The control channel, and a backend per device.
        (Role::Core, Kind::KvmVcpu | Kind::Socket) => ANY,
        // The log and the serial port's output.
        (Role::Core, Kind::Pipe) => 2,
        // The control channel and the core's.
        (Role::Blk | Role::Net, Kind::Socket) => 2,
        (Role::Blk | Role::Net | Role::Console, Kind::Eventpoll) => ANY,
        (Role::Blk, Kind::IoUring) => ANY,
        // The log and the sentinel.
        (Role::Blk, Kind::Pipe) => 2,
        (Role::Blk, Kind::File | Kind::BlockDevice) => 1,
        (Role::Net, Kind::Tap) => ANY,
        (Role::Net, Kind::Pipe) => 1,
        // The control channel, the core's, the listener and its clients; the log, the serial port's output; and whatever the
        // user's standard input and output are.
        (Role::Console, Kind::Socket | Kind::Pipe) => ANY,
        (Role::Console, Kind::Tty | Kind::File | Kind::Fifo | Kind::Device | Kind::OtherSocket(_)) => 2,
        (Role::Console, Kind::Pty) => 1,
        _ => 0,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use nix::sys::stat::makedev;

    /// A descriptor of a kind.
    pub fn of(number: u32, kind: Kind) -> Descriptor {
        Descriptor { number, kind, target: "somewhere".to_owned(), file: (0, number.into()) }
    }

    #[test]
    fn kinds_are_told_by_what_the_file_is_and_not_by_its_name() {
        let file = |target: &str, kind_bits: SFlag, device, links| {
            kind(target, FileFacts { mode: kind_bits.bits() | 0o600, device, links }, || "UNIX-STREAM".to_owned())
        };
        let char_device = |target, major, minor| file(target, SFlag::S_IFCHR, makedev(major, minor), 1);
        let anonymous = |target| kind(target, FileFacts { mode: 0o600, device: 0, links: 1 }, String::new);
        assert_eq!(char_device("/dev/null", 1, 3), Kind::Null);
        assert_eq!(char_device("/dev/null", 10, 232), Kind::Kvm);
        assert_eq!(char_device("/dev/net/tun", 10, 200), Kind::Tap);
        assert_eq!(char_device("/dev/ptmx", 5, 2), Kind::Pty);
        assert_eq!(char_device("/dev/pts/0", 136, 0), Kind::Tty);
        assert_eq!(char_device("/dev/mem", 1, 1), Kind::Device);
        assert_eq!(file("/memfd:guest-memory-0 (deleted)", SFlag::S_IFREG, 0, 0), Kind::Memfd);
        assert_eq!(file("/memfd:no such thing", SFlag::S_IFREG, 0, 1), Kind::File);
        assert_eq!(file("/root", SFlag::S_IFDIR, 0, 2), Kind::Directory);
        assert_eq!(file("/dev/vda", SFlag::S_IFBLK, 1, 1), Kind::BlockDevice);
        assert_eq!(file("pipe:[7]", SFlag::S_IFIFO, 0, 1), Kind::Pipe);
        assert_eq!(file("/tmp/fifo", SFlag::S_IFIFO, 0, 1), Kind::Fifo);
        assert_eq!(file("socket:[7]", SFlag::S_IFSOCK, 0, 1), Kind::Socket);
        assert_eq!(anonymous("anon_inode:[eventfd]"), Kind::Eventfd);
        assert_eq!(anonymous("anon_inode:[eventpoll]"), Kind::Eventpoll);
        assert_eq!(anonymous("anon_inode:[io_uring]"), Kind::IoUring);
        assert_eq!(anonymous("anon_inode:kvm-vm"), Kind::KvmVm);
        assert_eq!(anonymous("anon_inode:kvm-vcpu:0"), Kind::KvmVcpu);
        assert_eq!(anonymous("anon_inode:bpf-prog"), Kind::Other("bpf-prog".to_owned()));
    }

    #[test]
    fn this_process_descriptors_are_told() {
        let directory = std::fs::File::open("/").unwrap();
        let descriptors = read(std::process::id().cast_signed()).unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&directory).unsigned_abs();
        assert!(descriptors.iter().any(|it| it.number == number && it.kind == Kind::Directory), "{descriptors:?}");
    }

    #[test]
    fn a_role_holds_what_it_needs_and_nothing_else() {
        let of_blk = [Kind::Null, Kind::Null, Kind::Pipe, Kind::Socket, Kind::Socket, Kind::File, Kind::IoUring];
        let of_blk: Vec<Descriptor> = (0..).zip(of_blk).map(|(number, kind)| of(number, kind)).collect();
        assert!(strangers(Role::Blk, &of_blk).is_empty());
        for role in Role::ALL {
            for kind in [Kind::Directory, Kind::Kvm, Kind::Other("bpf-prog".to_owned())] {
                assert_eq!(strangers(role, &[of(7, kind.clone())]).len(), 1, "{role} may hold a {kind}");
            }
        }
        for (role, kind) in [
            (Role::Blk, Kind::File),
            (Role::Blk, Kind::BlockDevice),
            (Role::Core, Kind::File),
            (Role::Core, Kind::Tap),
            (Role::Net, Kind::KvmVm),
            (Role::Net, Kind::IoUring),
            (Role::Blk, Kind::OtherSocket("TCP".to_owned())),
            (Role::Console, Kind::BlockDevice),
        ] {
            let more: Vec<Descriptor> = of_blk.iter().take(6).cloned().chain([of(9, kind.clone())]).collect();
            let before = strangers(role, &more[..6]).len();
            assert_eq!(strangers(role, &more).len(), before + 1, "{role} may hold a {kind}");
        }
    }
}
