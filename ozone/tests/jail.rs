//! The jail as a child finds it and as the host sees it.
//!
//! This executable is its own jailed child: started with a process name as its first argument it looks around, reports over
//! descriptor 3, and waits there until it is let go. Without a test harness of threads, since `ozone` clones with one
//! thread only.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod child;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::time::Instant;

use child::{Child, OWN, PATIENCE, awaited, enter, enter_with, ground, inherited, spawn_as};
use libtest_mimic::{Arguments, Failed, Trial};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::libc;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::sys::wait::WaitStatus;
use nix::unistd::Uid;
use ozone::jail::{Identity, JailError, Layers};
use ozone::process::Process;
use protocol::{DeviceId, DeviceKind};
use seccomp::Role;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

const ORDINARY: u32 = 65534;

fn main() -> ExitCode {
    let name = std::env::args().next().unwrap_or_default();
    if name == "blk/disk0" {
        return probe();
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let root = Uid::effective().is_root();
    // What cannot be tried here is shown as ignored, with the reason in its name, never as passed.
    let own = if root { "" } else { " (needs root)" };
    let unified = if cgroup_mount().is_some() && root { "" } else { " (needs root and cgroup v2)" };
    let landlock = if ozone::landlock::is_available() && root { "" } else { " (needs root and Landlock)" };
    let test = |name: &str, body: fn() -> Result<(), Failed>| Trial::test(name, body);
    let tests = vec![
        test(&format!("a jailed child finds nothing and holds nothing{own}"), child_as_root).with_ignored_flag(!root),
        test(&format!("an ordinary user's child is as confined{own}"), child_as_user).with_ignored_flag(!root),
        test("an ordinary user's child, from that user", child_in_user_namespace).with_ignored_flag(root),
        test(&format!("the launch filter ends a child at a call outside of its table{own}"), launch_filter)
            .with_ignored_flag(!root),
        test(&format!("a failing step is named with its errno{own}"), failing_step).with_ignored_flag(!root),
        test(&format!("uid 0 and uid -1 are refused{own}"), never_root).with_ignored_flag(!root),
        test(&format!("nothing of the host is mounted by making jails{own}"), host_mounts).with_ignored_flag(!root),
        test(&format!("a child is born in its control group{unified}"), born_in_its_group)
            .with_ignored_flag(cgroup_mount().is_none() || !root),
        test(&format!("nothing can be opened beneath a descriptor's directory{landlock}"), beneath_a_directory)
            .with_ignored_flag(!landlock.is_empty()),
        test(&format!("a child is as confined where the kernel has fewer layers{own}"), fewer_layers)
            .with_ignored_flag(!root),
        test(&format!("no two children share a namespace{own}"), siblings).with_ignored_flag(!root),
        test("a second thread is refused", second_thread),
    ];
    libtest_mimic::run(&arguments, tests).exit_code()
}

/// The child: tries what it should not be able to do, and tells.
fn probe() -> ExitCode {
    let mut control = File::from(inherited());
    let mut said = String::new();
    let mut say = |what: &str, answer: String| said.push_str(&format!("{what}={answer}\n"));
    say("args", std::env::args_os().count().to_string());
    say("env", std::env::vars_os().count().to_string());
    say("entries", fs::read_dir("/").map_or(-1, |entries| entries.count() as i64).to_string());
    say("parent", fs::read_dir("/..").map_or(-1, |entries| entries.count() as i64).to_string());
    let errno = |result: std::io::Result<()>| {
        result
            .err()
            .and_then(|error| error.raw_os_error())
            .map_or("allowed".into(), |errno| Errno::from_raw(errno).to_string())
    };
    say("create", errno(File::create("/file").map(drop)));
    say("mkdir", errno(fs::create_dir("/directory")));
    say("proc", errno(File::open("/proc/self/status").map(drop)));
    let beneath = openat(std::io::stdin(), "file", OFlag::O_RDONLY, Mode::empty());
    say("beneath", errno(beneath.map(drop).map_err(Into::into)));
    say("securebits", securebits());
    say("parent death", format!("{:?}", nix::sys::prctl::get_pdeathsig()));
    let result = nix::mount::mount(None::<&str>, "/", Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>);
    say("mount", errno(result.map_err(Into::into)));
    say("pid", std::process::id().to_string());
    say("uid", format!("{}", Uid::current()));
    say("umask", format!("{:o}", nix::sys::stat::umask(Mode::empty()).bits()));
    say("host", nix::unistd::gethostname().unwrap_or_default().to_string_lossy().into_owned());
    let _ = control.write_all(said.as_bytes());
    let _ = control.write_all(b"\0");
    let _ = control.read(&mut [0]);
    ExitCode::SUCCESS
}

#[allow(unsafe_code)]
fn securebits() -> String {
    // SAFETY: numbers only.
    let bits = unsafe { libc::prctl(libc::PR_GET_SECUREBITS, 0, 0, 0, 0) };
    format!("{bits:#x}")
}

/// A filter that leaves everything but swapon(2) alone: the probe has to try what the product's filters end it for.
fn wide_filter() -> BpfProgram {
    let rules = BTreeMap::from([(libc::SYS_swapon, Vec::new())]);
    let arch = TargetArch::try_from(std::env::consts::ARCH).unwrap();
    SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::KillProcess, arch).unwrap().try_into().unwrap()
}

