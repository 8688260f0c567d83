//! Control groups: every process in its leaf from birth, limits that hold, and nothing left of them.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use agent::layout::ORDINARY_USER;
use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ozone_tests::harness::Test;
use ozone_tests::vm::{ANSWER, BOOT, Guest, Vm, executable};

use crate::kvm_device;
use crate::traces::Traces;

/// The tests of this file.
pub const TESTS: [Test; 15] = [
    Test::host("cgroup::every_process_is_in_its_leaf", every_process_is_in_its_leaf),
    Test::host("cgroup::a_leaf_outlives_an_incarnation", a_leaf_outlives_an_incarnation),
    Test::host("cgroup::limits_are_in_the_files", limits_are_in_the_files),
    Test::host("cgroup::a_numa_node_is_its_processors_and_memory", a_numa_node),
    Test::host("cgroup::pids_max_stops_a_thread", pids_max_stops_a_thread),
    Test::host("cgroup::cpu_max_holds_a_processor_back", cpu_max_holds_a_processor_back),
    Test::host("cgroup::memory_max_ends_the_machine_and_is_told", memory_max_ends_the_machine_and_is_told),
    Test::host("cgroup::a_given_parent_is_used_and_stays", a_given_parent_is_used_and_stays),
    Test::host("cgroup::a_delegated_group_is_used_and_left_as_it_was", a_delegated_group),
    Test::host("cgroup::a_container_is_the_machines_whole_world", a_container_is_the_machines_whole_world),
    Test::host("cgroup::an_ordinary_user_in_a_delegated_group", an_ordinary_user_in_a_delegated_group),
    Test::host("cgroup::an_ordinary_user_without_one_is_told", an_ordinary_user_without_one_is_told),
    Test::host("cgroup::what_cannot_be_is_refused_in_one_line", what_cannot_be_is_refused_in_one_line),
    Test::host("cgroup::a_failed_launch_leaves_no_group", a_failed_launch_leaves_no_group),
    Test::host("cgroup::what_a_killed_machine_left_gives_way", what_a_killed_machine_left_gives_way),
];

pub const MOUNT: &str = "/sys/fs/cgroup";

/// The path of a process's group below the mount, with a slash before it.
pub fn group_of(pid: i32) -> Result<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::")).with_context(|| format!("no group: {text}"))?;
    Ok(path.to_owned())
}

/// The group of each process of a machine, by its role.
fn groups(vm: &Vm) -> Result<BTreeMap<String, String>> {
    vm.processes()?.iter().map(|process| Ok((process.role.clone(), group_of(process.pid)?))).collect()
}

pub fn read(group: &str, file: &str) -> Result<String> {
    let path = format!("{MOUNT}{group}/{file}");
    Ok(fs::read_to_string(&path).context(path)?.trim().to_owned())
}

/// The number that stands after a word in a file of a group.
fn number(group: &str, file: &str, word: &str) -> Result<u64> {
    let text = read(group, file)?;
    let found = text.lines().find_map(|line| line.strip_prefix(word)?.strip_prefix(' '));
    Ok(found.with_context(|| format!("no {word} in {text}"))?.parse()?)
}

