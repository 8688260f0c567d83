//! Device processes that die under a live guest: it waits, and nothing else happens to it.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ozone_tests::harness::Test;
use ozone_tests::kills::{self, Random};
use ozone_tests::trial::{self, Disks, Medium};
use ozone_tests::vm::{ANSWER, BOOT, Guest, Vm};
use ozone_tests::{backends, control};
use rustix::process::Signal;

use crate::net;

/// The tests of this file.
pub const TESTS: [Test; 6] = [
    Test::host("restart::fifty_kills_of_a_disk_lose_no_write", fifty_kills_of_a_disk_lose_no_write),
    Test::host("restart::a_transfer_survives_kills_of_its_interface", a_transfer_survives_kills_of_its_interface),
    Test::host("restart::a_flood_survives_kills_of_its_console", a_flood_survives_kills_of_its_console),
    Test::host("restart::stopped_backends_are_found_and_replaced", stopped_backends_are_found_and_replaced),
    Test::host("restart::successors_that_are_killed_too_are_replaced", successors_that_are_killed_too_are_replaced),
    Test::host("restart::a_crash_loop_ends_in_health", a_crash_loop_ends_in_health),
];

/// The machine's name: one per test host.
const NAME: &str = "restart";

const BACKENDS: [&str; 3] = ["blk/disk0", "net/net0", "console/console0"];

fn named() -> Result<Guest> {
    Ok(Guest::new()?.option("--name", NAME))
}

/// A machine with every kind of device whose disk is tried. Its processes and the core are the same afterwards.
struct Tried {
    vm: Vm,
    disks: Disks,
    before: control::Status,
}

impl Tried {
    fn start(guest: Guest, medium: Medium) -> Result<Self> {
        let disks = Disks::make(medium)?;
        let mut vm = disks.give(guest, "id=disk0")?.boot()?;
        let before = control::status(NAME)?;
        trial::start(&mut vm, "--depth 32")?;
        trial::await_writes(&mut vm, 100, BOOT)?;
        Ok(Self { vm, disks, before })
    }

    /// Nothing was lost, and nobody noticed.
    fn end(mut self) -> Result<control::Status> {
        trial::await_writes(&mut self.vm, 100, BOOT)?;
        let after = control::all_up(NAME)?;
        ensure!((after.core_pid, after.pid) == (self.before.core_pid, self.before.pid), "another core or ozone");
        let found = trial::stop(&mut self.vm)?;
        let complaints = trial::complaints(&mut self.vm)?;
        ensure!(complaints.is_empty(), "the guest's kernel complains: {complaints:#?}");
        self.vm.power_off()?;
        let checked = self.disks.check()?;
        println!("{} writes, the longest stall {} ms", found.acknowledged, found.longest_stall_ms);
        trial::expect_clean(&found, &checked)?;
        Ok(after)
    }
}

fn fifty_kills_of_a_disk_lose_no_write() -> Result<()> {
    let seed = Random::any_seed();
    println!("the seed is {seed}");
    let tried = Tried::start(named()?, Medium::Direct)?;
    let mut random = Random::new(seed);
    kills::at_random(tried.vm.pid(), BACKENDS[0], 50, &mut random)?;
    let after = tried.end()?;
    let disk = after.device("disk0")?;
    ensure!(disk.restarts > 0 && disk.reexecuted > 0, "{disk:?}");
    ensure!(after.device("console0")?.restarts == 0, "{after:?}");
    Ok(())
}

fn a_transfer_survives_kills_of_its_interface() -> Result<()> {
    const KILLS: usize = 6;
    net::own_namespace()?;
    let guest = named()?.option("--net", format!("host-ip={}/24", net::HOST)).option("--memory", "512M");
    let mut vm = guest.boot()?;
    net::up(&mut vm)?;
    let data = net::sample(32 << 20);
    let sum = net::hex(&data);
    let (ozone, start) = (vm.pid(), Instant::now());
    let killer = std::thread::spawn(move || -> Result<i32> {
        let mut last = None;
        for _ in 0..KILLS {
            std::thread::sleep(Duration::from_millis(500));
            let pid = backends::await_other(ozone, BACKENDS[1], last, BOOT)?;
            backends::signal(pid, Signal::KILL)?;
            last = Some(pid);
        }
        last.context("nothing was killed")
    });
    let mut transfers = 0;
    while !killer.is_finished() || transfers == 0 {
        net::listen(&mut vm, 5001, "/received")?;
        std::io::Write::write_all(&mut net::connect(net::GUEST, 5001)?, &data)?;
        let (status, output) = vm.command("wait; sha256sum < /received", net::TRANSFER)?;
        ensure!(status == 0 && output.contains(&sum), "the guest received something else: {output}");
        transfers += 1;
    }
    let last = killer.join().map_err(|_| anyhow::anyhow!("the killer panicked"))??;
    println!("{transfers} transfers in {:?}", start.elapsed());
    // A kill may have met a process that did not serve yet, which is no restart.
    control::until(NAME, "the last kill was made good", |status| {
        status.device("net0").is_ok_and(|net| net.restarts > 0 && net.state == "up" && net.pid != Some(last))
    })?;
    vm.power_off()
}

