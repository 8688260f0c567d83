//! `ozone run` as a user meets it, with children that follow a script.
//!
//! This executable is copied beside `ozone` under the names of the roles. As the core it does what the first line of the
//! "kernel" says; as a backend what its device's name says. The jail and the filters are the product's own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, SetArg, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::{Pid, Uid};
use protocol::{
    BlkSpec, Cause, Channel, ConsoleHost, ConsoleSpec, Descriptor, DeviceId, DeviceSpec, Fault, FromBackend, FromCore,
    LinkError, ToBackend, ToCore,
};

#[path = "supervisor/links.rs"]
mod links;
#[path = "supervisor/log.rs"]
mod log;
#[path = "supervisor/record.rs"]
mod record;

fn main() -> ExitCode {
    let name = std::env::args().next().unwrap_or_default();
    if name == "core" {
        return core();
    }
    if name.starts_with("blk/") || name.starts_with("net/") || name.starts_with("console/") {
        return backend(&name);
    }
    if std::env::args().nth(1).as_deref() == Some(HELPER) {
        return helper();
    }
    tests()
}

/// The first argument of this executable when it prepares a surrounding and then becomes `ozone`.
const HELPER: &str = "as-helper";

/// A user without any rights.
const ORDINARY: u32 = 65534;

/// Becomes `./ozone` with the arguments after the second, in the surrounding that the second names. Without programs of the
/// host, which differ.
fn helper() -> ExitCode {
    use nix::mount::{MsFlags, mount};
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    let arguments: Vec<String> = std::env::args().skip(2).collect();
    let (surrounding, words) = arguments.split_first().unwrap();
    let nothing = None::<&str>;
    if surrounding == "terminal" {
        nix::unistd::setsid().unwrap();
        take_terminal();
    } else {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing).unwrap();
        let over_kvm = |mode: u32, kind: SFlag, device| {
            mknod("kvm", kind, Mode::empty(), device).unwrap();
            fs::set_permissions("kvm", fs::Permissions::from_mode(mode)).unwrap();
            mount(Some("kvm"), "/dev/kvm", nothing, MsFlags::MS_BIND, nothing).unwrap();
        };
        match surrounding.as_str() {
            "kvm-for-all" => over_kvm(0o666, SFlag::S_IFCHR, makedev(10, 232)),
            "kvm-for-root" => over_kvm(0o600, SFlag::S_IFREG, 0),
            "kvm-that-is-none" => over_kvm(0o666, SFlag::S_IFREG, 0),
            "no-kvm" => mount(Some("none"), "/dev", Some("tmpfs"), MsFlags::empty(), nothing).unwrap(),
            other => panic!("{other}"),
        }
    }
    let mut ozone = Command::new("./ozone");
    ozone.args(words);
    if surrounding != "terminal" {
        ozone.uid(ORDINARY).gid(ORDINARY);
    }
    panic!("exec of ozone: {}", ozone.exec());
}

#[allow(unsafe_code)]
fn take_terminal() {
    // SAFETY: numbers only.
    assert_eq!(unsafe { nix::libc::ioctl(0, nix::libc::TIOCSCTTY, 0) }, 0);
}

// The children. A role's filter permits little, so they do little: a failed expectation is an exit with a status.

fn core() -> ExitCode {
    if protocol::process::enter(Signal::SIGKILL).is_err() {
        return ExitCode::from(100);
    }
    let Ok(control) = Channel::<FromCore, ToCore>::inherited() else { return ExitCode::from(101) };
    let Ok(ToCore::Boot(boot)) = control.receive() else { return ExitCode::from(102) };
    let mut text = [0; 64];
    let Ok(length) = File::from(Descriptor::into_fd(boot.kernel)).read_at(&mut text, 0) else {
        return ExitCode::from(103);
    };
    let text = String::from_utf8_lossy(&text[..length]).into_owned();
    let script = text.lines().next().unwrap_or_default();
    let say = |message: FromCore| control.send(&message).is_ok();
    match script {
        "die-early" => return ExitCode::from(7),
        "running-early" => return ExitCode::from(if say(FromCore::Running) { 0 } else { 104 }),
        "exited-early" => return ExitCode::from(if say(FromCore::Exited(Cause::PowerOff)) { 0 } else { 104 }),
        "bad-image" => return ExitCode::from(u8::from(!say(FromCore::Failed(Fault::input("--kernel: no\nkernel"))))),
        _ => {}
    }
    let mut attached: Vec<DeviceId> = Vec::new();
    let mut sockets = Vec::new();
    loop {
        match control.receive() {
            Ok(ToCore::Attach(attach)) => {
                attached.push(attach.device.clone());
                sockets.push(attach.socket);
                say(FromCore::Attached { device: attach.device });
            }
            Ok(ToCore::ConfigChanged { .. }) => {}
            Ok(ToCore::Run) => break,
            _ => return ExitCode::from(105),
        }
    }
    if attached.len() != boot.slots.len() {
        return ExitCode::from(106);
    }
    say(FromCore::Running);
    let exited = |cause| ExitCode::from(u8::from(!say(FromCore::Exited(cause))));
    match script {
        "power-off" => exited(Cause::PowerOff),
        "reset" => exited(Cause::Reset),
        "panic" => exited(Cause::Panic),
        "triple-fault" => exited(Cause::TripleFault),
        "die" => ExitCode::from(9),
        "forbidden" => forbidden(),
        "forbidden-after-a-lie" => {
            let _ = std::io::stderr().write_all(LIE);
            forbidden()
        }
        "forbidden-unsaid" => {
            // The report does not come through.
            let _ = nix::unistd::close(2);
            forbidden()
        }
        "lie" => {
            let _ = std::io::stderr().write_all(LIE);
            ExitCode::from(159)
        }
        "lost" => {
            say(FromCore::Lost { device: attached.remove(0), reason: "bad\nreply".into() });
            obey(&control)
        }
        "lost-after-hanging-up" => {
            sockets.clear();
            // Devices are attached in the order in which their backends are ready, which is any.
            let device = attached.into_iter().find(|device| device.as_str() == "follower").unwrap();
            say(FromCore::Lost { device, reason: "bad reply".into() });
            obey(&control)
        }
        "until-resized" => loop {
            match control.receive() {
                Ok(ToCore::ConfigChanged { device }) if device.as_str() == "resizer" => {
                    return exited(Cause::PowerOff);
                }
                Ok(_) => {}
                Err(_) => return ExitCode::from(108),
            }
        },
        "lost-unknown" => {
            say(FromCore::Lost { device: DeviceId::try_from("nobody".to_owned()).unwrap(), reason: String::new() });
            obey(&control)
        }
        "running-twice" => {
            say(FromCore::Running);
            obey(&control)
        }
        "flood" => {
            for _ in 0..20_000 {
                // Refused when the pipe is full, as it has to be.
                let _ = std::io::stderr().write_all(b"noise\n");
            }
            exited(Cause::PowerOff)
        }
        _ => obey(&control),
    }
}

