//! What the processes of a machine have, read from /proc while it runs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use agent::layout::ORDINARY_USER;
use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use ozone_tests::harness::Test;
use ozone_tests::process_table::{Process, broken_promises, table};
use ozone_tests::vm::{ANSWER, BOOT, Guest, Vm, executable};

use crate::kvm_device;
use crate::traces::Traces;

/// The tests of this file.
pub const TESTS: [Test; 4] = [
    Test::host("jail::every_process_keeps_its_promises", every_process_keeps_its_promises),
    Test::host(
        "jail::leaked_descriptors_and_environment_stay_outside",
        leaked_descriptors_and_environment_stay_outside,
    ),
    Test::host("jail::children_have_an_empty_root_and_no_core_dumps", children_have_an_empty_root_and_no_core_dumps),
    Test::host("jail::an_ordinary_user_runs_a_machine_with_one_uid", an_ordinary_user_runs_a_machine_with_one_uid),
];

fn guest() -> Result<(Guest, tempfile::TempPath)> {
    let guest = Guest::new()?;
    let disk = guest.root_disk()?;
    let guest = guest.disk(&disk).option("--net", "host-ip=192.0.2.1/24");
    Ok((guest, disk))
}

fn every_process_keeps_its_promises() -> Result<()> {
    let (guest, _disk) = guest()?;
    let mut vm = guest.boot()?;
    let processes = vm.processes()?;
    println!("{}", table(&processes));
    let roles: BTreeSet<&str> = processes.iter().map(|process| process.role.as_str()).collect();
    let expected = ["ozone", "core", "blk/disk0", "net/net0", "console/console0"];
    ensure!(processes.len() == 5 && roles == BTreeSet::from(expected), "not {expected:?}:\n{}", table(&processes));
    let broken = broken_promises(&processes, vm.pid());
    ensure!(broken.is_empty(), "{broken:#?}");
    for process in processes.iter().filter(|process| process.pid != vm.pid()) {
        every_thread_is_confined(process)?;
        ensure!(!process.descriptors.contains_key("kvm") || process.role == "core", "{} holds /dev/kvm", process.role);
    }
    vm.power_off()
}

/// Every thread has the filter of `ozone`, three of the launcher, that of set-up, and the last, which is its role's or, in the
/// core, its own.
fn every_thread_is_confined(process: &Process) -> Result<()> {
    for task in fs::read_dir(format!("/proc/{}/task", process.pid))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.map(str::trim).with_context(|| format!("no {name} in a thread's status"))
        };
        let (name, filters) = (field("Name")?, field("Seccomp_filters")?);
        ensure!(filters == "6", "the thread '{name}' of {} has {filters} filters", process.role);
    }
    Ok(())
}

fn descriptors_of(guest: &Guest) -> Result<BTreeMap<String, BTreeMap<String, u32>>> {
    let mut vm = guest.boot()?;
    let ozone = vm.pid();
    let processes = vm.processes()?;
    for process in processes.iter().filter(|process| process.pid != ozone) {
        let environment = fs::read(format!("/proc/{}/environ", process.pid)).context("environ")?;
        ensure!(environment.is_empty(), "{} has an environment: {environment:?}", process.role);
    }
    vm.power_off()?;
    let children = processes.into_iter().filter(|process| process.pid != ozone);
    Ok(children.map(|process| (process.role, process.descriptors)).collect())
}

fn leaked_descriptors_and_environment_stay_outside() -> Result<()> {
    let (guest, _disk) = guest()?;
    let declared = descriptors_of(&guest)?;
    let leaked: Vec<File> = (0..200).map(|_| File::open("/etc/passwd")).collect::<Result<_, _>>()?;
    for file in &leaked {
        fcntl(file, FcntlArg::F_SETFD(FdFlag::empty()))?;
        ensure!(file.as_raw_fd() > 2);
    }
    let with_leaks = descriptors_of(&guest)?;
    ensure!(declared == with_leaks, "without leaks {declared:#?}\nwith 200 {with_leaks:#?}");
    Ok(())
}

fn children_have_an_empty_root_and_no_core_dumps() -> Result<()> {
    let (guest, _disk) = guest()?;
    let mut vm = guest.boot()?;
    for process in vm.processes()?.iter().filter(|process| process.pid != vm.pid()) {
        let directory = format!("/proc/{}", process.pid);
        let root: Vec<_> = fs::read_dir(format!("{directory}/root"))?.collect();
        ensure!(root.is_empty(), "{} sees {root:?}", process.role);
        let mounts = fs::read_to_string(format!("{directory}/mounts"))?;
        ensure!(mounts.lines().count() == 1, "{} has mounts:\n{mounts}", process.role);
        let options = mounts.split_whitespace().nth(3).context("mount options")?;
        for option in ["ro", "nosuid", "nodev", "noexec"] {
            ensure!(options.split(',').any(|it| it == option), "{}'s root is {options}", process.role);
        }
        // A process that may not be dumped belongs to root in /proc: not even its own user reads its memory there.
        let owner = fs::metadata(format!("{directory}/environ"))?.uid();
        ensure!(owner == 0 && process.uid != 0, "{} can be dumped: its files in /proc are {owner}'s", process.role);
        let limits = fs::read_to_string(format!("{directory}/limits"))?;
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).context("limits")?;
        ensure!(core.split_whitespace().nth(4) == Some("0"), "{}: {core}", process.role);
    }
    vm.power_off()
}

fn an_ordinary_user_runs_a_machine_with_one_uid() -> Result<()> {
    kvm_device::with_mode(0o666)?;
    let guest = Guest::new()?;
    let disk = guest.root_disk()?;
    chown(&disk, Some(ORDINARY_USER), Some(ORDINARY_USER))?;
    let before = Traces::of_this_host()?;
    let mut command = Command::new(executable("ozone"));
    command.args(guest.disk(&disk).arguments()).uid(ORDINARY_USER).gid(ORDINARY_USER);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut vm = Vm::spawn(&mut command)?;
    vm.expect_error(
        &format!("every process runs as uid {ORDINARY_USER}, each in a user namespace of its own"),
        ANSWER,
    )?;
    vm.expect("ozone-guest: ready\n", BOOT)?;
    let processes = vm.processes()?;
    ensure!(processes.len() == 4, "ozone, core, blk and console:\n{}", table(&processes));
    ensure!(processes.iter().all(|process| process.uid == ORDINARY_USER), "{}", table(&processes));
    for process in processes.iter().filter(|process| process.pid != vm.pid()) {
        let own = process.own_namespaces.iter().any(|name| name == "user");
        ensure!(own, "{} has no user namespace of its own", process.role);
    }
    // Of the promises, only that of a uid of its own cannot be kept.
    let broken = broken_promises(&processes, vm.pid());
    ensure!(broken.iter().all(|promise| promise.contains("user id")), "{broken:#?}");
    vm.power_off()?;
    before.expect_again()
}
