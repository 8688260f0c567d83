//! Backends that end themselves at every point of the order in which they take requests and give them back.
//!
//! The backend is built with the feature `crash-points`; the disk's name says at which point each of its processes ends.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use oracle::Found;
use oracle::verdict::Faults;
use ozone_tests::host::{self, Put};
use ozone_tests::product::Product;
use ozone_tests::vm::{ANSWER, Guest, Vm};
use ozone_tests::{build, control, progress, trial};
use serde::Serialize;

use super::report::Report;

/// All machines together, on a slow and busy machine.
pub const DEADLINE: Duration = Duration::from_secs(1800);

const NAME: &str = "crash-points";

/// The executable in the test host.
const EXECUTABLE: &str = "ozone-blk-crash-points";

/// The points, in the order in which a request meets them.
const POINTS: [&str; 5] = ["fetch", "io", "element", "index", "commit"];

/// How many queues a disk has, and at which passage of its point its process ends. More passages than requests are in
/// flight: of those that are answered together none is seen before the last, and there would be no progress. And so many
/// that the process serves for a while before: a series of failures is waited for ever longer.
const QUEUES: [(u16, u32); 2] = [(1, 601), (4, 701)];

/// How often a process ends at its point before the next depth.
const CRASHES: u64 = 3;

const DEPTHS: [u16; 3] = [1, 8, 64];

/// For so many crashes, and for the last look at every place.
const PATIENCE: Duration = Duration::from_secs(90);

/// Size of each disk, and of the journal's.
const DISK: u64 = 4 << 20;

/// One way to crash, and what came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Point {
    /// The point.
    pub point: &'static str,
    /// How many queues the disk has.
    pub queues: u16,
    /// Whether requests are in indirect descriptors.
    pub indirect: bool,
    /// How many requests were in flight.
    pub depth: u16,
    /// How often a process ended at the point.
    pub crashes: u64,
    /// Requests that were carried out again.
    pub reexecuted: u64,
    /// How the disk broke its word, inside or outside.
    pub faults: Faults,
    /// Requests of the guest's program that failed.
    pub io_errors: u64,
    /// The first faults, in words.
    #[serde(skip)]
    pub told: Vec<String>,
}

impl Point {
    /// In words.
    pub fn name(&self) -> String {
        let kind = if self.indirect { "indirect" } else { "direct" };
        format!("{}, {kind}, {} queues, depth {}", self.point, self.queues, self.depth)
    }
}

/// Builds the backend with its crash points, apart from the product.
pub fn executable() -> Result<Put> {
    let from = progress::step("build a backend with crash points", || build::crash_points("ozone-blk"))?;
    Ok(Put { from, to: host::executable(EXECUTABLE) })
}

/// Every point, with one machine for each kind of descriptor and number of queues. One that fails leaves the others be.
pub fn run(report: &mut Report) -> Result<()> {
    let product = Product::with(&[("ozone-blk", EXECUTABLE)])?;
    let mut outcome = Ok(());
    for (queues, passage) in QUEUES {
        for indirect in [true, false] {
            let kind = if indirect { "indirect" } else { "direct" };
            eprintln!("… {} crash points: {queues} queues, {kind} descriptors", POINTS.len() * DEPTHS.len());
            outcome = outcome.and(machine(&product, queues, passage, indirect, report));
        }
    }
    outcome
}

fn machine(product: &Product, queues: u16, passage: u32, indirect: bool, report: &mut Report) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let journal = directory.path().join("journal");
    File::create(&journal)?.set_len(DISK)?;
    let mut guest = Guest::new()?.ozone(product.ozone()).programs(&["oracle"])?;
    guest = guest.option("--name", NAME).option("--cpus", queues.to_string());
    guest = guest.option("--disk", format!("path={},id=journal", journal.display()));
    let mut disks = Vec::new();
    for point in POINTS {
        let id = format!("cp-{point}-{passage}{}", if indirect { "" } else { "-d" });
        let image = directory.path().join(&id);
        File::create(&image)?.set_len(DISK)?;
        guest = guest.option("--disk", format!("path={},id={id},queues={queues}", image.display()));
        disks.push((point, id, image));
    }
    let mut vm = guest.boot()?;
    for ((point, id, image), letter) in disks.iter().zip('b'..) {
        for depth in DEPTHS {
            let before = control::status(NAME)?.device(id)?.clone();
            let found =
                load(&mut vm, letter, depth, (id, before.restarts)).with_context(|| format!("{id}, depth {depth}"))?;
            let after = control::all_up(NAME)?.device(id)?.clone();
            let (faults, told) = look(image, &journal, &found)?;
            report.points.push(Point {
                point,
                queues,
                indirect,
                depth,
                crashes: after.restarts - before.restarts,
                reexecuted: after.reexecuted - before.reexecuted,
                faults,
                io_errors: found.io_errors,
                told,
            });
            // The next run takes zeroes for what was never written.
            vm.guest(&format!("dd if=/dev/zero of=/dev/vd{letter} bs=1M count={} 2>/dev/null && sync", DISK >> 20))?;
        }
    }
    let complaints = trial::complaints(&mut vm)?;
    if let Some(last) = report.points.last_mut() {
        last.io_errors += complaints.len() as u64;
        last.told.extend(complaints);
    }
    vm.power_off()
}

/// Runs the oracle until enough processes of the disk have ended.
fn load(vm: &mut Vm, letter: char, depth: u16, (id, before): (&str, u64)) -> Result<Found> {
    vm.send_line(&format!("oracle run --path /dev/vd{letter} --journal /dev/vda --depth {depth}"))?;
    vm.expect("oracle: running\n", ANSWER)?;
    control::until_within(NAME, "the process met its point", PATIENCE, |status| {
        status.device(id).is_ok_and(|device| device.restarts >= before + CRASHES)
    })?;
    trial::stop(vm)
}

/// The image is looked at while the machine runs: nothing is written to it, and the host's page cache is one.
fn look(image: &Path, journal: &Path, found: &Found) -> Result<(Faults, Vec<String>)> {
    let checked = oracle::check::check(image, journal)?;
    let mut faults = found.faults;
    faults.merge(&checked.faults);
    Ok((faults, [found.told.clone(), checked.told].concat()))
}
