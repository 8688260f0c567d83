//! What a user can ask for, and what a loss can be made to mean.

use std::time::Duration;

use anyhow::{Result, ensure};
use ozone_tests::harness::Test;
use ozone_tests::trial::{self, Disks, Medium};
use ozone_tests::vm::{ANSWER, BOOT, Guest, Vm};
use ozone_tests::{backends, control};

/// The tests of this file.
pub const TESTS: [Test; 5] = [
    Test::host("restart::devices_are_replaced_on_request", devices_are_replaced_on_request),
    Test::host("restart::a_machine_is_paused_and_resumed", a_machine_is_paused_and_resumed),
    Test::host("restart::a_loss_can_break_the_device", a_loss_can_break_the_device),
    Test::host("restart::a_loss_can_end_the_machine", a_loss_can_end_the_machine),
    Test::host("restart::a_held_image_and_a_draining_one_are_different", a_held_image_and_a_draining_one_are_different),
];

const NAME: &str = "restart";

fn devices_are_replaced_on_request() -> Result<()> {
    let disks = Disks::make(Medium::File)?;
    let mut vm = disks.give(Guest::new()?.option("--name", NAME), "id=disk0")?.boot()?;
    trial::start(&mut vm, "--depth 32")?;
    trial::await_writes(&mut vm, 200, BOOT)?;
    let before = control::status(NAME)?;
    for _ in 0..5 {
        control::command(&["restart", NAME, "disk0"])?;
    }
    let once = control::status(NAME)?;
    ensure!(once.device("disk0")?.restarts == 5, "{once:?}");
    ensure!(once.device("disk0")?.pid != before.device("disk0")?.pid, "the same process");
    ensure!(once.device("journal")?.restarts == 0 && once.device("console0")?.restarts == 0, "{once:?}");
    control::command(&["restart", NAME, "--all"])?;
    let after = control::status(NAME)?;
    for device in &after.devices {
        ensure!(device.state == "up" && device.pid != once.device(&device.id)?.pid, "{device:?}");
    }
    ensure!(after.core_pid == before.core_pid, "another core");
    let (text, code) = control::refused(&["restart", NAME, "disk9"])?;
    ensure!(code == 2 && text.contains("disk9"), "exit code {code}: {text}");
    let (text, code) = control::refused(&["restart", "nobody", "disk0"])?;
    ensure!(code == 2 && text.contains("nobody"), "exit code {code}: {text}");
    trial::await_writes(&mut vm, 200, BOOT)?;
    let found = trial::stop(&mut vm)?;
    ensure!(trial::complaints(&mut vm)?.is_empty(), "{:?}", trial::complaints(&mut vm)?);
    vm.power_off()?;
    trial::expect_clean(&found, &disks.check()?)
}

fn a_machine_is_paused_and_resumed() -> Result<()> {
    let disks = Disks::make(Medium::File)?;
    let mut vm = disks.give(Guest::new()?.option("--name", NAME), "id=disk0")?.boot()?;
    trial::start(&mut vm, "--depth 8")?;
    trial::await_writes(&mut vm, 200, BOOT)?;
    for _ in 0..3 {
        control::command(&["pause", NAME])?;
        let before = std::fs::read(disks.path())?;
        std::thread::sleep(Duration::from_millis(200));
        ensure!(std::fs::read(disks.path())? == before, "the disk was written to in a pause");
        control::command(&["resume", NAME])?;
        trial::await_writes(&mut vm, 100, BOOT)?;
    }
    let found = trial::stop(&mut vm)?;
    vm.power_off()?;
    trial::expect_clean(&found, &disks.check()?)
}

fn a_loss_can_break_the_device() -> Result<()> {
    let image = tempfile::NamedTempFile::new()?;
    image.as_file().set_len(16 << 20)?;
    let option = format!("path={},id=disk0,on-fail=needs-reset", image.path().display());
    let mut vm = Guest::new()?.option("--name", NAME).option("--disk", option).boot()?;
    vm.guest("driver=/sys/bus/virtio/drivers/virtio_blk; name=$(basename $(ls -d $driver/virtio*))")?;
    // The status register: DEVICE_NEEDS_RESET comes to what the driver had set.
    vm.guest("shown() { cat /sys/bus/virtio/devices/$name/status; }; [ $(shown) = 0x0000000f ]")?;
    backends::kill(vm.pid(), "blk/disk0")?;
    let back =
        |status: &control::Status| status.device("disk0").is_ok_and(|disk| disk.state == "up" && disk.restarts == 1);
    control::until(NAME, "the disk is back", back)?;
    ensure!(vm.guest("shown")?.trim() == "0x0000004f", "{}", vm.guest("shown")?);
    // Its driver does not reset a device of itself; a user does.
    vm.guest("echo $name > $driver/unbind && echo $name > $driver/bind && [ $(shown) = 0x0000000f ]")?;
    vm.guest("dd if=/dev/zero of=/dev/vda bs=4096 count=16 oflag=direct 2>/dev/null")?;
    vm.power_off()
}

fn a_loss_can_end_the_machine() -> Result<()> {
    let image = tempfile::NamedTempFile::new()?;
    image.as_file().set_len(16 << 20)?;
    let option = format!("path={},id=disk0,on-fail=stop-vm", image.path().display());
    let mut vm = Guest::new()?.option("--disk", option).boot()?;
    backends::kill(vm.pid(), "blk/disk0")?;
    vm.expect_exit(13, ANSWER)?;
    vm.expect_error("blk/disk0", ANSWER).map(drop)
}

/// A machine that only has the disk: whatever becomes of it is decided before the guest runs.
fn start(path: &str) -> Result<Vm> {
    Guest::new()?.init("poweroff").option("--disk", format!("path={path},direct,id=disk0")).start()
}

fn a_held_image_and_a_draining_one_are_different() -> Result<()> {
    // Longer than a new machine waits for what an earlier one began.
    let disks = Disks::make(Medium::Slow { delay: Duration::from_secs(16) })?;
    let path = disks.path().display().to_string();
    let option = format!("path={path},direct,id=disk0");
    let mut vm = Guest::new()?.option("--disk", option).start()?;
    vm.expect("ozone-guest: ready\n", BOOT)?;

    let mut second = start(&path)?;
    second.expect_exit(2, ANSWER)?;
    second.expect_error("held by another VM", ANSWER)?;

    vm.guest("dd if=/dev/zero of=/dev/vda bs=4096 count=1 oflag=direct 2>/dev/null &")?;
    vm.guest("until grep -q ' 1$' /sys/block/vda/inflight; do usleep 10000; done")?;
    // From the guest's queue to the device, which does not count what it holds back: nothing tells.
    std::thread::sleep(Duration::from_secs(1));
    vm.signal(nix::sys::signal::Signal::SIGKILL)?;
    vm.wait(ANSWER)?;
    let mut third = start(&path)?;
    third.wait(ANSWER)?;
    third.expect_error("draining", ANSWER)?;
    ensure!(!third.error_text().contains("held by another"), "{}", third.error_text());
    // Once that is over, the disk is as any.
    let mut fourth =
        Guest::new()?.init("poweroff").option("--disk", format!("path={path},id=disk0,readonly")).start()?;
    fourth.expect_exit(0, BOOT)
}