fn backend(name: &str) -> ExitCode {
    if protocol::process::enter(Signal::SIGKILL).is_err() {
        return ExitCode::from(100);
    }
    let Ok(control) = Channel::<FromBackend, ToBackend>::inherited() else { return ExitCode::from(101) };
    let Ok(ToBackend::Start(start)) = control.receive() else { return ExitCode::from(102) };
    let expected = match &start.spec {
        DeviceSpec::Blk(_) => "blk/",
        DeviceSpec::Net(_) => "net/",
        DeviceSpec::Console(_) => "console/",
    };
    if !name.starts_with(expected) {
        return ExitCode::from(103);
    }
    match name.split('/').nth(1).unwrap_or_default() {
        "faulty" => {
            let _ = control.send(&FromBackend::Failed(Fault::host("the disk is on fire")));
            return ExitCode::from(1);
        }
        "silent" => return wait(&control),
        // The image says how often it still fails.
        "counts" => {
            let DeviceSpec::Blk(BlkSpec { image, .. }) = &start.spec else { return ExitCode::from(104) };
            let mut left = [0];
            let mut parts = [std::io::IoSliceMut::new(&mut left)];
            if nix::sys::uio::preadv(image.as_fd(), &mut parts, 0).is_err() {
                return ExitCode::from(106);
            }
            if left[0] > 0 {
                let _ = nix::unistd::write(image.as_fd(), &[left[0] - 1]);
                return ExitCode::from(9);
            }
        }
        "late" => {
            let DeviceSpec::Blk(BlkSpec { image, .. }) = start.spec else { return ExitCode::from(104) };
            let (mut image, mut block) = (File::from(image.into_fd()), [0; 4096]);
            // Until something comes after its end; a child may not sleep.
            while block[0] == 0 {
                if image.read(&mut block).is_err() {
                    return ExitCode::from(108);
                }
            }
            let _ = control.send(&FromBackend::Ready);
            return wait(&control);
        }
        _ => {}
    }
    if name.ends_with("hasty") {
        let _ = control.send(&FromBackend::Resized);
    }
    let _ = control.send(&FromBackend::Ready);
    match name.split('/').nth(1).unwrap_or_default() {
        "raw-leaver" => {
            let DeviceSpec::Console(ConsoleSpec { host: ConsoleHost::Terminal { terminal }, .. }) = start.spec else {
                return ExitCode::from(104);
            };
            let Ok(mut settings) = tcgetattr(&terminal) else { return ExitCode::from(105) };
            cfmakeraw(&mut settings);
            if tcsetattr(&terminal, SetArg::TCSANOW, &settings).is_err() {
                return ExitCode::from(106);
            }
            // The size comes first, and again at each change.
            let mut sizes = Vec::new();
            while sizes.len() < 2 {
                let Some(ToBackend::Resize { columns, rows }) = told(&control) else { return ExitCode::from(107) };
                sizes.push((columns, rows));
                let _ = control.send(&FromBackend::Resized);
            }
            let as_expected = sizes == [(80, 25), (132, 43)];
            let _ = control.send(&if as_expected { FromBackend::Leave } else { FromBackend::Ready });
        }
        "leaver" | "resized" => {
            // Asked for a sign of life, it is past the launch.
            let Ok(ToBackend::Ping { .. }) = control.receive() else { return ExitCode::from(107) };
            let leaves = name.ends_with("leaver");
            let _ = control.send(&if leaves { FromBackend::Leave } else { FromBackend::Resized });
        }
        "resizer" => {
            // A child may not sleep; it takes its first size when the test types.
            let DeviceSpec::Console(ConsoleSpec { host: ConsoleHost::Terminal { terminal }, .. }) = start.spec else {
                return ExitCode::from(104);
            };
            let Some(ToBackend::Resize { .. }) = told(&control) else { return ExitCode::from(107) };
            if !matches!(nix::unistd::read(&terminal, &mut [0; 8]), Ok(1..)) {
                return ExitCode::from(108);
            }
            let _ = control.send(&FromBackend::Resized);
            // However often the size has changed meanwhile, the last is what is told.
            let Some(ToBackend::Resize { columns: 100, rows: 40 }) = told(&control) else {
                return ExitCode::from(109);
            };
            let _ = control.send(&FromBackend::Resized);
        }
        "follower" => {
            // Ends as a backend does whose core lets go of it.
            let mut socket = File::from(start.socket.into_fd());
            return ExitCode::from(u8::from(!matches!(socket.read(&mut [0]), Ok(0))));
        }
        "mortal" => return ExitCode::from(9),
        "noisy" => return noisy(&control),
        "offender" => {
            // The machine runs, or nobody would ask for a sign of life.
            let _ = control.receive();
            return forbidden();
        }
        "hangs" => {
            // No sign of life.
            while control.receive().is_ok() {}
            return ExitCode::SUCCESS;
        }
        "hangs-up" => {
            let Ok(ToBackend::Ping { number }) = control.receive() else { return ExitCode::from(107) };
            let _ = control.send(&FromBackend::Alive { number });
            drop(start.socket);
        }
        "floods" => {
            let Ok(ToBackend::Ping { .. }) = control.receive() else { return ExitCode::from(107) };
            while control.send(&FromBackend::Resubmitted { requests: 1 }).is_ok() {}
        }
        "unasked" => {
            // Only an answer to the question after it is one too many.
            while let Ok(ToBackend::Ping { number }) = control.receive() {
                let _ = control.send(&FromBackend::Alive { number });
                let _ = control.send(&FromBackend::Alive { number });
            }
        }
        _ => {}
    }
    wait(&control)
}

/// The next message but for questions after a sign of life, which are answered.
fn told(control: &Channel<FromBackend, ToBackend>) -> Option<ToBackend> {
    loop {
        match control.receive() {
            Ok(ToBackend::Ping { number }) => {
                let _ = control.send(&FromBackend::Alive { number });
            }
            other => return other.ok(),
        }
    }
}

fn wait(control: &Channel<FromBackend, ToBackend>) -> ExitCode {
    while told(control).is_some() {}
    ExitCode::SUCCESS
}

/// Writes lines without end, and answers questions after a sign of life meanwhile.
fn noisy(control: &Channel<FromBackend, ToBackend>) -> ExitCode {
    loop {
        for _ in 0..100 {
            // Refused when the pipe is full, as it has to be.
            let _ = std::io::stderr().write_all(b"warn \"noise\" {}\n");
        }
        match control.try_receive() {
            Ok(ToBackend::Ping { number }) => drop(control.send(&FromBackend::Alive { number })),
            Ok(_) | Err(LinkError::WouldBlock) => {}
            Err(_) => return ExitCode::SUCCESS,
        }
    }
}

/// A report of a call that was not made.
const LIE: &[u8] = b"error forbidden system call 165 (mount), architecture 0xc000003e\n";

/// Makes a call that no role may make.
fn forbidden() -> ExitCode {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let _ = socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None);
    ExitCode::from(107)
}

/// A core that does what it is told.
fn obey(control: &Channel<FromCore, ToCore>) -> ExitCode {
    let mut sockets = Vec::new();
    while let Ok(message) = control.receive() {
        let answer = match message {
            ToCore::Attach(attach) => {
                sockets.push(attach.socket);
                FromCore::Attached { device: attach.device }
            }
            ToCore::Detach { device } => FromCore::Detached { device },
            ToCore::Gone { device } => FromCore::Gone { device },
            ToCore::Pause => FromCore::Paused,
            ToCore::Resume => FromCore::Resumed,
            _ => continue,
        };
        let _ = control.send(&answer);
    }
    ExitCode::SUCCESS
}

// The tests.

