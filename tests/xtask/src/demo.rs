//! `cargo xtask demo`: one VM, its processes, and whether every promise about them held.
//!
//! The part that starts the VM runs where KVM is: on this machine, or in the test host, where this same
//! executable is put.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use agent::wire::{self, Exit};
use anyhow::{Context, Result, bail, ensure};
use ozone_tests::harness::Choice;
use ozone_tests::host::{self, DEFAULT_MEMORY, Parcel, Put, Stdin, TestHost};
use ozone_tests::process_table::{self, Process};
use ozone_tests::vm::{self, Guest, Vm};
use ozone_tests::{artifacts, build, progress};
use serde::Serialize;

use crate::host::show;
use crate::prerequisites;

/// Options of `cargo xtask demo`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Only name what this machine lacks.
    #[arg(long)]
    no_install: bool,
    /// Write what was found to this file; no shell, even on a terminal.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where the VM runs; without it this machine if it has KVM, else the test host.
    #[arg(long, value_name = "kvm|nested")]
    host: Option<Choice>,
}

/// Options of the part that runs where KVM is.
#[derive(clap::Args)]
pub struct HereArguments {
    /// End in the guest's shell rather than check.
    #[arg(long)]
    shell: bool,
    /// Write the report to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// The machine-readable report.
#[derive(Serialize)]
struct Report {
    /// Every check and every promise held.
    ok: bool,
    /// From the exec of `ozone` to the first line of the guest's init.
    init_ms: u64,
    /// One row per process of the VM.
    processes: Vec<Process>,
    /// What did not hold, in words.
    broken: Vec<String>,
}

/// The addresses on the two ends of the demo's tap.
const HOST_ADDRESS: &str = "10.77.0.1/30";
const GUEST_ADDRESS: &str = "10.77.0.2/30";

/// The report's place in the test host.
const REPORT: &str = "/run/demo.json";

/// The whole demo takes no longer, where nobody sits at a terminal.
const DEADLINE: Duration = Duration::from_secs(300);

/// Runs the demo where KVM is.
pub fn run(arguments: &Arguments) -> Result<u8> {
    let place = arguments.host.unwrap_or_else(pick);
    prerequisites::ensure_programs(!arguments.no_install)?;
    let shell = host::is_terminal() && arguments.json.is_none();
    match place {
        Choice::Kvm => {
            build::product()?;
            drop(artifacts::guest()?);
            eprintln!("… the host is this machine");
            here(&HereArguments { shell, json: arguments.json.clone() })
        }
        Choice::Nested => in_test_host(shell, arguments.json.as_deref()),
        Choice::None => bail!("a demo needs a host: kvm or nested"),
    }
}

/// This machine, if its KVM is one that runs Linux.
fn pick() -> Choice {
    let is_real = ["kvm_intel", "kvm_amd"].iter().any(|name| Path::new("/sys/module").join(name).exists());
    if is_real && Path::new("/dev/kvm").exists() { Choice::Kvm } else { Choice::Nested }
}

fn in_test_host(shell: bool, json: Option<&Path>) -> Result<u8> {
    let executables = build::product()?.into_iter().chain([build::xtask()?]);
    let puts: Vec<_> = executables.map(Put::executable).collect();
    let snapshot = host::snapshot(DEFAULT_MEMORY)?;
    let parcel = Parcel::pack(&puts)?;
    eprintln!("… the host is the test host: this machine's KVM, if any, does not run Linux");
    let mut host = progress::step("resume the test host", || TestHost::resume(&snapshot, &parcel))?;
    let mut argv: Vec<_> = [&host::executable("xtask"), "demo-here", "--json", REPORT].map(str::to_owned).into();
    if shell {
        argv.push("--shell".to_owned());
    }
    let terminal = if shell { host::window() } else { None };
    let command = wire::Command { argv, env: host::environment(), terminal };
    let (stdin, deadline) = if shell { (Stdin::Ours, None) } else { (Stdin::Empty, Some(DEADLINE)) };
    let exit = host.run(command, stdin, deadline, &mut show)?;
    let code = u8::try_from(exit.shell_code()).unwrap_or(u8::MAX);
    if let Some(json) = json {
        // A demo that got nowhere has said why, and left no report.
        let report = match host.fetch(REPORT) {
            Err(_) if exit != Exit::Code(0) => return Ok(code),
            report => report?,
        };
        fs::write(json, report).with_context(|| format!("write {}", json.display()))?;
    }
    Ok(code)
}

/// Runs the VM on this machine.
pub fn here(arguments: &HereArguments) -> Result<u8> {
    ensure!(nix::unistd::geteuid().is_root(), "the demo makes jails and a tap: run it as root");
    let guest = Guest::new()?;
    let disk = guest.root_disk()?;
    let guest = guest.disk(&disk).net(HOST_ADDRESS, GUEST_ADDRESS).option("--memory", "512M");
    if arguments.shell {
        return shell(&guest.init("shell"));
    }
    let (report, console) = check(&guest.init("check"))?;
    println!("{}", process_table::table(&report.processes));
    println!("{} ms from exec to the guest's init", report.init_ms);
    for broken in &report.broken {
        println!("NOT HELD: {broken}");
    }
    if report.ok {
        println!("ok: the guest's checks passed, and every promise about its processes held");
    } else {
        println!("--- the guest's console:\n{console}");
    }
    if let Some(path) = &arguments.json {
        let text = serde_json::to_string_pretty(&report)?;
        fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(u8::from(!report.ok))
}

/// Hands the terminal to the guest.
fn shell(guest: &Guest) -> Result<u8> {
    eprintln!("… a shell in the guest; `exit` powers it off, Ctrl-A x ends it at once\r");
    let status = Command::new(vm::executable("ozone")).args(guest.arguments()).status().context("start ozone")?;
    Ok(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1))
}

/// Runs the guest's self-check and looks at the processes meanwhile.
fn check(guest: &Guest) -> Result<(Report, String)> {
    let start = Instant::now();
    let mut vm = guest.start()?;
    vm.expect("ozone-guest: init", vm::BOOT)?;
    let init_ms = u64::try_from(start.elapsed().as_millis())?;
    eprintln!("… the guest's init runs");
    let mut broken = Vec::new();
    let results = vm.expect("OZONE-CHECK end", vm::BOOT)?;
    for name in ["disk", "net"] {
        expect_ok(&results, name, &mut broken);
    }
    let processes = vm.processes()?;
    broken.extend(process_table::broken_promises(&processes, vm.pid()));
    finish(&mut vm, &mut broken);
    let report = Report { ok: broken.is_empty(), init_ms, processes, broken };
    Ok((report, vm.console_text()))
}

/// Lets the guest go on to its last check and its end.
fn finish(vm: &mut Vm, broken: &mut Vec<String>) {
    let last = vm.send_line("go").and_then(|()| vm.expect("OZONE-CHECK console", vm::ANSWER).map(drop));
    match last.and_then(|()| vm.expect("\n", vm::ANSWER)) {
        Ok(result) if result == " ok" => {}
        Ok(result) => broken.push(format!("guest: console{result}")),
        Err(error) => broken.push(format!("guest: {error:#}")),
    }
    if let Err(error) = vm.expect_exit(0, vm::ANSWER) {
        broken.push(format!("{error:#}"));
    }
}

fn expect_ok(results: &str, name: &str, broken: &mut Vec<String>) {
    let line = results.lines().find_map(|line| line.strip_prefix("OZONE-CHECK ")?.strip_prefix(name));
    match line {
        Some(" ok") => {}
        Some(other) => broken.push(format!("guest: {name}{other}")),
        None => broken.push(format!("guest: said nothing about its {name}")),
    }
}
