//! Reads of a dead backend that are still under way in the host.

use std::time::Duration;

use anyhow::{Result, ensure};
use ozone_tests::harness::Test;
use ozone_tests::trial::{Disks, Medium};
use ozone_tests::vm::{ANSWER, BOOT, Guest};
use ozone_tests::{backends, control};

/// The tests of this file.
pub const TESTS: [Test; 1] =
    [Test::host("restart::a_late_read_never_reaches_reused_memory", a_late_read_never_reaches_reused_memory)];

const NAME: &str = "late";

/// How long a read takes.
const DELAY: Duration = Duration::from_secs(2);

/// A driver begins a read of a slow disk, whose backend is killed; then it resets the device and uses the memory for
/// something else. `restart` says whether a successor may be serving by then, and have begun the read again.
fn attempt(restart: &str) -> Result<()> {
    let disks = Disks::make(Medium::Slow { delay: DELAY })?;
    let option = format!("path={},direct,id=slow,restart={restart}", disks.path().display());
    // The tables of partitions are read at the boot, slowly.
    let mut vm = Guest::new()?.option("--name", NAME).option("--disk", option).programs(&["oracle"])?.boot()?;
    vm.guest("platform=$(readlink -f /sys/block/vda/device | cut -d/ -f5)")?;
    vm.guest("base=$(grep $platform /proc/iomem | head -n 1 | cut -d- -f1 | tr -d ' ')")?;
    vm.guest("echo $platform > /sys/bus/platform/drivers/virtio-mmio/unbind")?;
    for round in 0..2 {
        vm.send_line(&format!(
            "oracle late --registers 0x$base --watch {}",
            (DELAY + Duration::from_secs(1)).as_millis()
        ))?;
        vm.expect("oracle: in flight\n", ANSWER)?;
        backends::kill(vm.pid(), "blk/slow")?;
        if round == 1 && restart == "always" {
            control::all_up(NAME)?;
        }
        vm.send_line("now")?;
        let late: oracle::late::Late = vm.expect_json(BOOT)?;
        println!("restart={restart}, round {round}: {late:?}");
        ensure!(late.overwritten == 0, "a read reached memory that was not its own any more: {late:?}");
        ensure!(round > 0 || !late.answered, "the read was over before the reset: {late:?}");
        if restart == "never" {
            control::command(&["restart", NAME, "slow"])?;
        }
        control::all_up(NAME)?;
    }
    vm.power_off()
}

fn a_late_read_never_reaches_reused_memory() -> Result<()> {
    attempt("always")?;
    attempt("never")
}