fn disk() -> Process {
    Process::Backend { kind: DeviceKind::Blk, device: DeviceId::try_from("disk0".to_owned()).unwrap() }
}

fn spawn(identity: Identity, filters: Vec<BpfProgram>) -> Result<Child, JailError> {
    spawn_as(disk(), Role::Blk, identity, filters)
}

const NAMESPACES: [&str; 8] = ["pid", "mnt", "net", "ipc", "uts", "cgroup", "time", "user"];

/// Everything that holds in either way of making the jail, on a host with every layer.
fn confined(child: &mut Child) {
    in_jail(child, "-1");
    for namespace in NAMESPACES {
        let theirs = fs::read_link(child.proc(&format!("ns/{namespace}"))).unwrap();
        let ours = fs::read_link(format!("/proc/self/ns/{namespace}")).unwrap();
        assert_ne!(theirs, ours, "{namespace}");
    }
}

/// What holds whatever the kernel offers; in a Landlock domain the root cannot even be listed.
fn in_jail(child: &mut Child, entries: &str) {
    let said = child.report();
    let said = |key: &str| said.get(key).map(String::as_str);
    assert_eq!(said("args"), Some("1"));
    assert_eq!(said("env"), Some("0"), "the environment is empty");
    assert_eq!(said("entries"), Some(entries), "the root is empty");
    assert_eq!(said("parent"), Some(entries), "there is nothing above it");
    assert_eq!(fs::read_dir(child.proc("root")).unwrap().count(), 0);
    for attempt in ["create", "mkdir"] {
        assert!(
            matches!(said(attempt), Some(errno) if errno.starts_with("EROFS") || errno.starts_with("EACCES")),
            "{attempt}: {:?}",
            said(attempt)
        );
    }
    assert!(said("proc").unwrap().starts_with("ENOENT"), "{:?}", said("proc"));
    assert!(said("mount").unwrap().starts_with("EPERM"), "{:?}", said("mount"));
    assert_eq!(said("pid"), Some("1"));
    assert_eq!(said("umask"), Some("77"));
    assert_eq!(said("host"), Some("jail"));

    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(child.status(set), "0000000000000000", "{set}");
    }
    assert_eq!(child.status("NoNewPrivs"), "1");
    assert_eq!(child.status("Seccomp"), "2");
    assert_eq!(child.status("SigBlk"), "0000000000000000");

    // Everything locked but the keeping of capabilities, which is off (capabilities(7), linux/securebits.h).
    assert_eq!(said("securebits"), Some("0xeb"));
    assert_eq!(said("parent death"), Some("Ok(Some(SIGKILL))"));
    let mounts = fs::read_to_string(child.proc("mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    for property in [" / / ", "ro,", "nosuid", "nodev", "noexec", "tmpfs"] {
        assert!(mounts.contains(property), "{property}: {mounts}");
    }

    let mut open: Vec<String> = Vec::new();
    for entry in fs::read_dir(child.proc("fd")).unwrap() {
        let entry = entry.unwrap();
        let target = fs::read_link(entry.path()).unwrap().to_string_lossy().into_owned();
        let kind = target.split(':').next().unwrap_or_default().to_owned();
        open.push(format!("{} {kind}", entry.file_name().to_string_lossy()));
    }
    open.sort();
    assert_eq!(open, ["0 /dev/null", "1 /dev/null", "2 pipe", "3 socket"]);
    let limits = fs::read_to_string(child.proc("limits")).unwrap();
    assert!(limits.lines().any(|line| line.starts_with("Max core file size") && line.contains(" 0 ")), "{limits}");
    assert!(limits.lines().any(|line| line.starts_with("Max open files") && line.contains(" 512 ")), "{limits}");
}

