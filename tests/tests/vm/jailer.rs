//! `ozone jail` where there are control groups of the second version, on the kernel that hosts of machines have. What needs
//! neither is among the tests of the crate `ozone`.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

use agent::layout::{KVM_GROUP, ORDINARY_USER};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ozone_tests::harness::Test;
use ozone_tests::vm::executable;

use crate::cgroup::{MOUNT, Made, group_of, inside, ozone, read, seen_by_itself, until};
use crate::traces::Traces;

/// The tests of this file.
pub const TESTS: [Test; 8] = [
    Test::host("jailer::limits_are_in_the_files_of_its_own_group", limits_are_in_the_files_of_its_own_group),
    Test::host("jailer::files_of_cgroups_are_matched_by_their_whole_names", files_are_matched_by_their_whole_names),
    Test::host("jailer::memory_max_ends_the_program_and_is_told", memory_max_ends_the_program_and_is_told),
    Test::host("jailer::a_given_parent_is_used_and_stays", a_given_parent_is_used_and_stays),
    Test::host("jailer::what_a_killed_ozone_left_is_removed_by_its_name", what_a_killed_ozone_left_is_removed),
    Test::host("jailer::an_ordinary_user_in_a_delegated_group", an_ordinary_user_in_a_delegated_group),
    Test::host("jailer::the_kvm_device_is_a_source", the_kvm_device_is_a_source),
    Test::host("jailer::a_name_is_that_of_a_jail_and_of_a_machine", a_name_is_that_of_a_jail_and_of_a_machine),
];

/// Linked static, and of root.
const BUSYBOX: &str = "/bin/busybox";

const UID: &str = "1879111111";

/// The words of a jail with busybox in it, which is told these.
fn words<'a>(name: &'a str, options: &[&'a str], told: &[&'a str]) -> Vec<&'a str> {
    let base = ["jail", "--name", name, "--exec-file", BUSYBOX, "--uid", UID, "--gid", UID];
    [&base, options, &["--"], told].concat()
}

fn jail(name: &str, options: &[&str], told: &[&str]) -> Result<Output> {
    ozone(&words(name, options, told))
}

/// A program that runs in the background, and the first process of its jail.
struct Sleeper {
    first: i32,
    program: i32,
}

impl Sleeper {
    fn start(name: &str, options: &[&str]) -> Result<Self> {
        let output = jail(name, &[options, &["--daemonize"]].concat(), &["sleep", "1000"])?;
        Self::of(&output)
    }

    fn of(output: &Output) -> Result<Self> {
        ensure!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        let first: i32 = String::from_utf8_lossy(&output.stdout).trim().parse()?;
        let children = fs::read_to_string(format!("/proc/{first}/task/{first}/children"))?;
        let program = children.split_whitespace().next().context("no program")?.parse()?;
        Ok(Self { first, program })
    }

    /// The process that waits for it.
    fn ozone(&self) -> Result<i32> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.first))?;
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).context("no parent")?;
        Ok(parent.trim().parse()?)
    }

    fn end(self) -> Result<()> {
        Ok(kill(Pid::from_raw(self.first), Signal::SIGTERM)?)
    }
}

fn refused(output: &Output, code: i32, parts: &[&str]) -> Result<()> {
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(code) && errors.lines().count() == 1, "{:?}: {errors}", output.status);
    for part in parts {
        ensure!(errors.contains(part), "'{errors}' lacks '{part}'");
    }
    Ok(())
}

