//! `--boot-trace` tells what every process of a launch did, and in which order.

use anyhow::{Context, Result, ensure};
use ozone_tests::boot_trace::BootTrace;
use ozone_tests::harness::Test;
use ozone_tests::payload::Code;
use ozone_tests::vm::{ANSWER, BOOT, Guest, Vm};

/// The tests of this file.
pub const TESTS: [Test; 2] = [
    Test::local("trace::a_launch_to_the_first_instruction", a_launch),
    Test::host("trace::a_boot_to_the_drivers", a_boot),
];

fn in_order(trace: &BootTrace, process: &str, steps: &[&str]) -> Result<()> {
    let mut last = 0.0;
    for name in steps {
        let step = trace.step(process, name).with_context(|| format!("{process} has no '{name}' in {trace:#?}"))?;
        ensure!(step.start >= last, "'{name}' of {process} is too early in {trace:#?}");
        last = step.start;
    }
    Ok(())
}

fn a_launch() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (kernel, path) = (directory.path().join("kernel"), directory.path().join("trace.json"));
    std::fs::write(&kernel, Code::default().power_off().elf())?;
    let words = ["run", "--memory", "64M", "--kernel"].map(Into::into);
    let words = words.into_iter().chain([kernel.into(), "--boot-trace".into(), path.clone().into_os_string()]);
    Vm::start(words)?.expect_exit(0, ANSWER)?;

    let trace = BootTrace::read(&path)?;
    in_order(
        &trace,
        "ozone",
        &[
            "resolve the machine",
            "open resources",
            "make empty root",
            "confine ozone",
            "start core",
            "await jails",
            "await running",
        ],
    )?;
    let jail = [
        "clone3",
        "enter empty root",
        "setsid",
        "make user namespace",
        "setresuid",
        "enter Landlock domain",
        "install seccomp filter",
        "execveat",
        "await first message",
    ];
    in_order(&trace, "core", &jail)?;
    in_order(&trace, "console/console0", &jail)?;
    in_order(&trace, "console/console0", &["execveat", "open device", "install run filter"])?;
    let core = ["execveat", "make memory", "load kernel", "make machine", "make vCPUs", "install run filter"];
    in_order(&trace, "core", &core)?;
    in_order(&trace, "core", &["await first message", "handshake console0", "first guest instruction"])
}

fn a_boot() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("trace.json");
    let guest = Guest::new()?;
    let disk = guest.root_disk()?;
    let mut vm = guest.disk(&disk).init("poweroff").option("--boot-trace", &path).start()?;
    vm.expect_exit(0, BOOT)?;
    let trace = BootTrace::read(&path)?;
    for device in ["disk0", "console0"] {
        let ready = format!("DRIVER_OK {device}");
        in_order(&trace, "core", &[&format!("handshake {device}"), "first guest instruction", &ready])?;
    }
    Ok(())
}
