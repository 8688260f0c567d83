//! From the exec of `ozone` to the first instruction of a guest, step by step, for one machine and for many at once; beside
//! a plain fork and exec of the same executables, alone and into each namespace.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sched::CloneFlags;
use ozone_tests::boot_trace::BootTrace;
use ozone_tests::child;
use ozone_tests::payload::Code;
use ozone_tests::vm;

use crate::bench::processor_time;
use crate::bench::{Contender, Context, Figure, Row};

/// How many machines start at once.
const AT_ONCE: [usize; 3] = [1, 10, 50];

/// A machine has one console, so these are all of its processes.
const PROCESSES: [&str; 3] = ["ozone", "core", "console/console0"];

const NAMESPACES: [(&str, CloneFlags); 7] = [
    ("no new namespace", CloneFlags::empty()),
    ("mount", CloneFlags::CLONE_NEWNS),
    ("pid", CloneFlags::CLONE_NEWPID),
    ("network", CloneFlags::CLONE_NEWNET),
    ("IPC", CloneFlags::CLONE_NEWIPC),
    ("UTS", CloneFlags::CLONE_NEWUTS),
    ("cgroup", CloneFlags::CLONE_NEWCGROUP),
];

/// Measures.
pub fn run(context: &Context) -> Result<Vec<Row>> {
    let directory = tempfile::tempdir()?;
    let kernel = directory.path().join("kernel");
    fs::write(&kernel, Code::default().power_off().elf())?;

    let mut contenders = Vec::new();
    for count in AT_ONCE {
        let (directory, kernel) = (directory.path(), &kernel);
        let name = if count == 1 { "ozone, 1 machine".to_owned() } else { format!("ozone, {count} machines at once") };
        contenders.push(Contender::new(name, move || machines(directory, kernel, count)));
    }
    for name in ["ozone", "vmm-core", "ozone-console"] {
        contenders.push(Contender::new(format!("fork and exec {name}"), move || plain(name, CloneFlags::empty())));
    }
    for (namespace, flags) in NAMESPACES {
        let name = format!("fork, unshare, exec ozone-console: {namespace}");
        contenders.push(Contender::new(name, move || plain("ozone-console", flags)));
    }
    let mut rows = context.compare(contenders)?;
    // Each step is a thing of its own.
    for row in rows.iter_mut().filter(|row| row.unit == "µs") {
        row.name = std::mem::replace(&mut row.metric, "of 1 machine".to_owned());
    }
    Ok(rows)
}

/// Launches `count` machines that switch themselves off at their first instruction.
fn machines(directory: &Path, kernel: &Path, count: usize) -> Result<Vec<Figure>> {
    let start = now();
    let before = processor_time::of_children()?;
    let traces: Vec<PathBuf> = (0..count).map(|index| directory.join(format!("trace-{index}"))).collect();
    let mut children: Vec<Child> =
        traces.iter().map(|trace| machine(kernel, trace)).collect::<Result<Vec<_>>>().context("start ozone")?;
    for child in &mut children {
        let status = child.wait()?;
        ensure!(status.success(), "ozone: {status}");
    }
    let used = processor_time::of_children()? - before;
    let mut last: f64 = 0.0;
    for path in &traces {
        let trace = BootTrace::read(path)?;
        let first = trace.step("core", "first guest instruction").context("the guest did not run")?.start;
        last = last.max(first);
    }
    let mut figures = vec![
        Figure::new("to the first instruction of the last", "ms", (last - start) / 1e3),
        Figure::new("processor time each, with its end", "ms", used.as_secs_f64() * 1e3 / count as f64),
    ];
    if let ([trace], 1) = (traces.as_slice(), count) {
        figures.extend(steps(&BootTrace::read(trace)?, start));
    }
    Ok(figures)
}

/// How long each process spent on each step. The clone and the waits hold the others' work too.
fn steps(trace: &BootTrace, start: f64) -> Vec<Figure> {
    let mut figures = Vec::new();
    if let Some(first) = trace.step("ozone", "resolve the machine") {
        figures.push(Figure::new("ozone: fork, exec, start of the C library", "µs", first.start - start));
    }
    for process in PROCESSES {
        let mut seen: Vec<&str> = Vec::new();
        for step in trace.steps.iter().filter(|step| step.process == process && step.length > 0.0) {
            if !seen.contains(&step.name.as_str()) {
                seen.push(&step.name);
            }
        }
        for name in seen {
            let same = trace.steps.iter().filter(|step| step.process == process && step.name == name);
            figures.push(Figure::new(format!("{process}: {name}"), "µs", same.map(|step| step.length).sum()));
        }
    }
    figures
}

fn machine(kernel: &Path, trace: &Path) -> Result<Child> {
    let mut command = Command::new(vm::executable("ozone"));
    command.args(["run", "--memory", "64M", "--kernel"]).arg(kernel).arg("--boot-trace").arg(trace);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Ok(child::spawn(&mut command, Vec::<OwnedFd>::new())?)
}

/// Starts an executable that ends at once: `ozone` for its version, the others because nobody gave them anything to do.
fn plain(name: &str, namespaces: CloneFlags) -> Result<Vec<Figure>> {
    let mut command = Command::new(vm::executable(name));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    if name == "ozone" {
        command.arg("--version");
    }
    let before = processor_time::of_children()?;
    let start = Instant::now();
    let mut child = child::spawn_into(&mut command, namespaces).with_context(|| format!("start {name}"))?;
    child.wait()?;
    let (taken, used) = (start.elapsed(), processor_time::of_children()? - before);
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    Ok(vec![
        Figure::new("to its end", "ms", milliseconds(taken)),
        Figure::new("processor time", "ms", milliseconds(used)),
    ])
}

/// Microseconds of the clock that the trace uses.
fn now() -> f64 {
    processor_time::clock().as_secs_f64() * 1e6
}
