//! From a path to what it names, or to the directory that it ends in, past symbolic links that nobody else has put there.
//!
//! What a path leads through may be another user's: a directory for sockets that a tenant may write, say. A symbolic link
//! in such a directory is followed only if it is root's or this user's own. Any other could be swapped between two looks, and
//! lead root to wherever its owner likes. Symbolic links in directories that nobody else may write are the operator's, and are
//! followed.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat, readlink, readlinkat};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};

use super::{Directory, is_trusted, kind};

/// The most symbolic links on a path, as the kernel has it (path_resolution(7)).
const LINKS: usize = 40;

/// Why a path cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WalkError {
    /// The system says no.
    #[error("{}", .0.desc())]
    System(#[from] Errno),
    /// It names a directory.
    #[error("is a directory")]
    Directory,
    /// A symbolic link that another user can change.
    #[error("{} is a symbolic link of user {owner}, in a directory that others can write; name what it leads to", .path.display())]
    ForeignLink {
        /// The link.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// A file with several names, one of which others can have given it.
    #[error("has another name elsewhere, and is in a directory that others can write; remove it")]
    Linked,
}

/// Whether a symbolic link that a path ends in is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Last {
    /// It is what the path names.
    Itself,
    /// It is followed as those before it.
    Followed,
}

/// What a path ends in.
#[derive(Debug)]
pub struct Named {
    /// The directory.
    pub directory: Directory,
    /// The name in it, under which there may be nothing.
    pub name: OsString,
    /// Whether it is one of the links of /proc, which only the kernel can follow.
    is_magic: bool,
}

/// Finds the directory that a path ends in.
///
/// # Errors
/// [`WalkError`].
pub fn resolve(path: &Path, last: Last) -> Result<Named, WalkError> {
    match end_of(path, last)? {
        End::Name { named, .. } => Ok(named),
        End::Directory(_) => Err(WalkError::Directory),
    }
}

/// Holds what a path names, of whatever type, without opening it (open(2), O_PATH).
///
/// # Errors
/// [`WalkError`].
pub fn hold(path: &Path) -> Result<OwnedFd, WalkError> {
    if path.as_os_str().is_empty() {
        return Err(Errno::ENOENT.into());
    }
    match end_of(path, Last::Followed)? {
        End::Directory(found) | End::Name { found: Some(found), .. } => Ok(found),
        End::Name { named: Named { directory, name, is_magic: true }, .. } => {
            Ok(open_path(&directory, &name, OFlag::empty())?)
        }
        End::Name { .. } => Err(Errno::ENOENT.into()),
    }
}

/// Where a walk ends.
enum End {
    /// In a directory.
    Directory(OwnedFd),
    /// At a name, and what is there if that was looked at.
    Name { named: Named, found: Option<OwnedFd> },
}

fn end_of(path: &Path, last: Last) -> Result<End, WalkError> {
    let mut walk = Walk { directory: start(path)?, left: Vec::new(), links: 0 };
    walk.push(path);
    while let Some(part) = walk.left.pop() {
        let is_last = walk.left.is_empty();
        if part == ".." || part == "/" {
            walk.directory = open_path(&walk.directory, &part, OFlag::O_DIRECTORY)?;
            continue;
        }
        if is_last && last == Last::Itself {
            return Ok(walk.end(part, false, None));
        }
        let found = match open_path(&walk.directory, &part, OFlag::O_NOFOLLOW) {
            Err(Errno::ENOENT) if is_last => return Ok(walk.end(part, false, None)),
            found => found?,
        };
        let stat = fstat(&found)?;
        match kind(&stat) {
            SFlag::S_IFLNK if is_magic(&found) => {
                if is_last {
                    return Ok(walk.end(part, true, None));
                }
                walk.directory = open_path(&walk.directory, &part, OFlag::O_DIRECTORY)?;
            }
            SFlag::S_IFLNK => walk.follow(&found, &part, stat.st_uid)?,
            // As a directory, or what is mounted there on demand would not be (open(2), O_PATH).
            SFlag::S_IFDIR => {
                walk.directory = open_path(&walk.directory, &part, OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW)?;
            }
            _ if is_last => return Ok(walk.end(part, false, Some(found))),
            _ => return Err(Errno::ENOTDIR.into()),
        }
    }
    Ok(End::Directory(walk.directory))
}

