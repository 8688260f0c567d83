//! What a guest does to a device whose backend is away.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ozone_tests::harness::Test;
use ozone_tests::trial::{self, Disks, Medium};
use ozone_tests::vm::{ANSWER, BOOT, Guest, Vm};
use ozone_tests::{backends, control};

/// The tests of this file.
pub const TESTS: [Test; 5] = [
    Test::host("restart::a_driver_can_be_unbound_and_bound_meanwhile", a_driver_can_be_unbound_and_bound_meanwhile),
    Test::host("restart::a_guest_can_power_off_meanwhile", a_guest_can_power_off_meanwhile),
    Test::host("restart::a_guest_can_reboot_meanwhile", a_guest_can_reboot_meanwhile),
    Test::host("restart::a_machine_can_be_paused_meanwhile", a_machine_can_be_paused_meanwhile),
    Test::host("restart::a_backend_lost_in_a_pause_comes_back_stopped", a_backend_lost_in_a_pause_comes_back_stopped),
];

const NAME: &str = "restart";
const DISK: &str = "blk/disk0";

/// A guest whose disk's backend stays away until it is asked for, and its image.
fn with_a_patient_disk() -> Result<(Guest, tempfile::NamedTempFile)> {
    let image = tempfile::NamedTempFile::new()?;
    image.as_file().set_len(16 << 20)?;
    let option = format!("path={},id=disk0,restart=never,on-fail=wait", image.path().display());
    Ok((Guest::new()?.option("--name", NAME).option("--disk", option), image))
}

/// Kills the disk's backend, and waits until all that it began is over.
fn send_away(vm: &Vm) -> Result<()> {
    backends::kill(vm.pid(), DISK)?;
    let away = |status: &control::Status| status.device("disk0").is_ok_and(|disk| disk.state == "away");
    control::until(NAME, "the disk is away", away).map(drop)
}

fn a_driver_can_be_unbound_and_bound_meanwhile() -> Result<()> {
    let (guest, _image) = with_a_patient_disk()?;
    let mut vm = guest.boot()?;
    vm.guest("dd if=/dev/urandom of=/sample bs=64k count=16 && dd if=/sample of=/dev/vda bs=64k oflag=direct")?;
    vm.guest("driver=/sys/bus/virtio/drivers/virtio_blk; name=$(basename $(ls -d $driver/virtio*))")?;
    for round in 0..2 {
        send_away(&vm)?;
        // A reset is answered although nobody serves the device.
        vm.guest("echo $name > $driver/unbind && [ ! -e /sys/block/vda ]").with_context(|| format!("round {round}"))?;
        // The driver reads the partition table, for which it has to wait.
        vm.guest("(echo $name > $driver/bind; echo bound > /bound) &")?;
        control::command(&["restart", NAME, "disk0"])?;
        vm.guest("wait; [ $(cat /bound) = bound ] && rm /bound")?;
        vm.guest("dd if=/dev/vda bs=64k count=16 iflag=direct 2>/dev/null | cmp - /sample")?;
    }
    ensure!(trial::complaints(&mut vm)?.is_empty(), "{:?}", trial::complaints(&mut vm)?);
    vm.power_off()
}

fn a_guest_can_power_off_meanwhile() -> Result<()> {
    let (guest, _image) = with_a_patient_disk()?;
    let mut vm = guest.boot()?;
    send_away(&vm)?;
    vm.send_line("poweroff -f")?;
    vm.expect_exit(0, ANSWER)
}

fn a_guest_can_reboot_meanwhile() -> Result<()> {
    let (guest, _image) = with_a_patient_disk()?;
    let mut vm = guest.boot()?;
    let core = control::status(NAME)?.core_pid;
    vm.guest("echo kept | dd of=/dev/vda bs=512 conv=sync oflag=direct 2>/dev/null")?;
    send_away(&vm)?;
    vm.send_line("reboot -f")?;
    vm.expect("ozone-guest: ready\n", BOOT)?;
    ensure!(vm.guest("head -n 1 /dev/vda")? == "kept\n");
    ensure!(control::all_up(NAME)?.core_pid != core, "a reboot is a new launch");
    vm.power_off()
}

fn a_machine_can_be_paused_meanwhile() -> Result<()> {
    let (guest, _image) = with_a_patient_disk()?;
    let mut vm = guest.boot()?;
    send_away(&vm)?;
    vm.guest("(head -c 4096 /dev/vda | wc -c > /read) &")?;
    control::command(&["pause", NAME])?;
    ensure!(control::status(NAME)?.state == "paused");
    control::command(&["resume", NAME])?;
    ensure!(vm.guest("echo alive; [ ! -s /read ] || cat /read")? == "alive\n", "somebody answered the read");
    control::command(&["restart", NAME, "disk0"])?;
    ensure!(vm.guest("wait; cat /read")?.trim() == "4096");
    vm.power_off()
}

/// Whatever was in flight is carried out once the machine goes on, and not a moment before.
fn a_backend_lost_in_a_pause_comes_back_stopped() -> Result<()> {
    let disks = Disks::make(Medium::File)?;
    let mut vm = disks.give(Guest::new()?.option("--name", NAME), "id=disk0")?.boot()?;
    trial::start(&mut vm, "--depth 32")?;
    trial::await_writes(&mut vm, 500, BOOT)?;
    for _ in 0..3 {
        control::command(&["pause", NAME])?;
        let before = control::status(NAME)?.device("disk0")?.restarts;
        backends::kill(vm.pid(), DISK)?;
        let back = |status: &control::Status| {
            status.device("disk0").is_ok_and(|disk| disk.state == "up" && disk.restarts == before + 1)
        };
        let status = control::until(NAME, "the disk is back", back)?;
        ensure!(status.state == "paused", "{status:?}");
        let image = std::fs::read(disks.path())?;
        std::thread::sleep(Duration::from_millis(300));
        ensure!(std::fs::read(disks.path())? == image, "the disk was written to in a pause");
        control::command(&["resume", NAME])?;
        trial::await_writes(&mut vm, 100, BOOT)?;
    }
    let found = trial::stop(&mut vm)?;
    ensure!(trial::complaints(&mut vm)?.is_empty(), "{:?}", trial::complaints(&mut vm)?);
    vm.power_off()?;
    trial::expect_clean(&found, &disks.check()?)
}
