//! One control group, held by a descriptor of its directory: whatever happens to its path, nothing else can be meant.

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs};

use crate::directory::{self, FileId};
use crate::landlock::{BitFlags, Domain, Right};

/// The longest file that is read, in bytes: those of a group with many processes or block devices.
const FILE_MAX: u64 = 1 << 20;

/// A control group (cgroups(7)).
#[derive(Debug)]
pub struct Directory(directory::Directory);

impl Directory {
    /// The root of the mounted hierarchy.
    ///
    /// # Errors
    /// What open(2) says.
    pub fn root(mount: &Path) -> Result<Self, Errno> {
        directory::Directory::at(mount).map(Self)
    }

    /// Whether this is cgroup v2.
    pub fn is_unified(&self) -> bool {
        fstatfs(&self.0).is_ok_and(|statistics| statistics.filesystem_type() == CGROUP2_SUPER_MAGIC)
    }

    /// The path, for messages.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// The path of a file in it, for messages.
    pub fn path_of(&self, name: &str) -> PathBuf {
        self.0.path_of(name)
    }

    /// Which one it is.
    ///
    /// # Errors
    /// What fstat(2) says.
    pub fn id(&self) -> Result<FileId, Errno> {
        self.0.id()
    }

    /// The group at this path below; no symbolic link and no other mount is followed (openat2(2)).
    ///
    /// # Errors
    /// What openat2(2) says.
    pub fn open(&self, relative: &Path) -> Result<Self, Errno> {
        self.0.open(relative).map(Self)
    }

    /// Makes a group that only this user can open: whoever can open a directory can lock it.
    ///
    /// # Errors
    /// What mkdirat(2) says.
    pub fn make(&self, name: &str) -> Result<(), Errno> {
        self.0.make(name, Mode::from_bits_truncate(0o700))
    }

    /// Removes a group in which there is nobody.
    ///
    /// # Errors
    /// What unlinkat(2) says: `EBUSY` for one with processes or groups in it.
    pub fn remove(&self, name: &str) -> Result<(), Errno> {
        self.0.remove(name)
    }

    /// What a file in it says.
    ///
    /// # Errors
    /// What openat2(2) and read(2) say.
    pub fn read(&self, name: &str) -> Result<String, Errno> {
        let file = self.descriptor(name, OFlag::O_RDONLY)?;
        let mut text = String::new();
        file.take(FILE_MAX).read_to_string(&mut text).map_err(|error| errno(&error))?;
        Ok(text)
    }

    /// Writes to a file in it, with one write(2), as the kernel wants it.
    ///
    /// # Errors
    /// What openat2(2) and write(2) say.
    pub fn write(&self, name: &str, text: &str) -> Result<(), Errno> {
        let mut file = self.descriptor(name, OFlag::O_WRONLY)?;
        file.write(text.as_bytes()).map_err(|error| errno(&error)).map(drop)
    }

    /// Whether the caller may write to a file in it.
    pub fn may_write(&self, name: &str) -> bool {
        self.descriptor(name, OFlag::O_WRONLY).is_ok()
    }

    /// Gives rights on one file in it back in a Landlock domain.
    ///
    /// # Errors
    /// See [`Domain::allow`]; what openat2(2) says.
    pub fn allow(&self, domain: &mut Domain, name: &str, rights: BitFlags<Right>) -> Result<(), Errno> {
        domain.allow(self.descriptor(name, OFlag::O_PATH)?, rights)
    }

    /// Whether a file in it, which has words, has this one.
    ///
    /// # Errors
    /// What [`Self::read`] says.
    pub fn words(&self, name: &str) -> Result<Vec<String>, Errno> {
        Ok(self.read(name)?.split_whitespace().map(str::to_owned).collect())
    }

