//! The same guest under each VMM: one processor, 256 MiB, three disks through the host's page cache, and a tap.

use std::path::{Path, PathBuf};
use std::process::Command;

use ozone_tests::artifacts::GuestFiles;
use ozone_tests::vm;

/// The host's address.
pub const HOST: &str = "192.0.2.1";

/// The tap that QEMU makes.
pub const TAP: &str = "bench-tap";

const WORDS: &str = "quiet panic=-1 reboot=t mitigations=off ozone.init=commands";

/// The VMMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vmm {
    Ozone,
    Microvm,
    Q35,
    /// The same with the kernel's vhost-net.
    Q35VhostNet,
}

/// A guest's disks in the order in which it finds them. All but the first are read-only.
pub type Disks = [PathBuf; 3];

impl Vmm {
    /// What it is called in the tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ozone => "ozone",
            Self::Microvm => "qemu microvm",
            Self::Q35 => "qemu q35",
            Self::Q35VhostNet => "qemu q35, vhost-net",
        }
    }

    /// The command that starts the guest; `qemu` is QEMU's executable.
    pub fn command(self, qemu: &Path, files: &GuestFiles, disks: &Disks) -> Command {
        if self == Self::Ozone { ozone(files, disks) } else { self.qemu(qemu, files, disks) }
    }

    fn qemu(self, program: &Path, files: &GuestFiles, disks: &Disks) -> Command {
        let mut command = Command::new(program);
        let (machine, kind) = match self {
            Self::Microvm => ("microvm", "device"),
            _ => ("q35", "pci"),
        };
        command.args(["-M", machine, "-accel", "kvm", "-cpu", "host", "-m", "256", "-nodefaults", "-no-user-config"]);
        command.args(["-nographic", "-no-reboot", "-serial", "stdio"]);
        command.arg("-kernel").arg(files.bzimage_6_1()).arg("-initrd").arg(files.initramfs_6_1());
        command.args(["-append", &format!("console=ttyS0 {WORDS}")]);
        command.args(["-object", "iothread,id=thread"]);
        for (index, disk) in disks.iter().enumerate() {
            let read_only = if index == 0 { "off" } else { "on" };
            command.arg("-drive").arg(format!(
                "if=none,id=disk{index},format=raw,cache=writeback,aio=threads,readonly={read_only},file={}",
                disk.display()
            ));
            command.arg("-device").arg(format!("virtio-blk-{kind},drive=disk{index},iothread=thread"));
        }
        let vhost = if self == Self::Q35VhostNet { "on" } else { "off" };
        command.arg("-netdev").arg(format!("tap,id=net,ifname={TAP},script=no,downscript=no,vhost={vhost}"));
        // The card's own firmware is for booting from the network.
        let firmware = if kind == "pci" { ",romfile=" } else { "" };
        command.arg("-device").arg(format!("virtio-net-{kind},netdev=net{firmware}"));
        command
    }
}

fn ozone(files: &GuestFiles, disks: &Disks) -> Command {
    let mut command = Command::new(vm::executable("ozone"));
    command.args(["run", "--console", "stdio", "--memory", "256M"]);
    command.arg("--kernel").arg(files.bzimage_6_1()).arg("--initrd").arg(files.initramfs_6_1());
    command.args(["--append", &format!("console=ttyS0 console=hvc0 {WORDS}")]);
    for (index, disk) in disks.iter().enumerate() {
        let read_only = if index == 0 { "" } else { ",readonly" };
        command.arg("--disk").arg(format!("path={}{read_only}", disk.display()));
    }
    command.args(["--net", &format!("host-ip={HOST}/24")]);
    command
}