fn limits_are_in_the_files_of_its_own_group() -> Result<()> {
    let before = Traces::of_this_host()?;
    let options = [
        "--cgroup",
        "memory.max=64M",
        "--cgroup",
        "memory.swap.max=0",
        "--cgroup",
        "pids.max=20",
        "--cgroup",
        "cpu.max=50000",
        "--cgroup",
        "cpu.weight=50",
        "--cgroup",
        "memory.low=1048576",
        "--numa",
        "0",
        "--source",
        "/etc",
        "--source",
        "/dev/null:dev,rw",
    ];
    let sleeper = Sleeper::start("web.1", &options)?;
    let group = "/ozone/jail@web.1";
    for pid in [sleeper.first, sleeper.program] {
        ensure!(group_of(pid)? == format!("{group}/jailed/program"), "{}", group_of(pid)?);
        ensure!(seen_by_itself(pid)? == "/", "{}", seen_by_itself(pid)?);
    }
    for (file, value) in [("pids.max", "20"), ("cpu.max", "50000 100000"), ("cpu.weight", "50"), ("cpuset.mems", "0")] {
        ensure!(read(group, file)? == value, "{file}: {}", read(group, file)?);
    }
    ensure!(!read(group, "cpuset.cpus")?.is_empty());
    for (file, value) in [("memory.max", "67108864"), ("memory.swap.max", "0"), ("memory.low", "1048576")] {
        let found = read(&format!("{group}/jailed"), file)?;
        ensure!(found == value, "{file}: {found}");
    }
    let mounts = fs::read_to_string(format!("/proc/{}/mounts", sleeper.program))?;
    ensure!(
        mounts.lines().count() == 4 && mounts.lines().filter(|line| line.contains(" ro,")).count() == 3,
        "{mounts}"
    );
    sleeper.end()?;
    before.expect_again()
}

fn files_are_matched_by_their_whole_names() -> Result<()> {
    let before = Traces::of_this_host()?;
    for (setting, code, parts) in [
        // A part of cpuset's name, or with a part of another one's file.
        ("pu.max=1", 3, &["--cgroup pu.max=1", "controller pu cannot be enabled"][..]),
        ("cpus.max=1", 3, &["controller cpus cannot be enabled"]),
        ("memory.ma=1", 3, &["--cgroup memory.ma=1", "memory.ma", "this kernel lacks it"]),
        ("cpu.shares=1", 3, &["this kernel lacks it"]),
        ("cpuset.cpus=77", 2, &["--cgroup cpuset.cpus=77"]),
        ("cgroup.procs=1", 2, &["ozone's own to write"]),
        ("pids.max=0", 2, &["--cgroup pids.max=0"]),
    ] {
        refused(&jail("web1", &["--cgroup", setting], &["true"])?, code, parts).context(setting)?;
        before.expect_again().context(setting)?;
    }
    refused(&jail("web1", &["--numa", "9"], &["true"])?, 2, &["--numa 9", "it has 0"])?;
    // The first process is one too.
    refused(&jail("web1", &["--cgroup", "pids.max=1"], &["true"])?, 3, &["fork the program", "pids.max"])?;
    before.expect_again()
}

fn memory_max_ends_the_program_and_is_told() -> Result<()> {
    let before = Traces::of_this_host()?;
    let options = [
        "--cgroup",
        "memory.max=16M",
        "--cgroup",
        "memory.swap.max=0",
        "--source",
        "/dev/zero:dev,rw",
        "--source",
        "/dev/null:dev,rw",
    ];
    let output = jail("hungry", &options, &["dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1"])?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(128 + 9), "{:?}: {errors}", output.status);
    ensure!(errors.contains("the program needed more memory than it may have"), "{errors}");
    ensure!(errors.contains("memory.max 16777216") && errors.contains("hungry was ended by SIGKILL"), "{errors}");
    before.expect_again()
}

fn a_given_parent_is_used_and_stays() -> Result<()> {
    let _parent = Made::new("tenants.slice")?;
    let before = Traces::of_this_host()?;
    let sleeper = Sleeper::start("web1", &["--cgroup-parent", "tenants.slice", "--cgroup", "pids.max=9"])?;
    ensure!(group_of(sleeper.program)? == "/tenants.slice/jail@web1/jailed/program", "{}", group_of(sleeper.program)?);
    sleeper.end()?;
    before.expect_again()
}

