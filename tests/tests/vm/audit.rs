//! `ozone audit`: it says that every promise holds while they do, and finds those that are broken from outside.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread;

use agent::layout::ORDINARY_USER;
use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use ozone_tests::harness::Test;
use ozone_tests::vm::{ANSWER, BOOT, Guest, Vm, executable};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::Value;

use crate::{cgroup, kvm_device};

/// The tests of this file.
pub const TESTS: [Test; 6] = [
    Test::host("audit::a_machine_with_every_device_keeps_its_promises", a_machine_keeps_its_promises),
    Test::host("audit::what_is_broken_from_outside_is_found", what_is_broken_from_outside_is_found),
    Test::host("audit::processes_that_are_replaced_meanwhile_break_nothing", replaced_processes_break_nothing),
    Test::host("audit::an_ordinary_user_audits_a_machine", an_ordinary_user_audits_a_machine),
    Test::host("audit::a_host_that_gives_no_user_namespaces_is_said", no_user_namespaces),
    Test::host("audit::a_machine_that_is_not_there_is_the_users_fault", no_such_machine),
];

const NAME: &str = "audited";

/// A running machine with every kind of device and of console.
fn machine() -> Result<(Vm, tempfile::TempPath)> {
    let guest = Guest::new()?;
    let disk = guest.root_disk()?;
    let guest = guest.disk(&disk).option("--net", "host-ip=192.0.2.1/24").option("--console", "pty");
    let guest = guest.option("--console", "socket=/tmp/audited.console").option("--console", "file=/tmp/audited.log");
    Ok((guest.option("--name", NAME).option("--cpus", "2").boot()?, disk))
}

fn audit(command: &mut Command, options: &[&str]) -> Result<(i32, String)> {
    let output = command.arg("audit").arg(NAME).args(options).output().context("run ozone audit")?;
    let text = String::from_utf8(output.stdout)?;
    let errors = String::from_utf8_lossy(&output.stderr);
    Ok((output.status.code().with_context(|| format!("ozone audit was killed: {errors}"))?, text + &errors))
}

fn ozone() -> Command {
    Command::new(executable("ozone"))
}

/// The audit as JSON, and its exit code.
fn examine() -> Result<(i32, Value)> {
    let (code, text) = audit(&mut ozone(), &["--json"])?;
    let json = serde_json::from_str(&text).with_context(|| format!("ozone audit ended with {code}:\n{text}"))?;
    Ok((code, json))
}

fn processes(report: &Value) -> &[Value] {
    report["processes"].as_array().map(Vec::as_slice).unwrap_or_default()
}

/// Every broken promise, as `PROCESS: PROMISE`.
fn broken(report: &Value) -> Vec<String> {
    let findings = |process: &Value| process["promises"].as_array().cloned().unwrap_or_default();
    let mut broken = Vec::new();
    for process in processes(report) {
        let those = findings(process).into_iter().filter(|finding| finding["verdict"] == "broken");
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        broken.extend(those.map(|finding| format!("{}: {}", text(&process["name"]), text(&finding["promise"]))));
    }
    broken
}

fn pid_of(report: &Value, name: &str) -> Result<i32> {
    let process = processes(report).iter().find(|process| process["name"] == name);
    let pid =
        process.and_then(|process| process["pid"].as_i64()).with_context(|| format!("no {name} in {report:#}"))?;
    Ok(i32::try_from(pid)?)
}

/// Nothing is broken, of the processes with these names.
fn expect_all_to_hold(expected: &[&str]) -> Result<Value> {
    let (code, report) = examine()?;
    ensure!(code == 0 && report["holds"] == true, "exit code {code}: {:#?}", broken(&report));
    let names: Vec<_> = processes(&report).iter().filter_map(|process| process["name"].as_str()).collect();
    ensure!(names == expected, "{names:?} instead of {expected:?}");
    Ok(report)
}

const EVERYTHING: [&str; 8] = [
    "ozone",
    "core",
    "blk/disk0",
    "net/net0",
    "console/console0",
    "console/console1",
    "console/console2",
    "console/console3",
];