/// 200 descriptors that were not declared, some of them inheritable.
fn leak() -> Vec<OwnedFd> {
    let leaked: Vec<OwnedFd> = (0..200).map(|_| File::open("/etc/passwd").unwrap().into()).collect();
    for fd in leaked.iter().step_by(2) {
        nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
    }
    assert!(leaked.iter().any(|fd| fd.as_raw_fd() > 200));
    leaked
}

fn child_as_root() -> Result<(), Failed> {
    let _leaked = leak();
    let mut child = spawn(Identity::Own(OWN), vec![wide_filter()])?;
    confined(&mut child);
    own_user(&child);
    for map in ["uid_map", "gid_map"] {
        let map = fs::read_to_string(child.proc(map)).unwrap();
        assert_eq!(map.split_whitespace().collect::<Vec<_>>(), [&OWN.to_string(), &OWN.to_string(), "1"]);
    }
    assert_eq!(fs::read_to_string(child.proc("setgroups"))?, "deny\n");
    Ok(())
}

fn own_user(child: &Child) {
    let id = format!("{OWN} {OWN} {OWN} {OWN}");
    assert_eq!(child.status("Uid"), id);
    assert_eq!(child.status("Gid"), id);
    assert_eq!(child.status("Groups"), "");
}

fn beneath_a_directory() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
    fs::write(directory.path().join("file"), "of the host")?;
    fs::set_permissions(directory.path().join("file"), fs::Permissions::from_mode(0o644))?;
    let held = File::open(directory.path())?;
    let all = ground(Identity::Own(OWN)).layers();
    // Without Landlock the mode lets everyone in, which shows what it is that keeps the child out.
    for (landlock, expected) in [(false, "allowed"), (true, "EACCES: Permission denied")] {
        let (handed, filters) = ((held.as_fd(), Layers { landlock, ..all }), vec![wide_filter()]);
        let mut child = awaited(enter_with(disk(), Role::Blk, Identity::Own(OWN), filters, None, handed)?)?;
        assert_eq!(child.report().get("beneath").map(String::as_str), Some(expected), "Landlock: {landlock}");
    }
    Ok(())
}

fn fewer_layers() -> Result<(), Failed> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    let handed = (null.as_fd(), Layers { time: false, user: false, landlock: false });
    let mut child = awaited(enter_with(disk(), Role::Blk, Identity::Own(OWN), vec![wide_filter()], None, handed)?)?;
    in_jail(&mut child, "0");
    own_user(&child);
    for namespace in ["time", "user"] {
        let theirs = fs::read_link(child.proc(&format!("ns/{namespace}")))?;
        assert_eq!(theirs, fs::read_link(format!("/proc/self/ns/{namespace}"))?, "{namespace}");
    }
    Ok(())
}

fn siblings() -> Result<(), Failed> {
    let children =
        [spawn(Identity::Own(OWN), vec![wide_filter()])?, spawn(Identity::Own(OWN + 1), vec![wide_filter()])?];
    for namespace in NAMESPACES {
        let [one, other] = children.each_ref().map(|child| fs::read_link(child.proc(&format!("ns/{namespace}"))));
        assert_ne!(one?, other?, "{namespace}");
    }
    Ok(())
}

fn child_in_user_namespace() -> Result<(), Failed> {
    let _leaked = leak();
    let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    let mut child = spawn(Identity::Mapped { uid, gid }, vec![wide_filter()])?;
    confined(&mut child);
    assert_eq!(child.status("Uid"), format!("{uid} {uid} {uid} {uid}"));
    assert_ne!(fs::read_link(child.proc("ns/user")).unwrap(), fs::read_link("/proc/self/ns/user").unwrap());
    let map = fs::read_to_string(child.proc("uid_map")).unwrap();
    assert_eq!(map.split_whitespace().collect::<Vec<_>>(), ["65534", &uid.to_string(), "1"]);
    Ok(())
}

