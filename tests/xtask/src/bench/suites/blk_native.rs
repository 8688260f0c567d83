//! The disk's backend alone, through its vhost-user socket, without a guest: beside qemu-storage-daemon, which serves the
//! same protocol, and beside fio on the file itself, which is the limit.
//!
//! The load generator is a process of its own, so that each side's processor time is its own.

mod fio;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use load::blk::Found;
use ozone_tests::{paths, progress, tool};

use super::{Context, Row};
use crate::bench::{Contender, Figure, partners};

/// How long one run takes, in milliseconds.
const MILLISECONDS: u64 = 400;

/// Sizes of the images in bytes.
const IMAGE: u64 = 256 << 20;
const CHECKED: u64 = 32 << 20;

/// The most data in flight, in bytes.
const MOST: usize = 64 << 20;

/// Where the image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Medium {
    /// In memory, through the page cache.
    Tmpfs,
    /// On this machine's disk, past the page cache.
    Disk,
}

impl Medium {
    const ALL: [Self; 2] = [Self::Tmpfs, Self::Disk];

    fn directory(self) -> PathBuf {
        match self {
            Self::Tmpfs => "/dev/shm".into(),
            Self::Disk => paths::cache(),
        }
    }

    /// QEMU's ways to the file, the first the best as a rule.
    fn qemu(self, full: bool) -> &'static [&'static str] {
        match (self, full) {
            (Self::Tmpfs, false) => &["qemu-io-uring"],
            (Self::Tmpfs, true) => &["qemu-io-uring", "qemu-threads"],
            (Self::Disk, false) => &["qemu-io-uring", "qemu-native"],
            (Self::Disk, true) => &["qemu-io-uring", "qemu-native", "qemu-threads"],
        }
    }
}

impl fmt::Display for Medium {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(if *self == Self::Tmpfs { "tmpfs" } else { "disk" })
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug)]
struct Job {
    medium: Medium,
    pattern: &'static str,
    block: usize,
    depth: usize,
    queues: usize,
    poll: bool,
}

impl fmt::Display for Job {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { medium, pattern, block, depth, queues, poll } = self;
        let pattern = pattern.replace('-', " ");
        let block = if *block < 1 << 20 { format!("{} KiB", block >> 10) } else { format!("{} MiB", block >> 20) };
        write!(formatter, "{medium}, {pattern} {block}, depth {depth}")?;
        if *queues > 1 {
            write!(formatter, ", {queues} queues")?;
        }
        formatter.write_str(if *poll { ", polled" } else { "" })
    }
}

/// What is measured unless everything is: medium, pattern, KiB, depth, queues, polled.
const CHOICE: [(Medium, &str, usize, usize, usize, bool); 12] = [
    (Medium::Tmpfs, "random-read", 4, 1, 1, false),
    (Medium::Tmpfs, "random-read", 4, 1, 1, true),
    (Medium::Tmpfs, "random-read", 4, 32, 1, false),
    (Medium::Tmpfs, "random-read", 4, 128, 4, false),
    (Medium::Tmpfs, "random-write", 4, 32, 1, false),
    (Medium::Tmpfs, "read", 1024, 4, 1, false),
    (Medium::Tmpfs, "write", 1024, 4, 1, false),
    (Medium::Disk, "random-read", 4, 1, 1, false),
    (Medium::Disk, "random-read", 4, 32, 1, false),
    (Medium::Disk, "random-write", 4, 32, 1, false),
    (Medium::Disk, "read", 1024, 4, 1, false),
    (Medium::Disk, "write", 1024, 4, 1, false),
];

fn jobs(full: bool) -> Vec<Job> {
    if !full {
        let job = |(medium, pattern, block, depth, queues, poll)| Job {
            medium,
            pattern,
            block: block << 10,
            depth,
            queues,
            poll,
        };
        return CHOICE.into_iter().map(job).collect();
    }
    let mut jobs = Vec::new();
    for medium in Medium::ALL {
        for pattern in ["random-read", "random-write", "read", "write"] {
            for block in [4 << 10, 16 << 10, 64 << 10, 1 << 20] {
                for (depth, queues) in [(1, 1), (8, 1), (32, 1), (128, 1), (1, 4), (32, 4), (128, 2)] {
                    for poll in [false, true] {
                        jobs.push(Job { medium, pattern, block, depth, queues, poll });
                    }
                }
            }
        }
    }
    jobs.retain(|job| job.block * job.depth * job.queues <= MOST);
    jobs
}

/// The images of one medium, removed on drop.
struct Images {
    directory: PathBuf,
    medium: Medium,
}