fn what_a_killed_ozone_left_is_removed() -> Result<()> {
    let before = Traces::of_this_host()?;
    let group = Path::new(MOUNT).join("ozone/jail@lost/jailed/program");
    let killed = || -> Result<()> {
        let sleeper = Sleeper::start("lost", &["--cgroup", "pids.max=9"])?;
        kill(Pid::from_raw(sleeper.ozone()?), Signal::SIGKILL)?;
        until("the end of the program", || Ok(!Path::new(&format!("/proc/{}", sleeper.program)).exists()))?;
        ensure!(group.exists() && Path::new("/run/ozone/jails/lost").exists(), "nobody was left to remove it");
        Ok(())
    };
    killed()?;
    for _ in 0..2 {
        let output = ozone(&["jail", "--clean-resource", "--name", "lost"])?;
        ensure!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        before.expect_again()?;
    }
    killed()?;
    ensure!(jail("lost", &[], &["true"])?.status.success(), "the next of the name takes over");
    before.expect_again()
}

fn an_ordinary_user_in_a_delegated_group() -> Result<()> {
    let made = Made::new("user.scope")?;
    fs::write(Path::new(MOUNT).join("cgroup.subtree_control"), "+memory +pids")?;
    for file in ["", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"] {
        std::os::unix::fs::chown(made.0.join(file), Some(ORDINARY_USER), Some(ORDINARY_USER))?;
    }
    let runtime = tempfile::tempdir()?;
    std::os::unix::fs::chown(runtime.path(), Some(ORDINARY_USER), Some(ORDINARY_USER))?;
    let before = Traces::of_this_host()?;
    let id = ORDINARY_USER.to_string();
    let base = ["jail", "--name", "mine", "--exec-file", BUSYBOX, "--uid", &id, "--gid", &id];
    let command = |rest: &[&str]| {
        let mut command = Command::new(executable("ozone"));
        command.args(base).args(rest).env("XDG_RUNTIME_DIR", runtime.path()).uid(ORDINARY_USER).gid(ORDINARY_USER);
        command
    };
    let options = ["--cgroup", "memory.max=64M", "--source", "/etc", "--daemonize", "--", "sleep", "1000"];
    refused(&command(&options).output()?, 3, &["--cgroup memory.max=64M: this user has no cgroup", "Delegate=yes"])?;
    let mut delegated = command(&options);
    inside(&mut delegated, &made.0)?;
    let sleeper = Sleeper::of(&delegated.output()?)?;
    ensure!(group_of(sleeper.program)? == "/user.scope/jail@mine/jailed/program", "{}", group_of(sleeper.program)?);
    ensure!(read("/user.scope/jail@mine/jailed", "memory.max")? == "67108864");
    let mounts = fs::read_to_string(format!("/proc/{}/mounts", sleeper.program))?;
    ensure!(mounts.lines().count() == 3 && mounts.lines().all(|line| line.contains(" ro,")), "{mounts}");
    sleeper.end()?;
    before.expect_again()
}

fn the_kvm_device_is_a_source() -> Result<()> {
    let before = Traces::of_this_host()?;
    let gid = KVM_GROUP.to_string();
    let open = |gid: &str, options: &[&str]| {
        let base = ["jail", "--name", "vmm", "--exec-file", BUSYBOX, "--uid", UID, "--gid", gid];
        ozone(&[&base, options, &["--", "sh", "-c", ": <>/dev/kvm"]].concat())
    };
    ensure!(open(&gid, &["--source", "/dev/kvm:dev,rw"])?.status.success());
    ensure!(!open(UID, &["--source", "/dev/kvm:dev,rw"])?.status.success(), "its mode is that of the host");
    ensure!(!open(&gid, &[])?.status.success(), "it is there without having been asked for");
    refused(&open(&gid, &["--source", "/dev/kvm"])?, 2, &["it is a device", "add the key dev"])?;
    before.expect_again()
}

fn a_name_is_that_of_a_jail_and_of_a_machine() -> Result<()> {
    let before = Traces::of_this_host()?;
    let mut vm = ozone_tests::vm::Guest::new()?.option("--name", "web1").boot()?;
    let sleeper = Sleeper::start("web1", &["--cgroup", "pids.max=9"])?;
    ensure!(group_of(sleeper.program)? == "/ozone/jail@web1/jailed/program");
    sleeper.end()?;
    vm.power_off()?;
    before.expect_again()
}
