//! The root of a program's jail: an empty file system, and in it the program and what it was given of the host.
//!
//! All of it happens in the child's own mount namespace. What is mounted is a copy of the host's mount that is restricted
//! before it is anywhere, and places for it are made in the jail's own file system alone.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::libc;
use nix::sys::stat::{FileStat, Mode, fstat, mkdirat, umask};
use nix::unistd;

use super::source::Uses;
use super::sys;
use crate::directory::FileId;
use crate::jail::steps::Special;
use crate::jail::{mount_over_root, tmpfs};

/// Whether it is a directory.
pub fn is_directory(stat: &FileStat) -> bool {
    stat.st_mode & libc::S_IFMT == libc::S_IFDIR
}

/// Mounts an empty file system over the root and enters it. Paths from the root are the host's until pivot_root.
#[derive(Debug)]
pub struct Empty {
    /// How many places are made in it: names, not paths.
    pub places: usize,
}

impl Special for Empty {
    fn name(&self) -> &'static str {
        "mount root"
    }

    fn perform(&self) -> Result<(), Errno> {
        // Directories and files have the mode that they are given here; the program's mask comes later.
        umask(Mode::empty());
        // The root itself is an inode too.
        let inodes = CString::new((self.places + 1).to_string()).map_err(|_| Errno::EINVAL)?;
        let root = tmpfs(&inodes, 0)?;
        mount_over_root(root.as_fd())?;
        unistd::fchdir(&root)
    }
}

/// Mounts something of the host in the root, which is the current directory.
#[derive(Debug)]
pub struct Bind {
    /// What it is to the user.
    pub title: String,
    /// Its path on the host.
    pub path: PathBuf,
    /// What was found there, and is held open: nothing else is mounted.
    pub found: FileId,
    /// Its path in the jail.
    pub target: PathBuf,
    /// What it may be used for.
    pub uses: Uses,
}

impl Special for Bind {
    fn name(&self) -> &'static str {
        "mount source"
    }

    fn title(&self) -> String {
        self.title.clone()
    }

    fn remedy(&self, errno: Errno) -> String {
        match errno {
            Errno::ESTALE => " (it was replaced by another while the jail was made; start it again)".to_owned(),
            Errno::EINVAL => " (what is mounted there cannot be mounted elsewhere)".to_owned(),
            _ => String::new(),
        }
    }

    fn perform(&self) -> Result<(), Errno> {
        let path = CString::new(self.path.as_os_str().as_encoded_bytes()).map_err(|_| Errno::EINVAL)?;
        let mount = sys::copy_of_mounts(&path)?;
        let stat = fstat(&mount)?;
        if FileId::from(&stat) != self.found {
            return Err(Errno::ESTALE);
        }
        sys::restrict(mount.as_fd(), self.attributes(), true)?;
        let place = make_place(&self.target, is_directory(&stat))?;
        sys::mount_at(mount.as_fd(), place.as_fd())
    }
}

impl Bind {
    /// What of the mount's uses is taken away.
    fn attributes(&self) -> u64 {
        let without = |allowed: bool, attribute: u64| if allowed { 0 } else { attribute };
        libc::MOUNT_ATTR_NOSUID
            | without(self.uses.write, libc::MOUNT_ATTR_RDONLY)
            | without(self.uses.devices, libc::MOUNT_ATTR_NODEV)
            | without(self.uses.execute, libc::MOUNT_ATTR_NOEXEC)
    }
}

/// The names of a path from the root.
pub fn names(target: &Path) -> impl Iterator<Item = &std::ffi::OsStr> {
    target.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name),
        _ => None,
    })
}

/// Makes an empty directory or file below the current directory, with the directories above it, on its file system alone.
fn make_place(target: &Path, directory: bool) -> Result<OwnedFd, Errno> {
    let (flags, nobody) = (OFlag::O_PATH | OFlag::O_DIRECTORY, Mode::empty());
    let mut above = openat(nix::fcntl::AT_FDCWD, ".", flags | OFlag::O_CLOEXEC, nobody)?;
    let mut names = names(target).peekable();
    while let Some(name) = names.next() {
        let last = names.peek().is_none();
        let flags = if last && !directory {
            let (create, mode) = (OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY, Mode::from_bits_truncate(0o444));
            drop(openat(&above, name, create | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, mode)?);
            OFlag::O_PATH
        } else {
            match mkdirat(&above, name, Mode::from_bits_truncate(0o555)) {
                Ok(()) => {}
                // One that another source has above it; the last one is its own.
                Err(Errno::EEXIST) if !last => {}
                Err(errno) => return Err(errno),
            }
            flags
        };
        let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV;
        above = openat2(&above, name, OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve))?;
    }
    Ok(above)
}

/// Nothing can be made in the root any more, the current directory.
#[derive(Debug)]
pub struct Seal;

impl Special for Seal {
    fn name(&self) -> &'static str {
        "make root read-only"
    }

    fn perform(&self) -> Result<(), Errno> {
        let root = openat(nix::fcntl::AT_FDCWD, "/", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
        sys::restrict(root.as_fd(), libc::MOUNT_ATTR_RDONLY, false)
    }
}
