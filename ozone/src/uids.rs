//! Users of the host for the processes of one machine.
//!
//! As root every machine takes a slot of uids that no other machine has, for as long as it runs. The claim is a lock on
//! byte N of a file, tied to the open file description: it vanishes with `ozone`, however that ends.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::unistd::{getegid, geteuid};
use protocol::Fault;

use crate::jail::Identity;
use crate::landlock::Domain;
use crate::report;
use crate::runtime::{self, RuntimeError};

/// Where the claims are.
const DIRECTORY: &str = "/run/ozone";

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
    /// Every slot is taken.
    #[error("{0}: all {SLOTS} slots of uids are taken")]
    Full(PathBuf),
}

impl From<UidError> for Fault {
    fn from(error: UidError) -> Self {
        Fault::host(error.to_string())
    }
}

/// The users of one machine's processes.
#[derive(Debug)]
pub enum Uids {
    /// A uid per process.
    Slot(Slot),
    /// The caller's uid for all of them, since it is no root.
    Caller {
        /// Its effective uid.
        uid: u32,
        /// Its effective gid.
        gid: u32,
    },
}

/// A claimed slot.
#[derive(Debug)]
pub struct Slot {
    number: u32,
    directory: PathBuf,
    claim: File,
}

impl Uids {
    /// Takes users for one machine.
    ///
    /// # Errors
    /// [`UidError`]; never as an ordinary user.
    pub fn claim() -> Result<Self, UidError> {
        if geteuid().is_root() {
            Slot::claim(Path::new(DIRECTORY)).map(Self::Slot)
        } else {
            Ok(Self::Caller { uid: geteuid().as_raw(), gid: getegid().as_raw() })
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
            Self::Slot(slot) => domain.allow_to_remove(&slot.directory),
            Self::Caller { .. } => Ok(()),
        }
    }

    /// Who the process with this place in the machine is: 0 for the core, 1 and up for devices.
    pub fn identity(&self, place: u8) -> Identity {
        match self {
            Self::Slot(slot) => Identity::Own(FIRST + slot.number * PER_SLOT + u32::from(place) % PER_SLOT),
            Self::Caller { uid, gid } => Identity::Mapped { uid: *uid, gid: *gid },
        }
    }
}

impl Slot {
    fn claim(directory: &Path) -> Result<Self, UidError> {
        let path = directory.join("uids.lock");
        let deadline = Instant::now() + PATIENCE;
        loop {
            runtime::make(directory)?;
            let opened = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&path);
            let claim = match opened {
                Ok(claim) => claim,
                // The last user removed the directory in between.
                Err(error) if error.kind() == ErrorKind::NotFound && Instant::now() < deadline => continue,
                Err(error) => return Err(RuntimeError::File { path, error }.into()),
            };
            let number = (0..SLOTS).find(|slot| lock(&claim, (*slot).into(), 1).is_ok());
            // The last user may have removed the file between the open and the lock: the claim is worth nothing then.
            match (number, runtime::is_current(&claim, &path)) {
                (Some(number), true) => return Ok(Self { number, directory: directory.to_owned(), claim }),
                _ if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                _ => return Err(UidError::Full(path)),
            }
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // A lock on the whole file is granted to its only user. Length 0 means to the end.
        if lock(&self.claim, 0, 0).is_ok() {
            let path = self.directory.join("uids.lock");
            if runtime::is_current(&self.claim, &path) {
                let _ = fs::remove_file(path);
                // Not when something else is in it.
                let _ = fs::remove_dir(&self.directory);
            }
        }
    }
}

fn lock(file: &File, start: i64, length: i64) -> Result<(), Errno> {
    let lock = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: length,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock)).map(drop)
}

#[cfg(test)]
mod tests {
    use std::fs::DirBuilder;
    use std::os::unix::fs::DirBuilderExt;

    use super::*;

    #[test]
    fn slots_are_taken_once_and_the_last_user_cleans_up() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("ozone");
        let first = Slot::claim(&directory).unwrap();
        let second = Slot::claim(&directory).unwrap();
        assert_eq!((first.number, second.number), (0, 1));
        drop(first);
        assert_eq!(Slot::claim(&directory).unwrap().number, 0, "a slot given back is free again");
        assert!(directory.exists());
        drop(second);
        assert!(!directory.exists());
    }

    #[test]
    fn a_directory_open_to_others_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("ozone");
        DirBuilder::new().mode(0o755).create(&directory).unwrap();
        assert!(matches!(Slot::claim(&directory), Err(UidError::Runtime(RuntimeError::Shared(_)))));
        fs::remove_dir(&directory).unwrap();
        std::os::unix::fs::symlink(parent.path(), &directory).unwrap();
        assert!(matches!(Slot::claim(&directory), Err(UidError::Runtime(RuntimeError::Shared(_)))));
    }

    #[test]
    fn no_two_machines_share_a_uid() {
        let parent = tempfile::tempdir().unwrap();
        let slots: Vec<Uids> = (0..3).map(|_| Uids::Slot(Slot::claim(&parent.path().join("ozone")).unwrap())).collect();
        let mut ids: Vec<Identity> = slots.iter().flat_map(|slot| (0..16).map(|place| slot.identity(place))).collect();
        ids.sort_by_key(|id| format!("{id:?}"));
        ids.dedup();
        assert_eq!(ids.len(), 48);
    }
}
