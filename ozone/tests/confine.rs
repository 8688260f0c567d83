//! What `ozone` itself can no longer do once it is confined.
//!
//! This executable is its own confined process: started with the name of an attempt it makes what the jails of a machine
//! stand on, confines itself as `ozone run` does, and tries. Without a test harness of threads, as `ozone` has one.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Output};
use std::sync::OnceLock;
use std::time::Duration;

use ::landlock::{CompatLevel, Compatible, Ruleset, RulesetAttr, Scope};
use libtest_mimic::{Arguments, Failed, Trial};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, open};
use nix::libc;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, UnlinkatFlags, execve, unlinkat};
use ozone::confine::confine;
use ozone::jail::{self, Ground, Identity, Plan};
use ozone::landlock::{self, Right};
use ozone::process::Process;

const OWN: u32 = 0x7000_0000 + 62 * 64;

/// A user without any rights.
const ORDINARY: u32 = 65534;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    if let [_, mode, attempt, image, stranger] = &words[..]
        && mode == CONFINED
    {
        let outcome = tried(attempt, image, stranger.parse().unwrap());
        let _ = std::io::stdout().write_all(outcome.as_bytes());
        return ExitCode::SUCCESS;
    }
    let root = Uid::effective().is_root();
    // What cannot be tried here is shown as ignored, with the reason in its name, never as passed.
    let own = if root { "" } else { " (needs root)" };
    let landlock = if root && landlock::is_available() { "" } else { " (needs root and Landlock)" };
    // The kernel keeps signals in since the sixth interface of Landlock (Linux 6.12).
    let keeps = Ruleset::default().set_compatibility(CompatLevel::HardRequirement).scope(Scope::Signal).is_ok();
    let scopes = if root && keeps { "" } else { " (needs root and Landlock of Linux 6.12)" };
    // Written once, while no test starts a process: one that inherits the open file makes it busy (execve(2), ETXTBSY).
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let copy = directory.path().join("confine");
    fs::copy("/proc/self/exe", &copy).unwrap();
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    COPY.set(copy).unwrap();
    let tests = vec![
        Trial::test(format!("a forbidden call of ozone is reported and ends it{own}"), forbidden_calls)
            .with_ignored_flag(!root),
        Trial::test(format!("a call of x32 ends ozone without a report{own}"), foreign_call).with_ignored_flag(!root),
        Trial::test(format!("no file can be opened but those that are needed{landlock}"), files)
            .with_ignored_flag(!landlock.is_empty()),
        Trial::test(format!("nobody but children can be signalled{scopes}"), signals)
            .with_ignored_flag(!scopes.is_empty()),
        Trial::test(format!("a child can still be jailed{own}"), jailing).with_ignored_flag(!root),
        Trial::test(format!("a forbidden call of an ordinary user's ozone is reported and ends it{own}"), of_a_user)
            .with_ignored_flag(!root),
        Trial::test(format!("a child of an ordinary user can still be jailed{own}"), jailing_by_a_user)
            .with_ignored_flag(!root),
    ];
    libtest_mimic::run(&Arguments::from_args(), tests).exit_code()
}

/// A copy of this executable, which every user may execute.
static COPY: OnceLock<PathBuf> = OnceLock::new();

/// The first argument of this executable when it confines itself.
const CONFINED: &str = "as-confined";

