//! Disk and network as a guest's programs see them: fio and iperf3 of Debian in the same guest under ozone and under QEMU.
//!
//! In the test host everything is emulated, so what counts is the ratio of two VMMs.

mod disk;
mod network;
mod vmm;

use std::fs::{self, File};
use std::io::BufReader;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, unshare};
use ozone_tests::artifacts::GuestFiles;
use ozone_tests::host::Put;
use ozone_tests::tool;
use ozone_tests::vm::{self, Vm};
use serde::Deserialize;

use super::{Context, Row};
use crate::bench::{Contender, Figure, partners};
use network::{Server, Way};
use vmm::{Disks, HOST, TAP, Vmm};

/// How long round trips are measured, in milliseconds.
const MILLISECONDS: u64 = 1500;

/// Size of the disk in bytes.
const DISK: u64 = 64 << 20;

/// For everything in the guest, on a slow and busy machine.
const PATIENCE: Duration = Duration::from_secs(90);

const GUEST: &str = "192.0.2.2";

/// The image with fio and iperf3, in the test host.
const PROGRAMS: &str = "/partners/guest.ext4";

/// Makes the image of the programs a root to change to.
const MOUNT: &str = "mount -t ext4 -o ro /dev/vdb /root && mount -t devtmpfs dev /root/dev && \
                     mount -t proc proc /root/proc && mount -t tmpfs tmp /root/tmp";

/// What the suite needs in the test host: QEMU, fio and iperf3, and the load program.
pub fn puts() -> Result<Vec<Put>> {
    let mut puts = partners::puts(&["qemu-system-x86_64", "iperf3"])?;
    puts.extend(super::load()?);
    puts.extend(partners::unpacked().map(|it| Put { from: it.guest_disk(), to: PROGRAMS.to_owned() }));
    Ok(puts)
}

/// Measures.
pub fn run(context: &Context) -> Result<Vec<Row>> {
    let Some(iperf3) = partners::find("iperf3", None).filter(|_| Path::new(PROGRAMS).exists()) else {
        context.lacks("fio and iperf3: there are none");
        return Ok(Vec::new());
    };
    unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace: it takes root")?;
    let files = GuestFiles::here()?;
    let directory = tempfile::tempdir()?;
    let disks = [directory.path().join("data"), PROGRAMS.into(), directory.path().join("load")];
    load_disk(&disks[2])?;
    let _server = Server::start(&iperf3)?;
    let port = load::stream::serve()?;
    let qemu = partners::find("qemu-system-x86_64", context.partners.as_deref());
    let contender = |vmm: Vmm| {
        let (qemu, files, disks) = (qemu.clone().unwrap_or_default(), &files, &disks);
        Contender::new(vmm.name(), move || measure(vmm, &qemu, files, disks, port))
    };
    let rows = context.compare(vmms(context, qemu.as_deref()).into_iter().map(contender).collect())?;
    Ok(rows.iter().cloned().chain(ratios(&rows)).collect())
}

fn vmms(context: &Context, qemu: Option<&Path>) -> Vec<Vmm> {
    let mut vmms = vec![Vmm::Ozone];
    if qemu.is_none() {
        context.lacks("qemu-system-x86_64: there is none");
        return vmms;
    }
    vmms.extend([Vmm::Microvm, Vmm::Q35]);
    if Path::new("/dev/vhost-net").exists() {
        vmms.push(Vmm::Q35VhostNet);
    } else {
        context.lacks("vhost-net: there is no /dev/vhost-net");
    }
    vmms
}

/// The load program as a disk.
fn load_disk(path: &Path) -> Result<()> {
    let mut program = fs::read(vm::executable("load")).context("read the load program")?;
    program.resize(program.len().next_multiple_of(4096), 0);
    fs::write(path, program).context("make a disk")
}

/// One guest of this VMM, and all that is measured in it.
fn measure(vmm: Vmm, qemu: &Path, files: &GuestFiles, disks: &Disks, port: u16) -> Result<Vec<Figure>> {
    let data = &disks[0];
    fs::write(data, vec![0x5a; usize::try_from(DISK)?]).context("make a disk")?;
    let mut command = vmm.command(qemu, files, disks);
    let mut vm = Vm::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()))?;
    vm.expect("ozone-guest: ready\n", PATIENCE)?;
    guest(&mut vm, "mounts", MOUNT)?;
    guest(&mut vm, "the load program", "dd if=/dev/vdc of=/load bs=1M 2>/dev/null && chmod +x /load")?;
    guest(&mut vm, "fio", &format!("chroot /root {}", disk::command("/dev/vda", "/tmp/1")))?;
    if vmm != Vmm::Ozone {
        tool::output(Command::new("ip").args(["addr", "add", &format!("{HOST}/24"), "dev", TAP]))?;
        tool::output(Command::new("ip").args(["link", "set", TAP, "up"]))?;
    }
    guest(&mut vm, "its address", &format!("ip link set eth0 up && ip addr add {GUEST}/24 dev eth0"))?;
    let iperf3 = |way, report| format!("chroot /root {}", network::command(HOST, way, report));
    guest(&mut vm, "iperf3 from the guest", &iperf3(Way::FromGuest, "/tmp/2"))?;
    guest(&mut vm, "iperf3 to the guest", &iperf3(Way::ToGuest, "/tmp/3"))?;
    let stream = format!("/load stream --to {HOST}:{port} --milliseconds {MILLISECONDS} > /root/tmp/4");
    guest(&mut vm, "round trips", &stream)?;
    // A serial port takes seconds for what a disk takes at once.
    guest(&mut vm, "reports", "cat /root/tmp/[1234] | dd of=/dev/vda bs=64k conv=fsync 2>/dev/null")?;
    vm.send_line("poweroff -f")?;
    vm.expect_exit(0, PATIENCE)?;
    figures(data)
}

/// One command in the guest; `what` is what it is for.
fn guest(vm: &mut Vm, what: &str, line: &str) -> Result<()> {
    let (status, output) = vm.command(line, PATIENCE).with_context(|| format!("{what} in the guest"))?;
    anyhow::ensure!(status == 0, "{what} in the guest: exit status {status}\n{line}\n{output}");
    Ok(())
}

/// The reports that the guest left at the beginning of its disk, one behind the other.
fn figures(disk: &Path) -> Result<Vec<Figure>> {
    let mut reports = serde_json::Deserializer::from_reader(BufReader::new(File::open(disk)?));
    let mut figures = disk::figures(&Deserialize::deserialize(&mut reports).context("fio's report")?)?;
    for words in ["TCP from the guest", "TCP to the guest"] {
        let report = network::Report::deserialize(&mut reports).with_context(|| format!("report of {words}"))?;
        figures.push(Figure::new(words, "MB/s", report.rate()? / 1e6));
    }
    let found = load::stream::Found::deserialize(&mut reports).context("report of round trips")?;
    figures.push(Figure::new("TCP back and forth", "1/s", found.count as f64 / found.seconds));
    Ok(figures)
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
