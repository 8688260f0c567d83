//! Another `/dev/kvm` for one test and the processes it starts.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, major, makedev, minor, mknod, stat};

const DEVICE: &str = "/dev/kvm";
const NOTHING: Option<&str> = None;

/// Gives this process a mount namespace of its own, whose changes nobody else sees.
fn own_mounts() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace for the test")?;
    Ok(mount(NOTHING, "/", NOTHING, MsFlags::MS_PRIVATE | MsFlags::MS_REC, NOTHING)?)
}

/// Puts the same device with this mode, root's as ever, in its place.
pub fn with_mode(mode: u32) -> Result<()> {
    let number = stat(DEVICE).context(DEVICE)?.st_rdev;
    own_mounts()?;
    let directory = tempfile::tempdir()?;
    mount(Some("none"), directory.path(), Some("tmpfs"), MsFlags::empty(), NOTHING)?;
    let node = directory.path().join("kvm");
    mknod(&node, SFlag::S_IFCHR, Mode::empty(), makedev(major(number), minor(number))).context("mknod")?;
    fs::set_permissions(&node, fs::Permissions::from_mode(mode))?;
    mount(Some(&node), DEVICE, NOTHING, MsFlags::MS_BIND, NOTHING)?;
    // The file stays where it is bound to.
    Ok(umount2(directory.path(), MntFlags::MNT_DETACH)?)
}

/// Leaves `/dev` with `null` alone.
pub fn without() -> Result<()> {
    own_mounts()?;
    let null = tempfile::NamedTempFile::new()?;
    mount(Some("/dev/null"), null.path(), NOTHING, MsFlags::MS_BIND, NOTHING)?;
    mount(Some("none"), "/dev", Some("tmpfs"), MsFlags::empty(), NOTHING)?;
    fs::write("/dev/null", "")?;
    mount(Some(null.path()), Path::new("/dev/null"), NOTHING, MsFlags::MS_BIND, NOTHING)?;
    Ok(umount2(null.path(), MntFlags::MNT_DETACH)?)
}
