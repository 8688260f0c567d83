//! Where a machine's control groups are made. docs/decisions/0009 says why there.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::geteuid;

use super::CgroupError;
use super::delegated;
use super::directory::Directory;
use crate::spec::limits::{Limits, MOUNT};

/// The group for all machines that have no better place, below the root.
pub const COMMON: &str = "ozone";

/// The host's hierarchy, and the places in it.
#[derive(Debug)]
pub struct Place {
    /// The root of the hierarchy.
    pub root: Directory,
    /// Where the machine's group is made.
    pub parent: Parent,
    /// Where `ozone` is now, if it can be seen.
    pub origin: Option<Directory>,
}

/// The group that a machine's group is made in.
#[derive(Debug, PartialEq, Eq)]
pub enum Parent {
    /// [`COMMON`], made with the first machine and removed with the last.
    Common,
    /// One that `ozone` runs in and may do with as it likes.
    Own(PathBuf),
    /// One that the user named.
    Given(PathBuf),
}

impl Parent {
    /// Its path, relative to the root.
    pub fn path(&self) -> &Path {
        match self {
            Self::Common => Path::new(COMMON),
            Self::Own(path) | Self::Given(path) => path,
        }
    }
}

impl Place {
    /// Looks for the place of a machine.
    ///
    /// # Errors
    /// [`CgroupError`] when there is none.
    pub fn find(limits: &Limits) -> Result<Self, CgroupError> {
        let unsupported = |_| CgroupError::Unsupported;
        let root = Directory::root(Path::new(MOUNT)).map_err(unsupported)?;
        if !root.is_unified() {
            return Err(CgroupError::Unsupported);
        }
        let membership = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let path = own_path(&membership);
        let origin = path.as_ref().and_then(|path| root.open(path).ok());
        // The host's root, which has no type, is nobody's own; that of a container's namespace can be.
        let own = path.zip(origin.as_ref()).filter(|(_, directory)| directory.read("cgroup.type").is_ok());
        let parent = match (&limits.parent, own) {
            (Some(given), own) => {
                let problem = |errno| CgroupError::Parent { argument: given.argument.clone(), errno };
                root.open(&given.value).map_err(problem)?;
                match own {
                    Some((path, _)) if path == given.value => Parent::Own(path),
                    _ => Parent::Given(given.value.clone()),
                }
            }
            (None, Some((path, directory))) if is_ours(directory) => Parent::Own(path),
            (None, _) if geteuid().is_root() => Parent::Common,
            (None, _) => return Err(CgroupError::NotDelegated),
        };
        Ok(Self { root, parent, origin })
    }

    /// Every group from the root to the parent.
    ///
    /// # Errors
    /// What openat2(2) says.
    pub fn chain(&self) -> Result<Vec<Directory>, Errno> {
        let mut paths: Vec<&Path> = self.parent.path().ancestors().collect();
        paths.reverse();
        paths.into_iter().map(|path| self.root.open(path)).collect()
    }
}

/// Whether the group that `ozone` runs in is left to it: systemd says so, or nobody else is in it.
fn is_ours(directory: &Directory) -> bool {
    let alone = || directory.words("cgroup.procs").is_ok_and(|pids| pids == [std::process::id().to_string()]);
    directory.may_write("cgroup.procs") && (delegated::is_marked(directory.as_fd()) || alone())
}

/// The path of this process's group in cgroup v2, relative to the root (cgroups(7), /proc/pid/cgroup).
fn own_path(membership: &str) -> Option<PathBuf> {
    let path = membership.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(PathBuf::from(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ones_own_group_is_that_of_the_second_version() {
        let hybrid = "9:name=systemd:/a\n8:pids:/b\n0::/user.slice/x.scope\n";
        assert_eq!(own_path(hybrid), Some("user.slice/x.scope".into()));
        assert_eq!(own_path("0::/\n"), Some("".into()));
        assert_eq!(own_path("1:cpu:/x\n"), None);
    }

    #[test]
    fn a_group_with_others_in_it_is_not_ours() {
        let parent = tempfile::tempdir().unwrap();
        let directory = Directory::root(parent.path()).unwrap();
        assert!(!is_ours(&directory));
        let procs = parent.path().join("cgroup.procs");
        std::fs::write(&procs, format!("{}\n", std::process::id())).unwrap();
        assert!(is_ours(&directory));
        std::fs::write(&procs, format!("1\n{}\n", std::process::id())).unwrap();
        assert!(!is_ours(&directory));
    }
}