/// What comes of an attempt, in words; `image` may be read, `stranger` is a process of somebody else.
fn tried(attempt: &str, image: &str, stranger: i32) -> String {
    let (uid, gid) = (Uid::effective(), Gid::effective());
    let identity =
        if uid.is_root() { Identity::Own(OWN) } else { Identity::Mapped { uid: uid.as_raw(), gid: gid.as_raw() } };
    let ground = Ground::make(identity).unwrap();
    let held = open(image, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).unwrap();
    let null = File::options().read(true).write(true).open("/dev/null").unwrap();
    let own = open("/proc/self/exe", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).unwrap();
    let namespace = File::open("/proc/self/ns/net").unwrap();
    let stranger = pidfd_open(stranger);
    confine(ground.layers().landlock, |domain| {
        ground.allow(domain)?;
        domain.allow(&own, landlock::execution())?;
        domain.allow(&held, Right::ReadFile)
    })
    .unwrap();
    let nothing = None::<&str>;
    let outcome: Result<(), std::io::Error> = match attempt {
        "read the image" => File::open(image).map(drop),
        "read the image by its descriptor" => File::open(format!("/proc/self/fd/{}", held.as_raw_fd())).map(drop),
        "write the image" => File::options().write(true).open(image).map(drop),
        "read another file" => File::open("/etc/passwd").map(drop),
        "read a setting of the kernel" => File::open("/proc/sys/kernel/core_pattern").map(drop),
        "list a directory" => fs::read_dir("/").map(drop),
        "remove a file" => unlinkat(AT_FDCWD, image, UnlinkatFlags::NoRemoveDir).map_err(Into::into),
        "signal another process" => signal(stranger),
        "jail a child" => return jailed(&ground, identity, null.as_fd(), own.as_fd()),
        "make a file" => File::create(format!("{image}.new")).map(drop),
        "socket" => {
            let made = socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None);
            made.map(drop).map_err(Into::into)
        }
        "mount" => {
            nix::mount::mount(nothing, "/", Some("tmpfs"), nix::mount::MsFlags::empty(), nothing).map_err(Into::into)
        }
        "namespace" => unshare(CloneFlags::CLONE_NEWNET).map_err(Into::into),
        "enter a namespace" => setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(Into::into),
        "trace" => trace(),
        "signal by number" => nix::sys::signal::kill(nix::unistd::getpid(), None).map_err(Into::into),
        "type on a terminal" => type_on_a_terminal(),
        "executable memory" => executable_memory(),
        "execute" => execve(c"/proc/self/exe", &[c"x"], &[c""; 0]).map(|never| match never {}).map_err(Into::into),
        "x32" => foreign(),
        other => panic!("{other}"),
    };
    outcome
        .err()
        .and_then(|error| error.raw_os_error())
        .map_or("allowed".into(), |errno| Errno::from_raw(errno).to_string())
}

#[allow(unsafe_code)]
fn pidfd_open(pid: i32) -> i32 {
    // SAFETY: numbers only.
    unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) as i32 }
}

#[allow(unsafe_code)]
fn signal(pidfd: i32) -> Result<(), std::io::Error> {
    let none: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: a null siginfo is allowed; the other arguments are numbers.
    Ok(Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd, libc::SIGKILL, none, 0) }).map(drop)?)
}

#[allow(unsafe_code)]
fn trace() -> Result<(), std::io::Error> {
    // SAFETY: numbers only.
    Ok(Errno::result(unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) }).map(drop)?)
}

#[allow(unsafe_code)]
fn type_on_a_terminal() -> Result<(), std::io::Error> {
    // SAFETY: the request reads one byte.
    Ok(Errno::result(unsafe { libc::ioctl(0, libc::TIOCSTI, b"x".as_ptr()) }).map(drop)?)
}

