//! What a disk request costs the core: counted, not timed.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, ensure};
use ozone_tests::harness::Test;
use ozone_tests::vm::{Guest, Vm};

/// The tests of this file.
pub const TESTS: [Test; 1] =
    [Test::host("cost::disk_requests_wake_no_thread_of_the_core_but_its_vcpus", disk_requests)];

const REQUESTS: u64 = 10_000;

fn core(vm: &Vm) -> Result<i32> {
    let processes = vm.processes()?;
    Ok(processes.iter().find(|process| process.role == "core").context("no core")?.pid)
}

/// How often each thread was given a processor: the third field of schedstat.
fn turns(pid: i32) -> Result<BTreeMap<String, u64>> {
    let mut turns = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread = entry?.path();
        let name = fs::read_to_string(thread.join("comm"))?.trim().to_owned();
        let stat = fs::read_to_string(thread.join("schedstat")).context("the host's kernel has no schedstat")?;
        let count = stat.split_whitespace().nth(2).context("schedstat")?.parse()?;
        turns.insert(format!("{name} ({})", thread.display()), count);
    }
    Ok(turns)
}

/// Exits that KVM could not answer itself, for all machines of this host, of which there is one.
fn exits_to_user_space() -> Result<u64> {
    let read = |name: &str| -> Result<u64> {
        let path = format!("/sys/kernel/debug/kvm/{name}");
        Ok(fs::read_to_string(&path).with_context(|| path)?.trim().parse()?)
    };
    Ok(read("mmio_exits")? + read("io_exits")?)
}

fn disk_requests() -> Result<()> {
    let image = tempfile::NamedTempFile::new()?;
    image.as_file().set_len(64 << 20)?;
    let mut vm = Guest::new()?.option("--disk", format!("path={}", image.path().display())).boot()?;
    let read = format!("dd if=/dev/vda of=/dev/null bs=4096 count={REQUESTS} iflag=direct 2>/dev/null");
    vm.guest("dd if=/dev/vda of=/dev/null bs=4096 count=100 iflag=direct 2>/dev/null")?;
    let core = core(&vm)?;
    let completed = "awk '{print $1}' /sys/block/vda/stat";
    let requests: u64 = vm.guest(completed)?.trim().parse()?;
    let (before, exits) = (turns(core)?, exits_to_user_space()?);
    let (status, output) = vm.command(&read, ozone_tests::vm::BOOT * 2)?;
    let (after, exits) = (turns(core)?, exits_to_user_space()? - exits);
    ensure!(status == 0, "{output}");
    let requests = vm.guest(completed)?.trim().parse::<u64>()? - requests;
    ensure!(requests >= REQUESTS, "only {requests} requests");
    for (thread, turns) in &after {
        let ran = turns - before.get(thread).copied().unwrap_or(0);
        println!("{thread}: ran {ran} times");
        ensure!(thread.starts_with("vcpu") || ran == 0, "{thread} ran {ran} times during {requests} disk requests");
    }
    println!("{requests} requests, {exits} exits to user space: {:.3} per request", exits as f64 / requests as f64);
    // Reading and acknowledging the interrupt status; the notification itself is answered in the kernel.
    ensure!(exits <= requests * 5 / 2, "{exits} exits for {requests} requests");
    vm.power_off()
}
