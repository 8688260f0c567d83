//! What the other tests take for granted about the machine they run on.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use kvm_ioctls::Kvm;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, pivot_root};
use ozone_tests::harness::Test;

/// The tests of this file.
pub const TESTS: [Test; 3] = [
    Test::local("the_host::kvm_makes_a_vm", kvm_makes_a_vm),
    Test::local("the_host::pivot_root_works_in_a_new_mount_namespace", pivot_root_works),
    Test::host("the_host::has_cgroups_and_user_namespaces", has_cgroups_and_user_namespaces),
];

fn kvm_makes_a_vm() -> Result<()> {
    let kvm = Kvm::new().context("open /dev/kvm")?;
    ensure!(kvm.get_api_version() == 12, "KVM API version {}", kvm.get_api_version());
    let vm = kvm.create_vm().context("create a VM")?;
    vm.create_irq_chip().context("create the interrupt controllers")?;
    vm.create_vcpu(0).context("create a vCPU")?;
    Ok(())
}

fn pivot_root_works() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("unshare")?;
    let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).context("make mounts private")?;
    let root = tempfile::tempdir()?;
    mount(Some("root"), root.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>).context("mount tmpfs")?;
    chdir(root.path())?;
    pivot_root(".", ".").context("pivot_root")?;
    umount2(".", MntFlags::MNT_DETACH).context("unmount the old root")?;
    chdir("/")?;
    ensure!(fs::read_dir("/")?.next().is_none(), "the new root is not empty");
    Ok(())
}

fn has_cgroups_and_user_namespaces() -> Result<()> {
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").context("no cgroup2")?;
    for name in ["cpu", "io", "memory", "pids"] {
        ensure!(controllers.split_whitespace().any(|it| it == name), "no {name} controller: {controllers}");
    }
    let output = Command::new("unshare").args(["--user", "--map-root-user", "id", "-u"]).output()?;
    ensure!(output.status.success() && output.stdout == b"0\n", "no user namespaces: {output:?}");
    Ok(())
}
