//! The template unit under a real systemd: one test per statement of it.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ozone_tests::artifacts::GuestFiles;
use ozone_tests::harness::Test;
use ozone_tests::systemd::Systemd;
use ozone_tests::vm::{ANSWER, BOOT, OPEN_POWER_BUTTON};
use serde_json::json;

/// The tests of this file.
pub const TESTS: [Test; 7] = [
    Test::host("systemd::the_unit_is_well_formed", the_unit_is_well_formed).with_userland(),
    Test::host("systemd::start_returns_when_the_machine_runs", start_returns_when_the_machine_runs).with_userland(),
    Test::host("systemd::its_cgroups_are_below_the_units", its_cgroups_are_below_the_units).with_userland(),
    Test::host("systemd::a_silent_ozone_is_ended_and_started_again", a_silent_ozone).with_userland(),
    Test::host("systemd::stop_presses_the_power_button", stop_presses_the_power_button).with_userland(),
    Test::host("systemd::a_guest_that_ignores_the_button_is_ended", a_guest_that_ignores_the_button).with_userland(),
    Test::host("systemd::a_panic_leaves_the_unit_failed", a_panic_leaves_the_unit_failed).with_userland(),
];

const UNIT: &str = "ozone@web1.service";
const TEMPLATE: &str = "/etc/systemd/system/ozone@.service";
const CONSOLE: &str = "/run/web1.console";
const DISK: &str = "/srv/web1.img";
const RECORD: &str = "/var/lib/ozone/web1.status.json";

/// systemd with the template, and a machine with a disk, a network interface and a console, whose guest does `init`.
fn systemd(init: &str) -> Result<Systemd> {
    let systemd = Systemd::start()?;
    systemd.write(TEMPLATE, include_bytes!("../../../ozone/systemd/ozone@.service"))?;
    let spec = json!({
        "version": 1,
        "kernel": "/guest/bzImage-6.1",
        "initrd": "/guest/initramfs-6.1.cpio",
        "append": format!("console=ttyS0 console=hvc0 quiet panic=-1 root=/dev/vda ozone.init={init}"),
        "limits": { "memory.max": "1G" },
        "devices": {
            "disk0": { "disk": { "path": DISK } },
            "net0": { "net": { "host-ip": "192.0.2.1/24" } },
            "console0": { "console": { "socket": CONSOLE } },
        },
    });
    systemd.write("/etc/ozone/web1.json", spec.to_string())?;
    fs::copy(GuestFiles::here()?.root_disk(), systemd.path(DISK)).context("copy the root disk")?;
    reload(&systemd)?;
    Ok(systemd)
}

fn reload(systemd: &Systemd) -> Result<()> {
    let (code, text) = systemd.systemctl(&["daemon-reload"])?;
    ensure!(code == 0, "daemon-reload: {text}");
    Ok(())
}

/// Another value for this test.
fn drop_in(systemd: &Systemd, text: &str) -> Result<()> {
    systemd.write(&format!("{TEMPLATE}.d/test.conf"), format!("[Service]\n{text}\n"))?;
    reload(systemd)
}

fn start(systemd: &Systemd) -> Result<()> {
    let (code, text) = systemd.systemctl(&["start", UNIT])?;
    ensure!(code == 0, "systemctl start: {text}\n{}", systemd.told(UNIT));
    Ok(())
}

/// The guest's console.
struct Console {
    stream: UnixStream,
    text: String,
}

impl Console {
    fn connect(systemd: &Systemd) -> Result<Self> {
        let stream = UnixStream::connect(systemd.path(CONSOLE)).context(CONSOLE)?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        Ok(Self { stream, text: String::new() })
    }

    /// Types a line again and again until the guest shows `answer`: what it shows before anybody listens is lost.
    fn ask(&mut self, line: &str, answer: &str) -> Result<()> {
        let deadline = Instant::now() + BOOT;
        while Instant::now() < deadline {
            writeln!(self.stream, "{line}")?;
            let mut block = [0; 4096];
            while let Ok(length @ 1..) = self.stream.read(&mut block) {
                self.text.push_str(&String::from_utf8_lossy(&block[..length]));
                if self.text.contains(answer) {
                    return Ok(());
                }
            }
        }
        bail!("no '{answer}' within {BOOT:?}: {}", self.text)
    }