/// Waits until something is so: nothing of the kernel's tells of it.
pub fn until(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + ANSWER;
    while !is_so()? {
        if Instant::now() > deadline {
            bail!("awaited for {ANSWER:?}: {what}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn pid_of(vm: &Vm, role: &str) -> Result<i32> {
    let processes = vm.processes()?;
    Ok(processes.iter().find(|process| process.role == role).with_context(|| format!("no {role}"))?.pid)
}

pub fn ozone(words: &[&str]) -> Result<Output> {
    Command::new(executable("ozone")).args(words).output().context("run ozone")
}

/// What a process sees as its group: the path from the root of its namespace.
pub fn seen_by_itself(pid: i32) -> Result<String> {
    // In a thread of its own, which alone enters the namespace.
    let looked = std::thread::spawn(move || -> Result<String> {
        setns(fs::File::open(format!("/proc/{pid}/ns/cgroup"))?, CloneFlags::CLONE_NEWCGROUP).context("setns")?;
        group_of(pid)
    });
    looked.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?
}

fn every_process_is_in_its_leaf() -> Result<()> {
    let guest = Guest::new()?;
    let disk = guest.root_disk()?;
    let guest = guest.disk(&disk).option("--net", "host-ip=192.0.2.1/24").option("--name", "leaves");
    let before = Traces::of_this_host()?;
    let mut vm = guest.boot()?;
    // ozone joins the others when the guest runs.
    until("ozone in its leaf", || Ok(group_of(vm.pid())? == "/ozone/leaves/ozone"))?;
    let leaf = |role: &str, name: &str| (role.to_owned(), format!("/ozone/leaves/{name}"));
    let expected = BTreeMap::from([
        leaf("ozone", "ozone"),
        leaf("core", "jailed/core"),
        leaf("blk/disk0", "jailed/blk-disk0"),
        leaf("net/net0", "jailed/net-net0"),
        leaf("console/console0", "jailed/console-console0"),
    ]);
    ensure!(groups(&vm)? == expected, "{:#?} instead of {expected:#?}", groups(&vm)?);
    for (role, group) in groups(&vm)?.iter().filter(|(role, _)| *role != "ozone") {
        let pid = pid_of(&vm, role)?;
        ensure!(seen_by_itself(pid)? == "/", "{role} sees {}", seen_by_itself(pid)?);
        // Born there: nobody was ever moved into it, and its threads are counted.
        let (max, now): (u64, u64) = (read(group, "pids.max")?.parse()?, read(group, "pids.current")?.parse()?);
        ensure!((1..=max).contains(&now) && max <= 320, "{role}: {now} of {max} threads");
    }

    let output = ozone(&["stat", "leaves", "--json"])?;
    let stat: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(stat["memory"]["current"].as_u64() > Some(32 << 20), "the guest's memory counts: {stat:#}");
    ensure!(stat["processes"].as_array().map(Vec::len) == Some(5), "{stat:#}");
    let core = &stat["processes"][1];
    ensure!(core["process"] == "core" && core["cpu-usec"].as_u64() > Some(0), "{stat:#}");
    ensure!(core["pids"].as_u64() >= Some(2), "{stat:#}");
    let table = String::from_utf8(ozone(&["stat", "leaves"])?.stdout)?;
    println!("{table}");
    ensure!(table.starts_with("leaves: cpu ") && table.contains("\nblk/disk0 "), "{table}");

    vm.power_off()?;
    before.expect_again()
}

fn a_leaf_outlives_an_incarnation() -> Result<()> {
    let guest = Guest::new()?;
    let disk = guest.root_disk()?;
    let guest = guest.disk(&disk).option("--name", "again").option("--limit", "blk:pids.max=50");
    let before = Traces::of_this_host()?;
    let mut vm = guest.boot()?;
    let first = pid_of(&vm, "blk/disk0")?;
    let group = group_of(first)?;
    let used = number(&group, "cpu.stat", "usage_usec")?;
    kill(Pid::from_raw(first), Signal::SIGKILL)?;
    vm.expect_error("[blk/disk0] back after", ANSWER)?;
    let second = pid_of(&vm, "blk/disk0")?;
    ensure!(second != first && group_of(second)? == group, "{first} in {group}, {second} in {}", group_of(second)?);
    ensure!(seen_by_itself(second)? == "/", "it sees {}", seen_by_itself(second)?);
    ensure!(number(&group, "cpu.stat", "usage_usec")? >= used, "its account goes on");
    ensure!(read(&group, "pids.max")? == "50");
    vm.guest("echo works > /file && sync")?;
    vm.send_line("reboot -f")?;
    vm.expect("ozone-guest: ready\n", BOOT)?;
    ensure!(group_of(pid_of(&vm, "blk/disk0")?)? == group, "a reset changes nothing");
    vm.power_off()?;
    before.expect_again()
}

fn limits_are_in_the_files() -> Result<()> {
    let guest = Guest::new()?;
    let disk = guest.root_disk()?;
    let device = nix::sys::stat::stat("/dev/vda").map_or_else(|_| None, |it| Some(it.st_rdev));
    let mut guest = guest.disk(&disk).option("--name", "limited");
    for limit in [
        "memory.max=1G",
        "memory.high=900M",
        "memory.swap.max=0",
        "pids.max=500",
        "cpu.weight=50",
        "cpuset.cpus=0",
        "cpuset.mems=0",
        "core:cpu.max=90000 100000",
        "blk:pids.max=40",
        "blk/disk0:cpu.weight=20",
        "ozone:pids.max=5",
    ] {
        guest = guest.option("--limit", limit);
    }
    // A host without a block device has nothing to limit the rate of.
    let io = device.map(|it| format!("{}:{} rbps=1048576", nix::sys::stat::major(it), nix::sys::stat::minor(it)));
    if let Some(io) = &io {
        guest = guest.option("--limit", format!("blk:io.max={io}"));
    }
    let mut vm = guest.boot()?;
    let machine = "/ozone/limited";
    for (group, file, value) in [
        (format!("{machine}/jailed"), "memory.max", "1073741824"),
        (format!("{machine}/jailed"), "memory.high", "943718400"),
        (machine.to_owned(), "pids.max", "500"),
        (machine.to_owned(), "cpu.weight", "50"),
        (machine.to_owned(), "cpuset.cpus.effective", "0"),
        (machine.to_owned(), "cpuset.mems.effective", "0"),
        (format!("{machine}/jailed/core"), "cpu.max", "90000 100000"),
        (format!("{machine}/jailed/blk-disk0"), "pids.max", "40"),
        (format!("{machine}/jailed/blk-disk0"), "cpu.weight", "20"),
        (format!("{machine}/ozone"), "pids.max", "5"),
        (format!("{machine}/jailed/console-console0"), "pids.max", "16"),
    ] {
        ensure!(read(&group, file)? == value, "{group}/{file} is {}, not {value}", read(&group, file)?);
    }
    if let Some(io) = io {
        ensure!(read("/ozone/limited/jailed/blk-disk0", "io.max")?.starts_with(&io));
    }
    let status = fs::read_to_string(format!("/proc/{}/status", pid_of(&vm, "core")?))?;
    ensure!(status.lines().any(|line| line == "Cpus_allowed_list:\t0"), "{status}");
    vm.power_off()
}

fn a_numa_node() -> Result<()> {
    let processors = fs::read_to_string("/sys/devices/system/node/node0/cpulist").context("no NUMA in this host")?;
    let mut vm = Guest::new()?.option("--name", "near").option("--numa", "0").boot()?;
    ensure!(read("/ozone/near", "cpuset.cpus")? == processors.trim());
    ensure!(read("/ozone/near", "cpuset.mems")? == "0");
    vm.power_off()
}

fn pids_max_stops_a_thread() -> Result<()> {
    let before = Traces::of_this_host()?;
    let mut vm = Guest::new()?.option("--limit", "core:pids.max=1").start()?;
    ensure!(!vm.wait(BOOT)?.success(), "a core with one thread runs a guest");
    vm.expect_error("start the thread", ANSWER)?;
    vm.expect_error("Resource temporarily unavailable", ANSWER)?;
    before.expect_again()?;
    // And before it is born at all.
    let mut vm = Guest::new()?.option("--limit", "pids.max=1").start()?;
    vm.expect_exit(3, BOOT)?;
    vm.expect_error("clone3 into new namespaces: EAGAIN", ANSWER)?;
    vm.expect_error("pids.max of its cgroup", ANSWER)?;
    before.expect_again()
}

fn cpu_max_holds_a_processor_back() -> Result<()> {
    let guest = Guest::new()?.option("--name", "slow").option("--limit", "core:cpu.max=80000 100000");
    let mut vm = guest.boot()?;
    vm.send_line("while :; do :; done")?;
    let throttled = || number("/ozone/slow/jailed/core", "cpu.stat", "nr_throttled");
    let now = throttled()?;
    until("nr_throttled of the core", || Ok(throttled()? > now))?;
    let stat: serde_json::Value = serde_json::from_slice(&ozone(&["stat", "slow", "--json"])?.stdout)?;
    ensure!(stat["processes"][1]["throttled"].as_u64() > Some(0), "{stat:#}");
    vm.signal(Signal::SIGTERM)?;
    vm.expect_exit(143, ANSWER)
}

fn memory_max_ends_the_machine_and_is_told() -> Result<()> {
    let before = Traces::of_this_host()?;
    let record = tempfile::tempdir()?;
    let path = record.path().join("status.json");
    let with_directory = Traces::of_this_host()?;
    // With or without a device whose loss would be the end by itself: all but ozone are killed at once, and any of them may be
    // gone first.
    for keys in ["on-fail=stop-vm", "on-fail=wait"] {
        let guest = Guest::new()?.keys(keys).option("--limit", "memory.max=24M").option("--status-file", &path);
        let mut vm = guest.option("--limit", "memory.swap.max=0").start()?;
        vm.expect_exit(14, BOOT)?;
        vm.expect_error("the machine needed more memory than it may have", ANSWER)?;
        vm.expect_error("memory.max 25165824", ANSWER)?;
        let record: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
        ensure!(record["cause"] == "oom-kill" && record["exit-code"] == 14, "{record:#}");
        ensure!(record["memory"]["of"] == "cgroup", "{record:#}");
        ensure!(record["memory"]["peak-bytes"].as_u64() >= Some(16 << 20), "{record:#}");
        fs::remove_file(&path)?;
        with_directory.expect_again()?;
    }
    drop(record);
    before.expect_again()
}

/// A group made for a test, removed with it.
pub struct Made(pub PathBuf);

impl Made {
    /// Makes it.
    pub fn new(name: &str) -> Result<Self> {
        let path = Path::new(MOUNT).join(name);
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(Self(path))
    }

    /// One that belongs to the ordinary user, as a service manager would make it.
    pub fn of_user(name: &str) -> Result<Self> {
        let made = Self::new(name)?;
        fs::write(Path::new(MOUNT).join("cgroup.subtree_control"), "+memory +pids")?;
        for file in ["", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"] {
            std::os::unix::fs::chown(made.0.join(file), Some(ORDINARY_USER), Some(ORDINARY_USER))?;
        }
        Ok(made)
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

fn a_given_parent_is_used_and_stays() -> Result<()> {
    let parent = Made::new("tenants.slice")?;
    let before = Traces::of_this_host()?;
    for given in ["tenants.slice", "/sys/fs/cgroup/tenants.slice"] {
        let guest = Guest::new()?.option("--name", "a.b").option("--cgroup-parent", given);
        let mut vm = guest.option("--limit", "memory.max=1G").boot()?;
        ensure!(groups(&vm)?["core"] == "/tenants.slice/_a.b/jailed/core", "{:#?}", groups(&vm)?);
        vm.power_off()?;
        before.expect_again()?;
    }
    drop(parent);
    Ok(())
}

/// Starts a command in a group.
pub fn inside(command: &mut Command, group: &Path) -> Result<()> {
    let procs = fs::File::options().write(true).open(group.join("cgroup.procs"))?;
    // SAFETY: between fork and exec the child makes one system call, write(2), on a descriptor opened before.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(move || std::io::Write::write_all(&mut &procs, b"0"));
    }
    Ok(())
}

fn command(guest: &Guest) -> Command {
    let mut command = Command::new(executable("ozone"));
    command.args(guest.arguments()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn a_delegated_group() -> Result<()> {
    let made = Made::new("own.scope")?;
    let before = Traces::of_this_host()?;
    let mut command = command(&Guest::new()?.option("--name", "mine").option("--limit", "pids.max=600"));
    inside(&mut command, &made.0)?;
    let mut vm = Vm::spawn(&mut command)?;
    vm.expect("ozone-guest: ready\n", BOOT)?;
    ensure!(groups(&vm)?["ozone"] == "/own.scope/mine/ozone", "{:#?}", groups(&vm)?);
    ensure!(groups(&vm)?["core"] == "/own.scope/mine/jailed/core", "{:#?}", groups(&vm)?);
    vm.power_off()?;
    before.expect_again()?;
    ensure!(read("/own.scope", "cgroup.subtree_control")?.is_empty(), "it is not as it was");
    Ok(())
}

/// A container sees its group as the root, and `ozone` is alone in it.
fn a_container_is_the_machines_whole_world() -> Result<()> {
    let made = Made::new("container")?;
    let before = Traces::of_this_host()?;
    let mut command = command(&Guest::new()?.option("--name", "boxed").option("--limit", "memory.max=1G"));
    inside(&mut command, &made.0)?;
    // SAFETY: between fork and exec the child makes system calls only, with constants as their arguments.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(|| {
            unshare(CloneFlags::CLONE_NEWCGROUP | CloneFlags::CLONE_NEWNS)?;
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_PRIVATE | MsFlags::MS_REC, None::<&str>)?;
            umount2(MOUNT, MntFlags::MNT_DETACH)?;
            Ok(mount(Some("cgroup2"), MOUNT, Some("cgroup2"), MsFlags::empty(), None::<&str>)?)
        });
    }
    let mut vm = Vm::spawn(&mut command)?;
    vm.expect("ozone-guest: ready\n", BOOT)?;
    ensure!(groups(&vm)?["core"] == "/container/boxed/jailed/core", "{:#?}", groups(&vm)?);
    ensure!(read("/container/boxed/jailed", "memory.max")? == "1073741824");
    vm.power_off()?;
    before.expect_again()
}

fn an_ordinary_user_in_a_delegated_group() -> Result<()> {
    kvm_device::with_mode(0o666)?;
    let made = Made::of_user("user.scope")?;
    let before = Traces::of_this_host()?;
    let mut command = command(&Guest::new()?.option("--limit", "memory.max=1G"));
    inside(&mut command, &made.0)?;
    command.uid(ORDINARY_USER).gid(ORDINARY_USER);
    let mut vm = Vm::spawn(&mut command)?;
    vm.expect("ozone-guest: ready\n", BOOT)?;
    let machine = format!("/user.scope/vm-{}", vm.pid());
    ensure!(groups(&vm)?["core"] == format!("{machine}/jailed/core"), "{:#?}", groups(&vm)?);
    ensure!(read(&format!("{machine}/jailed"), "memory.max")? == "1073741824");
    ensure!(seen_by_itself(pid_of(&vm, "core")?)? == "/");
    vm.power_off()?;
    before.expect_again()
}

fn an_ordinary_user_without_one_is_told() -> Result<()> {
    kvm_device::with_mode(0o666)?;
    let mut plain = command(&Guest::new()?.init("poweroff"));
    let mut vm = Vm::spawn(plain.uid(ORDINARY_USER).gid(ORDINARY_USER))?;
    vm.expect_exit(0, BOOT)?;
    vm.expect_error("no cgroups: this user has no cgroup", ANSWER)?;
    let mut limited = command(&Guest::new()?.option("--limit", "pids.max=100"));
    let mut vm = Vm::spawn(limited.uid(ORDINARY_USER).gid(ORDINARY_USER))?;
    vm.expect_exit(3, ANSWER)?;
    vm.expect_error("--limit pids.max=100: this user has no cgroup", ANSWER)?;
    vm.expect_error("Delegate=yes", ANSWER)?;
    Ok(())
}

fn what_cannot_be_is_refused_in_one_line() -> Result<()> {
    let busy = Made::new("busy.scope")?;
    let mut sleeper = Command::new("sleep");
    sleeper.arg("1000");
    inside(&mut sleeper, &busy.0)?;
    let mut sleeper = sleeper.spawn()?;
    let before = Traces::of_this_host()?;
    let refused: [(&[&str], i32, &[&str]); 8] = [
        (&["--limit", "cpuset.cpus=0,77"], 2, &["--limit cpuset.cpus=0,77: ", "0,77"]),
        (&["--limit", "blk:memory.max=1G"], 2, &["--limit blk:memory.max=1G", "touches a page first"]),
        (&["--limit", "core:io.max=254:77 rbps=1"], 2, &["--limit core:io.max=254:77 rbps=1: ", "io.max", "lsblk"]),
        (&["--numa", "9"], 2, &["--numa 9: this host has no such NUMA node; it has 0"]),
        (&["--cgroup-parent", "no/such"], 2, &["--cgroup-parent no/such: ", "has to be a cgroup that exists"]),
        (&["--cgroup-parent", "cgroup.procs"], 2, &["--cgroup-parent cgroup.procs: ", "cgroup"]),
        (
            &["--cgroup-parent", "busy.scope", "--limit", "memory.max=1G"],
            3,
            &["--limit memory.max=1G: ", "controller memory", "/busy.scope/cgroup.subtree_control: ", "move them"],
        ),
        (&["--limit", "hugetlb.2MB.max=1"], 2, &["unknown key 'hugetlb.2MB.max'; the keys are cpu.max"]),
    ];
    for (words, code, parts) in refused {
        let guest = Guest::new()?.arguments();
        let output = Command::new(executable("ozone")).args(guest).args(words).stdin(Stdio::null()).output()?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(code), "{words:?} ended with {:?}: {errors}", output.status);
        let last = errors.lines().last().unwrap_or_default();
        for part in parts {
            ensure!(last.contains(part), "{words:?}: '{last}' lacks '{part}'");
        }
        before.expect_again().with_context(|| format!("{words:?}"))?;
    }
    sleeper.kill()?;
    sleeper.wait()?;
    Ok(())
}

fn a_failed_launch_leaves_no_group() -> Result<()> {
    let before = Traces::of_this_host()?;
    let garbage = tempfile::NamedTempFile::new()?;
    fs::write(garbage.path(), "no kernel")?;
    let path = garbage.path().display().to_string();
    let with_file = Traces::of_this_host()?;
    let output = ozone(&["run", "--kernel", &path, "--name", "never", "--limit", "memory.max=1G"])?;
    ensure!(output.status.code() == Some(2), "{:?}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    with_file.expect_again()?;
    drop(garbage);
    let mut vm = Guest::new()?.keys("on-fail=stop-vm").boot()?;
    kill(Pid::from_raw(pid_of(&vm, "console/console0")?), Signal::SIGKILL)?;
    vm.expect_exit(13, ANSWER)?;
    before.expect_again()
}

fn what_a_killed_machine_left_gives_way() -> Result<()> {
    let before = Traces::of_this_host()?;
    let guest = Guest::new()?.option("--name", "lost").option("--limit", "memory.max=1G");
    let mut vm = guest.boot()?;
    vm.signal(Signal::SIGKILL)?;
    ensure!(!vm.wait(ANSWER)?.success());
    ensure!(Path::new("/sys/fs/cgroup/ozone/lost/jailed/core").exists(), "nobody was left to remove it");
    let mut next = Guest::new()?.option("--name", "lost").boot()?;
    ensure!(read("/ozone/lost/jailed", "memory.max")? == "max", "the last one's limit holds");
    next.power_off()?;
    before.expect_again()
}
