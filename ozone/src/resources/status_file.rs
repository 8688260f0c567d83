//! The file of `--status-file`: written beside its name and put there whole, at the end of the run.
//!
//! Everything that needs a path is done at the start: the directory is held by a descriptor, found as [`walk`] finds it, and so
//! is the new file, which has no name where the file system can do that (open(2), O_TMPFILE), and else one that the journal
//! tells of. So nothing stays of a run that is killed. What has the name is replaced, never followed or written to: a symbolic
//! link too, whoever planted it.

use std::ffi::OsStr;
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::linkat;

use super::{ResourceError, said};
use crate::directory::walk::{self, Last, Named};
use crate::directory::{Directory, FileId, kind};
use crate::journal::{Entry, Identity, Journal, Object, point};
use crate::landlock::{Domain, Right};
use crate::spec::Given;

/// How many names beside the file's are tried; each is drawn from 2^64.
const ATTEMPTS: usize = 8;

const MODE: Mode = Mode::S_IRUSR.union(Mode::S_IWUSR);

/// A file that has not got its name yet.
#[derive(Debug)]
pub struct StatusFile {
    directory: Directory,
    name: PathBuf,
    argument: String,
    file: File,
    journal: Journal,
    directory_id: FileId,
    /// The name that it has meanwhile, if it has to have one.
    beside: Option<Beside>,
}

/// The name of a file until it gets its own, with its entry in the journal.
#[derive(Debug)]
struct Beside {
    name: String,
    entry: Option<Entry>,
}

impl StatusFile {
    /// Makes the file, without its name.
    ///
    /// # Errors
    /// [`ResourceError`] naming the argument, which names neither a file nor a place for one.
    pub fn open(path: &Given<PathBuf>, journal: &Journal) -> Result<Self, ResourceError> {
        let wrong = |problem: &str| ResourceError::input(path.argument.escape_debug(), problem);
        let failed = |errno: Errno| wrong(errno.desc());
        let name = path.value.file_name().map(PathBuf::from).ok_or_else(|| wrong("is not the name of a file"))?;
        let Named { directory, .. } =
            walk::resolve(&path.value, Last::Itself).map_err(|error| wrong(&error.to_string()))?;
        if directory.look(&name).is_ok_and(|found| kind(&found) == SFlag::S_IFDIR) {
            return Err(wrong("is a directory"));
        }
        let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC | OFlag::O_TMPFILE;
        match openat(&directory, ".", flags, MODE) {
            Ok(file) => Ok(Self {
                directory_id: directory.id().map_err(failed)?,
                directory,
                name,
                argument: path.argument.clone(),
                file: file.into(),
                journal: journal.clone(),
                beside: None,
            }),
            // Not every file system can (open(2)).
            Err(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::ENOENT) => Self::named(directory, name, path, journal),
            Err(errno) => Err(failed(errno)),
        }
    }

    /// Makes the file under a name that it has until it gets its own.
    fn named(
        directory: Directory,
        name: PathBuf,
        path: &Given<PathBuf>,
        journal: &Journal,
    ) -> Result<Self, ResourceError> {
        let failed = |errno: Errno| ResourceError::input(path.argument.escape_debug(), errno.desc());
        let directory_id = directory.id().map_err(failed)?;
        let mut last = Errno::EEXIST;
        for _ in 0..ATTEMPTS {
            let beside = beside(&name);
            let entry = journal.record(unnamed(&directory, directory_id, &beside))?;
            match directory.file(OsStr::new(&beside), OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL, MODE) {
                Ok(file) => {
                    if let Ok(stat) = fstat(&file) {
                        entry.made(Identity::File(FileId::from(&stat)));
                    }
                    let beside = Some(Beside { name: beside, entry: Some(entry) });
                    let (argument, journal) = (path.argument.clone(), journal.clone());
                    return Ok(Self { directory, name, argument, file, journal, directory_id, beside });
                }
                Err(errno) => {
                    entry.undone();
                    last = errno;
                }
            }
            if last != Errno::EEXIST {
                break;
            }
        }
        Err(failed(last))
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
            self.beside = Some(self.link()?);
        }
        if let Some(Beside { name, .. }) = &self.beside {
            point(format_args!("the record beside its name"));
            renameat(&self.directory, name.as_str(), &self.directory, &self.name)?;
        }
        if let Some(entry) = self.beside.take().and_then(|beside| beside.entry) {
            entry.undone();
        }
        Ok(())
    }

    /// Gives the file a name beside the one that it is to have: a link replaces nothing (linkat(2)).
    fn link(&self) -> Result<Beside, Errno> {
        let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let mut last = Errno::EEXIST;
        for _ in 0..ATTEMPTS {
            let name = beside(&self.name);
            // A record is worth more than the name that a kill -9 leaves here if the journal cannot be written.
            let entry = self.journal.record(unnamed(&self.directory, self.directory_id, &name)).ok();
            if let (Some(entry), Ok(stat)) = (&entry, fstat(&self.file)) {
                entry.made(Identity::File(FileId::from(&stat)));
            }
            match linkat(AT_FDCWD, own.as_str(), &self.directory, name.as_str(), AtFlags::AT_SYMLINK_FOLLOW) {
                Ok(()) => return Ok(Beside { name, entry }),
                Err(errno) => last = errno,
            }
            if let Some(entry) = entry {
                entry.undone();
            }
            if last != Errno::EEXIST {
                break;
            }
        }
        Err(last)
    }
}