/// Opens the file that a path names for writing, or makes it with this mode. It never changes the owner or mode of one that is
/// there.
///
/// # Errors
/// [`WalkError`].
pub fn open_for_writing(path: &Path, flags: OFlag, mode: Mode) -> Result<File, WalkError> {
    let Named { directory, name, is_magic } = resolve(path, Last::Followed)?;
    // Without O_NONBLOCK the open of a FIFO waits for a reader.
    let flags = flags | OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = if is_magic {
        File::from(openat(&directory, name.as_os_str(), flags | OFlag::O_CLOEXEC, mode)?)
    } else {
        directory.file(&name, flags, mode)?
    };
    let stat = fstat(&file)?;
    // Whoever may write the directory could have given it the name of a file elsewhere, which is not theirs.
    if kind(&stat) == SFlag::S_IFREG && stat.st_nlink > 1 && directory.is_shared()? {
        return Err(WalkError::Linked);
    }
    Ok(file)
}

struct Walk {
    directory: OwnedFd,
    /// The parts still to go, the next one last.
    left: Vec<OsString>,
    links: usize,
}

impl Walk {
    fn push(&mut self, path: &Path) {
        let parts = path.components().filter(|part| *part != Component::CurDir);
        self.left.extend(parts.map(|part| part.as_os_str().to_owned()).rev());
    }

    fn follow(&mut self, link: &OwnedFd, name: &OsStr, owner: u32) -> Result<(), WalkError> {
        let directory = held(self.directory.try_clone().map_err(|_| Errno::EMFILE)?);
        if !is_trusted(owner) && directory.is_shared()? {
            return Err(WalkError::ForeignLink { path: directory.path_of(name), owner });
        }
        self.links += 1;
        if self.links > LINKS {
            return Err(Errno::ELOOP.into());
        }
        self.push(Path::new(&readlinkat(link, "")?));
        Ok(())
    }

    fn end(self, name: OsString, is_magic: bool, found: Option<OwnedFd>) -> End {
        End::Name { named: Named { directory: held(self.directory), name, is_magic }, found }
    }
}

