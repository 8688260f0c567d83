//! Disk and network as a guest's programs see them: the same guest under ozone and under QEMU.
//!
//! A small static program does what fio and iperf3 would, which need half of a distribution around them. It comes into the
//! guest as a second disk. In the test host everything is emulated, so what counts is the ratio of two VMMs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, unshare};
use ozone_tests::artifacts::GuestFiles;
use ozone_tests::host::Put;
use ozone_tests::vm::{self, Vm};
use ozone_tests::{build, paths, tool};
use serde::de::DeserializeOwned;

use super::{Context, Row};
use crate::bench::{Contender, Figure, partners};

/// How long one measurement takes, in milliseconds.
const MILLISECONDS: u64 = 1500;

/// Size of the disk in bytes.
const DISK: u64 = 64 << 20;

/// For everything in the guest, on a slow and busy machine.
const PATIENCE: Duration = Duration::from_secs(90);

const HOST: &str = "192.0.2.1";
const GUEST: &str = "192.0.2.2";

/// The tap that QEMU makes.
const TAP: &str = "bench-tap";

/// What is done to the disk: words, pattern, bytes, threads.
const JOBS: [(&str, &str, u32, u32); 5] = [
    ("random read 4 KiB", "random-read", 4096, 1),
    ("random read 4 KiB, 8 threads", "random-read", 4096, 8),
    ("random write 4 KiB", "random-write", 4096, 1),
    ("read 256 KiB", "read", 262_144, 1),
    ("write 256 KiB", "write", 262_144, 1),
];

/// The VMMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vmm {
    Ozone,
    Microvm,
    Q35,
    /// The same with the kernel's vhost-net.
    Q35VhostNet,
}

impl Vmm {
    fn name(self) -> &'static str {
        match self {
            Self::Ozone => "ozone",
            Self::Microvm => "qemu microvm",
            Self::Q35 => "qemu q35",
            Self::Q35VhostNet => "qemu q35, vhost-net",
        }
    }
}

/// What the suite needs in the test host: QEMU, and the load program.
pub fn puts() -> Result<Vec<Put>> {
    build::cargo(["build", "--quiet", "--release", "--package", "load"])?;
    let mut puts = partners::qemu()?;
    puts.push(Put::executable(paths::release().join("load")));
    Ok(puts)
}

/// The files of a guest's disks.
struct Disks {
    directory: tempfile::TempDir,
}

impl Disks {
    fn make() -> Result<Self> {
        let disks = Self { directory: tempfile::tempdir()? };
        fs::write(disks.data(), vec![0x5a; usize::try_from(DISK)?]).context("make a disk")?;
        let mut program = fs::read(vm::executable("load")).context("read the load program")?;
        program.resize(program.len().next_multiple_of(4096), 0);
        fs::write(disks.program(), program)?;
        Ok(disks)
    }

    fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    fn program(&self) -> PathBuf {
        self.directory.path().join("program")
    }
}

/// Measures.
pub fn run(context: &Context) -> Result<Vec<Row>> {
    unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace: it takes root")?;
    let files = GuestFiles::here()?;
    let disks = Disks::make()?;
    let port = load::stream::serve()?;
    let mut contenders = vec![Vmm::Ozone];
    if partners::find("qemu-system-x86_64", context.partners.as_deref()).is_some() {
        contenders.extend([Vmm::Microvm, Vmm::Q35]);
        if Path::new("/dev/vhost-net").exists() {
            contenders.push(Vmm::Q35VhostNet);
        } else {
            context.lacks("vhost-net: there is no /dev/vhost-net");
        }
    } else {
        context.lacks("qemu-system-x86_64 (Debian's package qemu-system-x86)");
    }
    let contender = |vmm: Vmm| {
        let (files, disks) = (&files, &disks);
        Contender::new(vmm.name(), move || measure(context, vmm, files, disks, port))
    };
    let rows = context.compare(contenders.into_iter().map(contender).collect())?;
    Ok(rows.iter().cloned().chain(ratios(&rows)).collect())
}

/// One guest of this VMM, and all that is measured in it.
fn measure(context: &Context, vmm: Vmm, files: &GuestFiles, disks: &Disks, port: u16) -> Result<Vec<Figure>> {
    let mut command = command(context, vmm, files, disks)?;
    let mut vm = Vm::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()))?;
    vm.expect("ozone-guest: ready\n", PATIENCE)?;
    vm.guest("dd if=/dev/vdb of=/load bs=1M 2>/dev/null && chmod +x /load")?;
    let mut figures = Vec::new();
    for (words, pattern, block, threads) in JOBS {
        let line = format!(
            "/load file --path /dev/vda --pattern {pattern} --block {block} --threads {threads} --milliseconds {MILLISECONDS}"
        );
        let found: load::file::Found = answer(&mut vm, &line)?;
        figures.push(Figure::new(words, "op/s", found.operations as f64 / found.seconds));
        figures.push(Figure::new(format!("{words}, p99"), "µs", found.p99 as f64 / 1e3));
    }
    if vmm != Vmm::Ozone {
        tool::output(Command::new("ip").args(["addr", "add", &format!("{HOST}/24"), "dev", TAP]))?;
        tool::output(Command::new("ip").args(["link", "set", TAP, "up"]))?;
    }
    vm.guest(&format!("ip link set eth0 up && ip addr add {GUEST}/24 dev eth0"))?;
    for (words, way) in
        [("TCP from the guest", "send"), ("TCP to the guest", "receive"), ("TCP back and forth", "echo")]
    {
        let line = format!("/load stream --to {HOST}:{port} --way {way} --milliseconds {MILLISECONDS}");
        let found: load::stream::Found = answer(&mut vm, &line)?;
        let rate = found.count as f64 / found.seconds;
        figures.push(if way == "echo" {
            Figure::new(words, "1/s", rate)
        } else {
            Figure::new(words, "MB/s", rate / 1e6)
        });
    }
    vm.send_line("poweroff -f")?;
    vm.expect_exit(0, PATIENCE)?;
    Ok(figures)
}

