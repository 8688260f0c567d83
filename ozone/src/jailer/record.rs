//! What a jail of a name leaves on the host, written down before it is made, and undone by whoever comes next.
//!
//! There is little of it: mounts, namespaces and processes end with `ozone`. What stays after a kill -9 is the control group, and
//! the directory of this record. The directory is locked (flock(2)) for as long as `ozone` lives, which tells a jail that
//! runs from one that was left.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{OFlag, renameat};
use nix::sys::stat::Mode;
use nix::unistd::Pid;
use protocol::Fault;
use serde::{Deserialize, Serialize};

use crate::cgroup;
use crate::directory::Directory;
use crate::journal::{Object, point};
use crate::runtime::{self, Base, JAILS, RuntimeError};

/// How long the last jail of the same name may take to let go.
const PATIENCE: Duration = Duration::from_secs(2);

/// What there is to undo.
const UNDO: &str = "undo.json";

/// The process id of the jail's first process.
const PID: &str = "pid";

/// What a file is called until it is whole.
const UNFINISHED: &str = "unfinished";

/// The largest record in bytes.
const RECORD_MAX: u64 = 1 << 16;

/// Why there is no record, or why what it says stays.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// An ordinary user has no place for it.
    #[error("XDG_RUNTIME_DIR is not set: it names the directory in which an ordinary user's jails are recorded")]
    Nowhere,
    /// Its directory cannot be used.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// There is one of that name.
    #[error("--name {0}: a jail of this name is running; give this one another name, or end that one first")]
    Taken(String),
    /// Something is mounted where the directory is.
    #[error("{}: something is mounted on it, or it is not what ozone made; nothing was removed: unmount it first", .0.display())]
    Covered(PathBuf),
    /// A file in it cannot be used.
    #[error("{operation} {}: {}", .path.display(), .errno.desc())]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        errno: Errno,
    },
    /// It is not a record.
    #[error("{}: {problem}; remove the file, and the cgroup that it names", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The control group stays.
    #[error(transparent)]
    Cgroup(#[from] cgroup::CgroupError),
}

impl RecordError {
    fn is_missing(&self) -> bool {
        match self {
            Self::File { errno, .. } => *errno == Errno::ENOENT,
            Self::Runtime(error) => error.is_missing(),
            _ => false,
        }
    }
}

impl From<RecordError> for Fault {
    fn from(error: RecordError) -> Self {
        match error {
            RecordError::Taken(_) => Fault::input(error.to_string()),
            other => Fault::host(other.to_string()),
        }
    }
}

/// What there is to undo.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Undo {
    /// The control group, relative to the root of the hierarchy.
    cgroup: Option<PathBuf>,
}

/// The record of a jail. Dropping it removes it, if what it says has been undone.
#[derive(Debug)]
pub struct Record {
    base: Base,
    jails: Directory,
    /// Locked.
    own: Directory,
    name: String,
    /// The control group, once it may be there.
    cgroup: RefCell<Option<PathBuf>>,
    closed: bool,
}

impl Record {
    /// Begins the record of the jail `name`, and undoes what a killed `ozone` of the name has left.
    ///
    /// # Errors
    /// [`RecordError`]; another jail of the name is left alone.
    pub fn open(name: &str) -> Result<Self, RecordError> {
        let base = runtime::directory().ok_or(RecordError::Nowhere)?;
        Self::open_in(&base, name)
    }

    fn open_in(base: &Path, name: &str) -> Result<Self, RecordError> {
        Self::of(hold(base, name)?, name).map(|(record, _)| record)
    }

    /// The record in a directory that is locked, once what it says is undone; and what that was.
    fn of((base, jails, own): Place, name: &str) -> Result<(Self, Vec<String>), RecordError> {
        point(format_args!("the jail's lock taken"));
        let mut removed = Vec::new();
        if let Some(path) = read(&own)?.cgroup
            && cgroup::remove_left(&path)?
        {
            removed.push(Object::Cgroup { path }.describe(None));
        }
        let record = Self { base, jails, own, name: name.to_owned(), cgroup: RefCell::default(), closed: false };
        record.forget();
        Ok((record, removed))
    }

    /// Writes down a control group that is about to be made.
    ///
    /// # Errors
    /// [`RecordError::File`].
    pub fn note_cgroup(&self, path: &Path) -> Result<(), RecordError> {
        let undo = Undo { cgroup: Some(path.to_owned()) };
        let text = serde_json::to_string(&undo)
            .map_err(|error| RecordError::Malformed { path: self.own.path_of(UNDO), problem: error.to_string() })?;
        self.write(UNDO, &text)?;
        self.cgroup.replace(Some(path.to_owned()));
        Ok(())
    }