fn tests() -> ExitCode {
    let arguments = Arguments::from_args();
    let kvm = File::options().read(true).write(true).open("/dev/kvm").is_ok();
    let root = Uid::effective().is_root();
    let mut tests = Vec::new();
    // What cannot be tried here is shown as ignored, with the reason in its name, never as passed.
    let mut add = |name: &str, needs: &[(bool, &str)], body: fn() -> Result<(), Failed>| {
        let lacking: Vec<&str> = needs.iter().filter(|(have, _)| !have).map(|(_, what)| *what).collect();
        let lacking_text =
            if lacking.is_empty() { String::new() } else { format!(" (needs {})", lacking.join(" and ")) };
        tests.push(Trial::test(format!("{name}{lacking_text}"), body).with_ignored_flag(!lacking.is_empty()));
    };
    // Written once, while no other test starts a process: one that inherits the open file makes it busy (execve(2), ETXTBSY).
    let directory = tempfile::tempdir().unwrap();
    let copy = directory.path().join("child");
    fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
    COPY.set(copy).unwrap();
    let kvm = [(kvm, "/dev/kvm")];
    let all = [kvm[0], (root, "root")];
    add("each way of ending has its code and its line", &kvm, endings);
    add("a reset starts everything again, once per reset", &kvm, reboot);
    add("a child that breaks the protocol is named", &kvm, protocol_breaches);
    add("a backend that is never ready is named at its deadline", &kvm, silent);
    add("a backend's own fault comes before what follows from it", &kvm, faults);
    add("signals tear down", &kvm, signals);
    add("kill -9 of any process ends all of them", &kvm, kills);
    add("a killed backend is replaced, and nothing else", &kvm, replaced);
    add("a backend that gives no sign of life is replaced", &kvm, hanging);
    add("a forbidden system call of a backend is named in its loss", &kvm, offending);
    add("failures on the way back are retried, each later", &kvm, retried);
    add("nothing is started while an earlier request is under way", &kvm, drained);
    add("a device that stays away comes back by hand", &all, by_hand);
    add("a machine rests and goes on", &all, rested);
    add("a name is one machine's", &all, named);
    add("gc undoes what a kill -9 leaves, and nothing else", &all, collected);
    add("a service manager hears when the machine runs, goes round and ends", &kvm, notified);
    add("an audit finds what scripted processes lack", &all, audited);
    add("ozone itself keeps only what starting processes takes", &all, confined);
    add("a flood of log lines is cut, counted, and blocks nothing", &kvm, flood);
    add("standard error that nobody reads blocks nothing", &kvm, deaf_stderr);
    add("every line in JSON is one object", &kvm, log::json);
    add("a role that floods its log blocks nobody", &all, log::flooding_role);
    add("a full pipe as standard error blocks nobody", &all, log::full_pipe);
    add("a stopped terminal as standard error blocks nobody", &all, log::stopped_terminal);
    add("a full socket as standard error blocks nobody", &all, log::full_socket);
    add("another user's full pipe as standard error blocks nobody", &all, log::pipe_of_another);
    add("each way of ending leaves its record", &kvm, record::endings);
    add("a record counts restarts and resets", &kvm, record::counts);
    add("a record is no way to another file", &kvm, record::planted);
    add("a name that is taken leaves the other's record", &all, record::taken);
    add("the operator's links are followed", &kvm, links::operators);
    add("another user's links are not followed", &all, links::of_others);
    add("an image is held against other machines", &kvm, held_image);
    add("bad input on the host is refused before any process starts", &kvm, bad_input);
    add("an executable that others may write is refused", &kvm, written_by_others);
    add("an executable of one of the machine's uids is refused", &all, owned_by_a_role);
    add("no rights on /dev/kvm and no KVM are told apart", &all, kvm_rights);
    add("taps are made and go", &all, taps);
    add("a console's socket is private and goes", &kvm, console_socket);
    add("the terminal is told its size, left, and put back as it was", &kvm, terminal);
    add("the core hears of a terminal's size when the console has taken it", &kvm, resize);
    add("a terminal that takes no output is put back all the same", &kvm, stopped_terminal);
    add("a signal is heard while an image is waited for", &kvm, signal_while_draining);
    add("the time that an image takes is not the backends'", &kvm, patience_after_draining);
    add("two machines have different uids", &all, uids);
    add("uids that are asked for are given, to one machine", &all, uids_asked_for);
    add("an ordinary user runs a machine with one uid", &all, ordinary_user);
    libtest_mimic::run(&arguments, tests).exit_code()
}

/// A copy of this executable, for the children.
static COPY: OnceLock<PathBuf> = OnceLock::new();

/// A directory with `ozone`, the scripted children, a kernel that is a script, and an image.
struct Bench {
    directory: tempfile::TempDir,
}

impl Bench {
    fn new(script: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let place = |from: &Path, name: &str| {
            let to = directory.path().join(name);
            if fs::hard_link(from, &to).is_err() {
                fs::copy(from, &to).unwrap();
            }
        };
        let own = std::env::current_exe().unwrap();
        // In the test host this executable and ozone are not where they were built, but side by side.
        let built = Path::new(env!("CARGO_BIN_EXE_ozone"));
        let ozone = if built.exists() { built.to_owned() } else { own.with_file_name("ozone") };
        place(&ozone, "ozone");
        for role in ["vmm-core", "ozone-blk", "ozone-net", "ozone-console"] {
            place(COPY.get().unwrap(), role);
        }
        let bench = Self { directory };
        bench.script(script);
        File::create(bench.path("disk.img")).unwrap().set_len(1 << 20).unwrap();
        bench
    }

    fn script(&self, script: &str) {
        fs::write(self.path("kernel"), format!("{script}\n")).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.path("ozone"));
        command.current_dir(self.directory.path()).arg("run").args(words);
        if !words.contains(&"--kernel") {
            command.args(["--kernel", "kernel"]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// `ozone run` in a surrounding that [`helper`] makes.
    fn command_in(&self, surrounding: &str, words: &[&str]) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.current_dir(self.directory.path());
        command.args([HELPER, surrounding, "run", "--kernel", "kernel"]).args(words);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn start(&self, words: &[&str]) -> Run {
        Run { child: self.command(words).spawn().unwrap() }
    }

    /// Runs to the end: the code, and the lines of standard error.
    fn run(&self, words: &[&str]) -> (i32, Vec<String>) {
        self.start(words).end()
    }
}

/// A run under way.
struct Run {
    child: Child,
}

impl Run {
    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    fn end(mut self) -> (i32, Vec<String>) {
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut overdue = false;
        while self.child.try_wait().unwrap().is_none() {
            if Instant::now() >= deadline {
                overdue = true;
                self.child.kill().unwrap();
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let status = self.child.wait().unwrap();
        let mut text = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        assert!(!overdue, "ozone does not end: {text}");
        let code = status.code().unwrap_or_else(|| -status.signal().unwrap());
        (code, text.lines().map(str::to_owned).collect())
    }

    /// The children by name, once all of them have taken theirs and sit in a receive.
    fn children(&self, count: usize) -> Vec<(String, Pid)> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let mut children = Vec::new();
            let list = fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.pid())).unwrap_or_default();
            for pid in list.split_whitespace() {
                let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned();
                if name == "core" || name.contains('/') {
                    children.push((name, Pid::from_raw(pid.parse().unwrap())));
                }
            }
            if children.len() == count {
                // Running was sent before the wait; the script of these runs has nothing after it.
                std::thread::sleep(Duration::from_millis(150));
                return children;
            }
            assert!(Instant::now() < deadline, "children of ozone: {children:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn last(lines: &[String]) -> &str {
    lines.last().map_or("", String::as_str)
}

fn expect(script: &str, words: &[&str], code: i32, line: &str) {
    let (got, lines) = Bench::new(script).run(words);
    assert_eq!(got, code, "{script} {words:?}: {lines:?}");
    assert!(last(&lines).starts_with("ozone: ") && last(&lines).contains(line), "{script} {words:?}: {lines:?}");
}

fn endings() -> Result<(), Failed> {
    let disk = ["--disk", "path=disk.img"];
    expect("power-off", &disk, 0, "the guest switched itself off");
    expect("reset", &["--no-reboot"], 0, "the guest reset itself");
    expect("panic", &disk, 10, "the guest's kernel panicked");
    expect("triple-fault", &[], 11, "triple fault");
    expect("die", &disk, 12, "core died: exited with status 9");
    expect("die-early", &disk, 12, "core died: exited with status 7");
    expect("forbidden", &[], 12, "core died: made the forbidden system call socket (41)");
    expect("forbidden-after-a-lie", &[], 12, "core died: made the forbidden system call socket (41)");
    expect("forbidden-unsaid", &[], 12, "core died: made a system call that its role may not, and did not say which");
    expect("lie", &[], 12, "core died: exited with status 159");
    let offender = ["--disk", "path=disk.img,id=offender,on-fail=stop-vm"];
    expect("wait", &offender, 13, "blk/offender died: made the forbidden system call socket (41)");
    // Which of the two is ready first is any.
    let both = ["--disk", "path=disk.img,on-fail=stop-vm", "--console", "stdio,on-fail=stop-vm"];
    expect("lost", &both, 13, "died: the core lost it: bad\\nreply");
    let follower = ["--disk", "path=disk.img,id=follower,on-fail=stop-vm"];
    expect("lost-after-hanging-up", &follower, 13, "blk/follower died: the core lost it: bad reply");
    expect("wait", &["--disk", "path=disk.img,id=mortal,on-fail=stop-vm"], 13, "blk/mortal died: exited with status 9");
    Ok(())
}

fn reboot() -> Result<(), Failed> {
    let bench = Bench::new("reset");
    let mut run = bench.start(&["--disk", "path=disk.img"]);
    // What this host lacks is said at the beginning.
    let no_cgroups = |line: &std::io::Result<String>| line.as_ref().is_ok_and(|it| it.starts_with("ozone: no cgroups"));
    let mut lines = BufReader::new(run.child.stderr.take().unwrap()).lines().skip_while(no_cgroups);
    for _ in 0..3 {
        assert_eq!(lines.next().unwrap()?, "ozone: the guest reset itself: starting again");
    }
    bench.script("power-off");
    let rest: Vec<String> = lines.map_while(Result::ok).collect();
    assert_eq!(last(&rest), "ozone: the guest switched itself off");
    assert_eq!(run.child.wait()?.code(), Some(0));
    Ok(())
}

fn protocol_breaches() -> Result<(), Failed> {
    expect("running-early", &["--disk", "path=disk.img"], 4, "core broke the protocol: Running");
    expect("exited-early", &["--disk", "path=disk.img"], 4, "core broke the protocol: Exited");
    expect("running-twice", &[], 4, "core broke the protocol: Running");
    expect("lost-unknown", &[], 4, "core broke the protocol: Lost of an unknown device");
    expect("wait", &["--disk", "path=disk.img,id=hasty"], 4, "blk/hasty broke the protocol");
    // Once the machine runs, such a backend is lost like any other.
    for (id, message) in [("leaver", "Leave"), ("resized", "Resized")] {
        let line = format!("console/{id} died: it broke the protocol: {message} was not expected");
        expect("wait", &["--console", &format!("file=log,id={id},on-fail=stop-vm")], 13, &line);
    }
    Ok(())
}

fn silent() -> Result<(), Failed> {
    expect("wait", &["--disk", "path=disk.img,id=silent"], 4, "blk/silent was not ready within 10 s");
    Ok(())
}

fn faults() -> Result<(), Failed> {
    expect("wait", &["--disk", "path=disk.img,id=faulty"], 3, "ozone: the disk is on fire");
    expect("bad-image", &[], 2, "ozone: --kernel: no\\nkernel");
    Ok(())
}

fn signals() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130), (Signal::SIGHUP, 129), (Signal::SIGQUIT, 131)]
    {
        let run = bench.start(&["--disk", "path=disk.img"]);
        let children = run.children(3);
        kill(run.pid(), signal)?;
        let (got, lines) = run.end();
        assert_eq!(got, code, "{lines:?}");
        assert_eq!(last(&lines), format!("ozone: ended by {signal}"));
        gone(&children);
    }
    Ok(())
}