impl Images {
    fn make(medium: Medium) -> Result<Self> {
        let directory = medium.directory().join(format!("ozone-bench-{}", std::process::id()));
        fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
        let images = Self { directory, medium };
        for (name, bytes) in [("reads", IMAGE), ("writes", IMAGE), ("check", CHECKED)] {
            load::check::stamp(&images.path(name), bytes)?;
        }
        Ok(images)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The image for a pattern: what is written has no stamp afterwards.
    fn of(&self, pattern: &str) -> PathBuf {
        self.path(if pattern.ends_with("read") { "reads" } else { "writes" })
    }
}

impl Drop for Images {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// The executables beside the product's.
struct Partners {
    load: PathBuf,
    qemu: Option<PathBuf>,
    fio: Option<PathBuf>,
}

impl Partners {
    fn find(context: &Context) -> Result<Self> {
        let find = |program: &str| {
            let found = partners::find(program, context.partners.as_deref());
            if found.is_none() {
                context.lacks(format!("{program}: there is none"));
            }
            found
        };
        Ok(Self { load: super::load_program()?, qemu: find("qemu-storage-daemon"), fio: find("fio") })
    }
}

/// The load generator with what it is told of the image.
fn load(partners: &Partners, command: &str, by: &str, image: &Path, medium: Medium) -> Command {
    let mut load = Command::new(&partners.load);
    load.args([command, "--by", by, "--image"]).arg(image);
    if medium == Medium::Disk {
        load.arg("--direct");
    }
    if let Some(executable) = partners.qemu.as_ref().filter(|_| by != "ozone") {
        load.arg("--executable").arg(executable);
    }
    load
}

/// Measures.
pub fn run(context: &Context) -> Result<Vec<Row>> {
    let partners = Partners::find(context)?;
    let mut rows = Vec::new();
    for medium in Medium::ALL {
        let images = Images::make(medium)?;
        let qemu = if partners.qemu.is_some() { medium.qemu(context.full) } else { &[] };
        rows.extend(check(&partners, &images, qemu)?);
        for job in jobs(context.full).into_iter().filter(|job| job.medium == medium) {
            rows.extend(measure(context, &partners, &images, job, qemu)?);
        }
    }
    Ok(rows)
}

/// The data check. The product's own failure ends the suite: what loses data has no speed.
fn check(partners: &Partners, images: &Images, qemu: &[&str]) -> Result<Vec<Row>> {
    let path = images.path("check");
    let checked = |by: &str| {
        let mut command = load(partners, "check", by, &path, images.medium);
        let bytes: u64 = serde_json::from_str(&tool::output(command.args(["--queues", "4"]))?)?;
        anyhow::ensure!(bytes == CHECKED, "{bytes} bytes were checked instead of {CHECKED}");
        Ok(bytes)
    };
    checked("ozone").with_context(|| format!("ozone's data check on {}", images.medium))?;
    let contenders = std::iter::once("ozone").chain(qemu.iter().copied()).map(|by| {
        let name = format!("{}: {by}", images.medium);
        Contender::new(name, move || {
            Ok(vec![Figure::new("written, read back, intact", "MiB", checked(by)? as f64 / MIB)])
        })
    });
    let contenders = contenders.collect();
    Context::new(1, None, false).compare(contenders)
}

const MIB: f64 = (1 << 20) as f64;

fn measure(
    context: &Context,
    partners: &Partners,
    images: &Images,
    job: Job,
    qemu: &[&'static str],
) -> Result<Vec<Row>> {
    let image = images.of(job.pattern);
    let image = image.as_path();
    let mut contenders = Vec::new();
    for by in std::iter::once("ozone").chain(qemu.iter().copied()) {
        let mut command = load(partners, "blk", by, image, job.medium);
        command.args(["--pattern", job.pattern, "--completion", if job.poll { "poll" } else { "call" }]);
        for (option, value) in [("--block", job.block), ("--depth", job.depth), ("--queues", job.queues)] {
            command.args([option, &value.to_string()]);
        }
        command.args(["--milliseconds", &MILLISECONDS.to_string()]);
        contenders.push(Contender::new(format!("{job}: {by}"), move || {
            let found: Found = serde_json::from_str(&tool::output(&mut command)?)?;
            Ok(figures(job, &found))
        }));
    }
    if let Some(program) = partners.fio.as_ref().filter(|_| !job.poll) {
        contenders.push(Contender::new(format!("{job}: fio on the file"), move || fio::measure(program, image, job)));
    }
    progress::step(&job.to_string(), || context.compare(contenders))
}

fn figures(job: Job, found: &Found) -> Vec<Figure> {
    let operations = found.operations as f64;
    let mut figures = speed(job, operations, found.seconds, found.p50, found.p99);
    figures.extend([
        Figure::new("processor, device", "µs/op", found.backend_cpu as f64 / operations / 1e3),
        Figure::new("processor, driver", "µs/op", found.driver_cpu as f64 / operations / 1e3),
        Figure::new("kicks", "1/op", found.kicks as f64 / operations),
    ]);
    if !job.poll {
        figures.push(Figure::new("driver's sleeps", "1/op", found.sleeps as f64 / operations));
    }
    figures
}

/// What a disk does for whoever uses it; latencies in nanoseconds.
fn speed(job: Job, operations: f64, seconds: f64, p50: u64, p99: u64) -> Vec<Figure> {
    let speed = if job.block > 64 << 10 {
        Figure::new("throughput", "MiB/s", operations * job.block as f64 / MIB / seconds)
    } else {
        Figure::new("speed", "op/s", operations / seconds)
    };
    let mut figures = vec![speed];
    figures.push(Figure::new("latency p50", "µs", p50 as f64 / 1e3));
    figures.push(Figure::new("latency p99", "µs", p99 as f64 / 1e3));
    figures
}
