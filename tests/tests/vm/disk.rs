//! Disks keep what was written, and refuse what they should.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use ozone_tests::harness::Test;
use ozone_tests::tool;
use ozone_tests::vm::{ANSWER, Guest};

/// The tests of this file.
pub const TESTS: [Test; 7] = [
    Test::host("disk::every_number_of_devices_boots", every_number_of_devices_boots),
    Test::host("disk::a_write_survives_a_second_boot", a_write_survives_a_second_boot),
    Test::host("disk::a_read_only_disk_refuses_writes", a_read_only_disk_refuses_writes),
    Test::host("disk::what_the_guest_writes_is_in_the_image", what_the_guest_writes_is_in_the_image),
    Test::host("disk::several_queues_carry_parallel_writes", several_queues_carry_parallel_writes),
    Test::host("disk::the_driver_can_be_unbound_and_bound_again", the_driver_can_be_unbound_and_bound_again),
    Test::host("disk::a_block_device_is_a_disk", a_block_device_is_a_disk),
];

fn a_write_survives_a_second_boot() -> Result<()> {
    let guest = Guest::new()?;
    let disk = guest.root_disk()?;
    let guest = guest.disk(&disk);
    let mut first = guest.boot()?;
    first.guest("head -c 1000000 /dev/urandom > /kept && sync && sha256sum /kept > /kept.sum && sync")?;
    first.power_off()?;
    let mut second = guest.boot()?;
    second.guest("sha256sum -c /kept.sum")?;
    second.power_off()
}

fn a_read_only_disk_refuses_writes() -> Result<()> {
    let guest = Guest::new()?;
    let disk = guest.root_disk()?;
    let before = fs::read(&disk)?;
    let option = format!("path={},readonly", disk.display());
    let mut vm = guest.option("--disk", option).boot()?;
    ensure!(vm.guest("cat /sys/block/vda/ro")?.trim() == "1");
    let (status, output) = vm.command("dd if=/dev/zero of=/dev/vda bs=4096 count=1 oflag=direct 2>&1", ANSWER)?;
    ensure!(status != 0, "a write was accepted: {output}");
    vm.guest("dd if=/dev/vda of=/dev/null bs=1M count=4")?;
    vm.power_off()?;
    ensure!(fs::read(&disk)? == before, "the image changed");
    Ok(())
}

fn what_the_guest_writes_is_in_the_image() -> Result<()> {
    const AT: u64 = 3 << 20;
    let image = tempfile::NamedTempFile::new()?;
    image.as_file().set_len(16 << 20)?;
    image.as_file().write_all_at(b"from the host", 0)?;
    let mut vm = Guest::new()?.option("--disk", format!("path={},id=data", image.path().display())).boot()?;
    ensure!(vm.guest("head -c 13 /dev/vda")? == "from the host");
    vm.guest(&format!("echo from the guest | dd of=/dev/vda bs=1 seek={AT} conv=fsync"))?;
    ensure!(vm.guest("cat /sys/block/vda/serial")?.trim() == "data");
    ensure!(vm.guest("cat /sys/block/vda/size")?.trim() == (16 * 2048).to_string());
    vm.power_off()?;
    let mut text = [0; 14];
    File::open(image.path())?.read_exact_at(&mut text, AT)?;
    ensure!(&text == b"from the guest", "{text:?}");
    Ok(())
}

/// Whatever interrupts the slots have, up to the last of the board.
fn every_number_of_devices_boots() -> Result<()> {
    // With the console 4 to 15, the interrupts of the first three being those of every other test.
    for count in [3, 7, 8, 9, 10, 14] {
        let images = (0..count).map(|_| tempfile::NamedTempFile::new()).collect::<Result<Vec<_>, _>>()?;
        let mut guest = Guest::new()?;
        for image in &images {
            image.as_file().set_len(1 << 20)?;
            guest = guest.option("--disk", format!("path={}", image.path().display()));
        }
        let mut vm = guest.boot().with_context(|| format!("{count} disks"))?;
        let read = "dd if=$disk of=/dev/null bs=4096 count=4 iflag=direct 2>/dev/null";
        vm.guest(&format!("(for disk in /dev/vd?; do {read} || exit 1; done)"))?;
        ensure!(vm.guest("ls /dev/vd? | wc -l")?.trim() == count.to_string(), "{count} disks");
        vm.power_off()?;
    }
    Ok(())
}

fn several_queues_carry_parallel_writes() -> Result<()> {
    let image = tempfile::NamedTempFile::new()?;
    image.as_file().set_len(64 << 20)?;
    let option = format!("path={},queues=2", image.path().display());
    let mut vm = Guest::new()?.option("--cpus", "2").option("--disk", option).boot()?;
    ensure!(vm.guest("ls /sys/block/vda/mq | wc -l")?.trim() == "2");
    vm.guest("head -c 8388608 /dev/urandom > /sample")?;
    let copies = (0..4).map(|part| {
        let (cpu, at) = (1 << (part % 2), part * 128);
        format!("taskset {cpu:x} dd if=/sample of=/dev/vda bs=64k seek={at} oflag=direct conv=notrunc 2>/dev/null &")
    });
    vm.guest(&format!("{} wait", copies.collect::<Vec<_>>().join(" ")))?;
    for part in 0..4 {
        let at = part * 128;
        vm.guest(&format!("dd if=/dev/vda bs=64k skip={at} count=128 iflag=direct 2>/dev/null | cmp - /sample"))?;
    }
    vm.power_off()
}

/// A reset stops the queues, and the same connection starts them again.
fn the_driver_can_be_unbound_and_bound_again() -> Result<()> {
    let guest = Guest::new()?;
    let disk = guest.root_disk()?;
    let mut vm = guest.option("--disk", format!("path={}", disk.display())).boot()?;
    let sum = vm.guest("sha256sum < /dev/vda")?;
    vm.guest("cd /sys/bus/virtio/drivers/virtio_blk && name=$(ls -d virtio*)")?;
    for _ in 0..5 {
        vm.guest("echo $name > unbind && echo $name > bind")?;
        vm.guest("echo 3 > /proc/sys/vm/drop_caches")?;
        ensure!(vm.guest("sha256sum < /dev/vda")? == sum);
    }
    vm.power_off()
}

fn a_block_device_is_a_disk() -> Result<()> {
    let guest = Guest::new()?;
    let disk = guest.root_disk()?;
    let device = tool::output(Command::new("losetup").arg("-f"))?;
    let device = device.trim();
    let attached = Command::new("losetup").arg(device).arg(&*disk).status().context("losetup")?;
    ensure!(attached.success(), "losetup {device}");
    let outcome = write_to(guest, device);
    let detached = Command::new("losetup").args(["-d", device]).status().context("losetup -d")?;
    outcome?;
    ensure!(detached.success(), "losetup -d {device}");
    Ok(())
}

fn write_to(guest: Guest, device: &str) -> Result<()> {
    let guest = guest.option("--disk", format!("path={device}")).append("root=/dev/vda");
    let mut first = guest.boot()?;
    first.guest("echo kept > /file && sync")?;
    first.power_off()?;
    let mut second = guest.boot()?;
    ensure!(second.guest("cat /file")? == "kept\n");
    second.power_off()
}
