//! What a guest boots: two Debian kernels, an initramfs for each, and a small ext4 root.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use agent::layout;
use anyhow::{Context, Result};

use super::apt::{self, Packages};
use super::archive::Archive;
use super::store::{self, Stored};
use super::{ext4, kernel, modules};
use crate::tool;

/// Drivers of the devices that ozone offers or will offer.
const MODULES: [&str; 10] = [
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "virtio_balloon",
    "pvpanic_mmio",
    "button",
    "evdev",
];

/// Paths of the guest's files, on this machine or in the test host.
#[derive(Clone, Debug)]
pub struct GuestFiles {
    directory: PathBuf,
}

impl GuestFiles {
    /// The files in the place where the present program finds them: the test host's, else the cache's.
    pub fn here() -> Result<Self> {
        if std::env::var_os(layout::IN_HOST).is_some() {
            return Ok(Self { directory: layout::GUEST.into() });
        }
        let stored = guest()?;
        let directory = stored.path().to_owned();
        // Kept from removal until this process ends.
        std::mem::forget(stored);
        Ok(Self { directory })
    }

    /// Debian 12's cloud kernel.
    #[must_use]
    pub fn bzimage_6_1(&self) -> PathBuf {
        self.directory.join("bzImage-6.1")
    }

    /// The cloud kernel of Debian 12's backports.
    #[must_use]
    pub fn bzimage_6_12(&self) -> PathBuf {
        self.directory.join("bzImage-6.12")
    }

    /// The ELF kernel inside [`Self::bzimage_6_1`].
    #[must_use]
    pub fn vmlinux_6_1(&self) -> PathBuf {
        self.directory.join("vmlinux-6.1")
    }

    /// The initramfs for the 6.1 kernels.
    #[must_use]
    pub fn initramfs_6_1(&self) -> PathBuf {
        self.directory.join("initramfs-6.1.cpio")
    }

    /// The initramfs for the 6.12 kernel.
    #[must_use]
    pub fn initramfs_6_12(&self) -> PathBuf {
        self.directory.join("initramfs-6.12.cpio")
    }

    /// The root file system; guests write to a copy of it.
    #[must_use]
    pub fn root_disk(&self) -> PathBuf {
        self.directory.join("root.ext4")
    }
}

/// Names of the files, in the cache and in [`layout::GUEST`].
pub const FILES: [&str; 6] =
    ["bzImage-6.1", "bzImage-6.12", "vmlinux-6.1", "initramfs-6.1.cpio", "initramfs-6.12.cpio", "root.ext4"];

/// The guest's files in the cache, made if they are not there yet.
pub fn guest() -> Result<Stored> {
    let packages = apt::packages()?;
    let key = store::key([
        packages.versions()?.as_slice(),
        include_bytes!("guest.rs"),
        include_bytes!("guest-init.sh"),
        include_bytes!("root-init.sh"),
        include_bytes!("archive.rs"),
        include_bytes!("ext4.rs"),
        include_bytes!("modules.rs"),
    ]);
    store::directory("guest", &key, |directory| make(&packages, directory))
}

fn make(packages: &Packages, directory: &Path) -> Result<()> {
    let busybox = fs::read(packages.busybox()).context("read busybox")?;
    let applets = tool::output(Command::new(packages.busybox()).arg("--list"))?;
    let applets: Vec<_> = applets.lines().filter(|name| *name != "busybox").collect();
    for (series, package) in [("6.1", packages.linux_6_1()), ("6.12", packages.linux_6_12())] {
        fs::copy(kernel::bzimage(&package)?, directory.join(format!("bzImage-{series}")))?;
        let path = directory.join(format!("initramfs-{series}.cpio"));
        initramfs(&path, &package, &busybox, &applets)?;
    }
    let bzimage = fs::read(directory.join("bzImage-6.1"))?;
    fs::write(directory.join("vmlinux-6.1"), kernel::vmlinux(&bzimage).context("extract vmlinux")?)?;
    root_disk(directory, &packages.busybox(), &applets)
}

fn initramfs(path: &Path, package: &Path, busybox: &[u8], applets: &[&str]) -> Result<()> {
    let mut archive = Archive::create(path)?;
    for name in ["bin", "dev", "modules", "proc", "root", "sys"] {
        archive.directory(name)?;
    }
    archive.character_device("dev/console", (5, 1))?;
    archive.file("init", 0o755, include_bytes!("guest-init.sh"))?;
    archive.file("bin/busybox", 0o755, busybox)?;
    for applet in applets {
        archive.symlink(&format!("bin/{applet}"), "busybox")?;
    }
    let mut order = String::new();
    for module in modules::collect(package, &MODULES)? {
        archive.file(&format!("modules/{}", module.file_name), 0o644, &module.contents)?;
        order.push_str(&format!("{}\n", module.file_name));
    }
    archive.file("modules/order", 0o644, order.as_bytes())?;
    archive.finish()
}

fn root_disk(directory: &Path, busybox: &Path, applets: &[&str]) -> Result<()> {
    let tree = tempfile::tempdir_in(directory)?;
    let root = tree.path();
    fs::set_permissions(root, fs::Permissions::from_mode(0o755))?;
    for name in ["bin", "dev", "etc", "mnt", "proc", "root", "run", "sbin", "sys", "tmp"] {
        fs::create_dir(root.join(name))?;
    }
    fs::copy(busybox, root.join("bin/busybox"))?;
    for applet in applets {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    fs::write(root.join("sbin/init"), include_str!("root-init.sh"))?;
    fs::set_permissions(root.join("sbin/init"), fs::Permissions::from_mode(0o755))?;
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
    fs::write(root.join("etc/group"), "root:x:0:\n")?;
    fs::write(root.join("etc/profile"), "PS1='ozone-guest# '\n")?;
    ext4::make(root, &directory.join("root.ext4"), "ozone-root", "64M")
}