#[allow(unsafe_code)]
fn executable_memory() -> Result<(), std::io::Error> {
    let (access, kind) = (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping anywhere, of which nothing is used.
    let mapped = unsafe { libc::mmap(std::ptr::null_mut(), 4096, access, kind, -1, 0) };
    if mapped == libc::MAP_FAILED { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

#[allow(unsafe_code)]
fn foreign() -> Result<(), std::io::Error> {
    // SAFETY: numbers only (Linux arch/x86/include/uapi/asm/unistd.h).
    Ok(Errno::result(unsafe { libc::syscall(libc::SYS_getpid | 0x4000_0000) }).map(drop)?)
}

/// A child in a jail, which ends by itself: its filters do not let it start.
fn jailed(
    ground: &Ground,
    identity: Identity,
    null: std::os::fd::BorrowedFd<'_>,
    own: std::os::fd::BorrowedFd<'_>,
) -> String {
    let plan = Plan {
        process: Process::Core,
        executable: own,
        identity,
        layers: ground.layers(),
        root: ground.root(),
        proc: ground.as_fd(),
        cgroup: None,
        limits: jail::limits::for_role(seccomp::Role::Core, 1 << 20),
        filters: Vec::new(),
        null,
        log: null,
        control: null,
        trace: false,
    };
    match jail::spawn(&plan).and_then(|entering| entering.wait(Duration::from_secs(20))) {
        Ok(_) => "allowed".to_owned(),
        Err(error) => error.to_string(),
    }
}

/// How a confined process ends that makes an attempt.
fn attempt(name: &str) -> Result<Output, Failed> {
    attempt_by(&mut Command::new("/proc/self/exe"), name)
}

/// The same of an ordinary user's process.
fn attempt_by_a_user(name: &str) -> Result<Output, Failed> {
    attempt_by(Command::new(COPY.get().unwrap()).uid(ORDINARY).gid(ORDINARY).current_dir("/"), name)
}

fn attempt_by(command: &mut Command, name: &str) -> Result<Output, Failed> {
    let image = tempfile::NamedTempFile::new()?;
    let mut stranger = Command::new("sleep").arg("1000").spawn()?;
    let output = command.arg(CONFINED).arg(name).arg(image.path()).arg(stranger.id().to_string()).output();
    let _ = stranger.kill();
    stranger.wait()?;
    Ok(output?)
}

fn expect(name: &str, outcome: &str) -> Result<(), Failed> {
    let output = attempt(name)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.trim() == outcome, "{name}: {}, {text}", output.status);
    Ok(())
}

/// Attempts at calls that no user's `ozone` may make, and the calls.
const FORBIDDEN: [(&str, &str); 9] = [
    ("make a file", "257 (openat)"),
    ("socket", "41 (socket)"),
    ("namespace", "272 (unshare)"),
    ("enter a namespace", "308 (setns)"),
    ("trace", "101 (ptrace)"),
    ("signal by number", "62 (kill)"),
    ("type on a terminal", "16 (ioctl)"),
    ("executable memory", "9 (mmap)"),
    ("execute", "59 (execve)"),
];

fn expect_end(name: &str, call: &str, output: &Output) {
    let log = String::from_utf8_lossy(&output.stderr);
    let line = format!("ozone: error forbidden system call {call}, architecture 0xc000003e\n");
    assert!(output.status.signal() == Some(Signal::SIGSYS as i32) && log == line, "{name}: {output:?}");
}

fn forbidden_calls() -> Result<(), Failed> {
    // An ordinary user's children make their own mounts, under the same filter.
    for (name, call) in FORBIDDEN.into_iter().chain([("mount", "165 (mount)")]) {
        expect_end(name, call, &attempt(name)?);
    }
    Ok(())
}

fn of_a_user() -> Result<(), Failed> {
    for (name, call) in FORBIDDEN {
        expect_end(name, call, &attempt_by_a_user(name)?);
    }
    let output = attempt_by_a_user("x32")?;
    assert!(output.status.signal() == Some(Signal::SIGSYS as i32) && output.stderr.is_empty(), "{output:?}");
    Ok(())
}

fn jailing_by_a_user() -> Result<(), Failed> {
    let output = attempt_by_a_user("jail a child")?;
    assert!(output.status.success() && output.stdout == b"allowed", "{output:?}");
    Ok(())
}

fn foreign_call() -> Result<(), Failed> {
    let output = attempt("x32")?;
    assert!(output.status.signal() == Some(Signal::SIGSYS as i32) && output.stderr.is_empty(), "{output:?}");
    Ok(())
}

fn files() -> Result<(), Failed> {
    expect("read the image", "allowed")?;
    expect("read the image by its descriptor", "allowed")?;
    for name in
        ["write the image", "read another file", "read a setting of the kernel", "list a directory", "remove a file"]
    {
        expect(name, "EACCES: Permission denied")?;
    }
    Ok(())
}

fn signals() -> Result<(), Failed> {
    expect("signal another process", "EPERM: Operation not permitted")
}

fn jailing() -> Result<(), Failed> {
    expect("jail a child", "allowed")
}