    /// Types a line once.
    fn say(&mut self, line: &str) -> Result<()> {
        Ok(writeln!(self.stream, "{line}")?)
    }

    fn expect(&mut self, answer: &str) -> Result<()> {
        let deadline = Instant::now() + ANSWER;
        while !self.text.contains(answer) {
            let mut block = [0; 4096];
            let length = self.stream.read(&mut block).unwrap_or(0);
            self.text.push_str(&String::from_utf8_lossy(&block[..length]));
            ensure!(Instant::now() < deadline, "no '{answer}' within {ANSWER:?}: {}", self.text);
        }
        Ok(())
    }
}

fn record(systemd: &Systemd) -> Result<serde_json::Value> {
    let path = systemd.path(RECORD);
    Ok(serde_json::from_str(&fs::read_to_string(&path).with_context(|| path.display().to_string())?)?)
}

/// Every key is known, and every value is one.
fn the_unit_is_well_formed() -> Result<()> {
    let systemd = systemd("commands")?;
    let output =
        systemd.run(&["/usr/bin/systemd-analyze", "verify", "--man=no", "/etc/systemd/system/ozone@web1.service"]);
    // An instance that is no file is verified by its template.
    let output = match output {
        Ok(output) if output.status.success() => output,
        _ => systemd.run(&["/usr/bin/systemd-analyze", "verify", "--man=no", TEMPLATE])?,
    };
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    let about_it: Vec<&str> = text.lines().filter(|line| line.contains("ozone@")).collect();
    ensure!(output.status.success() && about_it.is_empty(), "{text}");
    Ok(())
}

fn start_returns_when_the_machine_runs() -> Result<()> {
    let systemd = systemd("commands")?;
    // As requests of an earlier machine do that are still under way, a lock on the image holds the launch up.
    let image = fs::File::options().read(true).write(true).open(systemd.path(DISK))?;
    image.lock()?;
    let mut starting = systemd.command(&["/bin/systemctl", "start", UNIT]).spawn()?;
    systemd.expect(UNIT, "ActiveState", "activating", ANSWER)?;
    systemd.until("the machine's processes", ANSWER, |systemd| {
        let group = systemd.path("/sys/fs/cgroup/machine.slice/ozone@web1.service/web1/jailed/core/cgroup.procs");
        Ok(fs::read_to_string(group).is_ok_and(|pids| !pids.is_empty()).then_some(()))
    })?;
    ensure!(starting.try_wait()?.is_none(), "systemctl start has returned, and nothing runs");
    ensure!(systemd.property(UNIT, "ActiveState")? == "activating");
    drop(image);
    let status = starting.wait()?;
    ensure!(status.success(), "systemctl start: {status}\n{}", systemd.told(UNIT));
    for (name, value) in [
        ("ActiveState", "active"),
        ("SubState", "running"),
        ("Type", "notify"),
        ("NotifyAccess", "main"),
        ("StatusText", "the machine runs"),
        ("NRestarts", "0"),
    ] {
        let got = systemd.property(UNIT, name)?;
        ensure!(got == value, "{name} is '{got}' instead of '{value}'\n{}", systemd.told(UNIT));
    }
    let output = systemd.run(&["/usr/local/bin/ozone", "status", "web1", "--json"])?;
    let status: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(status["state"] == "running", "{status:#}");
    let main = systemd.property(UNIT, "MainPID")?;
    ensure!(status["pid"].as_i64() == main.parse().ok(), "{main} is not that of {status:#}");
    Ok(())
}

fn its_cgroups_are_below_the_units() -> Result<()> {
    let systemd = systemd("commands")?;
    start(&systemd)?;
    let group = systemd.property(UNIT, "ControlGroup")?;
    ensure!(group == "/machine.slice/ozone@web1.service", "{group}");
    let machine = systemd.path(&format!("/sys/fs/cgroup{group}/web1"));
    for leaf in ["ozone", "jailed/core", "jailed/blk-disk0", "jailed/net-net0", "jailed/console-console0"] {
        // ozone joins the others when the guest runs.
        systemd
            .until(leaf, ANSWER, |_| {
                // KVM has a thread of its own in the core's group.
                let pids = fs::read_to_string(machine.join(leaf).join("cgroup.procs")).unwrap_or_default();
                Ok((!pids.is_empty()).then_some(()))
            })
            .with_context(|| systemd.told(UNIT))?;
    }
    ensure!(fs::read_to_string(machine.join("jailed/memory.max"))?.trim() == "1073741824");
    // What the unit is allowed counts for the machine.
    let output = systemd.run(&["/usr/local/bin/ozone", "audit", "web1"])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let (code, text) = systemd.systemctl(&["kill", "--kill-whom=main", "--signal=TERM", UNIT])?;
    ensure!(code == 0, "{text}");
    systemd.expect(UNIT, "ActiveState", "inactive", ANSWER)?;
    ensure!(systemd.property(UNIT, "Result")? == "success", "SIGTERM was somebody's wish\n{}", systemd.told(UNIT));
    ensure!(!machine.exists(), "the machine's groups are left");
    ensure!(record(&systemd)?["cause"] == "signal", "{:#}", record(&systemd)?);
    Ok(())
}