    /// The names of the groups in it.
    pub fn children(&self) -> Vec<String> {
        // By the held descriptor: a path could mean another directory by now.
        let entries = fs::read_dir(format!("/proc/self/fd/{}", self.as_fd().as_raw_fd()));
        let directory = |entry: fs::DirEntry| {
            let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
            entry.file_name().into_string().ok().filter(|_| is_directory)
        };
        entries.into_iter().flatten().flatten().filter_map(directory).collect()
    }

    /// Takes the lock of the directory (flock(2)), which ends with this value, if nobody else has it and the directory is
    /// still where it was.
    pub fn claim(&self, parent: &Self, name: &str) -> bool {
        self.0.claim(&parent.0, name)
    }

    /// Takes its lock together with others that do so, if no running machine has it.
    pub fn claim_shared(&self) -> bool {
        self.0.claim_shared()
    }

    /// Whether only this user can open it, so that a lock of it is ozone's.
    pub fn is_private(&self) -> bool {
        self.0.is_private().unwrap_or(false)
    }

    /// Waits until no process is in it or below it; `false` at the deadline.
    pub fn wait_until_empty(&self, deadline: Instant) -> bool {
        let Ok(mut events) = self.descriptor("cgroup.events", OFlag::O_RDONLY) else { return true };
        loop {
            let mut text = String::new();
            // Read before every poll: it tells of changes since then (cgroup-v2.rst, "[Un]populated Notification").
            let read = events.rewind().and_then(|()| events.read_to_string(&mut text));
            // A group that is removed cannot be read any more.
            if read.is_err() || value(&text, "populated") == Some(0) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
            let _ = poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX));
        }
    }

    fn descriptor(&self, name: &str, flags: OFlag) -> Result<File, Errno> {
        self.0.beneath(Path::new(name), flags)
    }
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The number that stands after this word at the beginning of a line.
pub fn value(text: &str, word: &str) -> Option<u64> {
    text.lines().find_map(|line| match line.split_once(' ') {
        Some((key, number)) if key == word => number.trim().parse().ok(),
        _ => None,
    })
}

fn errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EINVAL, Errno::from_raw)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::time::Duration;

    #[test]
    fn no_symbolic_link_is_followed() {
        let parent = tempfile::tempdir().unwrap();
        fs::create_dir_all(parent.path().join("a/b")).unwrap();
        symlink("a", parent.path().join("link")).unwrap();
        symlink("b", parent.path().join("a/file")).unwrap();
        let root = Directory::root(parent.path()).unwrap();
        assert!(!root.is_unified());
        let a = root.open(Path::new("a")).unwrap();
        assert_eq!(root.open(Path::new("link")).unwrap_err(), Errno::ELOOP);
        assert_eq!(root.open(Path::new("link/b")).unwrap_err(), Errno::ELOOP);
        assert_eq!(a.read("file").unwrap_err(), Errno::ELOOP);
        assert_eq!(a.open(Path::new("..")).unwrap_err(), Errno::EXDEV);
        assert_eq!(a.children(), ["b"]);
        assert_eq!(a.path_of("x"), parent.path().join("a/x"));
    }

    #[test]
    fn values_are_found_by_their_whole_word() {
        let text = "nr_periods 4\nthrottled_usec 7\npopulated 0\n";
        assert_eq!((value(text, "populated"), value(text, "nr"), value(text, "usec")), (Some(0), None, None));
    }

    #[test]
    fn a_group_without_events_is_empty() {
        let parent = tempfile::tempdir().unwrap();
        let root = Directory::root(parent.path()).unwrap();
        assert!(root.wait_until_empty(Instant::now() + Duration::from_secs(1)));
        fs::write(parent.path().join("cgroup.events"), "populated 0\nfrozen 0\n").unwrap();
        assert!(root.wait_until_empty(Instant::now() + Duration::from_secs(1)));
        fs::write(parent.path().join("cgroup.events"), "populated 1\nfrozen 0\n").unwrap();
        assert!(!root.wait_until_empty(Instant::now()));
    }
}
