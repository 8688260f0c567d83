//! Stock Debian kernels boot, with any number of vCPUs and any size of memory.

use anyhow::{Context, Result, ensure};
use ozone_tests::harness::Test;
use ozone_tests::vm::{BOOT, Guest, Vm};

/// The tests of this file.
pub const TESTS: [Test; 10] = [
    Test::host("boot::a_bzimage_of_6_1", a_bzimage_of_6_1),
    Test::host("boot::a_bzimage_of_6_12", a_bzimage_of_6_12),
    Test::host("boot::an_elf_kernel", an_elf_kernel),
    Test::host("boot::one_cpu", one_cpu),
    Test::host("boot::two_cpus", two_cpus),
    Test::host("boot::four_cpus", four_cpus),
    Test::host("boot::memory_of_128_mib", memory_of_128_mib),
    Test::host("boot::memory_of_1_gib", memory_of_1_gib),
    Test::host("boot::memory_of_5_gib_across_the_hole", memory_of_5_gib_across_the_hole),
    Test::host("boot::the_serial_port_shows_the_first_lines", the_serial_port_shows_the_first_lines),
];

fn kernel_is(guest: &Guest, version: &str) -> Result<()> {
    let mut vm = guest.boot()?;
    let running = vm.guest("uname -r")?;
    ensure!(running.starts_with(version), "the guest runs {running}");
    vm.power_off()
}

fn a_bzimage_of_6_1() -> Result<()> {
    kernel_is(&Guest::new()?, "6.1.")
}

fn a_bzimage_of_6_12() -> Result<()> {
    kernel_is(&Guest::new()?.kernel_6_12(), "6.12.")
}

fn an_elf_kernel() -> Result<()> {
    kernel_is(&Guest::new()?.elf(), "6.1.")
}

/// Every processor runs something, and knows that it is a core of one package.
fn cpus(count: u32) -> Result<()> {
    let mut vm = Guest::new()?.option("--cpus", count.to_string()).boot()?;
    ensure!(vm.guest("nproc")?.trim() == count.to_string());
    for cpu in 0..count {
        let ran = vm.guest(&format!("taskset {:x} cut -d' ' -f39 /proc/self/stat", 1u32 << cpu))?;
        ensure!(ran.trim() == cpu.to_string(), "asked for processor {cpu}, ran on {ran}");
    }
    let packages = vm.guest("cat /sys/devices/system/cpu/cpu*/topology/physical_package_id | sort -u | wc -l")?;
    ensure!(packages.trim() == "1", "{packages} packages");
    let cores = vm.guest("cat /sys/devices/system/cpu/cpu*/topology/core_id | sort -u | wc -l")?;
    ensure!(cores.trim() == count.to_string(), "{cores} cores");
    vm.power_off()
}

fn one_cpu() -> Result<()> {
    cpus(1)
}

fn two_cpus() -> Result<()> {
    cpus(2)
}

fn four_cpus() -> Result<()> {
    cpus(4)
}

fn with_memory(size: &str) -> Result<(Vm, u64)> {
    let mut vm = Guest::new()?.option("--memory", size).boot()?;
    let line = vm.guest("grep MemTotal /proc/meminfo")?;
    let kib = line.split_whitespace().nth(1).context("MemTotal")?.parse::<u64>()?;
    Ok((vm, kib >> 10))
}

fn memory_of_128_mib() -> Result<()> {
    let (mut vm, mib) = with_memory("128M")?;
    ensure!((80..128).contains(&mib), "{mib} MiB");
    vm.power_off()
}

fn memory_of_1_gib() -> Result<()> {
    let (mut vm, mib) = with_memory("1G")?;
    ensure!((900..1024).contains(&mib), "{mib} MiB");
    vm.power_off()
}

/// The memory above the hole is told, and usable.
fn memory_of_5_gib_across_the_hole() -> Result<()> {
    let (mut vm, mib) = with_memory("5G")?;
    ensure!((4800..5120).contains(&mib), "{mib} MiB");
    let map = vm.guest("grep 'System RAM' /proc/iomem")?;
    ensure!(map.contains("00100000-bfffffff") && map.contains("100000000-17fffffff"), "{map}");
    // Linux gives out high memory first.
    vm.guest("dd if=/dev/zero of=/filled bs=1M count=64 && [ $(wc -c < /filled) = 67108864 ]")?;
    vm.power_off()
}

fn the_serial_port_shows_the_first_lines() -> Result<()> {
    let mut vm = Guest::new()?.console("ttyS0").append("loglevel=7").init("poweroff").start()?;
    vm.expect("Linux version 6.1.", BOOT)?;
    vm.expect("ozone-guest: init", BOOT)?;
    vm.expect_exit(0, BOOT)
}
