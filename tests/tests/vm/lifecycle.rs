//! How machines end, and that nothing of them is left.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ozone_tests::harness::Test;
use ozone_tests::process_table::Process;
use ozone_tests::tool;
use ozone_tests::vm::{ANSWER, BOOT, Guest, OPEN_POWER_BUTTON, Vm, executable};

use crate::traces::Traces;

/// The tests of this file.
pub const TESTS: [Test; 11] = [
    Test::host("lifecycle::a_guest_that_powers_off_ends_with_0", a_guest_that_powers_off_ends_with_0),
    Test::host("lifecycle::a_guest_that_reboots_boots_again", a_guest_that_reboots_boots_again),
    Test::host("lifecycle::without_reboot_a_reset_is_the_end", without_reboot_a_reset_is_the_end),
    Test::host("lifecycle::a_guest_kernel_panic_has_its_own_code", a_guest_kernel_panic_has_its_own_code),
    Test::host("lifecycle::the_power_button_reaches_the_guest", the_power_button_reaches_the_guest),
    Test::host("lifecycle::two_vms_run_side_by_side", two_vms_run_side_by_side),
    Test::host("lifecycle::a_signal_tears_everything_down", a_signal_tears_everything_down),
    Test::host("lifecycle::a_killed_core_leaves_nothing", a_killed_core_leaves_nothing),
    Test::host("lifecycle::a_killed_backend_leaves_nothing", a_killed_backend_leaves_nothing),
    Test::host("lifecycle::a_killed_ozone_takes_its_children_along", a_killed_ozone_takes_its_children_along),
    Test::host("lifecycle::memory_of_a_vm_beside_its_guests", memory_of_a_vm_beside_its_guests),
];

fn with_every_device() -> Result<(Guest, tempfile::TempPath)> {
    let guest = Guest::new()?;
    let disk = guest.root_disk()?;
    let guest = guest.disk(&disk).option("--net", "host-ip=192.0.2.1/24");
    Ok((guest, disk))
}

fn find(vm: &Vm, role: &str) -> Result<Process> {
    let processes = vm.processes()?;
    let roles: Vec<_> = processes.iter().map(|process| process.role.clone()).collect();
    let found = processes.into_iter().find(|process| process.role.starts_with(role));
    found.with_context(|| format!("no '{role}' among {roles:?}"))
}

fn a_guest_that_powers_off_ends_with_0() -> Result<()> {
    let (guest, _disk) = with_every_device()?;
    let before = Traces::of_this_host()?;
    let mut vm = guest.boot()?;
    vm.power_off()?;
    vm.expect_error("switched itself off", ANSWER)?;
    before.expect_again()
}

fn a_guest_that_reboots_boots_again() -> Result<()> {
    let (guest, _disk) = with_every_device()?;
    let before = Traces::of_this_host()?;
    let mut vm = guest.boot()?;
    let core = find(&vm, "core")?.pid;
    vm.guest("echo kept > /file && sync")?;
    for _ in 0..2 {
        vm.send_line("reboot -f")?;
        vm.expect("ozone-guest: ready\n", BOOT)?;
        ensure!(vm.guest("cat /file")? == "kept\n");
    }
    ensure!(find(&vm, "core")?.pid != core, "a reboot is a new launch");
    vm.power_off()?;
    before.expect_again()
}

fn without_reboot_a_reset_is_the_end() -> Result<()> {
    let mut arguments = Guest::new()?.init("reboot").arguments();
    arguments.push("--no-reboot".into());
    let mut vm = Vm::start(arguments)?;
    vm.expect_exit(0, BOOT)
}

fn a_guest_kernel_panic_has_its_own_code() -> Result<()> {
    let before = Traces::of_this_host()?;
    let mut vm = Guest::new()?.init("panic").start()?;
    vm.expect_exit(10, BOOT)?;
    vm.expect_error("panic", ANSWER)?;
    before.expect_again()
}

/// SIGPWR to ozone is a press on the guest's power button.
fn the_power_button_reaches_the_guest() -> Result<()> {
    let mut vm = Guest::new()?.boot()?;
    vm.guest("cat /proc/bus/input/devices | grep -q 'Power Button'")?;
    vm.guest(OPEN_POWER_BUTTON)?;
    vm.send_line("dd bs=24 count=1 <&3 > /pressed 2> /errors && [ -s /pressed ] && echo button-pressed")?;
    ensure!(vm.expect("button-pressed", Duration::from_secs(1)).is_err(), "pressed before it was");
    vm.signal(Signal::SIGPWR)?;
    vm.expect("button-pressed", ANSWER)?;
    vm.power_off()
}