/// Runs this executable's tests again as a user without privilege.
fn child_as_user() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
    let copy = directory.path().join("jail");
    fs::copy("/proc/self/exe", &copy)?;
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
    let output = Command::new(&copy)
        .uid(ORDINARY)
        .gid(ORDINARY)
        .current_dir("/")
        .args(["--exact", "an ordinary user's child, from that user"])
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    if output.status.success() && text.contains("1 passed") { Ok(()) } else { Err(text.into()) }
}

fn launch_filter() -> Result<(), Failed> {
    let mut child = spawn(Identity::Own(OWN), seccomp::launch_filters(Role::Blk)?)?;
    let mut rest = Vec::new();
    let _ = child.control.read_to_end(&mut rest);
    assert!(rest.is_empty(), "the probe got through: {}", String::from_utf8_lossy(&rest));
    let status = child.jailed.reap(Instant::now() + PATIENCE);
    assert!(matches!(status, Some(WaitStatus::Signaled(_, Signal::SIGSYS, _))), "{status:?}");
    Ok(())
}

fn failing_step() -> Result<(), Failed> {
    let nonsense = vec![seccompiler::sock_filter { code: u16::MAX, jt: 0, jf: 0, k: 0 }];
    let error = spawn(Identity::Own(OWN), vec![nonsense]).err().map(|error| error.to_string());
    assert_eq!(error.as_deref(), Some("jail of blk/disk0: install seccomp filter: EINVAL: Invalid argument"));
    Ok(())
}

fn never_root() -> Result<(), Failed> {
    for uid in [0, u32::MAX] {
        let error = spawn(Identity::Own(uid), vec![wide_filter()]).err().map(|error| error.to_string());
        let expected = "jail of blk/disk0: setresgid: EPERM: Operation not permitted (a jailed process is never root)";
        assert_eq!(error.as_deref(), Some(expected));
    }
    Ok(())
}

fn host_mounts() -> Result<(), Failed> {
    let before = fs::read_to_string("/proc/self/mountinfo")?;
    let mut child = spawn(Identity::Own(OWN), vec![wide_filter()])?;
    child.report();
    assert_eq!(fs::read_to_string("/proc/self/mountinfo")?, before);
    drop(child);
    assert_eq!(fs::read_to_string("/proc/self/mountinfo")?, before);
    Ok(())
}

/// Where cgroup v2 is mounted, alone or beside v1, if it can be written to.
fn cgroup_mount() -> Option<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let found = fields.find(|it| it.get(2) == Some(&"cgroup2") && it.get(3).is_some_and(|it| it.starts_with("rw")))?;
    found.get(1).map(|path| (*path).to_owned())
}

fn born_in_its_group() -> Result<(), Failed> {
    let name = format!("ozone-test-{}", std::process::id());
    let path = format!("{}/{name}", cgroup_mount().unwrap());
    fs::create_dir(&path)?;
    let group = File::open(&path)?;
    let (entering, control, _log) =
        enter(disk(), Role::Blk, Identity::Own(OWN), vec![wide_filter()], Some(group.as_fd())).unwrap();
    let (jailed, _progress) = entering.follow();
    // Before the first step of its jail or after the last: it was never anywhere else.
    let groups = fs::read_to_string(format!("/proc/{}/cgroup", jailed.pid()))?;
    assert!(groups.lines().any(|line| line.starts_with("0::") && line.ends_with(&format!("/{name}"))), "{groups}");
    drop((jailed, control));
    fs::remove_dir(&path)?;
    Ok(())
}

fn second_thread() -> Result<(), Failed> {
    let (hold, wait) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || wait.recv());
    let refused = spawn(Identity::Own(OWN), vec![wide_filter()]).err();
    drop(hold);
    let _ = thread.join();
    assert!(matches!(refused, Some(JailError::Threads { threads: 2, .. })), "{refused:?}");
    Ok(())
}