impl Drop for StatusFile {
    fn drop(&mut self) {
        let Some(Beside { name, entry }) = self.beside.take() else { return };
        let removed = self.directory.unlink(&name);
        if let (Ok(()) | Err(Errno::ENOENT), Some(entry)) = (removed, entry) {
            entry.undone();
        }
    }
}

/// What the journal has of it.
fn unnamed(directory: &Directory, id: FileId, name: &str) -> Object {
    Object::Unnamed { directory: directory.path().to_owned(), id, name: name.to_owned() }
}

/// A name that nobody can have foreseen, beside another.
fn beside(name: &Path) -> String {
    // A name has at most 255 bytes.
    let stem: String = name.to_string_lossy().chars().take(32).collect();
    // The standard library seeds every RandomState from the kernel's random numbers.
    format!(".{stem}.{:016x}", RandomState::new().build_hasher().finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::Undone;
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
            let file = StatusFile::open(&given(&path), &Journal::none()).unwrap();
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
        let file = StatusFile::open(&given(&directory.path().join("status.json")), &Journal::none()).unwrap();
        assert!(names(directory.path()).is_empty() || file.beside.is_some());
        drop(file);
        assert!(names(directory.path()).is_empty());
    }

    #[test]
    fn a_name_that_it_has_meanwhile_is_in_the_journal() {
        let (own, directory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let own = Directory::at(own.path()).unwrap();
        let path = given(&directory.path().join("status.json"));
        // As on a file system without O_TMPFILE.
        let named = || {
            let (journal, leftovers) = Journal::open(&own).unwrap();
            assert!(leftovers.is_empty());
            let held = walk::resolve(&path.value, Last::Itself).unwrap().directory;
            StatusFile::named(held, "status.json".into(), &path, &journal).unwrap()
        };
        let file = named();
        let [beside] = <[String; 1]>::try_from(names(directory.path())).unwrap();
        assert!(beside.starts_with(".status.json."), "{beside}");
        file.write(b"new").unwrap();
        assert_eq!(names(directory.path()), ["status.json"]);
        drop(named());
        assert_eq!(names(directory.path()), ["status.json"]);
        // Killed.
        std::mem::forget(named());
        assert_eq!(names(directory.path()).len(), 2);
        let (journal, leftovers) = Journal::open(&own).unwrap();
        let [leftover] = <[_; 1]>::try_from(leftovers).unwrap();
        assert_eq!(leftover.undo(&own).unwrap(), Undone::Removed);
        assert!(journal.is_done());
        assert_eq!(names(directory.path()), ["status.json"]);
        assert_eq!(std::fs::read_to_string(&path.value).unwrap(), "new");
    }

    #[test]
    fn a_place_that_cannot_be_is_refused_at_the_start() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("taken")).unwrap();
        for (path, problem) in
            [("taken", "is a directory"), ("no/such", "No such file"), ("..", "not the name of a file")]
        {
            let error =
                StatusFile::open(&given(&directory.path().join(path)), &Journal::none()).unwrap_err().to_string();
            assert!(error.starts_with("--status-file ") && error.contains(problem), "{error}");
        }
    }

    #[test]
    fn a_directory_that_moves_takes_its_record_along() {
        let parent = tempfile::tempdir().unwrap();
        let (before, after) = (parent.path().join("before"), parent.path().join("after"));
        fs::create_dir(&before).unwrap();
        let file = StatusFile::open(&given(&before.join("status.json")), &Journal::none()).unwrap();
        fs::rename(&before, &after).unwrap();
        fs::create_dir(&before).unwrap();
        file.write(b"new").unwrap();
        assert_eq!((names(&before).len(), names(&after)), (0, vec!["status.json".to_owned()]));
    }
}