fn answer<T: DeserializeOwned>(vm: &mut Vm, line: &str) -> Result<T> {
    let (status, output) = vm.command(line, PATIENCE)?;
    anyhow::ensure!(status == 0, "in the guest: {line}: exit status {status}\n{output}");
    let json = output.lines().find(|line| line.starts_with('{')).with_context(|| format!("no answer: {output}"))?;
    Ok(serde_json::from_str(json)?)
}

/// One processor and 256 MiB; disks through the host's page cache, as ozone's are.
fn command(context: &Context, vmm: Vmm, files: &GuestFiles, disks: &Disks) -> Result<Command> {
    let words = "quiet panic=-1 reboot=t mitigations=off ozone.init=commands";
    if vmm == Vmm::Ozone {
        let mut command = Command::new(vm::executable("ozone"));
        command.args(["run", "--console", "stdio", "--memory", "256M"]);
        command.arg("--kernel").arg(files.bzimage_6_1()).arg("--initrd").arg(files.initramfs_6_1());
        command.args(["--append", &format!("console=ttyS0 console=hvc0 {words}")]);
        for disk in [disks.data(), disks.program()] {
            command.arg("--disk").arg(format!("path={}", disk.display()));
        }
        command.args(["--net", &format!("host-ip={HOST}/24")]);
        return Ok(command);
    }
    let program = partners::find("qemu-system-x86_64", context.partners.as_deref()).context("no QEMU")?;
    let mut command = Command::new(program);
    let (machine, kind) = match vmm {
        Vmm::Microvm => ("microvm,pic=off,pit=off,rtc=off", "device"),
        _ => ("q35", "pci"),
    };
    command.args(["-M", machine, "-accel", "kvm", "-cpu", "host", "-m", "256", "-nodefaults", "-no-user-config"]);
    command.args(["-nographic", "-no-reboot", "-serial", "stdio"]);
    command.arg("-kernel").arg(files.bzimage_6_1()).arg("-initrd").arg(files.initramfs_6_1());
    command.args(["-append", &format!("console=ttyS0 {words}")]);
    command.args(["-object", "iothread,id=thread"]);
    for (index, disk) in [disks.data(), disks.program()].iter().enumerate() {
        let disk = disk.display();
        command.arg("-drive").arg(format!("if=none,id=disk{index},format=raw,cache=writeback,aio=threads,file={disk}"));
        command.arg("-device").arg(format!("virtio-blk-{kind},drive=disk{index},iothread=thread"));
    }
    let vhost = if vmm == Vmm::Q35VhostNet { "on" } else { "off" };
    command.arg("-netdev").arg(format!("tap,id=net,ifname={TAP},script=no,downscript=no,vhost={vhost}"));
    command.arg("-device").arg(format!("virtio-net-{kind},netdev=net"));
    Ok(command)
}

/// How much of each partner's speed ozone reaches: median by median. Of latencies there are none.
fn ratios(rows: &[Row]) -> Vec<Row> {
    let ozone = rows.iter().filter(|row| row.name == Vmm::Ozone.name() && row.unit != "µs");
    let pairs = ozone.flat_map(|own| rows.iter().map(move |row| (own, row)));
    let pairs = pairs.filter(|(own, row)| row.name != own.name && row.metric == own.metric && row.median > 0.0);
    let ratio = |(own, row): (&Row, &Row)| {
        let value = own.median / row.median;
        let (min, max) = (own.min / row.max, own.max / row.min.max(f64::MIN_POSITIVE));
        Row { name: format!("ozone / {}", row.name), unit: String::new(), median: value, min, max, ..own.clone() }
    };
    pairs.map(ratio).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speeds_are_divided_and_latencies_left_out() {
        let row = |name: &str, metric: &str, unit: &str, median: f64| Row {
            name: name.into(),
            metric: metric.into(),
            unit: unit.into(),
            median,
            min: median,
            max: median,
            n: 1,
            note: None,
        };
        let rows = [
            row("ozone", "read", "op/s", 30.0),
            row("ozone", "read, p99", "µs", 9.0),
            row("qemu q35", "read", "op/s", 20.0),
            row("qemu q35", "read, p99", "µs", 3.0),
        ];
        let ratios = ratios(&rows);
        assert_eq!(ratios.len(), 1);
        assert_eq!((ratios[0].name.as_str(), ratios[0].median), ("ozone / qemu q35", 1.5));
    }
}
