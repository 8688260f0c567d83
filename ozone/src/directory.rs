//! Directories held by descriptors: whatever becomes of their paths, nothing else can be meant.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, open, openat, openat2};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};
use serde::{Deserialize, Serialize};

pub mod walk;

/// What makes two names the same file, for as long as someone has it open (inode(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FileId {
    device: u64,
    inode: u64,
}

impl From<&FileStat> for FileId {
    fn from(stat: &FileStat) -> Self {
        Self { device: stat.st_dev, inode: stat.st_ino }
    }
}

/// The type of a file, as `st_mode` has it (inode(7)).
pub fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

/// Whether a uid is root's or that of this process: what those own, nobody else can have put somewhere.
fn is_trusted(uid: u32) -> bool {
    uid == 0 || uid == geteuid().as_raw()
}

/// A directory.
#[derive(Debug)]
pub struct Directory {
    file: File,
    /// For messages only.
    path: PathBuf,
}

impl Directory {
    /// The directory at this path, of which the last part is no symbolic link.
    ///
    /// # Errors
    /// What open(2) says.
    pub fn at(path: &Path) -> Result<Self, Errno> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        Ok(Self { file: File::from(open(path, flags, Mode::empty())?), path: path.to_owned() })
    }

    /// The directory at this path, of which no part is a symbolic link (openat2(2)). Its names cannot be listed, so that no
    /// right to read it is needed.
    ///
    /// # Errors
    /// What openat2(2) says.
    pub fn without_links(path: &Path) -> Result<Self, Errno> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let how = OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
        Ok(Self { file: File::from(openat2(AT_FDCWD, path, how)?), path: path.to_owned() })
    }

    /// Another descriptor for it, with which it shares its lock.
    ///
    /// # Errors
    /// What dup(2) says.
    pub fn try_clone(&self) -> Result<Self, Errno> {
        let file =
            self.file.try_clone().map_err(|error| error.raw_os_error().map_or(Errno::EMFILE, Errno::from_raw))?;
        Ok(Self { file, path: self.path.clone() })
    }

    /// The path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path of what is in it, for messages.
    pub fn path_of(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// Which one it is.
    ///
    /// # Errors
    /// What fstat(2) says.
    pub fn id(&self) -> Result<FileId, Errno> {
        self.stat().map(|stat| FileId::from(&stat))
    }

    /// All that fstat(2) says of it.
    ///
    /// # Errors
    /// What it says instead.
    pub fn stat(&self) -> Result<FileStat, Errno> {
        fstat(&self.file)
    }

    /// Whether nobody but this user gets into it.
    ///
    /// # Errors
    /// What fstat(2) says.
    pub fn is_private(&self) -> Result<bool, Errno> {
        let stat = self.stat()?;
        Ok(stat.st_uid == geteuid().as_raw() && stat.st_mode & 0o077 == 0)
    }

    /// Whether anybody but root and this user may put names into it.
    ///
    /// # Errors
    /// What fstat(2) says.
    pub fn is_shared(&self) -> Result<bool, Errno> {
        let stat = self.stat()?;
        Ok(!is_trusted(stat.st_uid) || stat.st_mode & 0o022 != 0)
    }

    /// The directory at this path below; no symbolic link and no other mount is followed (openat2(2)).
    ///
    /// # Errors
    /// What openat2(2) says.
    pub fn open(&self, relative: &Path) -> Result<Self, Errno> {
        let relative = if relative.as_os_str().is_empty() { Path::new(".") } else { relative };
        let file = self.beneath(relative, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
        Ok(Self { file, path: self.path.join(relative) })
    }

    /// A file below, in the same way.
    ///
    /// # Errors
    /// What openat2(2) says.
    pub fn beneath(&self, relative: &Path, flags: OFlag) -> Result<File, Errno> {
        let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV;
        openat2(&self.file, relative, OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve)).map(File::from)
    }

    /// The file of this name, which is no symbolic link; with `O_CREAT` it is made with `mode`.
    ///
    /// # Errors
    /// What openat(2) says.
    pub fn file(&self, name: &OsStr, flags: OFlag, mode: Mode) -> Result<File, Errno> {
        openat(&self.file, name, flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, mode).map(File::from)
    }

    /// Makes a directory in it.
    ///
    /// # Errors
    /// What mkdirat(2) says.
    pub fn make(&self, name: impl AsRef<Path>, mode: Mode) -> Result<(), Errno> {
        mkdirat(&self.file, name.as_ref(), mode)
    }

    /// Removes a directory in it, in which there is nothing.
    ///
    /// # Errors
    /// What unlinkat(2) says.
    pub fn remove(&self, name: impl AsRef<Path>) -> Result<(), Errno> {
        unlinkat(&self.file, name.as_ref(), UnlinkatFlags::RemoveDir)
    }

    /// Removes the name of what is no directory.
    ///
    /// # Errors
    /// What unlinkat(2) says.
    pub fn unlink(&self, name: impl AsRef<Path>) -> Result<(), Errno> {
        unlinkat(&self.file, name.as_ref(), UnlinkatFlags::NoRemoveDir)
    }

    /// What stands under this name, a symbolic link itself included.
    ///
    /// # Errors
    /// What fstatat(2) says.
    pub fn look(&self, name: impl AsRef<Path>) -> Result<FileStat, Errno> {
        fstatat(&self.file, name.as_ref(), AtFlags::AT_SYMLINK_NOFOLLOW)
    }

    /// Whether this name is that of the open file.
    pub fn names(&self, name: impl AsRef<Path>, file: impl AsFd) -> bool {
        let held = fstat(file).map(|stat| FileId::from(&stat));
        held.is_ok() && held == self.look(name).map(|stat| FileId::from(&stat))
    }

    /// The names in it, sorted.
    ///
    /// # Errors
    /// What getdents(2) says.
    pub fn list(&self) -> io::Result<Vec<OsString>> {
        // By the held descriptor: the path could mean another directory by now.
        let entries = fs::read_dir(format!("/proc/self/fd/{}", self.file.as_raw_fd()))?;
        let mut names = entries.map(|entry| entry.map(|entry| entry.file_name())).collect::<io::Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    }

    /// Takes its lock (flock(2)), which ends with this value, if nobody else has it and `parent` still has it as `name`.
    pub fn claim(&self, parent: &Self, name: impl AsRef<Path>) -> bool {
        self.file.try_lock().is_ok() && parent.names(name, &self.file)
    }

    /// Takes its lock together with others that do so, if nobody has it for himself.
    pub fn claim_shared(&self) -> bool {
        self.file.try_lock_shared().is_ok()
    }
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn no_symbolic_link_is_followed() {
        let parent = tempfile::tempdir().unwrap();
        fs::create_dir_all(parent.path().join("a/b")).unwrap();
        symlink("a", parent.path().join("link")).unwrap();
        let root = Directory::at(parent.path()).unwrap();
        assert_eq!(root.open(Path::new("link")).unwrap_err(), Errno::ELOOP);
        assert_eq!(root.open(Path::new("link/b")).unwrap_err(), Errno::ELOOP);
        assert_eq!(root.open(Path::new("a/..")).unwrap().id(), root.id());
        assert_eq!(root.open(Path::new("..")).unwrap_err(), Errno::EXDEV);
        assert!(Directory::without_links(&parent.path().join("a/b")).is_ok());
        assert_eq!(Directory::without_links(&parent.path().join("link/b")).unwrap_err(), Errno::ELOOP);
        assert!(Directory::at(&parent.path().join("link")).is_err());
        assert_eq!(root.file(OsStr::new("link"), OFlag::O_RDONLY, Mode::empty()).unwrap_err(), Errno::ELOOP);
    }

    #[test]
    fn a_directory_is_claimed_once_and_where_it_is() {
        let parent = tempfile::tempdir().unwrap();
        let root = Directory::at(parent.path()).unwrap();
        root.make("vm", Mode::S_IRWXU).unwrap();
        let first = root.open(Path::new("vm")).unwrap();
        let second = root.open(Path::new("vm")).unwrap();
        assert!(first.claim(&root, "vm"));
        assert!(!second.claim(&root, "vm") && !second.claim_shared());
        drop(first);
        root.remove("vm").unwrap();
        assert!(!second.claim(&root, "vm"), "it is not there any more");
        root.make("vm", Mode::S_IRWXU).unwrap();
        assert!(!second.claim(&root, "vm"), "it is another one");
    }

    #[test]
    fn who_may_change_it_is_seen() {
        let parent = tempfile::tempdir().unwrap();
        let root = Directory::at(parent.path()).unwrap();
        for (mode, private, shared) in [(0o700, true, false), (0o755, false, false), (0o1777, false, true)] {
            fs::set_permissions(parent.path(), fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!((root.is_private(), root.is_shared()), (Ok(private), Ok(shared)), "{mode:o}");
        }
    }
}