/// Where a path begins.
fn start(path: &Path) -> Result<OwnedFd, Errno> {
    let from = if path.is_absolute() { "/" } else { "." };
    open(from, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
}

fn open_path(directory: impl AsFd, name: &OsStr, flags: OFlag) -> Result<OwnedFd, Errno> {
    openat(directory, name, flags | OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
}

/// Whether a symbolic link is one of /proc, whose text need not be a path.
fn is_magic(link: &OwnedFd) -> bool {
    fstatfs(link).is_ok_and(|statistics| statistics.filesystem_type() == PROC_SUPER_MAGIC)
}

/// A directory with the path that it has now.
fn held(directory: OwnedFd) -> Directory {
    let path = readlink(format!("/proc/self/fd/{}", directory.as_fd().as_raw_fd()).as_str()).unwrap_or_default();
    Directory { file: File::from(directory), path: PathBuf::from(path) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::geteuid;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, lchown, symlink};

    fn place(path: &Path, last: Last) -> Result<(PathBuf, OsString), WalkError> {
        resolve(path, last).map(|named| (named.directory.path().to_owned(), named.name))
    }

    #[test]
    fn the_operators_links_are_followed() {
        let base = tempfile::tempdir().unwrap();
        let base = base.path().canonicalize().unwrap();
        fs::create_dir_all(base.join("real/deep")).unwrap();
        symlink("real", base.join("relative")).unwrap();
        symlink(base.join("relative/deep"), base.join("absolute")).unwrap();
        symlink("real/../relative/deep/file", base.join("file")).unwrap();
        let expected = Ok((base.join("real/deep"), OsString::from("file")));
        for path in ["real/deep/file", "relative/deep/file", "absolute/./file", "absolute/../deep/file"] {
            assert_eq!(place(&base.join(path), Last::Itself), expected, "{path}");
        }
        assert_eq!(place(&base.join("file"), Last::Followed), expected);
        assert_eq!(place(&base.join("file"), Last::Itself), Ok((base.clone(), OsString::from("file"))));
        symlink("loop", base.join("loop")).unwrap();
        assert_eq!(place(&base.join("loop/x"), Last::Itself), Err(Errno::ELOOP.into()));
        assert_eq!(place(&base.join("nowhere/x"), Last::Itself), Err(Errno::ENOENT.into()));
        for path in ["", "..", "real/.."] {
            assert_eq!(place(&base.join(path), Last::Followed), Err(WalkError::Directory), "{path}");
        }
        assert_eq!(place(Path::new("name"), Last::Itself).unwrap().1, "name");
    }

    #[test]
    fn others_links_are_not_followed() {
        if !geteuid().is_root() {
            return;
        }
        let base = tempfile::tempdir().unwrap();
        let shared = base.path().canonicalize().unwrap().join("shared");
        fs::create_dir(&shared).unwrap();
        fs::create_dir(base.path().join("elsewhere")).unwrap();
        symlink("../elsewhere", shared.join("link")).unwrap();
        assert!(place(&shared.join("link/x"), Last::Itself).is_ok());
        lchown(shared.join("link"), Some(65534), None).unwrap();
        assert!(place(&shared.join("link/x"), Last::Itself).is_ok(), "nobody else can swap it");
        fs::set_permissions(&shared, fs::Permissions::from_mode(0o1777)).unwrap();
        let refused = WalkError::ForeignLink { path: shared.join("link"), owner: 65534 };
        assert_eq!(place(&shared.join("link/x"), Last::Itself), Err(refused.clone()));
        assert_eq!(place(&shared.join("link"), Last::Followed), Err(refused.clone()));
        for path in ["link", "link/x"] {
            assert_eq!(hold(&shared.join(path)).map(drop), Err(refused.clone()), "{path}");
        }
        lchown(shared.join("link"), Some(0), None).unwrap();
        assert!(place(&shared.join("link/x"), Last::Itself).is_ok(), "it is root's own");
    }

    #[test]
    fn whatever_a_path_names_is_held() {
        let base = tempfile::tempdir().unwrap();
        fs::create_dir(base.path().join("real")).unwrap();
        fs::write(base.path().join("real/file"), "").unwrap();
        symlink("real/file", base.path().join("file")).unwrap();
        symlink("real", base.path().join("directory")).unwrap();
        symlink("nothing", base.path().join("dangling")).unwrap();
        let open = fs::File::open(base.path().join("file")).unwrap();
        let magic = PathBuf::from(format!("/proc/self/fd/{}", open.as_raw_fd()));
        for path in [base.path().join("file"), base.path().join("directory"), magic, "/".into(), "..".into()] {
            let found = fstat(hold(&path).unwrap()).map(|stat| (stat.st_dev, stat.st_ino));
            let expected = nix::sys::stat::stat(&path).map(|stat| (stat.st_dev, stat.st_ino));
            assert_eq!(found, expected, "{path:?}");
        }
        for path in [base.path().join("dangling"), base.path().join("none"), "".into()] {
            assert_eq!(hold(&path).map(drop), Err(Errno::ENOENT.into()), "{path:?}");
        }
        assert_eq!(hold(&base.path().join("file/x")).map(drop), Err(Errno::ENOTDIR.into()));
    }

    #[test]
    fn a_file_with_another_name_is_left_alone_where_others_write() {
        let base = tempfile::tempdir().unwrap();
        fs::write(base.path().join("secret"), "kept").unwrap();
        fs::hard_link(base.path().join("secret"), base.path().join("log")).unwrap();
        let log = base.path().join("log");
        let opened = || open_for_writing(&log, OFlag::O_APPEND, Mode::S_IRUSR);
        assert!(opened().is_ok());
        fs::set_permissions(base.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(opened().unwrap_err(), WalkError::Linked);
        assert_eq!(fs::read_to_string(log).unwrap(), "kept");
    }

    #[test]
    fn a_link_of_proc_is_left_to_the_kernel() {
        let file = tempfile::tempfile().unwrap();
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let mut opened = open_for_writing(&path, OFlag::empty(), Mode::empty()).unwrap();
        std::io::Write::write_all(&mut opened, b"x").unwrap();
        assert_eq!(file.metadata().unwrap().len(), 1);
    }
}
