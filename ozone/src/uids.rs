//! Users of the host for the processes of one machine.
//!
//! As root every machine has a range of uids that no other machine has, for as long as it runs: one that is asked for, or
//! else the first free slot of many. The claim is a lock on the bytes of a file that have the uids' numbers, tied to the open
//! file description: it vanishes with `ozone`, however that ends.

use std::ffi::OsStr;
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::sys::stat::Mode;
use nix::unistd::{getegid, geteuid};
use protocol::Fault;

use crate::jail::Identity;
use crate::journal::{self, Journal, JournalError, Object, Vanishing};
use crate::landlock::Domain;
use crate::report;
use crate::runtime::{Base, RuntimeError};
use crate::spec::{Given, VmSpec};

/// Where the claims are.
const DIRECTORY: &str = "/run/ozone";

/// The file of claims.
pub const FILE: &str = "uids.lock";

/// The first uid of slot 0: above every range that distributions and systemd-nspawn hand out.
const FIRST: u32 = 0x7000_0000;

/// Uids in a slot: the core's and one per device.
const PER_SLOT: u32 = 64;

/// How many slots there are.
const SLOTS: u32 = 65536;

/// How long to look for a free slot: a machine that is just ending holds all of them for a moment.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why no users could be had.
#[derive(Debug, thiserror::Error)]
pub enum UidError {
    /// The file of claims or its directory cannot be used.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// They cannot be written down.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Every slot is taken.
    #[error("{DIRECTORY}/{FILE}: all {SLOTS} slots of uids are taken")]
    Full,
    /// An ordinary user asks for some.
    #[error(
        "{argument}: only root can give processes uids of their own; all of this machine's run as user {uid}: leave it out"
    )]
    Ordinary {
        /// The argument.
        argument: String,
        /// The user.
        uid: u32,
    },
    /// Another machine has some of them.
    #[error("{argument}: {} has some of the uids {first} to {last}; give this one others", match .other { Some(name) => format!("machine '{name}'"), None => "another machine".to_owned() })]
    Overlap {
        /// The argument.
        argument: String,
        /// The first uid that was asked for.
        first: u32,
        /// The last one.
        last: u32,
        /// The other machine, if its journal tells.
        other: Option<String>,
    },
}

impl From<UidError> for Fault {
    fn from(error: UidError) -> Self {
        match error {
            UidError::Ordinary { .. } | UidError::Overlap { .. } => Fault::input(error.to_string()),
            UidError::Runtime(error) => error.into(),
            UidError::Journal(error) => error.into(),
            UidError::Full => Fault::host(error.to_string()),
        }
    }
}

/// The users of one machine's processes.
#[derive(Debug)]
pub enum Uids {
    /// A uid per process.
    Range(Claim),
    /// The caller's uid for all of them, since it is no root.
    Caller {
        /// Its effective uid.
        uid: u32,
        /// Its effective gid.
        gid: u32,
    },
}

/// A range of uids that no other machine has.
#[derive(Debug)]
pub struct Claim {
    first: u32,
    count: u32,
    base: Base,
    file: File,
    _noted: Option<Vanishing>,
}

impl Uids {
    /// Takes users for one machine.
    ///
    /// # Errors
    /// [`UidError`]; as an ordinary user only if some are asked for.
    pub fn claim(spec: &VmSpec, journal: &Journal) -> Result<Self, UidError> {
        let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
        match &spec.uid_base {
            Some(asked) if uid != 0 => Err(UidError::Ordinary { argument: asked.argument.clone(), uid }),
            None if uid != 0 => Ok(Self::Caller { uid, gid }),
            asked => {
                let mut claim = match asked {
                    Some(first) => Claim::asked(Path::new(DIRECTORY), first, spec.processes())?,
                    None => Claim::derived(Path::new(DIRECTORY))?,
                };
                // Which ones they are is known only now; the lock needs nobody to undo it.
                let entry = journal.record(Object::Uids { first: claim.first, count: claim.count })?;
                claim._noted = Some(entry.vanishing());
                Ok(Self::Range(claim))
            }
        }
    }

    /// Says so when the processes cannot have users of their own.
    pub fn announce(&self) {
        if let Self::Caller { uid, .. } = self {
            report::say(&format!("without root every process runs as uid {uid}, each in a user namespace of its own"));
        }
    }

    /// The file of claims is removed at the end, if nobody else uses it.
    ///
    /// # Errors
    /// See [`Domain::allow`].
    pub fn allow(&self, domain: &mut Domain) -> Result<(), Errno> {
        match self {
            Self::Range(claim) => claim.base.allow(domain),
            Self::Caller { .. } => Ok(()),
        }
    }