fn a_machine_keeps_its_promises() -> Result<()> {
    let (mut vm, _disk) = machine()?;
    let report = expect_all_to_hold(&EVERYTHING)?;
    ensure!(pid_of(&report, "ozone")? == vm.pid());
    for process in processes(&report).iter().filter(|process| process["name"] != "ozone") {
        let promises = process["promises"].as_array().context("promises")?;
        let with = |verdict: &str| promises.iter().filter(|finding| finding["verdict"] == verdict).count();
        ensure!(with("holds") == 29 && with("not-visible") == 3, "{process:#}");
        ensure!(process["descriptors"].as_array().is_some_and(|all| all.len() >= 4), "{process:#}");
        ensure!(process["limits"].as_array().is_some_and(|all| all.len() >= 16), "{process:#}");
    }
    let (code, short) = audit(&mut ozone(), &[])?;
    println!("{short}");
    // A line for each process, and the last.
    ensure!(code == 0 && short.lines().count() == EVERYTHING.len() + 1, "{short}");
    let (code, long) = audit(&mut ozone(), &["--all"])?;
    println!("{long}");
    ensure!(code == 0 && long.contains("no capability in any set"), "{long}");
    vm.power_off()
}

/// A process of the host, killed on drop.
struct Stranger(Child);

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn what_is_broken_from_outside_is_found() -> Result<()> {
    let (mut vm, _disk) = machine()?;
    let report = expect_all_to_hold(&EVERYTHING)?;
    let expect = |what: &[&str]| {
        let (code, report) = examine()?;
        ensure!(code == 1 && report["holds"] == false, "exit code {code}, awaited 1 for {what:?}: {report:#}");
        ensure!(broken(&report) == what, "{:#?} instead of {what:#?}", broken(&report));
        Ok(())
    };

    // Somebody else with the uid of a backend.
    let net = pid_of(&report, "net/net0")?;
    let uid = vm.processes()?.iter().find(|process| process.pid == net).context("net/net0")?.uid;
    let mut command = Command::new("sleep");
    let stranger = Stranger(command.arg("1000").uid(uid).gid(uid).stdin(Stdio::null()).spawn()?);
    expect(&["net/net0: a uid that no other process has"])?;
    drop(stranger);
    expect_all_to_hold(&EVERYTHING)?;

    // A core dump is possible again.
    let core = Pid::from_raw(pid_of(&report, "core")?);
    let unlimited = Rlimit { current: None, maximum: None };
    prlimit(core, Resource::Core, unlimited)?;
    expect(&["core: no core dump"])?;
    prlimit(core, Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    expect_all_to_hold(&EVERYTHING)?;

    // Everyone may write an executable; it is put right whatever comes of it.
    let program = executable("ozone-blk");
    let before = fs::metadata(&program)?.permissions();
    fs::set_permissions(&program, Permissions::from_mode(0o757))?;
    let found = expect(&["blk/disk0: an executable that no role can write"]);
    fs::set_permissions(&program, before)?;
    found?;
    expect_all_to_hold(&EVERYTHING)?;

    // A group with no limit, and then a process in none.
    let guest_log = pid_of(&report, "console/console3")?;
    let group = cgroup::group_of(guest_log)?;
    let in_group = |file: &str| format!("{}{group}/{file}", cgroup::MOUNT);
    let limit = fs::read_to_string(in_group("pids.max"))?;
    fs::write(in_group("pids.max"), "max")?;
    expect(&["console/console3: a limit on processes in its group"])?;
    fs::write(in_group("pids.max"), limit)?;
    fs::write(format!("{}/cgroup.procs", cgroup::MOUNT), guest_log.to_string())?;
    expect(&[
        "console/console3: in a control group of its own",
        "console/console3: a limit on processes in its group",
    ])?;
    fs::write(in_group("cgroup.procs"), guest_log.to_string())?;
    expect_all_to_hold(&EVERYTHING)?;
    // Somebody else in the group of a process.
    let stranger = Stranger(Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn()?);
    fs::write(in_group("cgroup.procs"), stranger.0.id().to_string())?;
    expect(&["console/console3: in a control group of its own"])?;
    drop(stranger);
    expect_all_to_hold(&EVERYTHING)?;

    // The empty root can be written.
    let console = pid_of(&report, "console/console1")?;
    with_mounts_of(console, || {
        Ok(mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REMOUNT | MsFlags::MS_BIND, None::<&str>)?)
    })?;
    expect(&["console/console1: an empty read-only root"])?;
    // And it stays so while something else breaks.
    prlimit(core, Resource::Nofile, Rlimit { current: Some(1024), maximum: Some(2048) })?;
    expect(&["core: limits", "console/console1: an empty read-only root"])?;

    let (code, table) = audit(&mut ozone(), &[])?;
    println!("{table}");
    ensure!(code == 1 && table.contains("BROKEN") && table.contains("2 promises do not hold"), "{table}");
    vm.power_off()
}

