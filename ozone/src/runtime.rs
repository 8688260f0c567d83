//! Where ozone keeps what a run needs to be found by and undone with: directories that nobody else gets into.
//!
//! `BASE/machines/NAME` is a machine's own directory, locked for as long as its `ozone` lives, however that ends: a machine runs
//! if and only if its lock is taken. In it are the journal and the control socket. A machine without a name is called by its
//! process id there, after an underscore, with which no name begins.

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::stat::Mode;
use nix::unistd::geteuid;
use protocol::Fault;

use crate::directory::Directory;
use crate::journal::{self, Journal, JournalError, Leftover, point};
use crate::landlock::{Domain, Right};

/// The directory of the machines in that of ozone.
const MACHINES: &str = "machines";

/// The directory of the jails of `ozone jail` in that of ozone.
pub const JAILS: &str = "jails";

/// How long the last machine of the same name may take to let go.
const PATIENCE: Duration = Duration::from_secs(2);

/// How many machines without a name one process id may have in sight: those of other pid namespaces have it as well.
const NAMESAKES: u32 = 100;

/// Why a directory or what is in it cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The system says no.
    #[error("{}: {}", .path.display(), .errno.desc())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What the system says.
        errno: Errno,
    },
    /// Others could change it.
    #[error("{}: not a directory of this user alone (mode 0700); remove it", .0.display())]
    Shared(PathBuf),
    /// There is a machine of that name.
    #[error("--name {0}: a machine of this name is running; give this one another name")]
    Taken(String),
    /// The journal cannot be kept.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

impl RuntimeError {
    /// Whether it is about a directory that is not there.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::File { errno: Errno::ENOENT, .. })
    }
}

impl From<RuntimeError> for Fault {
    fn from(error: RuntimeError) -> Self {
        match error {
            RuntimeError::Taken(_) => Fault::input(error.to_string()),
            RuntimeError::Journal(error) => error.into(),
            other => Fault::host(other.to_string()),
        }
    }
}

/// The directory of this user's machines: `/run/ozone` for root, else below `$XDG_RUNTIME_DIR`; nothing without that.
pub fn directory() -> Option<PathBuf> {
    if geteuid().is_root() {
        return Some(PathBuf::from("/run/ozone"));
    }
    let base = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|base| base.is_absolute())?;
    Some(base.join("ozone"))
}

/// Whether a machine can have this name: 1 to 64 letters, digits, '.', '_' and '-', beginning with a letter or digit.
pub fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.len() <= 64 && name.chars().all(allowed)
}

/// Whether no machine of this user's has this name, as it seems at the moment.
pub fn is_free(name: &str) -> bool {
    !is_name(name) || directory().is_none_or(|base| Home::is_free(&base, name))
}

/// Whether a machine's own directory can have this name.
pub fn is_directory_name(name: &str) -> bool {
    is_name(name.strip_prefix('_').unwrap_or(name))
}

/// The path of a machine's own directory.
pub fn machine_path(base: &Path, name: &str) -> PathBuf {
    base.join(MACHINES).join(name)
}

/// The directory of all that ozone keeps for a user.
#[derive(Debug)]
pub struct Base {
    parent: Directory,
    name: OsString,
    directory: Directory,
}

impl Base {
    /// Makes it, if it is not there.
    ///
    /// # Errors
    /// [`RuntimeError`]: one that is there and open to others is refused.
    pub fn make(path: &Path) -> Result<Self, RuntimeError> {
        Self::get(path, true)
    }