fn two_vms_run_side_by_side() -> Result<()> {
    let before = Traces::of_this_host()?;
    let mut vms = [Guest::new()?.start()?, Guest::new()?.start()?];
    for vm in &mut vms {
        vm.expect("ozone-guest: ready\n", BOOT)?;
    }
    let mut users = BTreeSet::new();
    for vm in &vms {
        for process in vm.processes()?.iter().filter(|process| process.pid != vm.pid()) {
            ensure!(users.insert(process.uid), "{} shares user {}", process.role, process.uid);
        }
    }
    let [first, second] = &mut vms;
    first.power_off()?;
    ensure!(second.guest("echo alive")? == "alive\n");
    second.power_off()?;
    before.expect_again()
}

fn a_signal_tears_everything_down() -> Result<()> {
    let (guest, _disk) = with_every_device()?;
    let before = Traces::of_this_host()?;
    for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130), (Signal::SIGHUP, 129)] {
        let mut vm = guest.boot()?;
        vm.signal(signal)?;
        vm.expect_exit(code, ANSWER)?;
        before.expect_again().with_context(|| format!("after {signal}"))?;
    }
    Ok(())
}

fn killed(role: &str, code: i32) -> Result<()> {
    let (guest, _disk) = with_every_device()?;
    let guest = guest.keys("on-fail=stop-vm");
    let before = Traces::of_this_host()?;
    let mut vm = guest.boot()?;
    kill(Pid::from_raw(find(&vm, role)?.pid), Signal::SIGKILL)?;
    vm.expect_exit(code, ANSWER)?;
    vm.expect_error(role, ANSWER)?;
    before.expect_again()
}

fn a_killed_core_leaves_nothing() -> Result<()> {
    killed("core", 12)
}

fn a_killed_backend_leaves_nothing() -> Result<()> {
    for role in ["blk", "net", "console"] {
        killed(role, 13).with_context(|| format!("kill -9 of {role}"))?;
    }
    Ok(())
}

/// Nothing of a machine outlives its `ozone` but names of files and empty control groups, which no process is left to remove:
/// see docs/decisions/0005. `ozone gc` does, and leaves a machine that runs alone.
fn a_killed_ozone_takes_its_children_along() -> Result<()> {
    let (guest, _disk) = with_every_device()?;
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("console.sock").display().to_string();
    let console = format!("socket={socket}");
    let guest = guest.option("--console", &console);
    let before = Traces::of_this_host()?;
    let mut vm = guest.boot()?;
    vm.signal(Signal::SIGKILL)?;
    ensure!(!vm.wait(ANSWER)?.success());
    let mut but_for_files = before.clone();
    let own = format!("/run/ozone/machines/_{}", vm.pid());
    but_for_files.files.extend(["", "/uids.lock", "/machines"].map(|name| format!("/run/ozone{name}")));
    but_for_files.files.extend([format!("{own}/journal"), own, socket]);
    let group = format!("/sys/fs/cgroup/ozone/vm-{}", vm.pid());
    let leaves = ["core", "blk-disk0", "net-net0", "console-console0", "console-console1"];
    but_for_files.files.extend(leaves.map(|leaf| format!("{group}/jailed/{leaf}")));
    but_for_files.files.extend(["ozone", "jailed"].map(|name| format!("{group}/{name}")));
    but_for_files.files.extend(["/sys/fs/cgroup/ozone".to_owned(), group.clone()]);
    but_for_files.expect_again()?;

    // Another one runs meanwhile, on the same socket, and is not disturbed.
    let mut next = Guest::new()?.option("--name", "next").option("--console", &console).boot()?;
    let said = tool::output(Command::new(executable("ozone")).arg("gc"))?;
    ensure!(said.contains("removed directory /run/ozone/machines/_") && !said.contains("next"), "{said}");
    ensure!(!Path::new(&group).exists() && next.guest("echo alive")? == "alive\n");
    next.power_off()?;
    before.expect_again()
}

/// What a machine costs beside its guest's memory; shown, and bounded only against accidents.
fn memory_of_a_vm_beside_its_guests() -> Result<()> {
    let (guest, _disk) = with_every_device()?;
    let mut vm = guest.boot()?;
    let processes = vm.processes()?;
    for process in &processes {
        println!("{}: {} KiB private", process.role, process.private_kib);
        ensure!(process.private_kib < 64 << 10, "{} has {} KiB", process.role, process.private_kib);
    }
    println!("together: {} KiB", processes.iter().map(|process| process.private_kib).sum::<u64>());
    vm.power_off()
}
