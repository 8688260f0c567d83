//! The jail of a program for which nothing is asked.

use std::fs::{self, File};
use std::os::fd::AsFd;

use libtest_mimic::Failed;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::CloneFlags;

use crate::Test;
use crate::support::{OWN, Place, Said, apart, descriptors, leak, namespace, status};

pub const TESTS: &[Test] = &[
    ("a program finds nothing and holds nothing", true, finds_nothing),
    ("the jail's first process is as confined as the program", true, first_process),
    ("nothing is mounted on the host, not even for a moment", true, host_mounts),
    ("no abstract socket of the host can be reached", true, abstract_socket),
    ("what the default filter refuses is refused, and an ordinary program runs", true, default_filter),
];

/// The sets, of which the last is what execve could give.
const CAPABILITIES: [&str; 5] = ["CapInh", "CapPrm", "CapEff", "CapAmb", "CapBnd"];

/// Everything that holds for any program, whoever started it.
pub fn closest(said: &Said) {
    assert_eq!(said.get("pid"), "2 of 1 in session 1");
    assert_eq!(said.get("arguments"), "/probe");
    assert_eq!(said.get("environment"), "");
    assert_eq!(said.get("descriptors"), "0 1 2");
    assert_eq!((said.get("list /"), said.get("list /..")), ("probe", "probe"), "the root has the program alone");
    assert_eq!((said.get("root"), said.get("directory")), ("555", "/"));
    assert_eq!(said.get("umask"), "77");
    assert_eq!(said.get("host"), "jail");
    // NOROOT, NO_SETUID_FIXUP's, KEEP_CAPS's and NO_CAP_AMBIENT_RAISE's locks, and what is locked (capabilities(7)).
    assert_eq!(said.get("securebits"), "0xeb");
    assert_eq!(said.get("core"), "0:0");
    assert_eq!(said.get("terminal"), "ENOENT");
}

/// What the host sees of a process in the jail.
pub fn confined(pid: i32) {
    for set in CAPABILITIES {
        assert_eq!(status(pid, set), "0000000000000000", "{set}");
    }
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    assert_eq!(status(pid, "Seccomp"), "2");
    for name in ["pid", "mnt", "net", "ipc", "uts", "cgroup", "time"] {
        assert_ne!(namespace(pid, name), namespace(std::process::id().cast_signed(), name), "{name}");
    }
}

fn finds_nothing() -> Result<(), Failed> {
    let place = Place::new();
    let _leaked = leak();
    let running = place.waiting(&[], &["look", "create", "/file", "create", "/probe", "chmod", "/probe"])?;
    closest(&running.said);
    let id = format!("{OWN} {OWN} {OWN}");
    assert_eq!((running.said.get("uid"), running.said.get("gid")), (id.as_str(), id.as_str()));
    assert_eq!(running.said.get("groups"), "0");
    assert_eq!(running.said.get("create /file"), "EROFS");
    assert_eq!(running.said.get("chmod /probe"), "EROFS");
    assert!(["EROFS", "ETXTBSY", "EACCES"].contains(&running.said.get("create /probe")));
    let [soft, hard] = running.said.get("nofile").split(':').collect::<Vec<_>>()[..] else { panic!() };
    assert!(soft == hard && soft.parse::<u64>()? <= 2048, "{soft}");
    confined(running.program);
    assert_eq!(status(running.program, "SigBlk"), "0000000000000000");
    // SIGPIPE, by the probe's own start.
    assert_eq!(status(running.program, "SigIgn"), "0000000000001000");

    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", running.program))?;
    let [root, program] = &mounts.lines().collect::<Vec<_>>()[..] else { panic!("{mounts}") };
    for (mount, place, properties) in
        [(root, " / ", &["ro,", "nosuid", "nodev", "noexec"][..]), (program, " /probe ", &["ro,", "nosuid", "nodev"])]
    {
        assert!(mount.contains(place) && properties.iter().all(|it| mount.contains(it)), "{mount}");
        assert!(!mount.contains("shared:") && !mount.contains("master:"), "{mount}");
    }
    assert!(!program.contains("noexec"));
    confined(running.first);
    Ok(())
}

fn first_process() -> Result<(), Failed> {
    let place = Place::new();
    let _leaked = leak();
    let running = place.waiting(&["--capability", "CAP_NET_RAW", "--seccomp", "none"], &[])?;
    // It executes nothing, so that the bounding set, which only a capability can reduce, means nothing.
    for set in &CAPABILITIES[..4] {
        assert_eq!(status(running.first, set), "0000000000000000", "{set}");
    }
    assert_eq!((status(running.first, "NoNewPrivs"), status(running.first, "Seccomp")), ("1".into(), "2".into()));
    let id = format!("{OWN} {OWN} {OWN} {OWN}");
    assert_eq!((status(running.first, "Uid"), status(running.first, "Gid")), (id.clone(), id));
    assert_eq!(descriptors(running.first), ["3 pipe"]);
    assert_eq!(status(running.first, "NSpid").split(' ').next_back(), Some("1"));
    Ok(())
}

fn host_mounts() -> Result<(), Failed> {
    // In a mount namespace of this test's own, where nobody else mounts anything: `ozone` takes it for the host's.
    apart(CloneFlags::CLONE_NEWNS, || {
        let place = Place::new();
        let source = place.make_directory("source", 0o755, 0);
        let mounts = File::open("/proc/thread-self/mountinfo")?;
        let before = fs::read_to_string("/proc/thread-self/mountinfo")?;
        // The first poll after an open tells of nothing (proc(5)).
        let changed = || {
            let mut fds = [PollFd::new(mounts.as_fd(), PollFlags::POLLPRI)];
            poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
        };
        assert!(!changed());
        let running = place.waiting(&["--source", &source], &["list", "/"])?;
        assert_ne!(namespace(running.program, "mnt"), fs::read_link("/proc/thread-self/ns/mnt")?);
        assert_eq!(fs::read_to_string("/proc/thread-self/mountinfo")?, before);
        drop(running);
        assert_eq!(fs::read_to_string("/proc/thread-self/mountinfo")?, before);
        assert!(!changed(), "the kernel has counted a change of the host's mounts");
        // It does count them.
        nix::mount::mount(Some("none"), source.as_str(), Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>)?;
        assert!(changed());
        Ok(nix::mount::umount(source.as_str())?)
    })
}

fn abstract_socket() -> Result<(), Failed> {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener};
    let place = Place::new();
    let _listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(place.name())?)?;
    assert_eq!(place.said(&[], &["abstract", place.name()])?.get("abstract"), "ECONNREFUSED");
    Ok(())
}

fn default_filter() -> Result<(), Failed> {
    let place = Place::new();
    let said = place.said(&[], &["calls", "thread", "personality"])?;
    for (name, outcome) in said.calls() {
        let expected = match name {
            "clone3" => "ENOSYS",
            "socket unix" => "allowed",
            _ => "EPERM",
        };
        assert_eq!(outcome, expected, "{name}");
    }
    assert_eq!((said.get("thread"), said.get("personality")), ("ran", "0"));
    // Most of it would not be refused without the filter, or not like that.
    let without = place.said(&["--seccomp", "none"], &["calls"])?;
    let other = without.calls().filter(|(name, outcome)| said.get(&format!("call {name}")) != *outcome).count();
    assert!(other >= 15, "{without:?}");

    let output = place.jail(&[], &["x32"]).output()?;
    assert_eq!(output.status.code(), Some(128 + 31), "x32 ends it: {output:?}");
    Ok(())
}