    /// Opens it; nothing if it is not there.
    ///
    /// # Errors
    /// [`RuntimeError`].
    pub fn open(path: &Path) -> Result<Option<Self>, RuntimeError> {
        match Self::get(path, false) {
            Ok(base) => Ok(Some(base)),
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn get(path: &Path, make: bool) -> Result<Self, RuntimeError> {
        let (above, name) = path.parent().zip(path.file_name()).unwrap_or((Path::new("/"), OsStr::new("ozone")));
        // Above it links are the system's or the user's own, and not ours to judge.
        let above = above.canonicalize().unwrap_or_else(|_| above.to_owned());
        let parent = Directory::at(&above).map_err(|errno| RuntimeError::File { path: above, errno })?;
        let directory = private(&parent, name, make)?;
        Ok(Self { parent, name: name.to_owned(), directory })
    }

    /// The directory itself.
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// The names in that of the machines, and the directory; none if it is not there.
    ///
    /// # Errors
    /// [`RuntimeError`].
    pub fn machines(&self) -> Result<Option<(Directory, Vec<OsString>)>, RuntimeError> {
        self.listed(MACHINES)
    }

    /// The names in that of the jails; none if it is not there.
    ///
    /// # Errors
    /// [`RuntimeError`].
    pub fn jails(&self) -> Result<Vec<OsString>, RuntimeError> {
        Ok(self.listed(JAILS)?.map_or_else(Vec::new, |(_, names)| names))
    }

    fn listed(&self, name: &str) -> Result<Option<(Directory, Vec<OsString>)>, RuntimeError> {
        let directory = match private(&self.directory, OsStr::new(name), false) {
            Ok(directory) => directory,
            Err(error) if error.is_missing() => return Ok(None),
            Err(error) => return Err(error),
        };
        let failed = |error: io::Error| RuntimeError::File {
            path: directory.path().to_owned(),
            errno: error.raw_os_error().map_or(Errno::EIO, Errno::from_raw),
        };
        let names = directory.list().map_err(failed)?;
        Ok(Some((directory, names)))
    }

    /// It is removed at the end, with what is in it, if nobody else uses it.
    ///
    /// # Errors
    /// See [`Domain::allow`].
    pub fn allow(&self, domain: &mut Domain) -> Result<(), Errno> {
        domain.allow(&self.directory, Right::RemoveFile | Right::RemoveDir)?;
        // Its entry is the parent's.
        domain.allow(&self.parent, Right::RemoveDir)
    }

    /// Removes it with those of the machines and of the jails, as far as nothing else is in them.
    pub fn remove(&self) {
        for name in [MACHINES, JAILS] {
            let _ = self.directory.remove(name);
            point(format_args!("the directory of the {name} removed"));
        }
        let _ = self.parent.remove(&self.name);
    }
}

/// A directory for this user alone, which is made if it is not there and `make` says so.
fn private(parent: &Directory, name: &OsStr, make: bool) -> Result<Directory, RuntimeError> {
    let path = parent.path_of(name);
    let failed = |errno| RuntimeError::File { path: path.clone(), errno };
    if make {
        match parent.make(name, Mode::S_IRWXU) {
            Ok(()) => point(format_args!("{} made", path.display())),
            Err(Errno::EEXIST) => {}
            Err(errno) => return Err(failed(errno)),
        }
    }
    let directory = match parent.open(Path::new(name)) {
        Ok(directory) => directory,
        Err(Errno::ELOOP | Errno::ENOTDIR) => return Err(RuntimeError::Shared(path)),
        Err(errno) => return Err(failed(errno)),
    };
    if directory.is_private().map_err(failed)? { Ok(directory) } else { Err(RuntimeError::Shared(path)) }
}

/// The directory of one machine, and its lock. Dropping it removes it, unless its journal still tells of something.
#[derive(Debug)]
pub struct Home {
    base: Base,
    machines: Directory,
    own: Directory,
    name: String,
    journal: Option<Journal>,
    closed: bool,
}

impl Home {
    /// Makes the directory of a machine and takes its lock (flock(2)), which ends with `ozone`, however that ends. With what
    /// a killed machine of the same name has left.
    ///
    /// # Errors
    /// [`RuntimeError`]; nothing is left behind.
    pub fn claim(base: &Path, name: Option<&str>) -> Result<(Self, Vec<Leftover>), RuntimeError> {
        let mut home = match name {
            Some(name) => Self::wait_for(base, name)?.ok_or_else(|| RuntimeError::Taken(name.to_owned()))?,
            None => {
                let pid = std::process::id();
                let names = (0..NAMESAKES)
                    .map(|number| if number == 0 { format!("_{pid}") } else { format!("_{pid}-{number}") });
                let mut homes = names.filter_map(|name| Self::enter(base, &name, true).transpose());
                homes.next().ok_or_else(|| RuntimeError::Taken(format!("_{pid}")))??
            }
        };
        let leftovers = home.read()?;
        home.journal().begin()?;
        Ok((home, leftovers))
    }

    /// Takes what a killed machine has left; nothing if the machine runs, or is gone.
    ///
    /// # Errors
    /// [`RuntimeError`].
    pub fn leftover(base: &Path, name: &str) -> Result<Option<(Self, Vec<Leftover>)>, RuntimeError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let home = match Self::enter(base, name, false) {
                Err(error) if error.is_missing() => return Ok(None),
                home => home?,
            };
            if let Some(mut home) = home {
                let leftovers = home.read()?;
                return Ok(Some((home, leftovers)));
            }
            // The lock of one that was killed may still be on its way out with a child that it had just cloned.
            if Self::is_alive(base, name) || Instant::now() >= deadline {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Whether nobody has this name. What cannot be told is no.
    fn is_free(base: &Path, name: &str) -> bool {
        match Self::enter(base, name, false) {
            // Nothing in it has been looked at, and nothing is removed.
            Ok(found) => found.map(|mut home| home.closed = true).is_some(),
            Err(error) => error.is_missing(),
        }
    }

    fn is_alive(base: &Path, name: &str) -> bool {
        let machine = Base::open(base).ok().flatten().and_then(|base| {
            let machines = private(&base.directory, OsStr::new(MACHINES), false).ok()?;
            private(&machines, OsStr::new(name), false).ok()
        });
        let pid = machine.and_then(|own| journal::peek(&own).ok()?.0);
        pid.is_some_and(runs)
    }

    fn wait_for(base: &Path, name: &str) -> Result<Option<Self>, RuntimeError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(home) = Self::enter(base, name, true)? {
                return Ok(Some(home));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            // Polled: nothing tells of a lock that is given back.
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The directory of a machine with its lock; nothing if that is taken.
    fn enter(directory: &Path, name: &str, make: bool) -> Result<Option<Self>, RuntimeError> {
        let deadline = Instant::now() + PATIENCE;
        let find = || {
            let base = Base::get(directory, make)?;
            let machines = private(&base.directory, OsStr::new(MACHINES), make)?;
            let own = private(&machines, OsStr::new(name), make)?;
            Ok((base, machines, own))
        };
        loop {
            match find() {
                Ok((base, machines, own)) => {
                    // The last one may have removed it between the open and the lock.
                    let claimed = own.claim(&machines, name);
                    let name = name.to_owned();
                    return Ok(claimed.then_some(Self { base, machines, own, name, journal: None, closed: false }));
                }
                // Another machine has removed a directory that it was the last to use.
                Err(RuntimeError::File { errno: Errno::ENOENT, path })
                    if make && directory.parent() != Some(&path) && Instant::now() < deadline => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn read(&mut self) -> Result<Vec<Leftover>, RuntimeError> {
        point(format_args!("the machine's lock taken"));
        let (journal, leftovers) = Journal::open(&self.own)?;
        self.journal = Some(journal);
        point(format_args!("the journal there"));
        Ok(leftovers)
    }

    /// The machine's directory.
    pub fn directory(&self) -> &Directory {
        &self.own
    }

    /// The machine's journal.
    pub fn journal(&self) -> Journal {
        self.journal.clone().unwrap_or_default()
    }

    /// It is removed at the end.
    ///
    /// # Errors
    /// See [`Domain::allow`].
    pub fn allow(&self, domain: &mut Domain) -> Result<(), Errno> {
        self.base.allow(domain)
    }

    /// Removes the directory, if the journal tells of nothing any more; whether it did.
    ///
    /// # Errors
    /// [`RuntimeError`], as when something is in it that ozone has not made.
    pub fn close(mut self) -> Result<bool, RuntimeError> {
        self.remove()
    }

    fn remove(&mut self) -> Result<bool, RuntimeError> {
        if self.closed || !self.journal().is_done() {
            return Ok(false);
        }
        self.closed = true;
        if self.journal.is_some() {
            let _ = self.own.unlink(journal::NAME);
            point(format_args!("the journal removed"));
        }
        let failed = |errno| RuntimeError::File { path: self.own.path().to_owned(), errno };
        self.machines.remove(&self.name).map_err(failed)?;
        point(format_args!("the machine's directory removed"));
        self.base.remove();
        Ok(true)
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = self.remove();
    }
}

/// Whether a process is there that has not ended (proc(5), /proc/PID/stat).
pub fn runs(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::journal::Object;
    use std::fs;
    use std::os::unix::fs::{DirBuilderExt, symlink};

    /// Where machines and jails could be, and the directory that it goes with.
    pub(crate) fn base() -> (tempfile::TempDir, PathBuf) {
        let parent = tempfile::tempdir().unwrap();
        let base = parent.path().join("ozone");
        (parent, base)
    }

    #[test]
    fn a_name_is_one_machines_and_everything_goes_with_the_last() {
        let (_parent, base) = base();
        let (first, _) = Home::claim(&base, Some("web1")).unwrap();
        assert!(matches!(Home::claim(&base, Some("web1")), Err(RuntimeError::Taken(_))));
        assert!(Home::leftover(&base, "web1").unwrap().is_none(), "it runs");
        assert!(!Home::is_free(&base, "web1") && Home::is_free(&base, "web2"));
        let (unnamed, _) = Home::claim(&base, None).unwrap();
        let (namesake, _) = Home::claim(&base, None).unwrap();
        let pid = std::process::id();
        assert_eq!((unnamed.name.clone(), namesake.name.clone()), (format!("_{pid}"), format!("_{pid}-1")));
        drop((first, unnamed));
        assert!(base.exists());
        assert!(namesake.close().unwrap());
        assert!(!base.exists());
    }

    #[test]
    fn what_the_journal_tells_of_keeps_the_directory() {
        let (_parent, base) = base();
        let (home, _) = Home::claim(&base, Some("web1")).unwrap();
        let _entry = home.journal().record(Object::Control).unwrap();
        drop(home);
        assert!(Home::is_free(&base, "web1"), "nobody has it");
        let (home, leftovers) = Home::claim(&base, Some("web1")).unwrap();
        let [leftover] = <[Leftover; 1]>::try_from(leftovers).unwrap();
        leftover.undo(home.directory()).unwrap();
        drop(home);
        assert!(!base.exists());
        assert!(Home::leftover(&base, "web1").unwrap().is_none() && Home::is_free(&base, "web1"));
    }

    #[test]
    fn machines_that_come_and_go_do_not_disturb_each_other() {
        let (_parent, base) = base();
        let churn = |name: &'static str| {
            let base = base.clone();
            std::thread::spawn(move || (0..300).for_each(|_| drop(Home::claim(&base, Some(name)).unwrap())))
        };
        for thread in [churn("web1"), churn("web2")] {
            thread.join().unwrap();
        }
        assert!(!base.exists());
    }

    #[test]
    fn a_directory_open_to_others_is_refused() {
        let (parent, base) = base();
        fs::DirBuilder::new().mode(0o755).create(&base).unwrap();
        let refused = || {
            let claim = Home::claim(&base, Some("web1"));
            !Home::is_free(&base, "web1") && matches!(claim, Err(RuntimeError::Shared(path)) if path == base)
        };
        assert!(refused());
        fs::remove_dir(&base).unwrap();
        fs::DirBuilder::new().mode(0o700).create(parent.path().join("other")).unwrap();
        symlink("other", &base).unwrap();
        assert!(refused());
        fs::remove_file(&base).unwrap();
        fs::write(&base, "").unwrap();
        assert!(refused());
    }

    #[test]
    fn names_cannot_lead_elsewhere() {
        for name in ["web1", "a.b-c_d", "0"] {
            assert!(is_name(name) && is_directory_name(name) && is_directory_name(&format!("_{name}")));
        }
        for name in ["", ".", "..", "../x", "a/b", "_1", "-a", "a\n", "ä", &"x".repeat(65), &"x".repeat(256)] {
            assert!(!is_name(name), "{name}");
        }
        assert!(!is_directory_name("_") && !is_directory_name("__1"));
    }
}