fn a_silent_ozone() -> Result<()> {
    let systemd = systemd("commands")?;
    drop_in(&systemd, "WatchdogSec=5")?;
    start(&systemd)?;
    let pid = systemd.property(UNIT, "MainPID")?;
    let stopped = systemd.run(&["/bin/kill", "-STOP", &pid])?;
    ensure!(stopped.status.success(), "{stopped:?}");
    systemd.expect(UNIT, "NRestarts", "1", BOOT)?;
    systemd.expect(UNIT, "ActiveState", "active", BOOT)?;
    ensure!(systemd.property(UNIT, "MainPID")? != pid);
    let output = systemd.run(&["/usr/local/bin/ozone", "status", "web1", "--json"])?;
    let status: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(status["state"] == "running", "{status:#}");
    Ok(())
}

fn stop_presses_the_power_button() -> Result<()> {
    let systemd = systemd("commands")?;
    start(&systemd)?;
    let mut console = Console::connect(&systemd)?;
    console.ask("echo it $((40 + 2))", "it 42")?;
    console.say(&format!(
        "{OPEN_POWER_BUTTON} && echo opened $((40 + 2)); dd bs=24 count=1 <&3 > /dev/null 2>&1; poweroff -f"
    ))?;
    console.expect("opened 42")?;
    let (code, text) = systemd.systemctl(&["stop", UNIT])?;
    ensure!(code == 0, "systemctl stop: {text}");
    for (name, value) in [("ActiveState", "inactive"), ("Result", "success"), ("ExecMainStatus", "0")] {
        let got = systemd.property(UNIT, name)?;
        ensure!(got == value, "{name} is '{got}' instead of '{value}'\n{}", systemd.told(UNIT));
    }
    let record = record(&systemd)?;
    ensure!(record["cause"] == "power-off" && record["exit-code"] == 0, "{record:#}");
    ensure!(record["memory"]["of"] == "cgroup", "{record:#}");
    Ok(())
}

fn a_guest_that_ignores_the_button() -> Result<()> {
    let systemd = systemd("commands")?;
    drop_in(&systemd, "TimeoutStopSec=3")?;
    start(&systemd)?;
    let (_, text) = systemd.systemctl(&["stop", UNIT])?;
    // Ended at once, but in order: the last word is ozone's.
    let record = record(&systemd).with_context(|| format!("{text}{}", systemd.told(UNIT)))?;
    ensure!(record["cause"] == "signal" && record["signal"] == "SIGTERM", "{record:#}");
    ensure!(systemd.property(UNIT, "ExecMainStatus")? == "143", "{}", systemd.told(UNIT));
    ensure!(!systemd.path("/run/ozone").exists(), "something is left");
    Ok(())
}

fn a_panic_leaves_the_unit_failed() -> Result<()> {
    let systemd = systemd("panic")?;
    start(&systemd)?;
    systemd.expect(UNIT, "ActiveState", "failed", BOOT)?;
    for (name, value) in [("Result", "exit-code"), ("ExecMainStatus", "10"), ("NRestarts", "0")] {
        let got = systemd.property(UNIT, name)?;
        ensure!(got == value, "{name} is '{got}' instead of '{value}'\n{}", systemd.told(UNIT));
    }
    let text = systemd.property(UNIT, "StatusText")?;
    ensure!(text == "the guest's kernel panicked", "{text}");
    ensure!(record(&systemd)?["cause"] == "panic", "{:#}", record(&systemd)?);
    Ok(())
}
