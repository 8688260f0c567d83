//! The file of `--status-file`: written beside its name and put there whole, at the end of the run.
//!
//! Everything that needs a path is done at the start: the directory is held by a descriptor, found as [`walk`] finds it, and so is the new file, which has
//! no name where the file system can do that (open(2), O_TMPFILE). So a run that is killed leaves nothing. What has the name is
//! replaced, never followed or written to: a symbolic link too, whoever planted it.

use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{Mode, SFlag};
use nix::unistd::linkat;

use super::{ResourceError, said};
use crate::directory::walk::{self, Last, Named};
use crate::directory::{Directory, kind};
use crate::landlock::{Domain, Right};
use crate::spec::Given;

/// How many names beside the file's are tried; each is drawn from 2^64.
const ATTEMPTS: usize = 8;

/// A file that has not got its name yet.
#[derive(Debug)]
pub struct StatusFile {
    directory: Directory,
    name: PathBuf,
    argument: String,
    file: File,
    /// The name that it has meanwhile, if it has to have one.
    beside: Option<String>,
}

impl StatusFile {
    /// Makes the file, without its name.
    ///
    /// # Errors
    /// [`ResourceError`] naming the argument, which names neither a file nor a place for one.
    pub fn open(path: &Given<PathBuf>) -> Result<Self, ResourceError> {
        let wrong = |problem: &str| ResourceError::input(path.argument.escape_debug(), problem);
        let name = path.value.file_name().map(PathBuf::from).ok_or_else(|| wrong("is not the name of a file"))?;
        let Named { directory, .. } =
            walk::resolve(&path.value, Last::Itself).map_err(|error| wrong(&error.to_string()))?;
        if directory.look(&name).is_ok_and(|found| kind(&found) == SFlag::S_IFDIR) {
            return Err(wrong("is a directory"));
        }
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        let (file, beside) = match openat(&directory, ".", flags | OFlag::O_TMPFILE, mode) {
            Ok(file) => (file, None),
            // Not every file system can (open(2)).
            Err(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::ENOENT) => {
                let made = beside(&name, |beside| {
                    openat(&directory, beside, flags | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW, mode)
                });
                made.map(|(beside, file)| (file, Some(beside))).map_err(|errno| wrong(errno.desc()))?
            }
            Err(errno) => return Err(wrong(errno.desc())),
        };
        Ok(Self { directory, name, argument: path.argument.clone(), file: file.into(), beside })
    }

    /// Leaves it what giving it its name takes.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn allow(&self, domain: &mut Domain) -> Result<(), Errno> {
        domain.allow(&self.directory, Right::MakeReg | Right::RemoveFile)
    }

    /// Writes the file and gives it its name.
    ///
    /// # Errors
    /// [`ResourceError`] naming the argument; nothing of it is left then.
    pub fn write(mut self, text: &[u8]) -> Result<(), ResourceError> {
        let failed = |argument: &str, error: io::Error| ResourceError::host(argument.escape_debug(), said(&error));
        self.file.write_all(text).map_err(|error| failed(&self.argument, error))?;
        self.publish().map_err(|errno| failed(&self.argument, errno.into()))
    }

    fn publish(&mut self) -> Result<(), Errno> {
        if self.beside.is_none() {
            let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            let link = |name: &str| linkat(AT_FDCWD, own.as_str(), &self.directory, name, AtFlags::AT_SYMLINK_FOLLOW);
            let (beside, ()) = beside(&self.name, link)?;
            self.beside = Some(beside);
        }
        if let Some(beside) = &self.beside {
            renameat(&self.directory, beside.as_str(), &self.directory, &self.name)?;
            self.beside = None;
        }
        Ok(())
    }
}

impl Drop for StatusFile {
    fn drop(&mut self) {
        if let Some(beside) = &self.beside {
            let _ = self.directory.unlink(beside);
        }
    }
}

/// Makes something under a name that nobody can have foreseen, beside another.
fn beside<T>(name: &Path, make: impl Fn(&str) -> Result<T, Errno>) -> Result<(String, T), Errno> {
    // A name has at most 255 bytes.
    let stem: String = name.to_string_lossy().chars().take(32).collect();
    let mut last = Errno::EEXIST;
    for _ in 0..ATTEMPTS {
        // The standard library seeds every RandomState from the kernel's random numbers.
        let beside = format!(".{stem}.{:016x}", RandomState::new().build_hasher().finish());
        match make(&beside) {
            Ok(made) => return Ok((beside, made)),
            Err(errno) => last = errno,
        }
        if last != Errno::EEXIST {
            break;
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn given(path: &Path) -> Given<PathBuf> {
        Given { value: path.to_owned(), argument: format!("--status-file {}", path.display()) }
    }

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn what_has_the_name_is_replaced_and_never_followed() {
        let directory = tempfile::tempdir().unwrap();
        let (path, other) = (directory.path().join("status.json"), directory.path().join("other"));
        fs::write(&other, "mine").unwrap();
        for plant in [
            (|_, _| {}) as fn(&Path, &Path),
            |path, _| fs::write(path, "old").unwrap(),
            |path, other| symlink(other, path).unwrap(),
            |path, _| symlink("/nonexistent/file", path).unwrap(),
            |path, other| fs::hard_link(other, path).unwrap(),
        ] {
            let _ = fs::remove_file(&path);
            let file = StatusFile::open(&given(&path)).unwrap();
            // Planted after the start: what was there then was looked at.
            plant(&path, &other);
            file.write(b"new").unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), "new");
            let metadata = fs::symlink_metadata(&path).unwrap();
            assert!(metadata.is_file() && metadata.permissions().mode() & 0o777 == 0o600, "{metadata:?}");
            assert_eq!(fs::read_to_string(&other).unwrap(), "mine");
            assert_eq!(names(directory.path()), ["other", "status.json"]);
        }
    }

    #[test]
    fn a_run_without_an_end_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let file = StatusFile::open(&given(&directory.path().join("status.json"))).unwrap();
        assert!(names(directory.path()).is_empty() || file.beside.is_some());
        drop(file);
        assert!(names(directory.path()).is_empty());
    }

    #[test]
    fn a_place_that_cannot_be_is_refused_at_the_start() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("taken")).unwrap();
        for (path, problem) in
            [("taken", "is a directory"), ("no/such", "No such file"), ("..", "not the name of a file")]
        {
            let error = StatusFile::open(&given(&directory.path().join(path))).unwrap_err().to_string();
            assert!(error.starts_with("--status-file ") && error.contains(problem), "{error}");
        }
    }

    #[test]
    fn a_directory_that_moves_takes_its_record_along() {
        let parent = tempfile::tempdir().unwrap();
        let (before, after) = (parent.path().join("before"), parent.path().join("after"));
        fs::create_dir(&before).unwrap();
        let file = StatusFile::open(&given(&before.join("status.json"))).unwrap();
        fs::rename(&before, &after).unwrap();
        fs::create_dir(&before).unwrap();
        file.write(b"new").unwrap();
        assert_eq!((names(&before).len(), names(&after)), (0, vec!["status.json".to_owned()]));
    }
}
