//! What the test host boots: Debian 12's cloud kernel and an initramfs whose init is the agent.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::apt::{self, Packages};
use super::archive::Archive;
use super::store::{self, Stored};
use super::{kernel, modules};
use crate::build;

/// What the product, its tests and the agent use; dependencies follow by themselves.
const MODULES: [&str; 24] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "irqbypass",
    "kvm",
    "kvm_amd",
    "tun",
    "bridge",
    "veth",
    "loop",
    "overlay",
    "squashfs",
    "nf_tables",
    "nft_chain_nat",
    "nft_ct",
    "nft_masq",
    "vhost",
    "vhost_net",
    "vhost_vsock",
    "dm_mod",
    "dm_delay",
    "dm_flakey",
    "vsock_loopback",
];

/// The test host's files in the cache.
#[derive(Debug)]
pub struct HostFiles {
    stored: Stored,
    key: String,
}

impl HostFiles {
    /// The kernel.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.stored.path().join("bzImage")
    }

    /// The initramfs.
    #[must_use]
    pub fn initramfs(&self) -> PathBuf {
        self.stored.path().join("initramfs.cpio")
    }

    /// Stands for the contents.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }
}

/// The test host's files, made if they are not there yet.
pub fn host() -> Result<HostFiles> {
    let agent = build::agent()?;
    let agent = fs::read(&agent).with_context(|| format!("read {}", agent.display()))?;
    let packages = apt::packages()?;
    let key = store::key([
        packages.versions()?.as_slice(),
        agent.as_slice(),
        include_bytes!("host.rs"),
        include_bytes!("archive.rs"),
        include_bytes!("modules.rs"),
    ]);
    let stored = store::directory("host", &key, |directory| make(&packages, &agent, directory))?;
    Ok(HostFiles { stored, key })
}

fn make(packages: &Packages, agent: &[u8], directory: &Path) -> Result<()> {
    fs::copy(kernel::bzimage(&packages.linux_6_1())?, directory.join("bzImage"))?;
    let mut archive = Archive::create(&directory.join("initramfs.cpio"))?;
    for name in ["bin", "dev", "modules", "proc", "sys"] {
        archive.directory(name)?;
    }
    archive.character_device("dev/console", (5, 1))?;
    archive.file("init", 0o755, agent)?;
    archive.file("bin/busybox", 0o755, &fs::read(packages.busybox())?)?;
    let mut order = String::new();
    for module in modules::collect(&packages.linux_6_1(), &MODULES)? {
        archive.file(&format!("modules/{}", module.file_name), 0o644, &module.contents)?;
        order.push_str(&format!("{}\n", module.file_name));
    }
    archive.file("modules/order", 0o644, order.as_bytes())?;
    archive.finish()
}