/// Lines may be lost or come twice; how many is bounded by what a console holds.
fn a_flood_survives_kills_of_its_console() -> Result<()> {
    const KILLS: usize = 4;
    const FIRST: usize = 1_000_001;
    /// Between two kills, in bytes: a console is slow where every byte is emulated.
    const BETWEEN: usize = 2000;
    /// Of eight bytes each, together a page.
    const MOST: usize = KILLS * 4096 / 8;
    let mut vm = named()?.boot()?;
    let already = vm.console_text().len();
    vm.send_line(&format!("seq {FIRST} 9999999 & read -r line; kill $!; wait; echo over: $line."))?;
    let mut seen = already;
    for kill in 0..KILLS {
        let deadline = Instant::now() + BOOT;
        while vm.console_text().len() < seen + BETWEEN {
            ensure!(Instant::now() < deadline, "the flood stopped after {kill} kills");
            std::thread::sleep(Duration::from_millis(5));
        }
        seen = vm.console_text().len();
        backends::kill(vm.pid(), BACKENDS[2])?;
        control::until(NAME, "the console is back", |status| {
            status.device("console0").is_ok_and(|device| device.state == "up" && device.restarts > kill as u64)
        })?;
    }
    // What was typed while nobody read is not there; what is typed now is.
    vm.send_line("enough")?;
    vm.expect("over: enough.\n", ANSWER)?;
    let text = vm.console_text();
    let numbers = text.get(already..).unwrap_or_default().lines().filter_map(|line| line.parse::<usize>().ok());
    let lines: Vec<usize> = numbers.filter(|number| (FIRST..FIRST * 2).contains(number)).collect();
    let different: BTreeSet<usize> = lines.iter().copied().collect();
    let last = lines.last().context("no line")?;
    let lost = (FIRST..=*last).filter(|number| !different.contains(number)).count();
    let twice = lines.len() - different.len();
    println!("{KILLS} kills, {} lines: {lost} lost or damaged, {twice} more than once", lines.len());
    ensure!(lost <= MOST && twice <= MOST, "of {} lines {lost} are lost, {twice} came twice", lines.len());
    vm.power_off()
}

/// The deadline for a sign of life is the product's own.
fn stopped_backends_are_found_and_replaced() -> Result<()> {
    const HANG: Duration = Duration::from_secs(60);
    net::own_namespace()?;
    let tried = Tried::start(named()?.option("--net", format!("host-ip={}/24", net::HOST)), Medium::File)?;
    for role in BACKENDS {
        let pid = backends::find(tried.vm.pid(), role).with_context(|| format!("no {role}"))?;
        backends::signal(pid, Signal::STOP)?;
    }
    let status = control::until_within(NAME, "every device was replaced", HANG, |status| {
        ["disk0", "net0", "console0"]
            .iter()
            .all(|id| status.device(id).is_ok_and(|device| device.restarts == 1 && device.state == "up"))
    })?;
    println!("{:?}", status.devices.iter().map(|device| device.cause.clone()).collect::<Vec<_>>());
    tried.end().map(drop)
}

fn successors_that_are_killed_too_are_replaced() -> Result<()> {
    net::own_namespace()?;
    let tried = Tried::start(named()?.option("--net", format!("host-ip={}/24", net::HOST)), Medium::File)?;
    let ozone = tried.vm.pid();
    for milliseconds in [0, 1, 2, 4, 8, 16, 32] {
        let first = backends::kill(ozone, BACKENDS[0])?;
        let second = backends::await_other(ozone, BACKENDS[0], Some(first), BOOT)?;
        std::thread::sleep(Duration::from_millis(milliseconds));
        backends::signal(second, Signal::KILL)?;
        control::all_up(NAME).with_context(|| format!("killed after {milliseconds} ms"))?;
    }
    // In its jail, before it has a name.
    let known: BTreeSet<i32> = backends::children(ozone).into_iter().collect();
    backends::kill(ozone, BACKENDS[0])?;
    let deadline = Instant::now() + ANSWER;
    loop {
        ensure!(Instant::now() < deadline, "no new child of ozone");
        if let Some(pid) = backends::children(ozone).into_iter().find(|pid| !known.contains(pid)) {
            backends::signal(pid, Signal::KILL)?;
            break;
        }
    }
    control::all_up(NAME).context("killed in its jail")?;
    for round in 0..3 {
        for role in BACKENDS {
            backends::kill(ozone, role).with_context(|| format!("round {round}"))?;
        }
        let restarts = |status: &control::Status, id: &str| status.device(id).map_or(0, |device| device.restarts);
        control::until(NAME, "every device is back", |status| {
            ["net0", "console0"].iter().all(|id| restarts(status, id) > round)
                && status.devices.iter().all(|device| device.state == "up")
        })?;
    }
    tried.end().map(drop)
}

fn a_crash_loop_ends_in_health() -> Result<()> {
    let tried = Tried::start(named()?, Medium::File)?;
    let (ozone, end) = (tried.vm.pid(), Instant::now() + Duration::from_secs(4));
    let mut kills = 0;
    while Instant::now() < end {
        if let Some(pid) = backends::find(ozone, BACKENDS[0]) {
            kills += u32::from(backends::signal(pid, Signal::KILL)?);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    println!("{kills} kills");
    ensure!(kills > 3, "only {kills} attempts in 4 s");
    tried.end().map(drop)
}
