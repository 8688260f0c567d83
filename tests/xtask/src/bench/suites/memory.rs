//! What the Nth machine costs: per process, and to the host as a whole, which also sees page tables, namespaces, sockets
//! and KVM's own memory. The guest's memory is left out of everything.

use std::fs;

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use ozone_tests::payload::Code;
use ozone_tests::process_table;
use ozone_tests::vm::{BOOT, Guest, Vm};
use tempfile::NamedTempFile;

use crate::bench::footprint::{self, Footprint};
use crate::bench::{Contender, Context, Figure, Row};

/// The machines that are looked at. A Linux guest takes seconds to boot, so there are few of them unless everything is to be
/// measured.
const STOPS: [usize; 4] = [1, 2, 10, 50];
const FEW: [usize; 3] = [1, 2, 10];

/// The guests' memory in MiB.
const TINY: u64 = 64;
const LINUX: u64 = 128;

/// What the host needs beside the guest's memory to start one more, in MiB.
const SPARE: u64 = 256;

/// Machines of one kind.
struct Kind<'a> {
    name: &'static str,
    stops: &'static [usize],
    /// Memory of each guest in MiB.
    memory: u64,
    start: &'a dyn Fn() -> Result<Vm>,
}

/// Measures.
pub fn run(context: &Context) -> Result<Vec<Row>> {
    let mut kernel = NamedTempFile::new()?;
    std::io::Write::write_all(&mut kernel, &Code::default().print("ready\n").halt().elf())?;
    let tiny = || {
        let words = ["run", "--memory", &format!("{TINY}M"), "--kernel"].map(Into::into);
        let mut vm = Vm::start(words.into_iter().chain([kernel.path().as_os_str().to_owned()]))?;
        vm.expect("ready\n", BOOT)?;
        Ok(vm)
    };
    let guest = Guest::new()?.option("--memory", format!("{LINUX}M"));
    let disk = guest.root_disk()?;
    // Read-only, so that all of them can have it.
    let disk_option = format!("path={},readonly", disk.display());
    let linux = || guest.clone().option("--disk", &disk_option).boot();
    let kinds = [
        Kind { name: "halted guest", stops: &STOPS, memory: TINY, start: &tiny },
        Kind { name: "Linux guest", stops: if context.full { &STOPS } else { &FEW }, memory: LINUX, start: &linux },
    ];
    let contenders = kinds.iter().map(|kind| Contender::new(kind.name, || series(context, kind)));
    let mut rows = context.compare(contenders.collect())?;
    for row in &mut rows {
        if let Some((which, metric)) = row.metric.split_once(": ") {
            row.name = format!("{}, {which}", row.name);
            row.metric = metric.to_owned();
        }
    }
    Ok(rows)
}

/// Starts machines until there are as many as the last of the stops, and looks around at each of them. It ends sooner where
/// the host has no memory for more.
fn series(context: &Context, kind: &Kind) -> Result<Vec<Figure>> {
    let mut before = (0, footprint::settled()? as f64);
    let mut machines = Vec::new();
    let mut figures = Vec::new();
    'stops: for stop in kind.stops {
        while machines.len() < *stop {
            if footprint::available()? < (kind.memory + SPARE) << 10 {
                context.lacks(format!("{} number {stop}: the host's memory is used up before", kind.name));
                break 'stops;
            }
            machines.push((kind.start)().with_context(|| format!("machine {}", machines.len() + 1))?);
        }
        let mut guest = 0;
        for machine in &machines {
            for pid in process_table::descendants(machine.pid())? {
                guest += Footprint::of(pid)?.guest;
            }
        }
        // Since the last stop, guests left out.
        let now = (*stop, footprint::settled()? as f64 + guest as f64);
        let each = (before.1 - now.1) / (now.0 - before.0) as f64;
        let which = if now.0 - before.0 == 1 { "number".to_owned() } else { format!("{} to", before.0 + 1) };
        before = now;
        figures.push(Figure::new(format!("{which} {stop}: all of it, as the host sees it"), "KiB each", each));
        let newest = machines.last().context("no machine")?;
        let mut total = 0;
        for pid in process_table::descendants(newest.pid())? {
            let Footprint { proportional, private, .. } = Footprint::of(pid)?;
            let role = fs::read_to_string(format!("/proc/{pid}/comm"))?;
            let role = role.trim();
            total += proportional;
            figures.push(Figure::new(format!("number {stop}: {role}, proportional"), "KiB", proportional as f64));
            figures.push(Figure::new(format!("number {stop}: {role}, private"), "KiB", private as f64));
        }
        figures.push(Figure::new(format!("number {stop}: all processes, proportional"), "KiB", total as f64));
    }
    for machine in &mut machines {
        // Its children follow it; what they held is waited for at the beginning of the next series.
        machine.signal(Signal::SIGTERM)?;
        machine.wait(BOOT)?;
    }
    Ok(figures)
}
