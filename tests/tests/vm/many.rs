//! Fifty machines at once: all run, all end, and nothing of them is left. What each costs is for the bench to say
//! (`cargo xtask bench launch`).

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;

use agent::layout;
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use ozone_tests::control;
use ozone_tests::harness::Test;
use ozone_tests::payload::Code;
use ozone_tests::process_table::Process;
use ozone_tests::vm::{ANSWER, BOOT, Vm};

/// The tests of this file. Their guests are tiny, so that any KVM runs them.
pub const TESTS: [Test; 2] = [
    Test::local("many::fifty_machines_run_at_once", fifty_machines_run_at_once),
    Test::local("many::fifty_machines_end_by_themselves", fifty_machines_end_by_themselves),
];

/// An emulated machine is too slow for fifty: a process that is not ready within ten seconds counts as lost.
fn machines() -> usize {
    if std::env::var_os(layout::IN_HOST).is_some() { 8 } else { 50 }
}

/// Machines with names that no others on this host have, started one right after the other.
struct Machines {
    vms: Vec<Vm>,
    names: Vec<String>,
    _kernel: tempfile::TempDir,
}

impl Machines {
    fn start(stem: &str, code: &Code) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let kernel = directory.path().join("kernel");
        std::fs::write(&kernel, code.elf())?;
        let names: Vec<String> =
            (0..machines()).map(|number| format!("{stem}-{}-{number}", std::process::id())).collect();
        let machine = |name: &String| {
            let words = ["run", "--memory", "64M", "--name", name, "--kernel"].map(Path::new);
            Vm::start(words.into_iter().chain([kernel.as_path()]))
        };
        let vms = names.iter().map(machine).collect::<Result<_>>()?;
        Ok(Self { vms, names, _kernel: directory })
    }

    /// Nothing is left: of other machines on this host nobody can tell.
    fn expect_gone(&self, processes: &[Process]) -> Result<()> {
        for name in &self.names {
            for place in ["/run/ozone/machines", "/sys/fs/cgroup/ozone"] {
                let path = Path::new(place).join(name);
                ensure!(!path.exists(), "{} is left", path.display());
            }
        }
        let deadline = Instant::now() + ANSWER;
        for Process { pid, role, .. } in processes {
            let is_there = || {
                let comm = std::fs::read_to_string(format!("/proc/{pid}/comm"));
                comm.is_ok_and(|name| role.starts_with(name.trim()))
            };
            while is_there() {
                ensure!(Instant::now() < deadline, "{role} (process {pid}) is left");
                // Polled: the last of a dead process goes when the kernel gets to it, and nothing tells.
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        }
        Ok(())
    }
}

fn fifty_machines_run_at_once() -> Result<()> {
    let mut machines = Machines::start("run", &Code::default().print("it runs\n").halt())?;
    for vm in &mut machines.vms {
        vm.expect("it runs\n", BOOT)?;
    }
    // None has ended while the others were starting, and no two processes share a user.
    let (mut users, mut all) = (BTreeSet::new(), Vec::new());
    for (name, vm) in machines.names.iter().zip(&machines.vms) {
        let status = control::all_up(name)?;
        ensure!(status.state == "running" && status.pid == vm.pid(), "{status:#?}");
        for process in vm.processes()?.into_iter().filter(|process| process.pid != vm.pid()) {
            ensure!(users.insert(process.uid), "{} of {name} shares user {}", process.role, process.uid);
            all.push(process);
        }
    }
    ensure!(all.len() == 2 * machines.vms.len(), "a core and a console each: {}", all.len());
    for vm in &machines.vms {
        vm.signal(Signal::SIGTERM)?;
    }
    for vm in &mut machines.vms {
        vm.expect_exit(143, BOOT)?;
    }
    machines.expect_gone(&all)
}

fn fifty_machines_end_by_themselves() -> Result<()> {
    let mut machines = Machines::start("end", &Code::default().print("it ran\n").power_off())?;
    for (name, vm) in machines.names.iter().zip(&mut machines.vms) {
        vm.expect_exit(0, BOOT).with_context(|| name.clone())?;
        vm.expect("it ran\n", BOOT).with_context(|| name.clone())?;
    }
    machines.expect_gone(&[])
}