/// No process of these exists any more.
fn gone(children: &[(String, Pid)]) {
    let deadline = Instant::now() + Duration::from_secs(5);
    for (name, pid) in children {
        while fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name) {
            assert!(Instant::now() < deadline, "{name} is left");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn kills() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    for (victim, code) in [("core", 12), ("blk/disk0", 13), ("console/console", 13)] {
        let run = bench.start(&["--disk", "path=disk.img,on-fail=stop-vm", "--console", "stdio,on-fail=stop-vm"]);
        let children = run.children(3);
        let (_, pid) = children.iter().find(|(name, _)| name == victim).unwrap();
        kill(*pid, Signal::SIGKILL)?;
        let (got, lines) = run.end();
        assert_eq!(got, code, "{victim}: {lines:?}");
        assert!(last(&lines).contains("died: killed by SIGKILL"), "{lines:?}");
        gone(&children);
    }
    let run = bench.start(&["--disk", "path=disk.img"]);
    let children = run.children(3);
    kill(run.pid(), Signal::SIGKILL)?;
    gone(&children);
    Ok(())
}

/// Lines of ozone as they come.
struct Lines(BufReader<std::process::ChildStderr>);

impl Lines {
    fn of(run: &mut Run) -> Self {
        Self(BufReader::new(run.child.stderr.take().unwrap()))
    }

    /// The next line that has this in it. Ends with ozone at the latest, which the test's own deadline sees to.
    fn expect(&mut self, part: &str) -> String {
        let mut seen = String::new();
        loop {
            let mut line = String::new();
            assert!(self.0.read_line(&mut line).unwrap() > 0, "no '{part}' in: {seen}");
            if line.contains(part) {
                return line;
            }
            seen.push_str(&line);
        }
    }
}

fn pid_of(children: &[(String, Pid)], name: &str) -> Pid {
    children.iter().find(|(child, _)| child == name).unwrap().1
}

fn replaced() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    let mut run = bench.start(&["--disk", "path=disk.img"]);
    let mut before = run.children(3);
    let mut lines = Lines::of(&mut run);
    for (count, victim) in (1..).zip(["blk/disk0", "blk/disk0", "console/console"]) {
        kill(pid_of(&before, victim), Signal::SIGKILL)?;
        lines.expect("lost: killed by SIGKILL; it is started again");
        let line = lines.expect("back after");
        let number = if victim == "blk/disk0" { count } else { 1 };
        assert!(line.contains(&format!("(restart {number})")), "{line}");
        let after = run.children(3);
        for (name, pid) in &before {
            assert_eq!(pid_of(&after, name) == *pid, name != victim, "{name}");
        }
        before = after;
    }
    kill(run.pid(), Signal::SIGTERM)?;
    lines.expect("ended by SIGTERM");
    gone(&before);
    Ok(())
}

fn offending() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    let mut run = bench.start(&["--disk", "path=disk.img,id=offender"]);
    let mut lines = Lines::of(&mut run);
    lines.expect("[blk/offender] error forbidden system call 41 (socket), architecture 0xc000003e");
    lines.expect("[blk/offender] lost: made the forbidden system call socket (41); it is started again");
    Ok(())
}

fn hanging() -> Result<(), Failed> {
    // One image cannot be two disks; each has its own machine.
    for (id, cause) in [
        ("hangs", "no sign of life within 15 s"),
        ("unasked", "a sign of life that was not asked for"),
        ("hangs-up", "it closed its vhost-user socket"),
        ("floods", "it floods its control channel"),
    ] {
        let bench = Bench::new("wait");
        let mut run = bench.start(&["--disk", &format!("path=disk.img,id={id}")]);
        let line = Lines::of(&mut run).expect(&format!("[blk/{id}] lost: "));
        assert!(line.contains(cause), "{line}");
    }
    let hangs = ["--disk", "path=disk.img,id=hangs,on-fail=stop-vm"];
    expect("wait", &hangs, 13, "blk/hangs died: no sign of life within 15 s");
    Ok(())
}

fn retried() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    let mut run = bench.start(&["--disk", "path=disk.img,id=counts"]);
    let children = run.children(3);
    File::options().write(true).open(bench.path("disk.img")).unwrap().write_all_at(&[4], 0).unwrap();
    kill(pid_of(&children, "blk/counts"), Signal::SIGKILL)?;
    let mut lines = Lines::of(&mut run);
    lines.expect("lost: killed by SIGKILL; it is started again at once");
    for _ in 0..4 {
        lines.expect("lost: exited with status 9; it is started again in");
    }
    assert!(lines.expect("back after").contains("exited with status 9; started again after"));
    Ok(())
}

fn drained() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    let mut run = bench.start(&["--disk", "path=disk.img"]);
    let children = run.children(3);
    let mut lines = Lines::of(&mut run);
    // As a request of the killed process would, another descriptor of its description holds the lock.
    let process = nix::libc::pid_t::from(pid_of(&children, "blk/disk0"));
    let held = fs::read_dir(format!("/proc/{process}/fd")).unwrap().map(|entry| entry.unwrap().path());
    let image = held.filter(|path| fs::read_link(path).is_ok_and(|to| to.ends_with("disk.img")));
    assert_eq!(image.count(), 1);
    let copy = duplicate_of(process, &bench.path("disk.img"));
    kill(pid_of(&children, "blk/disk0"), Signal::SIGKILL)?;
    lines.expect("lost: killed by SIGKILL");
    lines.expect("draining: earlier requests");
    drop(copy);
    lines.expect("back after");
    Ok(())
}

