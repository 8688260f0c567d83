//! From the initramfs onto a tmpfs: `pivot_root` refuses the initramfs, and the jails need it.

use std::convert::Infallible;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot, execv};

const NEW: &str = "/.root";

/// Moves everything to a tmpfs and starts this program again there.
pub fn move_to_tmpfs() -> Result<()> {
    fs::create_dir(NEW).context("make the new root")?;
    mount(Some("root"), NEW, Some("tmpfs"), MsFlags::empty(), Some("mode=755,size=90%"))
        .context("mount the new root")?;
    move_tree(Path::new("/"), Path::new(NEW))?;
    chdir(NEW).context("enter the new root")?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).context("move the new root")?;
    chroot(".").context("chroot")?;
    chdir("/")?;
    let _: Infallible = execv(c"/init", &[c"/init", c"init"]).context("start again")?;
    Ok(())
}

fn move_tree(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (path, kind, target) = (entry.path(), entry.file_type()?, to.join(entry.file_name()));
        if path == Path::new(NEW) {
            continue;
        } else if kind.is_dir() {
            fs::create_dir(&target)?;
            move_tree(&path, &target)?;
        } else if kind.is_symlink() {
            symlink(fs::read_link(&path)?, &target)?;
        } else if kind.is_file() {
            fs::copy(&path, &target).with_context(|| format!("copy {}", path.display()))?;
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}