/// Does something in the mount namespace of a process, in a thread that ends with it.
fn with_mounts_of(pid: i32, work: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
    let namespace = File::open(format!("/proc/{pid}/ns/mnt"))?;
    let entered = thread::spawn(move || {
        // A thread that shares its root directory with others cannot go elsewhere (setns(2)).
        unshare(CloneFlags::CLONE_FS)?;
        setns(namespace, CloneFlags::CLONE_NEWNS)?;
        work()
    });
    match entered.join() {
        Ok(outcome) => outcome,
        Err(_) => bail!("the thread in the namespace of {pid} panicked"),
    }
}

fn replaced_processes_break_nothing() -> Result<()> {
    let (mut vm, _disk) = machine()?;
    let before = pid_of(&expect_all_to_hold(&EVERYTHING)?, "blk/disk0")?;
    for _ in 0..5 {
        let mut restart = ozone();
        restart.args(["restart", NAME, "--all"]);
        restart.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut restart = Vm::spawn(&mut restart)?;
        // Meanwhile: which processes it finds, and which of them are not to be judged yet, is chance.
        for _ in 0..2 {
            let (code, report) = examine()?;
            ensure!(code == 0, "a restart breaks {:#?}", broken(&report));
        }
        restart.expect_exit(0, ANSWER)?;
    }
    let after = pid_of(&expect_all_to_hold(&EVERYTHING)?, "blk/disk0")?;
    ensure!(before != after, "blk/disk0 is process {before} before and after its restarts");
    vm.power_off()
}

fn an_ordinary_user_audits_a_machine() -> Result<()> {
    kvm_device::with_mode(0o666)?;
    let guest = Guest::new()?;
    let disk = guest.root_disk()?;
    let runtime = tempfile::tempdir()?;
    for path in [disk.to_path_buf(), runtime.path().to_owned()] {
        chown(path, Some(ORDINARY_USER), Some(ORDINARY_USER))?;
    }
    let as_user = || {
        let mut command = ozone();
        command.uid(ORDINARY_USER).gid(ORDINARY_USER).env("XDG_RUNTIME_DIR", runtime.path());
        command
    };
    let mut command = as_user();
    command.args(guest.disk(&disk).option("--name", NAME).arguments());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut vm = Vm::spawn(&mut command)?;
    vm.expect("ozone-guest: ready\n", BOOT)?;
    let (code, text) = audit(&mut as_user(), &["--all"])?;
    println!("{text}");
    ensure!(code == 0, "exit code {code}:\n{text}");
    for promise in ["own user namespace", "own mount namespace", "an empty read-only root", "not dumpable"] {
        let holds = |line: &&str| line.contains(promise) && line.trim_start().starts_with("holds");
        ensure!(text.lines().filter(holds).count() == 3, "'{promise}' of the core, the disk and the console:\n{text}");
    }
    vm.power_off()
}

/// Root's machines have them where ordinary users may make none, and go without where nobody has any.
fn no_user_namespaces() -> Result<()> {
    let verdicts = |report: &Value, promise: &str| {
        let children = processes(report).iter().filter(|process| process["name"] != "ozone");
        let all = children.flat_map(|process| process["promises"].as_array().cloned().unwrap_or_default());
        let those = all.filter(|finding| finding["promise"] == promise);
        those.map(|finding| finding["verdict"].as_str().unwrap_or_default().to_owned()).collect::<Vec<_>>()
    };
    let guest = || Ok::<_, anyhow::Error>(Guest::new()?.option("--name", NAME));
    for (setting, value, verdict) in [
        ("/proc/sys/kernel/unprivileged_userns_clone", "0", "holds"),
        ("/proc/sys/user/max_user_namespaces", "0", "not-offered"),
    ] {
        fs::write(setting, value).context(setting)?;
        let mut vm = guest()?.boot()?;
        if verdict != "holds" {
            vm.expect_error("this host has no user namespaces for root's machines", ANSWER)?;
        }
        let report = expect_all_to_hold(&["ozone", "core", "console/console0"])?;
        for promise in ["own user namespace", "one uid in its user namespace"] {
            let found = verdicts(&report, promise);
            ensure!(found == [verdict, verdict], "{setting} = {value}: {promise}: {found:?}");
        }
        vm.power_off()?;
    }
    Ok(())
}

fn no_such_machine() -> Result<()> {
    let (code, text) = audit(&mut ozone(), &[])?;
    ensure!(code == 2 && text.contains("not running"), "exit code {code}: {text}");
    Ok(())
}