/// The descriptor that a process has of `path`, as a descriptor of this one (pidfd_getfd(2)).
#[allow(unsafe_code)]
fn duplicate_of(process: i32, path: &Path) -> OwnedFd {
    use nix::libc;
    use std::os::fd::FromRawFd;
    let mut entries = fs::read_dir(format!("/proc/{process}/fd")).unwrap().map(|entry| entry.unwrap().path());
    let entry = entries.find(|entry| fs::read_link(entry).is_ok_and(|to| to == path)).unwrap();
    let number: i64 = entry.file_name().unwrap().to_str().unwrap().parse().unwrap();
    // SAFETY: numbers only, and the descriptors made are known to nobody else.
    unsafe {
        let pidfd = libc::syscall(libc::SYS_pidfd_open, i64::from(process), 0);
        assert!(pidfd >= 0);
        let pidfd = OwnedFd::from_raw_fd(pidfd as i32);
        let copy = libc::syscall(libc::SYS_pidfd_getfd, std::os::fd::AsRawFd::as_raw_fd(&pidfd), number, 0);
        assert!(copy >= 0, "{}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(copy as i32)
    }
}

/// `ozone` with these words: its code and what it printed.
fn ask(bench: &Bench, words: &[&str]) -> (i32, String) {
    let output = Command::new(bench.path("ozone")).args(words).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8_lossy(&text).into_owned())
}

/// A name that no other machine of this host has.
fn unique(bench: &Bench) -> String {
    let name = bench.directory.path().file_name().unwrap().to_str().unwrap();
    format!("test{}", name.replace(|c: char| !c.is_ascii_alphanumeric(), ""))
}

fn by_hand() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    let name = unique(&bench);
    let mut run = bench.start(&["--name", &name, "--disk", "path=disk.img,restart=never"]);
    let children = run.children(3);
    let mut lines = Lines::of(&mut run);
    kill(pid_of(&children, "blk/disk0"), Signal::SIGKILL)?;
    lines.expect("it stays away until 'ozone restart NAME disk0'");
    let (code, text) = ask(&bench, &["status", &name]);
    assert!(code == 0 && text.contains("blk/disk0") && text.contains("away"), "{text}");
    assert_eq!(ask(&bench, &["restart", &name, "disk0"]).0, 0);
    lines.expect("back after");
    // A process that serves is replaced as well, and all of them at once.
    let before = run.children(3);
    assert_eq!(ask(&bench, &["restart", &name, "--all"]).0, 0);
    lines.expect("back after");
    lines.expect("back after");
    let after = run.children(3);
    for (process, pid) in &before {
        assert_eq!(pid_of(&after, process) == *pid, process == "core", "{process}");
    }
    let (code, text) = ask(&bench, &["status", &name, "--json"]);
    let status: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((code, &status["state"]), (0, &"running".into()));
    let disk = status["devices"].as_array().unwrap().iter().find(|device| device["id"] == "disk0").unwrap().clone();
    assert_eq!(
        (&disk["state"], &disk["restarts"], &disk["cause"]),
        (&"up".into(), &2.into(), &"replaced by hand".into())
    );
    let (code, text) = ask(&bench, &["restart", &name, "disk9"]);
    assert!(code == 2 && text.contains("has no device 'disk9'; its devices are disk0, console0"), "{text}");
    let (code, text) = ask(&bench, &["restart", "nobody", "disk0"]);
    assert!(code == 2 && text.contains("machine 'nobody': not running"), "{text}");
    Ok(())
}

fn rested() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    let name = unique(&bench);
    let mut run = bench.start(&["--name", &name, "--disk", "path=disk.img"]);
    let children = run.children(3);
    let mut lines = Lines::of(&mut run);
    for _ in 0..2 {
        assert_eq!(ask(&bench, &["pause", &name]).0, 0);
    }
    assert!(ask(&bench, &["status", &name]).1.contains(": paused"));
    kill(pid_of(&children, "blk/disk0"), Signal::SIGKILL)?;
    lines.expect("lost: killed by SIGKILL");
    assert_eq!(ask(&bench, &["restart", &name, "disk0"]).0, 0);
    assert!(ask(&bench, &["status", &name]).1.contains(": paused"));
    assert_eq!(ask(&bench, &["resume", &name]).0, 0);
    assert!(ask(&bench, &["status", &name]).1.contains(": running"));
    Ok(())
}

fn confined() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    let run = bench.start(&["--disk", "path=disk.img"]);
    run.children(3);
    let status = fs::read_to_string(format!("/proc/{}/status", run.pid()))?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    // DAC_OVERRIDE, KILL, SETGID, SETUID, SETPCAP, SYS_CHROOT and SYS_ADMIN (linux/capability.h).
    let kept = format!("{:016x}", 1_u64 << 1 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 18 | 1 << 21);
    for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
        assert_eq!(field(set), kept, "{set}");
    }
    for set in ["CapInh:", "CapAmb:"] {
        assert_eq!(field(set), format!("{:016x}", 0), "{set}");
    }
    assert_eq!(field("NoNewPrivs:"), "1");
    assert_eq!((field("Seccomp:"), field("Seccomp_filters:")), ("2".into(), "1".into()));
    assert_eq!(core_limit(run.pid()), ["0", "0"]);
    // Who has the same uid and more capabilities may look at what is dumpable, and at nothing else (ptrace(2)).
    let link = format!("/proc/{}/ns/net", run.pid());
    assert!(fs::read_link(&link).is_ok());
    let looked = std::thread::spawn(move || {
        caps::drop(None, caps::CapSet::Effective, caps::Capability::CAP_SYS_PTRACE).unwrap();
        fs::read_link(&link).map_err(|error| error.kind())
    });
    assert_eq!(looked.join().unwrap(), Err(std::io::ErrorKind::PermissionDenied), "ozone is dumpable");
    Ok(())
}

/// How large a core dump of a process may be, as its soft and hard limit.
fn core_limit(pid: Pid) -> [String; 2] {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max core file size")).unwrap();
    let mut words = line.split_whitespace().map(str::to_owned);
    [words.next().unwrap(), words.next().unwrap()]
}

fn notified() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    let manager = std::os::unix::net::UnixDatagram::bind(bench.path("manager"))?;
    manager.set_read_timeout(Some(Duration::from_secs(20)))?;
    let heard = || {
        let mut text = [0; 256];
        let length = manager.recv(&mut text).expect("a word of ozone");
        String::from_utf8(text[..length].to_vec()).unwrap()
    };
    let mut command = bench.command(&[]);
    command.env("NOTIFY_SOCKET", bench.path("manager")).env("WATCHDOG_USEC", "200000");
    let run = Run { child: command.spawn()? };
    assert_eq!(heard(), "READY=1\nSTATUS=the machine runs");
    for _ in 0..3 {
        assert_eq!(heard(), "WATCHDOG=1");
    }
    kill(run.pid(), Signal::SIGTERM)?;
    let mut words: Vec<String> = std::iter::repeat_with(heard).take_while(|text| text != "STOPPING=1").collect();
    words.retain(|text| text != "WATCHDOG=1");
    assert_eq!(words, ["STATUS=ended by SIGTERM"]);
    assert_eq!(run.end().0, 143);
    let mut command = bench.command(&[]);
    command.env("NOTIFY_SOCKET", "/nonexistent/socket");
    let (code, lines) = Run { child: command.spawn()? }.end();
    assert!(code == 3 && last(&lines).contains("NOTIFY_SOCKET /nonexistent/socket: No such file"), "{lines:?}");
    Ok(())
}

fn named() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    let name = unique(&bench);
    let first = bench.start(&["--name", &name]);
    first.children(2);
    let (code, lines) = bench.run(&["--name", &name]);
    assert!(code == 2 && last(&lines).contains("a machine of this name is running"), "{lines:?}");
    kill(first.pid(), Signal::SIGKILL)?;
    let second = bench.start(&["--name", &name]);
    second.children(2);
    assert_eq!(ask(&bench, &["status", &name]).0, 0);
    kill(second.pid(), Signal::SIGTERM)?;
    second.end();
    assert!(!Path::new("/run/ozone/machines").join(&name).exists());
    Ok(())
}

