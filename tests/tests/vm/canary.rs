//! What a guest has in its memory is on no disk of the host and in no file that another user reads.

use std::fs::{self, File};
use std::os::unix::fs::{DirBuilderExt, FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use agent::layout::ORDINARY_USER;
use anyhow::{Context, Result, ensure};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
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

fn proc_shows_nothing() -> Result<()> {
    let mut vm = machine()?;
    let processes = vm.processes()?;
    let core = processes.iter().find(|process| process.role == "core").context("no core")?;
    ensure!(in_guest_memory(core)?, "the canary is not in guest memory, as root sees it");
    for process in &processes {
        for uid in [ORDINARY_USER, ANOTHER_TENANT] {
            let found = Command::new("/bin/busybox")
                .args(["timeout", "60", "/bin/busybox", "grep", "-rsl", "-e"])
                .args([CANARY[0], &format!("/proc/{}", process.pid)])
                .stdin(Stdio::null())
                .uid(uid)
                .gid(uid)
                .output()?;
            let (files, code) = (String::from_utf8_lossy(&found.stdout).into_owned(), found.status.code());
            // grep(1): 1 is nothing found, 2 that some files cannot be read.
            ensure!(files.is_empty() && matches!(code, Some(1 | 2)), "uid {uid}, {}: {files}, {code:?}", process.role);
        }
    }
    vm.power_off()
}

/// Where the kernel is told to write core files, and what it was told before.
struct Cores {
    before: String,
    directory: tempfile::TempDir,
}

const PATTERN: &str = "/proc/sys/kernel/core_pattern";

impl Cores {
    fn here() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
        fs::DirBuilder::new().mode(0o777).create(directory.path().join("all"))?;
        fs::set_permissions(directory.path().join("all"), fs::Permissions::from_mode(0o777))?;
        let before = fs::read_to_string(PATTERN)?;
        fs::write(PATTERN, format!("{}/all/core.%P", directory.path().display()))?;
        Ok(Self { before, directory })
    }

    fn files(&self) -> Result<Vec<String>> {
        let entries = fs::read_dir(self.directory.path().join("all"))?;
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }
}

impl Drop for Cores {
    fn drop(&mut self) {
        let _ = fs::write(PATTERN, self.before.trim_end());
    }
}

fn no_core_file() -> Result<()> {
    let cores = Cores::here()?;
    // Inherited by ozone and, if it did nothing about it, by all its children.
    setrlimit(Resource::RLIMIT_CORE, RLIM_INFINITY, RLIM_INFINITY)?;
    let mut ordinary = Command::new("/bin/busybox").args(["sleep", "600"]).spawn()?;
    kill(Pid::from_raw(i32::try_from(ordinary.id())?), Signal::SIGSEGV)?;
    ordinary.wait()?;
    let expected = format!("core.{}", ordinary.id());
    ensure!(cores.files()? == [expected.clone()], "not the core file of an ordinary process: {:?}", cores.files()?);

    let mut vm = machine()?;
    let processes = vm.processes()?;
    // The core last: the machine ends with it.
    let (core, backends): (Vec<&Process>, Vec<&Process>) =
        processes.iter().filter(|process| process.pid != vm.pid()).partition(|process| process.role == "core");
    for process in backends.into_iter().chain(core) {
        // Of which the default action is a core file, and which the first process of a pid namespace does not ignore here.
        kill(Pid::from_raw(process.pid), Signal::SIGSYS)?;
        let deadline = Instant::now() + ANSWER;
        while fs::exists(format!("/proc/{}", process.pid))? {
            ensure!(Instant::now() < deadline, "{} does not end of SIGSYS within {ANSWER:?}", process.role);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    vm.expect_exit(12, ANSWER)?;
    ensure!(cores.files()? == [expected], "a process of the machine left a core file: {:?}", cores.files()?);
    Ok(())
}