    /// Writes down the process that signals for the program go to.
    ///
    /// # Errors
    /// [`RecordError::File`].
    pub fn note_pid(&self, pid: Pid) -> Result<(), RecordError> {
        self.write(PID, &format!("{pid}\n"))
    }

    /// By name, and nothing else: what is not ozone's stays, and the directory with it.
    fn forget(&self) {
        for name in [UNFINISHED, PID, UNDO] {
            let _ = self.own.unlink(name);
            point(format_args!("{name} forgotten"));
        }
    }

    /// Removes it, if nothing of what it says is there any more; whether it did.
    fn remove(&mut self) -> Result<bool, RecordError> {
        // Whoever removed the group has said why it stays; the record does too.
        if self.closed || self.cgroup.borrow().as_deref().is_some_and(cgroup::is_there) {
            return Ok(false);
        }
        self.closed = true;
        self.forget();
        let failed = |errno| RecordError::File { operation: "remove", path: self.own.path().to_owned(), errno };
        self.jails.remove(&self.name).map_err(failed)?;
        point(format_args!("the jail's directory removed"));
        self.base.remove();
        Ok(true)
    }

    fn write(&self, name: &'static str, text: &str) -> Result<(), RecordError> {
        let failed = |errno| RecordError::File { operation: "write", path: self.own.path_of(name), errno };
        // One that is left over from a kill in between is no hindrance.
        let _ = self.own.unlink(UNFINISHED);
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
        let file = self.own.file(OsStr::new(UNFINISHED), flags, Mode::S_IRUSR | Mode::S_IWUSR);
        let mut file = file.map_err(failed)?;
        point(format_args!("{name} begun"));
        let written = file.write_all(text.as_bytes());
        written.map_err(|error| failed(error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)))?;
        point(format_args!("{name} written, under another name"));
        renameat(&self.own, UNFINISHED, &self.own, name).map_err(failed)?;
        point(format_args!("{name} written"));
        Ok(())
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let _ = self.remove();
    }
}

/// The directory of ozone, that of all jails in it, and that of one jail.
type Place = (Base, Directory, Directory);

/// A directory of ozone's own in another, made if it is not there and `make` says so. Nothing is mounted on it.
fn private(parent: &Directory, name: &str, make: bool) -> Result<Directory, RecordError> {
    let failed = |errno| RecordError::File { operation: "open", path: parent.path_of(name), errno };
    if make {
        match parent.make(name, Mode::S_IRWXU) {
            Ok(()) => point(format_args!("{} made", parent.path_of(name).display())),
            Err(Errno::EEXIST) => {}
            Err(errno) => return Err(failed(errno)),
        }
    }
    match parent.open(Path::new(name)) {
        Ok(directory) if directory.is_private().map_err(failed)? => Ok(directory),
        Ok(_) | Err(Errno::EXDEV | Errno::ELOOP | Errno::ENOTDIR) => Err(RecordError::Covered(parent.path_of(name))),
        Err(errno) => Err(failed(errno)),
    }
}

fn find(path: &Path, name: &str, make: bool) -> Result<Place, RecordError> {
    let missing = || RecordError::File { operation: "open", path: path.to_owned(), errno: Errno::ENOENT };
    let base = if make { Base::make(path)? } else { Base::open(path)?.ok_or_else(missing)? };
    let jails = private(base.directory(), JAILS, make)?;
    let own = private(&jails, name, make)?;
    Ok((base, jails, own))
}

/// Makes the directory of a jail and takes its lock (flock(2)), which ends with `ozone`, however that ends.
fn hold(path: &Path, name: &str) -> Result<Place, RecordError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match find(path, name, true) {
            // The last one may have removed it between the open and the lock.
            Ok((base, jails, own)) if own.claim(&jails, name) => return Ok((base, jails, own)),
            Ok(_) if Instant::now() >= deadline => return Err(RecordError::Taken(name.to_owned())),
            // Polled: nothing tells of a lock that is given back.
            Ok(_) => std::thread::sleep(Duration::from_millis(10)),
            // Another one has removed a directory that it was the last to use.
            Err(error) if error.is_missing() && Instant::now() < deadline => {}
            Err(error) => return Err(error),
        }
    }
}