fn collected() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    let name = unique(&bench);
    let own = Path::new("/run/ozone/machines").join(&name);
    let words = ["--name", &name, "--console", "socket=console", "--console", "socket=other"];
    let killed = || {
        let run = bench.start(&words);
        let children = run.children(3);
        assert_eq!(ask(&bench, &["gc", &name]).0, 2, "it runs");
        kill(run.pid(), Signal::SIGKILL).unwrap();
        drop(run);
        gone(&children);
        assert!(own.join("journal").exists() && bench.path("console").exists());
    };
    killed();
    // A file of the user's is where the socket was.
    fs::remove_file(bench.path("console"))?;
    fs::write(bench.path("console"), "mine")?;
    let (code, text) = ask(&bench, &["gc", &name]);
    assert_eq!(code, 0, "{text}");
    let other = bench.path("other").canonicalize().unwrap_or(bench.path("other"));
    for line in [
        format!("{name}: removed socket {}", other.display()),
        format!("{name}: removed its control socket"),
        format!("{name}: removed directory {}", own.display()),
    ] {
        assert!(text.lines().any(|it| it == line), "no '{line}' in: {text}");
    }
    assert!(text.contains("console is not the socket that it was; it stays"), "{text}");
    assert_eq!(fs::read_to_string(bench.path("console"))?, "mine");
    assert!(!own.exists() && !bench.path("other").exists());
    assert_eq!(ask(&bench, &["gc", &name]), (0, String::new()), "there is nothing left");
    fs::remove_file(bench.path("console"))?;

    // What cannot be removed is told, with the reason, as often as it is tried.
    killed();
    fs::write(own.join("of-the-user"), "")?;
    let (code, text) = ask(&bench, &["gc", &name]);
    let reason = format!("{name}: directory {} is not removed: ", own.display());
    assert!(code == 1 && text.contains(&reason) && text.contains("Directory not empty"), "{text}");
    let (code, text) = ask(&bench, &["gc", "--json", &name]);
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert!(code == 1 && report["machines"][0]["left"][0]["reason"].as_str().unwrap().contains("not empty"), "{text}");
    fs::remove_file(own.join("of-the-user"))?;
    assert_eq!(ask(&bench, &["gc", &name]).0, 0);
    for wrong in ["../web1", "a/b", ".", &"x".repeat(256)] {
        let (code, text) = ask(&bench, &["gc", wrong]);
        assert!(code == 2 && text.contains("no machine can have this name"), "{text}");
    }

    // A start of the same name does the same.
    killed();
    bench.script("power-off");
    let (code, lines) = bench.run(&["--name", &name]);
    assert_eq!(code, 0, "{lines:?}");
    assert!(
        lines.iter().any(|line| line.contains("a machine of this name was killed: removed what it left")),
        "{lines:?}"
    );
    assert!(!own.exists() && !bench.path("console").exists());
    Ok(())
}

/// The jail and the supervisor are real, so what they promise holds; the core of this bench is no machine.
fn audited() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    let name = unique(&bench);
    let run = bench.start(&["--name", &name, "--disk", "path=disk.img"]);
    run.children(3);
    let deadline = Instant::now() + Duration::from_secs(20);
    let (code, table) = loop {
        match ask(&bench, &["audit", &name, "--all"]) {
            (2, text) if text.contains("it is starting") && Instant::now() < deadline => {}
            answer => break answer,
        }
    };
    assert_eq!(code, 1, "awaited an audit of a running machine: {table}");
    let judged = |process: &str, promise: &str| {
        let section = table.lines().skip_while(|line| !line.starts_with(process)).skip(1);
        let mut section = section.take_while(|line| line.starts_with("  "));
        let line = section.find(|line| line.contains(promise)).unwrap_or_else(|| panic!("{promise}: {table}"));
        line.split_whitespace().next().unwrap_or_default().to_owned()
    };
    assert_eq!(judged("core", "guest memory in no core dump"), "BROKEN");
    for process in ["core", "blk/disk", "console/console0"] {
        assert_eq!(judged(process, "no capability in any set"), "holds");
        assert_eq!(judged(process, "a uid that no other process has"), "holds");
        assert_eq!(judged(process, "an empty read-only root"), "holds");
        assert_eq!(judged(process, "parent-death signal"), "not", "visible");
    }
    assert_eq!(judged("ozone", "only capabilities to start processes"), "holds");
    assert_eq!(judged("ozone", "no core dump"), "holds");
    assert_eq!(judged("ozone", "not dumpable"), "not", "visible");
    assert_eq!(ask(&bench, &["audit", "nobody"]).0, 2);
    Ok(())
}

fn flood() -> Result<(), Failed> {
    let (code, lines) = Bench::new("flood").run(&[]);
    assert_eq!(code, 0, "{:?}", last(&lines));
    let printed = lines.iter().filter(|line| *line == "ozone: [core] noise").count();
    assert!((100..2000).contains(&printed), "{printed} lines got through");
    assert!(lines.iter().any(|line| line.contains("lines were lost")), "{:?}", last(&lines));
    Ok(())
}

fn deaf_stderr() -> Result<(), Failed> {
    let bench = Bench::new("flood");
    let mut run = bench.start(&[]);
    // The pipe is full after 64 KiB at the latest; nobody reads it until the end.
    let deadline = Instant::now() + Duration::from_secs(20);
    let status = loop {
        if let Some(status) = run.child.try_wait()? {
            break status;
        }
        assert!(Instant::now() < deadline, "ozone waits for the reader of its standard error");
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(status.code(), Some(0));
    Ok(())
}

fn held_image() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    let holder = bench.start(&["--disk", "path=disk.img"]);
    holder.children(3);
    let (code, lines) = bench.run(&["--disk", "path=disk.img,readonly"]);
    assert_eq!(code, 2);
    assert!(last(&lines).contains("--disk path=disk.img,readonly: held by another VM"), "{lines:?}");
    drop(holder);
    let readers =
        [bench.start(&["--disk", "path=disk.img,readonly"]), bench.start(&["--disk", "path=disk.img,readonly"])];
    readers.iter().for_each(|reader| drop(reader.children(3)));
    let (code, lines) = bench.run(&["--disk", "path=disk.img"]);
    assert_eq!(code, 2, "{lines:?}");
    drop(readers);
    bench.script("power-off");
    let (code, lines) = bench.run(&["--disk", "path=disk.img"]);
    assert_eq!(code, 0, "after a kill -9 the image is free again: {lines:?}");
    Ok(())
}

fn bad_input() -> Result<(), Failed> {
    let bench = Bench::new("power-off");
    File::create(bench.path("empty")).unwrap();
    fs::hard_link(bench.path("disk.img"), bench.path("linked.img")).unwrap();
    nix::unistd::mkfifo(&bench.path("fifo"), nix::sys::stat::Mode::S_IRWXU)?;
    fs::write(bench.path("plain"), "mine").unwrap();
    let before: Vec<_> = listing(&bench);
    for (words, expected) in [
        (&["--initrd", "nowhere"][..], "--initrd nowhere: No such file"),
        (&["--initrd", "."], "--initrd .: is a directory"),
        (&["--initrd", "empty"], "--initrd empty: is empty"),
        (&["--initrd", "fifo"], "--initrd fifo: is a pipe"),
        (&["--disk", "path=nowhere"], "--disk path=nowhere: No such file"),
        (&["--disk", "path=."], "--disk path=.: is a directory"),
        (&["--disk", "path=empty"], "--disk path=empty: is empty"),
        (&["--disk", "path=fifo"], "--disk path=fifo: is neither"),
        (&["--disk", "path=/dev/null"], "--disk path=/dev/null: is neither"),
        (
            &["--disk", "path=disk.img", "--disk", "path=./linked.img"],
            "--disk path=./linked.img: the same image as --disk path=disk.img",
        ),
        (&["--disk", "path=disk.img,readonly", "--disk", "path=disk.img"], "the same image as"),
        (&["--memory", "1000T"], "--memory 1000T: more than the"),
        (&["--net", "tap=no-such-tap"], "--net tap=no-such-tap: missing tap"),
        (&["--console", "file=/nowhere/log"], "--console file=/nowhere/log: No such file"),
        (&["--console", "socket=plain"], "--console socket=plain: exists and is not a socket"),
        (&["--console", "socket=/nowhere/socket"], "--console socket=/nowhere/socket: No such file"),
        (&["--frobnicate"], "'--frobnicate'"),
    ] {
        let (code, lines) = bench.run(words);
        assert_eq!(code, 2, "{words:?}: {lines:?}");
        assert_eq!(lines.len(), 1, "{words:?}: {lines:?}");
        assert!(lines[0].starts_with("ozone: ") && lines[0].contains(expected), "{words:?}: {lines:?}");
        assert_eq!(listing(&bench), before, "{words:?} leaves something behind");
    }
    assert_eq!(fs::read_to_string(bench.path("plain"))?, "mine");
    fs::remove_file(bench.path("kernel"))?;
    let (code, lines) = bench.run(&[]);
    assert_eq!((code, last(&lines)), (2, "ozone: --kernel kernel: No such file or directory"));
    let (code, lines) = {
        bench.script("power-off");
        fs::remove_file(bench.path("ozone-blk"))?;
        bench.run(&["--disk", "path=disk.img"])
    };
    assert_eq!(code, 3);
    assert!(last(&lines).contains("ozone-blk: No such file"), "{lines:?}");
    Ok(())
}

