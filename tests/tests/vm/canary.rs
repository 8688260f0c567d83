//! What a guest has in its memory is on no disk of the host and in no file that another user reads.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use agent::layout::ORDINARY_USER;
use anyhow::{Context, Result, ensure};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid, setegid, seteuid, setgroups};
use ozone_tests::harness::Test;
use ozone_tests::process_table::Process;
use ozone_tests::vm::{ANSWER, Guest, Vm};

/// The tests of this file.
pub const TESTS: [Test; 2] = [
    Test::host("canary::no_file_in_proc_shows_guest_memory_to_another_user", proc_shows_nothing),
    Test::host("canary::a_crash_leaves_no_core_file", no_core_file),
];

/// What the guest knows and nobody else may. In two parts, so that no program of the test has it in its arguments.
const CANARY: [&str; 2] = ["cAnArY-7f3a", "9c1e-yRaNaC"];

/// A uid that a process of another machine could have.
const ANOTHER_TENANT: u32 = 0x7000_0000 + 64;

fn machine() -> Result<Vm> {
    let mut vm = Guest::new()?.boot()?;
    let [first, second] = CANARY;
    // The shell puts the parts together; the file is in the guest's memory.
    vm.guest(&format!("a={first}; b={second}; echo $a$b > /canary; grep -c $a$b /canary"))?;
    Ok(vm)
}

/// Whether the process's mapping of guest memory has the canary: the largest that it shares.
fn in_guest_memory(process: &Process) -> Result<bool> {
    let maps = fs::read_to_string(format!("/proc/{}/maps", process.pid)).context("maps")?;
    let memory = File::open(format!("/proc/{}/mem", process.pid)).context("mem")?;
    let wanted = CANARY.concat();
    let mut buffer = vec![0; 1 << 20];
    for line in maps.lines().filter(|line| line.contains("/memfd:")) {
        let range = line.split_whitespace().next().and_then(|range| range.split_once('-')).context("a range")?;
        let (mut at, end) = (u64::from_str_radix(range.0, 16)?, u64::from_str_radix(range.1, 16)?);
        while at < end {
            let length = buffer.len().min(usize::try_from(end - at)?);
            // A piece that is cut by the buffer's end is not looked for: the guest has more copies than one.
            let read = memory.read_at(&mut buffer[..length], at).unwrap_or(0);
            if buffer[..read].windows(wanted.len()).any(|window| window == wanted.as_bytes()) {
                return Ok(true);
            }
            at += length as u64;
        }
    }
    Ok(false)
}

/// Files and directories of a process in /proc that lead to its memory or to what it holds.
const INWARD: [&str; 8] = ["mem", "maps", "smaps", "pagemap", "environ", "auxv", "fd", "map_files"];

/// Does something as another user, with nothing of root's.
fn as_user<T>(uid: u32, action: impl FnOnce() -> T) -> Result<T> {
    setgroups(&[])?;
    setegid(Gid::from_raw(uid))?;
    seteuid(Uid::from_raw(uid))?;
    let outcome = action();
    seteuid(Uid::from_raw(0))?;
    setegid(Gid::from_raw(0))?;
    Ok(outcome)
}

/// Which of [`INWARD`] this user may open.
fn opened(process: &Process) -> Vec<&'static str> {
    let opens = |name: &&str| File::open(format!("/proc/{}/{name}", process.pid)).is_ok();
    INWARD.into_iter().filter(opens).collect()
}

/// The files of a process and its threads in /proc that this user can read and that have the canary.
fn shown(process: &Process) -> Vec<String> {
    let mut directories = vec![format!("/proc/{}", process.pid)];
    let tasks = fs::read_dir(format!("/proc/{}/task", process.pid)).into_iter().flatten().flatten();
    directories.extend(tasks.map(|task| task.path().display().to_string()));
    let mut shown = Vec::new();
    for directory in directories {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
            let mut text = Vec::new();
            let read = is_file.then(|| File::open(entry.path()).map(|file| file.take(1 << 20).read_to_end(&mut text)));
            if matches!(read, Some(Ok(_))) && text.windows(CANARY[0].len()).any(|it| it == CANARY[0].as_bytes()) {
                shown.push(entry.path().display().to_string());
            }
        }
    }
    shown
}

