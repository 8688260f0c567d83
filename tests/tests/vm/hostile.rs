//! Guests and backends that do not play by the rules.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ozone_tests::harness::Test;
use ozone_tests::vm::{ANSWER, Guest, Vm};

/// The tests of this file.
pub const TESTS: [Test; 3] = [
    Test::host("hostile::a_ring_outside_of_memory_needs_a_reset", a_ring_outside_of_memory_needs_a_reset),
    Test::host("hostile::a_backend_that_stops_is_hung_up_on", a_backend_that_stops_is_hung_up_on),
    Test::host("hostile::scribbling_over_every_register_ends_nothing", scribbling_over_every_register_ends_nothing),
];

/// A guest whose disk has no driver; its registers are at `$base`.
fn with_a_disk_for_the_taking() -> Result<(Vm, tempfile::TempPath)> {
    let guest = Guest::new()?;
    let disk = guest.root_disk()?;
    let mut vm = guest.option("--disk", format!("path={}", disk.display())).boot()?;
    vm.guest("name=$(readlink -f /sys/block/vda/device | cut -d/ -f5)")?;
    vm.guest("base=0x$(grep $name /proc/iomem | head -n 1 | cut -d- -f1 | tr -d ' ')")?;
    vm.guest("put() { devmem $((base + $1)) 32 $2; }; get() { devmem $((base + $1)) 32; }")?;
    vm.guest("driver() { echo $name > /sys/bus/platform/drivers/virtio-mmio/$1; }")?;
    vm.guest("driver unbind")?;
    ensure!(vm.guest("get 0")?.trim() == "0x74726976", "these are no virtio registers");
    Ok((vm, disk))
}

fn a_ring_outside_of_memory_needs_a_reset() -> Result<()> {
    let (mut vm, _disk) = with_a_disk_for_the_taking()?;
    // Reset, acknowledge, accept nothing but virtio 1, one queue of 16 with its rings at 508 GiB.
    vm.guest("put 0x70 0; put 0x70 3; put 0x24 1; put 0x20 1; put 0x70 0xb")?;
    vm.guest("put 0x30 0; put 0x38 16; put 0x84 0x7f; put 0x94 0x7f; put 0xa4 0x7f; put 0x44 1; put 0x70 0xf")?;
    vm.guest(
        "tries=0; until [ $(get 0x70) = 0x0000004F ] || [ $tries = 200 ]; do usleep 20000; tries=$((tries + 1)); done",
    )?;
    ensure!(vm.guest("get 0x70")?.trim() == "0x0000004F", "the device does not ask for a reset");
    vm.guest("put 0x70 0; [ $(get 0x70) = 0x00000000 ]")?;
    vm.guest("driver bind && dd if=/dev/vda of=/dev/null bs=4096 count=16 2>/dev/null")?;
    vm.power_off()
}

fn a_backend_that_stops_is_hung_up_on() -> Result<()> {
    let (mut vm, _disk) = with_a_disk_for_the_taking()?;
    let processes = vm.processes()?;
    let backend = processes.iter().find(|process| process.role.starts_with("blk")).context("no blk")?;
    kill(Pid::from_raw(backend.pid), Signal::SIGSTOP)?;
    vm.send_line("driver bind")?;
    vm.expect_error("lost: the core lost it: it did not answer within", ANSWER)?;
    // Its driver was set up without it, and the next one serves.
    vm.expect_error("back after", ANSWER)?;
    vm.guest("dd if=/dev/vda of=/dev/null bs=4096 count=16 2>/dev/null")?;
    vm.power_off()
}

/// Any value to any register, in any order, is at most the guest's own loss.
fn scribbling_over_every_register_ends_nothing() -> Result<()> {
    let (mut vm, _disk) = with_a_disk_for_the_taking()?;
    for value in ["0", "1", "0xf", "0xffffffff", "0x80000001"] {
        vm.guest(&format!(
            "for at in 0x14 0x20 0x24 0x30 0x38 0x44 0x50 0x64 0x70 0x80 0x84 0x90 0x94 0xa0 0xa4 0xac 0xc0 0xfc 0x100 0xf00; do put $at {value}; done"
        ))?;
    }
    vm.guest("put 0x70 0 && driver bind && dd if=/dev/vda of=/dev/null bs=4096 count=16 2>/dev/null")?;
    vm.power_off()
}