fn listing(bench: &Bench) -> Vec<std::ffi::OsString> {
    let mut names: Vec<_> =
        fs::read_dir(bench.directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    names
}

fn kvm_rights() -> Result<(), Failed> {
    for (surrounding, line) in [
        ("kvm-for-root", "ozone: /dev/kvm: user 65534 has no rights on it: add the user to the group kvm"),
        ("no-kvm", "ozone: /dev/kvm: this host has no KVM: "),
        ("kvm-that-is-none", "ozone: /dev/kvm: it does not answer as KVM does"),
    ] {
        let bench = Bench::new("power-off");
        let (code, lines) = Run { child: bench.command_in(surrounding, &[]).spawn()? }.end();
        assert_eq!(code, 3, "{surrounding}: {lines:?}");
        assert!(lines.len() == 1 && lines[0].starts_with(line), "{surrounding}: {lines:?}");
    }
    Ok(())
}

fn interfaces() -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir("/sys/class/net")
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn taps() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    let before = interfaces();
    let run = bench.start(&["--net", "host-ip=192.168.213.1/24,mtu=1400,queues=2"]);
    run.children(3);
    let now = interfaces();
    let made = now.iter().find(|name| !before.contains(name)).expect("a tap is made");
    let address = nix::ifaddrs::getifaddrs()?.find(|entry| {
        entry.interface_name == *made && entry.address.is_some_and(|address| address.as_sockaddr_in().is_some())
    });
    let address = address.expect("an address on the tap");
    assert!(address.flags.contains(nix::net::if_::InterfaceFlags::IFF_UP));
    let text = |address: Option<nix::sys::socket::SockaddrStorage>| address.map(|address| address.to_string());
    assert_eq!(text(address.address).as_deref(), Some("192.168.213.1:0"));
    assert_eq!(text(address.netmask).as_deref(), Some("255.255.255.0:0"));
    assert_eq!(fs::read_to_string(format!("/sys/class/net/{made}/mtu"))?.trim(), "1400");
    kill(run.pid(), Signal::SIGTERM)?;
    let (code, lines) = run.end();
    assert_eq!(code, 143, "{lines:?}");
    assert!(lines.iter().any(|line| line.contains(made)), "its name is told: {lines:?}");
    assert_eq!(interfaces(), before);

    // A tap of the user's, of either kind: it lives as long as this descriptor.
    for kind in [0, nix::libc::IFF_MULTI_QUEUE] {
        let tun = File::options().read(true).write(true).open("/dev/net/tun")?;
        let flags = nix::libc::IFF_TAP | nix::libc::IFF_NO_PI | kind;
        ozone::ioctl::tun_set_interface(tun.as_fd(), "ozone-test", flags)?;
        let run = bench.start(&["--net", "tap=ozone-test"]);
        if kind == 0 {
            let (code, lines) = run.end();
            assert_eq!(code, 3, "{lines:?}");
            assert!(last(&lines).contains("the tap 'ozone-test' is in use"), "{lines:?}");
            continue;
        }
        run.children(3);
        kill(run.pid(), Signal::SIGTERM)?;
        assert_eq!(run.end().0, 143);
        assert!(interfaces().contains(&"ozone-test".to_owned()), "a tap of the user's stays");
    }

    let (code, lines) = bench.run(&["--net", "tap=lo"]);
    assert_eq!(code, 2);
    assert!(last(&lines).contains("--net tap=lo: the interface 'lo' is not a tap"), "{lines:?}");

    // A tap for one queue, persistent, so that it is there and free.
    let tun = File::options().read(true).write(true).open("/dev/net/tun")?;
    let flags = nix::libc::IFF_TAP | nix::libc::IFF_NO_PI;
    ozone::ioctl::tun_set_interface(tun.as_fd(), "ozone-one", flags)?;
    let (code, lines) = bench.run(&["--net", "tap=ozone-one,queues=2"]);
    assert_eq!(code, 2);
    assert!(last(&lines).contains("--net tap=ozone-one,queues=2: the tap 'ozone-one' has one queue"), "{lines:?}");
    Ok(())
}

fn console_socket() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    let run = bench.start(&["--console", "socket=console"]);
    run.children(2);
    let mode = fs::symlink_metadata(bench.path("console"))?.permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let (code, lines) = bench.run(&["--console", "socket=console"]);
    assert_eq!(code, 2, "{lines:?}");
    assert!(last(&lines).contains("another program listens"), "{lines:?}");
    kill(run.pid(), Signal::SIGTERM)?;
    assert_eq!(run.end().0, 143);
    assert!(!bench.path("console").exists());
    // One left over from a kill -9 gives way, also while its listener is still on its way out.
    let run = bench.start(&["--console", "socket=console"]);
    run.children(2);
    kill(run.pid(), Signal::SIGKILL)?;
    drop(run);
    assert!(bench.path("console").exists());
    let lingering = std::os::unix::net::UnixListener::bind(bench.path("other"))?;
    fs::rename(bench.path("other"), bench.path("console"))?;
    let ending = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        drop(lingering);
    });
    bench.script("power-off");
    assert_eq!(bench.run(&["--console", "socket=console"]).0, 0);
    ending.join().unwrap();
    assert!(!bench.path("console").exists());
    Ok(())
}

fn terminal() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    let size = |ws_col, ws_row| Winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(&size(80, 25), None)?;
    let before = tcgetattr(&pty.slave)?;
    assert!(before.local_flags.contains(LocalFlags::ECHO | LocalFlags::ISIG));
    let mut command = bench.command_in("terminal", &["--console", "stdio,id=raw-leaver"]);
    let child = command.stdin(pty.slave.try_clone()?).stdout(pty.slave.try_clone()?).spawn()?;
    let run = Run { child };
    let deadline = Instant::now() + Duration::from_secs(20);
    while tcgetattr(&pty.slave)?.local_flags.contains(LocalFlags::ECHO) {
        assert!(Instant::now() < deadline, "the console does not make the terminal raw");
        std::thread::sleep(Duration::from_millis(5));
    }
    // Time to read the first size; two changes at once would be told as the last.
    std::thread::sleep(Duration::from_millis(200));
    set_window_size(&pty.master, &size(132, 43));
    let (code, lines) = run.end();
    assert_eq!((code, last(&lines)), (0, "ozone: left with Ctrl-A x; the guest was ended"), "{lines:?}");
    let after = tcgetattr(&pty.slave)?;
    assert_eq!(after.local_flags, before.local_flags);
    assert_eq!(after.output_flags, before.output_flags);
    Ok(())
}