    /// Whether this is a uid that only this machine's processes have. As an ordinary user they have none of their own.
    pub fn has(&self, uid: u32) -> bool {
        match self {
            Self::Range(claim) => uid.checked_sub(claim.first).is_some_and(|place| place < claim.count),
            Self::Caller { .. } => false,
        }
    }

    /// Who the process with this place in the machine is: 0 for the core, 1 and up for devices.
    pub fn identity(&self, place: u8) -> Identity {
        match self {
            Self::Range(claim) => Identity::Own(claim.first + u32::from(place) % claim.count),
            Self::Caller { uid, gid } => Identity::Mapped { uid: *uid, gid: *gid },
        }
    }
}

impl Claim {
    fn open(directory: &Path) -> Result<Self, UidError> {
        let base = Base::make(directory)?;
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_NONBLOCK;
        let file = base.directory().file(OsStr::new(FILE), flags, Mode::S_IRUSR | Mode::S_IWUSR);
        let file = file.map_err(|errno| RuntimeError::File { path: base.directory().path_of(FILE), errno })?;
        Ok(Self { first: 0, count: 1, base, file, _noted: None })
    }

    /// Tries until it has uids: `try_lock` says which.
    fn take(directory: &Path, try_lock: impl Fn(&File) -> Option<(u32, u32)>) -> Result<Option<Self>, UidError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Self::open(directory) {
                Ok(mut claim) => {
                    // The last user may have removed the file between the open and the lock: the claim is worth nothing then.
                    if let Some((first, count)) = try_lock(&claim.file)
                        && claim.base.directory().names(FILE, &claim.file)
                    {
                        (claim.first, claim.count) = (first, count);
                        return Ok(Some(claim));
                    }
                }
                // The last user removed the directory in between.
                Err(UidError::Runtime(RuntimeError::File { errno: Errno::ENOENT, .. })) => {}
                Err(error) => return Err(error),
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn derived(directory: &Path) -> Result<Self, UidError> {
        let free = |file: &File| {
            let mut firsts = (0..SLOTS).map(|slot| FIRST + slot * PER_SLOT);
            firsts.find(|first| lock(file, *first, PER_SLOT).is_ok()).map(|first| (first, PER_SLOT))
        };
        Self::take(directory, free)?.ok_or(UidError::Full)
    }

    fn asked(directory: &Path, asked: &Given<u32>, count: u32) -> Result<Self, UidError> {
        let first = asked.value;
        let claim = Self::take(directory, |file| lock(file, first, count).is_ok().then_some((first, count)))?;
        claim.ok_or_else(|| {
            let last = first.saturating_add(count.saturating_sub(1));
            let other = holder(directory, first, last);
            UidError::Overlap { argument: asked.argument.clone(), first, last, other }
        })
    }
}

/// The running machine whose journal tells of some of these uids.
fn holder(directory: &Path, first: u32, last: u32) -> Option<String> {
    let (machines, names) = Base::open(directory).ok()??.machines().ok()??;
    names.into_iter().filter_map(|name| name.into_string().ok()).find(|name| {
        let Ok(own) = machines.open(Path::new(name)) else { return false };
        let objects = journal::peek(&own).map(|(_, objects)| objects).unwrap_or_default();
        let overlaps = |object: &Object| {
            matches!(object, Object::Uids { first: other, count }
                if *other <= last && first < other.saturating_add(*count))
        };
        objects.iter().any(overlaps) && !own.claim_shared()
    })
}

impl Drop for Claim {
    fn drop(&mut self) {
        remove_unused(&self.base, &self.file);
    }
}

/// Removes the file of claims if it is nobody else's, and the directory if nothing else is in it; whether the file was removed.
fn remove_unused(base: &Base, file: &File) -> bool {
    // A lock on the whole file is granted to its only user. Length 0 means to the end.
    let is_ours = lock(file, 0, 0).is_ok() && base.directory().names(FILE, file);
    let removed = is_ours && base.directory().unlink(FILE).is_ok();
    if removed {
        journal::point(format_args!("the file of uids removed"));
        base.remove();
    }
    removed
}

/// Removes the file of claims that killed machines have left; whether there was one.
///
/// # Errors
/// [`RuntimeError`].
pub fn sweep(base: &Base) -> Result<bool, RuntimeError> {
    match base.directory().file(OsStr::new(FILE), OFlag::O_RDWR | OFlag::O_NONBLOCK, Mode::empty()) {
        Ok(file) => Ok(remove_unused(base, &file)),
        Err(Errno::ENOENT) => Ok(false),
        Err(errno) => Err(RuntimeError::File { path: base.directory().path_of(FILE), errno }),
    }
}

fn lock(file: &File, first: u32, count: u32) -> Result<(), Errno> {
    let lock = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: first.into(),
        l_len: count.into(),
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock)).map(drop)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, DirBuilder};
    use std::os::unix::fs::DirBuilderExt;

    use super::*;
    use crate::runtime::Home;

    fn asked(directory: &Path, first: u32, count: u32) -> Result<Claim, UidError> {
        Claim::asked(directory, &Given { value: first, argument: format!("--uid-base {first}") }, count)
    }

    #[test]
    fn slots_are_taken_once_and_the_last_user_cleans_up() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("ozone");
        let first = Claim::derived(&directory).unwrap();
        let second = Claim::derived(&directory).unwrap();
        assert_eq!((first.first, second.first), (FIRST, FIRST + PER_SLOT));
        drop(first);
        assert_eq!(Claim::derived(&directory).unwrap().first, FIRST, "a slot given back is free again");
        assert!(directory.exists());
        drop(second);
        assert!(!directory.exists());
    }

    #[test]
    fn what_is_asked_for_is_refused_if_another_machine_has_some_of_it() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("ozone");
        let (home, _) = Home::claim(&directory, Some("web1")).unwrap();
        let claim = asked(&directory, 100_000, 4).unwrap();
        let _noted =
            home.journal().record(Object::Uids { first: claim.first, count: claim.count }).unwrap().vanishing();
        let other = asked(&directory, 100_004, 4).unwrap();
        let error = asked(&directory, 99_998, 3).unwrap_err().to_string();
        assert_eq!(
            error,
            "--uid-base 99998: machine 'web1' has some of the uids 99998 to 100000; give this one others"
        );
        let error = asked(&directory, 100_007, 2).unwrap_err().to_string();
        assert!(error.contains("another machine has some of the uids 100007 to 100008"), "{error}");
        drop((claim, other));
        drop(asked(&directory, 99_998, 3).unwrap());
        let most = u32::MAX - 1;
        drop(asked(&directory, most, 1).unwrap());
    }

    #[test]
    fn nothing_is_derived_that_another_machine_asked_for() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("ozone");
        let _asked = asked(&directory, FIRST + PER_SLOT - 1, 2).unwrap();
        assert_eq!(Claim::derived(&directory).unwrap().first, FIRST + 2 * PER_SLOT);
    }

    #[test]
    fn a_directory_open_to_others_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("ozone");
        DirBuilder::new().mode(0o755).create(&directory).unwrap();
        let refused = || matches!(Claim::derived(&directory), Err(UidError::Runtime(RuntimeError::Shared(_))));
        assert!(refused());
        fs::remove_dir(&directory).unwrap();
        std::os::unix::fs::symlink(parent.path(), &directory).unwrap();
        assert!(refused());
    }

    #[test]
    fn a_killed_machines_file_is_swept_and_a_running_ones_stays() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("ozone");
        let claim = Claim::derived(&directory).unwrap();
        let base = Base::open(&directory).unwrap().unwrap();
        assert!(!sweep(&base).unwrap(), "it is in use");
        drop(claim);
        assert!(!directory.exists());
        DirBuilder::new().mode(0o700).create(&directory).unwrap();
        fs::write(directory.join(FILE), "").unwrap();
        assert!(sweep(&Base::open(&directory).unwrap().unwrap()).unwrap());
        assert!(!directory.exists());
    }

    #[test]
    fn no_two_machines_share_a_uid() {
        let parent = tempfile::tempdir().unwrap();
        let claims: Vec<Uids> =
            (0..3).map(|_| Uids::Range(Claim::derived(&parent.path().join("ozone")).unwrap())).collect();
        let mut ids: Vec<Identity> =
            claims.iter().flat_map(|claim| (0..16).map(|place| claim.identity(place))).collect();
        ids.sort_by_key(|id| format!("{id:?}"));
        ids.dedup();
        assert_eq!(ids.len(), 48);
    }

    #[test]
    fn a_machine_has_its_range_and_an_ordinary_users_none() {
        let parent = tempfile::tempdir().unwrap();
        let uids = Uids::Range(asked(&parent.path().join("ozone"), 100_000, 3).unwrap());
        let held: Vec<u32> = (99_990..100_010).filter(|uid| uids.has(*uid)).collect();
        assert_eq!(held, [100_000, 100_001, 100_002]);
        assert!(!uids.has(0) && !Uids::Caller { uid: 1000, gid: 1000 }.has(1000));
    }
}