fn proc_shows_nothing() -> Result<()> {
    let mut vm = machine()?;
    let processes = vm.processes()?;
    let core = processes.iter().find(|process| process.role == "core").context("no core")?;
    ensure!(in_guest_memory(core)?, "the canary is not in guest memory, as root sees it");
    for process in &processes {
        ensure!(opened(process) == INWARD, "{}: root itself opens only {:?}", process.role, opened(process));
        for uid in [ORDINARY_USER, ANOTHER_TENANT] {
            let (opened, shown) = as_user(uid, || (opened(process), shown(process)))?;
            ensure!(opened.is_empty(), "uid {uid} opens {opened:?} of {}", process.role);
            ensure!(shown.is_empty(), "uid {uid} reads the canary in {shown:?}");
        }
    }
    vm.power_off()
}

/// Settings of the kernel, and what they were before.
struct Settings(Vec<(&'static str, String)>);

impl Settings {
    fn set(&mut self, path: &'static str, value: &str) -> Result<()> {
        self.0.push((path, fs::read_to_string(path)?));
        fs::write(path, value).with_context(|| format!("{path} = {value}"))
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        for (path, before) in self.0.drain(..).rev() {
            let _ = fs::write(path, before.trim_end());
        }
    }
}

fn names(directory: &Path) -> Result<Vec<String>> {
    fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

fn no_core_file() -> Result<()> {
    // Inherited by ozone and, if it did nothing about it, by all its children.
    setrlimit(Resource::RLIMIT_CORE, RLIM_INFINITY, RLIM_INFINITY)?;
    let mut settings = Settings(Vec::new());
    // A process waits for the end of the program that takes its core: it is all over when the process is.
    settings.set("/proc/sys/kernel/core_pipe_limit", "16")?;
    // The limit on core files does not count for a program.
    for pattern in ["", "|/bin/busybox dd of="] {
        let directory = tempfile::tempdir()?;
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777))?;
        settings.set("/proc/sys/kernel/core_pattern", &format!("{pattern}{}/core.%P", directory.path().display()))?;
        crash_everything(directory.path()).with_context(|| format!("core_pattern begins with '{pattern}'"))?;
    }
    Ok(())
}

/// Ends an ordinary process, and each process of a machine, by signals whose default action is a core file in `directory`.
fn crash_everything(directory: &Path) -> Result<()> {
    let mut ordinary = Command::new("/bin/busybox").args(["sleep", "600"]).spawn()?;
    kill(Pid::from_raw(i32::try_from(ordinary.id())?), Signal::SIGSEGV)?;
    ordinary.wait()?;
    let expected = format!("core.{}", ordinary.id());
    ensure!(names(directory)? == [expected.clone()], "not the core of an ordinary process: {:?}", names(directory)?);

    let mut vm = machine()?;
    let processes = vm.processes()?;
    // The core last: the machine ends with it.
    let (core, backends): (Vec<&Process>, Vec<&Process>) =
        processes.iter().filter(|process| process.pid != vm.pid()).partition(|process| process.role == "core");
    for process in backends.into_iter().chain(core) {
        // Which the first process of a pid namespace does not ignore here.
        kill(Pid::from_raw(process.pid), Signal::SIGSYS)?;
        let deadline = Instant::now() + ANSWER;
        while fs::exists(format!("/proc/{}", process.pid))? {
            ensure!(Instant::now() < deadline, "{} does not end of SIGSYS within {ANSWER:?}", process.role);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    vm.expect_exit(12, ANSWER)?;
    ensure!(names(directory)? == [expected], "a process of the machine left a core: {:?}", names(directory)?);
    Ok(())
}