/// `ozone` with this console on a terminal; with the terminal's own side and the user's.
fn on_terminal(bench: &Bench, console: &str) -> Result<(Run, OwnedFd, OwnedFd), Failed> {
    let size = Winsize { ws_row: 25, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(&size, None)?;
    let mut command = bench.command_in("terminal", &["--console", &format!("stdio,id={console}")]);
    let child = command.stdin(pty.slave.try_clone()?).stdout(pty.slave.try_clone()?).spawn()?;
    Ok((Run { child }, pty.slave, pty.master))
}

fn resize() -> Result<(), Failed> {
    let bench = Bench::new("until-resized");
    let (run, _slave, master) = on_terminal(&bench, "resizer")?;
    let children = run.children(2);
    for columns in 90..=100 {
        set_window_size(&master, &Winsize { ws_row: 40, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 });
    }
    std::thread::sleep(Duration::from_millis(300));
    for (name, pid) in children {
        let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        assert_eq!(comm.trim(), name, "the core has heard of a size that the console has not taken");
    }
    File::from(master.try_clone()?).write_all(b"go\n")?;
    let (code, lines) = run.end();
    assert_eq!((code, last(&lines)), (0, "ozone: the guest switched itself off"), "{lines:?}");
    Ok(())
}

fn stopped_terminal() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    let (run, slave, _master) = on_terminal(&bench, "patient")?;
    run.children(2);
    // Another program on the terminal, whose output nobody takes.
    let mut flooding = Command::new("cat").arg("/dev/zero").stdout(slave).stderr(Stdio::null()).spawn()?;
    std::thread::sleep(Duration::from_millis(300));
    let start = Instant::now();
    kill(run.pid(), Signal::SIGTERM)?;
    let mut run = run;
    while run.child.try_wait()?.is_none() && start.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let ended = run.child.try_wait()?;
    flooding.kill()?;
    flooding.wait()?;
    assert_eq!(ended.and_then(|status| status.code()), Some(143), "it waits for the terminal");
    Ok(())
}

/// An image, held as by requests of an earlier incarnation that are still under way.
fn held(bench: &Bench, name: &str) -> File {
    let image = File::options().read(true).write(true).create(true).truncate(false).open(bench.path(name)).unwrap();
    image.set_len(1 << 20).unwrap();
    image.lock().unwrap();
    image
}

fn signal_while_draining() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    let _image = held(&bench, "disk.img");
    let run = bench.start(&["--disk", "path=disk.img"]);
    let children = run.children(3);
    let start = Instant::now();
    kill(run.pid(), Signal::SIGTERM)?;
    let (code, lines) = run.end();
    assert!(start.elapsed() < Duration::from_secs(5), "it took {:?}", start.elapsed());
    assert_eq!((code, last(&lines)), (143, "ozone: ended by SIGTERM"), "{lines:?}");
    gone(&children);
    Ok(())
}

fn patience_after_draining() -> Result<(), Failed> {
    let bench = Bench::new("power-off");
    let images = [held(&bench, "disk.img"), held(&bench, "other.img")];
    let run = bench.start(&["--disk", "path=disk.img", "--disk", "path=other.img,id=late"]);
    // Each within what an image is waited for, both together longer than a backend may take to be ready.
    for image in images {
        std::thread::sleep(Duration::from_secs(6));
        drop(image);
    }
    std::thread::sleep(Duration::from_millis(500));
    File::options().write(true).open(bench.path("other.img"))?.write_all_at(&[1], 1 << 20)?;
    let (code, lines) = run.end();
    assert_eq!(code, 0, "{lines:?}");
    Ok(())
}

#[allow(unsafe_code)]
fn set_window_size(terminal: &impl std::os::fd::AsRawFd, size: &Winsize) {
    // SAFETY: the request reads one `struct winsize`.
    let result = unsafe { nix::libc::ioctl(terminal.as_raw_fd(), nix::libc::TIOCSWINSZ, std::ptr::from_ref(size)) };
    assert_eq!(result, 0);
}

fn uid_of(pid: Pid) -> u32 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("Uid:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn uids() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    let runs = [bench.start(&["--disk", "path=disk.img,readonly"]), bench.start(&["--disk", "path=disk.img,readonly"])];
    let mut uids: Vec<u32> = runs.iter().flat_map(|run| run.children(3)).map(|(_, pid)| uid_of(pid)).collect();
    uids.sort_unstable();
    uids.dedup();
    assert_eq!(uids.len(), 6, "{uids:?}");
    assert!(uids.iter().all(|uid| *uid >= 0x7000_0000));
    Ok(())
}

/// Puts a file of its own in the place of an executable, which shares its mode with the other tests' otherwise. It is not to be
/// executed: a process that another test starts meanwhile may have it open (execve(2), ETXTBSY).
fn own_copy(bench: &Bench, name: &str) -> PathBuf {
    let path = bench.path(name);
    let text = fs::read(&path).unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn written_by_others() -> Result<(), Failed> {
    let bench = Bench::new("power-off");
    for (name, mode) in [("vmm-core", 0o775), ("ozone-blk", 0o757), ("ozone-console", 0o720)] {
        let path = own_copy(&bench, name);
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        let before = listing(&bench);
        let (code, lines) = bench.run(&["--disk", "path=disk.img"]);
        let expected = format!(
            "ozone: executable {}: others than its owner may write it (mode {mode:04o}); take that away with chmod go-w",
            path.display()
        );
        assert_eq!((code, &lines[..]), (3, &[expected][..]));
        assert_eq!(listing(&bench), before, "it leaves something behind");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    // What is not executed is no matter.
    let bench = Bench::new("power-off");
    fs::set_permissions(own_copy(&bench, "ozone-net"), fs::Permissions::from_mode(0o777))?;
    assert_eq!(bench.run(&["--disk", "path=disk.img"]).0, 0);
    Ok(())
}

fn owned_by_a_role() -> Result<(), Failed> {
    let bench = Bench::new("power-off");
    let path = own_copy(&bench, "vmm-core");
    for owner in [500_000, 500_001] {
        std::os::unix::fs::chown(&path, Some(owner), None)?;
        let (code, lines) = bench.run(&["--uid-base", "500000"]);
        let expected = format!(
            "ozone: executable {}: it belongs to uid {owner}, which a process of this machine has; give it to root with chown",
            path.display()
        );
        assert_eq!((code, &lines[..]), (3, &[expected][..]));
    }
    Ok(())
}

fn uids_asked_for() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    let name = unique(&bench);
    let run = bench.start(&["--name", &name, "--uid-base", "300000", "--disk", "path=disk.img,readonly"]);
    let children = run.children(3);
    for (process, uid) in [("core", 300_000), ("blk/disk0", 300_001), ("console/console", 300_002)] {
        let pid = pid_of(&children, process);
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let groups = status.lines().find_map(|line| line.strip_prefix("Gid:")).unwrap();
        assert_eq!(uid_of(pid), uid, "{process}");
        assert!(groups.split_whitespace().all(|gid| gid == uid.to_string()), "{process}: {groups}");
    }
    let status: serde_json::Value = serde_json::from_str(&ask(&bench, &["status", &name, "--json"]).1).unwrap();
    assert_eq!((&status["core-uid"], &status["devices"][1]["uid"]), (&300_000.into(), &300_002.into()), "{status}");
    let (code, lines) = bench.run(&["--uid-base", "300002"]);
    assert_eq!(code, 2);
    let line = format!("--uid-base 300002: machine '{name}' has some of the uids 300002 to 300003");
    assert!(last(&lines).contains(&line), "{lines:?}");
    bench.script("power-off");
    assert_eq!(bench.run(&["--uid-base", "300003"]).0, 0);
    let ordinary = Run { child: bench.command_in("kvm-for-all", &["--uid-base", "400000"]).spawn()? };
    let (code, lines) = ordinary.end();
    assert_eq!(code, 2);
    assert!(last(&lines).contains("--uid-base 400000: only root can give"), "{lines:?}");
    Ok(())
}

fn ordinary_user() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    std::os::unix::fs::chown(bench.path("disk.img"), Some(ORDINARY), Some(ORDINARY))?;
    let run = Run { child: bench.command_in("kvm-for-all", &["--disk", "path=disk.img"]).spawn()? };
    for (name, pid) in run.children(3) {
        assert_eq!(uid_of(pid), ORDINARY, "{name}");
    }
    assert_eq!(core_limit(run.pid()), ["0", "0"]);
    kill(run.pid(), Signal::SIGTERM)?;
    let (code, lines) = run.end();
    assert_eq!(code, 143, "{lines:?}");
    assert!(lines.iter().any(|line| line.contains("every process runs as uid 65534")), "{lines:?}");
    Ok(())
}