fn read(own: &Directory) -> Result<Undo, RecordError> {
    let path = || own.path_of(UNDO);
    let file = match own.file(OsStr::new(UNDO), OFlag::O_RDONLY, Mode::empty()) {
        Ok(file) => file,
        Err(Errno::ENOENT) => return Ok(Undo::default()),
        Err(errno) => return Err(RecordError::File { operation: "read", path: path(), errno }),
    };
    let mut text = String::new();
    let read = file.take(RECORD_MAX).read_to_string(&mut text);
    let problem = match read {
        Ok(_) => match serde_json::from_str(&text) {
            Ok(undo) => return Ok(undo),
            Err(error) => error.to_string(),
        },
        Err(error) if error.kind() == ErrorKind::InvalidData => "not text".to_owned(),
        Err(error) => crate::resources::said(&error),
    };
    Err(RecordError::Malformed { path: path(), problem })
}

/// Undoes what a killed `ozone jail` of this name left; nothing if there is nothing.
///
/// # Errors
/// [`RecordError`]; a jail that runs is left alone.
pub fn clean(name: &str) -> Result<(), RecordError> {
    Record::open(name).map(drop)
}

/// What became of a jail.
#[derive(Debug, PartialEq, Eq)]
pub enum State {
    /// It runs.
    Running,
    /// There is none of the name.
    Gone,
    /// It was killed, and what it left is removed: this.
    Removed(Vec<String>),
}

/// Undoes what a killed `ozone jail` of this name left in the directory of ozone at `base`, and makes nothing for that.
///
/// # Errors
/// [`RecordError`] when something of it stays.
pub fn undo(base: &Path, name: &str) -> Result<State, RecordError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (base, jails, own) = match find(base, name, false) {
            Ok(place) => place,
            Err(error) if error.is_missing() => return Ok(State::Gone),
            Err(error) => return Err(error),
        };
        if own.claim(&jails, name) {
            let path = own.path().display().to_string();
            let (mut record, mut removed) = Record::of((base, jails, own), name)?;
            if record.remove()? {
                removed.push(format!("directory {path}"));
            }
            return Ok(State::Removed(removed));
        }
        // The lock of one that was killed may still be on its way out with a child that it had just cloned.
        if first_process(&own).is_some_and(runtime::runs) || Instant::now() >= deadline {
            return Ok(State::Running);
        }
        // Polled: nothing tells of a lock that is given back.
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The first process of a jail, if it has come as far.
fn first_process(own: &Directory) -> Option<u32> {
    let mut text = String::new();
    let file = own.file(OsStr::new(PID), OFlag::O_RDONLY, Mode::empty()).ok()?;
    file.take(RECORD_MAX).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::tests::base;
    use std::fs;
    use std::os::unix::fs::{DirBuilderExt, symlink};

    #[test]
    fn a_name_is_taken_once_and_nothing_stays() {
        let (_parent, base) = base();
        let first = Record::open_in(&base, "web1").unwrap();
        assert!(matches!(Record::open_in(&base, "web1"), Err(RecordError::Taken(_))));
        let other = Record::open_in(&base, "web2").unwrap();
        first.note_pid(Pid::from_raw(7)).unwrap();
        first.note_cgroup(Path::new("ozone/jail@web1")).unwrap();
        first.note_pid(Pid::from_raw(8)).unwrap();
        assert_eq!(fs::read_to_string(base.join("jails/web1/pid")).unwrap(), "8\n");
        drop(first);
        assert!(base.join("jails/web2").exists() && !base.join("jails/web1").exists());
        drop(other);
        assert!(!base.exists());
    }

    #[test]
    fn what_is_not_ozones_stays() {
        let (parent, base) = base();
        let precious = parent.path().join("precious");
        fs::write(&precious, "kept").unwrap();
        let record = Record::open_in(&base, "web1").unwrap();
        let inside = base.join("jails/web1");
        fs::write(inside.join("other"), "").unwrap();
        symlink(&precious, inside.join(UNFINISHED)).unwrap();
        record.note_pid(Pid::from_raw(7)).unwrap();
        fs::remove_file(inside.join(PID)).unwrap();
        symlink(&precious, inside.join(PID)).unwrap();
        drop(record);
        assert_eq!(fs::read_to_string(&precious).unwrap(), "kept");
        assert!(inside.join("other").exists() && !inside.join(PID).exists());
    }

    #[test]
    fn a_record_that_is_none_is_named() {
        let (_parent, base) = base();
        for text in ["", "{", "{\"cgroup\": 1}", "{\"other\": null}"] {
            let inside = base.join("jails/web1");
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&inside).unwrap();
            fs::write(inside.join(UNDO), text).unwrap();
            let wrong = Record::open_in(&base, "web1").unwrap_err().to_string();
            assert!(wrong.contains("undo.json") && wrong.lines().count() == 1, "{wrong}");
        }
    }
}
