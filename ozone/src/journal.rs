//! What a run makes on its host, written down before it is made, so that whoever comes after a `kill -9` can undo it.
//!
//! The journal is a file in the machine's own directory, with a JSON object on each line: what is about to be made, what it
//! has become (an inode, an interface), and that it is gone again. It is believed because nobody else gets into that
//! directory ([`crate::runtime`]). It is not synced: a killed process takes nothing along that write(2) has taken, and after a
//! crash of the host nothing is left that would have to be undone.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::rc::Rc;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::geteuid;
use protocol::Fault;
use serde::{Deserialize, Serialize};

use crate::directory::{Directory, kind};

mod object;
mod undo;

pub use object::{Identity, Object};
pub use undo::{UndoError, Undone};

/// The file's name in the machine's directory.
pub const NAME: &str = "journal";

/// The version of the format.
const VERSION: u32 = 1;

/// What a line ends in that could be written only in part, as on a full file system: a character that JSON has not.
const GIVEN_UP: &[u8] = b"\x18\n";

/// The longest journal in bytes. A run writes a few KiB, which stay only as long as something of it cannot be undone.
const LENGTH_MAX: u64 = 16 << 20;

/// Why a journal cannot be kept or believed.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The system says no.
    #[error("{}: {}", .path.display(), .errno.desc())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        errno: Errno,
    },
    /// It is not what a machine of this user wrote.
    #[error("{}: not a file of this user alone (mode 0600, one name); look at it and remove it", .0.display())]
    Foreign(PathBuf),
    /// It is longer than any machine writes.
    #[error("{}: longer than {LENGTH_MAX} bytes; look at it and remove it", .0.display())]
    Long(PathBuf),
    /// Something has no text to be written down.
    #[error("{0}: its path is not UTF-8, and the journal could not tell of it; use another one")]
    Text(String),
}

impl From<JournalError> for Fault {
    fn from(error: JournalError) -> Self {
        match error {
            JournalError::Text(_) => Fault::input(error.to_string()),
            _ => Fault::host(error.to_string()),
        }
    }
}

/// One line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Line {
    /// A process takes the machine.
    Machine { version: u32, pid: u32 },
    /// An object is about to be made.
    Making { number: u64, object: Object },
    /// It is there.
    Made { number: u64, identity: Identity },
    /// It is gone.
    Undone { number: u64 },
}

/// A journal under way; copies of it are the same one. A machine without a directory has one that keeps nothing.
#[derive(Clone, Debug, Default)]
pub struct Journal(Option<Rc<Book>>);

#[derive(Debug)]
struct Book {
    file: File,
    path: PathBuf,
    /// Whether the last line could be written only in part.
    is_torn: Cell<bool>,
    next: Cell<u64>,
    /// The objects that are there, as far as it knows.
    standing: RefCell<BTreeMap<u64, (Object, Option<Identity>)>>,
    /// Lines that a later version has written.
    unknown: usize,
}

/// One object in the journal. It stays there until [`Entry::undone`], whatever becomes of this value.
#[derive(Debug)]
#[must_use = "the object has to be struck out when it is gone"]
pub struct Entry {
    journal: Journal,
    number: u64,
}

/// An entry of what goes with a descriptor: dropped after that, it strikes the object out.
#[derive(Debug)]
pub struct Vanishing(Option<Entry>);

impl Drop for Vanishing {
    fn drop(&mut self) {
        if let Some(entry) = self.0.take() {
            entry.undone();
        }
    }
}

/// An object that a killed machine has left.
#[derive(Debug)]
pub struct Leftover {
    /// What it is.
    pub object: Object,
    /// Which one, if that was written down.
    pub identity: Option<Identity>,
    entry: Entry,
}

impl Leftover {
    /// Undoes it, and strikes it out if it is gone. `own` is the machine's directory.
    ///
    /// # Errors
    /// [`UndoError`]; it stays in the journal then.
    pub fn undo(self, own: &Directory) -> Result<Undone, UndoError> {
        let undone = undo::undo(&self.object, self.identity.as_ref(), own)?;
        self.entry.undone();
        Ok(undone)
    }

    /// What it is, in words.
    pub fn name(&self) -> String {
        self.object.describe(self.identity.as_ref())
    }
}

/// What a journal says.
#[derive(Debug, Default)]
struct Parsed {
    /// The process that wrote it last.
    pid: Option<u32>,
    standing: BTreeMap<u64, (Object, Option<Identity>)>,
    next: u64,
    /// How many lines make no sense.
    unknown: usize,
    /// The length of the whole lines in bytes: a process that was killed may have left a part of one.
    length: usize,
}

fn parse(text: &[u8]) -> Parsed {
    let mut parsed = Parsed { next: 1, ..Parsed::default() };
    for line in text.split_inclusive(|byte| *byte == b'\n').filter(|line| line.ends_with(b"\n")) {
        parsed.length += line.len();
        if line.ends_with(GIVEN_UP) {
            continue;
        }
        match serde_json::from_slice(line) {
            Ok(Line::Machine { version: VERSION, pid }) => parsed.pid = Some(pid),
            Ok(Line::Making { number, object }) => {
                parsed.next = parsed.next.max(number.saturating_add(1));
                parsed.standing.insert(number, (object, None));
            }
            Ok(Line::Made { number, identity }) => {
                if let Some((_, known)) = parsed.standing.get_mut(&number) {
                    *known = Some(identity);
                }
            }
            Ok(Line::Undone { number }) => drop(parsed.standing.remove(&number)),
            Ok(Line::Machine { .. }) | Err(_) => parsed.unknown += 1,
        }
    }
    parsed
}

/// The process that wrote the journal of a machine last, and the uids it has, if there is one.
///
/// # Errors
/// [`JournalError`].
pub fn peek(own: &Directory) -> Result<(Option<u32>, Vec<Object>), JournalError> {
    let parsed = match open(own, OFlag::O_RDONLY) {
        Ok((_, parsed)) => parsed,
        Err(JournalError::File { errno: Errno::ENOENT, .. }) => Parsed::default(),
        Err(error) => return Err(error),
    };
    Ok((parsed.pid, parsed.standing.into_values().map(|(object, _)| object).collect()))
}

fn open(own: &Directory, flags: OFlag) -> Result<(File, Parsed), JournalError> {
    let path = own.path_of(NAME);
    let failed = |errno| JournalError::File { path: path.clone(), errno };
    let file = own.file(OsStr::new(NAME), flags | OFlag::O_NONBLOCK, Mode::S_IRUSR | Mode::S_IWUSR).map_err(failed)?;
    let stat = fstat(&file).map_err(failed)?;
    let is_own = stat.st_uid == geteuid().as_raw() && stat.st_mode & 0o077 == 0 && stat.st_nlink == 1;
    if kind(&stat) != SFlag::S_IFREG || !is_own {
        return Err(JournalError::Foreign(path));
    }
    let mut text = Vec::new();
    let read = (&file).take(LENGTH_MAX + 1).read_to_end(&mut text);
    read.map_err(|error| failed(error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)))?;
    if text.len() as u64 > LENGTH_MAX {
        return Err(JournalError::Long(path));
    }
    Ok((file, parse(&text)))
}

impl Journal {
    /// One that keeps nothing: for a user without a place for it.
    pub fn none() -> Self {
        Self(None)
    }

    /// Opens the journal in a machine's directory, which nobody else may be using or get into, or begins it; with what is in
    /// it, in the order in which it was made.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn open(own: &Directory) -> Result<(Self, Vec<Leftover>), JournalError> {
        let (file, parsed) = open(own, OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_APPEND)?;
        let length = parsed.length as u64;
        let path = own.path_of(NAME);
        // What follows begins a line of its own.
        file.set_len(length).map_err(|error| JournalError::File {
            path: path.clone(),
            errno: error.raw_os_error().map_or(Errno::EIO, Errno::from_raw),
        })?;
        let (next, unknown) = (Cell::new(parsed.next), parsed.unknown);
        let standing = RefCell::new(parsed.standing.clone());
        let journal = Self(Some(Rc::new(Book { file, path, is_torn: Cell::new(false), next, standing, unknown })));
        let leftover = |(number, (object, identity))| {
            let entry = Entry { journal: journal.clone(), number };
            Leftover { object, identity, entry }
        };
        let leftovers = parsed.standing.into_iter().map(leftover).collect();
        Ok((journal, leftovers))
    }

    /// Writes down which process has the machine from now on.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn begin(&self) -> Result<(), JournalError> {
        self.write(&Line::Machine { version: VERSION, pid: std::process::id() })
    }

    /// Writes down an object that is about to be made.
    ///
    /// # Errors
    /// [`JournalError`]: it must not be made then.
    pub fn record(&self, object: Object) -> Result<Entry, JournalError> {
        let Some(book) = &self.0 else { return Ok(Entry { journal: self.clone(), number: 0 }) };
        let number = book.next.replace(book.next.get().saturating_add(1));
        let name = object.describe(None);
        book.standing.borrow_mut().insert(number, (object.clone(), None));
        let entry = Entry { journal: self.clone(), number };
        if let Err(error) = self.write(&Line::Making { number, object }) {
            book.standing.borrow_mut().remove(&number);
            return Err(error);
        }
        point(format_args!("{name} written down"));
        Ok(entry)
    }

    /// Makes an object and writes down before and after what it is. What cannot be made is struck out: `make` leaves nothing.
    ///
    /// # Errors
    /// What `make` says, or [`JournalError`].
    pub fn make<T, E: From<JournalError>>(
        &self,
        object: Object,
        make: impl FnOnce() -> Result<(T, Option<Identity>), E>,
    ) -> Result<(T, Entry), E> {
        let entry = self.record(object)?;
        match make() {
            Ok((made, identity)) => {
                if let Some(identity) = identity {
                    entry.made(identity);
                }
                Ok((made, entry))
            }
            Err(error) => {
                entry.undone();
                Err(error)
            }
        }
    }

    /// Whether nothing is left that it tells of.
    pub fn is_done(&self) -> bool {
        self.0.as_ref().is_none_or(|book| book.standing.borrow().is_empty() && book.unknown == 0)
    }

    /// How many lines of it make no sense: a later version of `ozone` has written them.
    pub fn unknown(&self) -> usize {
        self.0.as_ref().map_or(0, |book| book.unknown)
    }

    fn write(&self, line: &Line) -> Result<(), JournalError> {
        let Some(book) = &self.0 else { return Ok(()) };
        let mut text = serde_json::to_vec(line).map_err(|_| match line {
            Line::Making { object, .. } => JournalError::Text(object.describe(None)),
            _ => JournalError::Text(String::new()),
        })?;
        text.push(b'\n');
        if book.is_torn.get() {
            // It cannot be taken back: once ozone is confined it changes no file's length.
            text.splice(..0, GIVEN_UP.iter().copied());
        }
        #[cfg(feature = "crash-points")]
        if matches!(line, Line::Making { .. }) && crate::crash::is_reached() {
            let _ = (&book.file).write_all(text.get(..text.len() / 2).unwrap_or_default());
            crate::crash::end("half a line");
        }
        let written = (&book.file).write_all(&text);
        book.is_torn.set(written.is_err());
        if let Err(error) = written {
            let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
            return Err(JournalError::File { path: book.path.clone(), errno });
        }
        Ok(())
    }
}

impl Entry {
    /// Writes down which one it has become.
    pub fn made(&self, identity: Identity) {
        point(format_args!("made {}", identity));
        let Some(book) = &self.journal.0 else { return };
        // Without it the object is still known by its name.
        let _ = self.journal.write(&Line::Made { number: self.number, identity: identity.clone() });
        if let Some((_, known)) = book.standing.borrow_mut().get_mut(&self.number) {
            *known = Some(identity);
        }
        point(format_args!("made and written down"));
    }

    /// Strikes it out: it is gone, or was never made.
    pub fn undone(self) {
        let Some(book) = &self.journal.0 else { return point(format_args!("gone, and in no journal")) };
        let gone = book.standing.borrow_mut().remove(&self.number);
        point(format_args!("gone: {}", gone.map_or_else(String::new, |(object, _)| object.describe(None))));
        // Without it the object is looked for once more, and not found.
        let _ = self.journal.write(&Line::Undone { number: self.number });
        point(format_args!("gone and struck out"));
    }

    /// For an object that goes with a descriptor.
    pub fn vanishing(self) -> Vanishing {
        Vanishing(Some(self))
    }
}

/// A step between which and the next `ozone` could be killed.
#[cfg_attr(not(feature = "crash-points"), expect(unused_variables, reason = "only tests end here"))]
pub fn point(name: std::fmt::Arguments<'_>) {
    #[cfg(feature = "crash-points")]
    crate::crash::pass(&name.to_string());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn own() -> (tempfile::TempDir, Directory) {
        let directory = tempfile::tempdir().unwrap();
        let held = Directory::at(directory.path()).unwrap();
        (directory, held)
    }

    fn cgroup(path: &str) -> Object {
        Object::Cgroup { path: path.into() }
    }

    fn standing(own: &Directory) -> Vec<Object> {
        Journal::open(own).unwrap().1.into_iter().map(|leftover| leftover.object).collect()
    }

    #[test]
    fn what_stands_is_read_again_in_order() {
        let (_directory, own) = own();
        let (journal, leftovers) = Journal::open(&own).unwrap();
        assert!(leftovers.is_empty() && journal.is_done());
        journal.begin().unwrap();
        let first = journal.record(cgroup("a")).unwrap();
        let identity = Identity::Interface { name: "ozone0".to_owned(), index: 7 };
        let made: Result<_, JournalError> = journal.make(Object::Tap, || Ok(((), Some(identity.clone()))));
        let (_, _tap) = made.unwrap();
        let failed = journal.make(cgroup("b"), || Err::<((), _), _>(JournalError::Text("no".to_owned())));
        assert!(failed.is_err());
        let _last = journal.record(cgroup("c")).unwrap();
        first.undone();
        assert!(!journal.is_done());
        drop(journal);
        let (journal, leftovers) = Journal::open(&own).unwrap();
        let read: Vec<_> =
            leftovers.into_iter().map(|it| (it.object.clone(), it.identity.clone(), it.entry.number)).collect();
        assert_eq!(read, [(Object::Tap, Some(identity), 2), (cgroup("c"), None, 4)]);
        assert_eq!(journal.record(cgroup("d")).unwrap().number, 5);
        assert_eq!(peek(&own).unwrap().0, Some(std::process::id()));
    }

    #[test]
    fn half_a_line_at_the_end_is_no_line() {
        let (directory, own) = own();
        let (journal, _) = Journal::open(&own).unwrap();
        let _entry = journal.record(cgroup("a")).unwrap();
        let path = directory.path().join(NAME);
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, [&whole[..], &whole[..length]].concat()).unwrap();
            let (journal, leftovers) = Journal::open(&own).unwrap();
            assert_eq!((leftovers.len(), journal.unknown()), (1, 0), "{length}");
            assert_eq!(fs::read(&path).unwrap(), whole);
            let _entry = journal.record(cgroup("b")).unwrap();
            assert_eq!(standing(&own), [cgroup("a"), cgroup("b")]);
        }
    }

    #[test]
    fn what_a_later_version_wrote_keeps_the_journal() {
        let (directory, own) = own();
        fs::write(directory.path().join(NAME), "{\"making\":{\"number\":1,\"object\":{\"portal\":{}}}}\n").unwrap();
        fs::set_permissions(directory.path().join(NAME), fs::Permissions::from_mode(0o600)).unwrap();
        let (journal, leftovers) = Journal::open(&own).unwrap();
        assert_eq!((leftovers.len(), journal.unknown(), journal.is_done()), (0, 1, false));
    }

    #[test]
    fn only_ones_own_file_is_believed() {
        let (directory, own) = own();
        let path = directory.path().join(NAME);
        fs::write(directory.path().join("other"), "").unwrap();
        fs::set_permissions(directory.path().join("other"), fs::Permissions::from_mode(0o600)).unwrap();
        symlink("other", &path).unwrap();
        assert!(matches!(Journal::open(&own), Err(JournalError::File { errno: Errno::ELOOP, .. })));
        fs::remove_file(&path).unwrap();
        fs::hard_link(directory.path().join("other"), &path).unwrap();
        assert!(matches!(Journal::open(&own), Err(JournalError::Foreign(_))));
        fs::remove_file(directory.path().join("other")).unwrap();
        assert!(Journal::open(&own).is_ok());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(Journal::open(&own), Err(JournalError::Foreign(_))));
        fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        assert!(Journal::open(&own).is_err());
    }

    #[test]
    fn without_a_place_nothing_is_kept() {
        let journal = Journal::none();
        let entry = journal.record(cgroup("a")).unwrap();
        entry.made(Identity::Interface { name: String::new(), index: 0 });
        assert!(journal.is_done());
        entry.undone();
    }
}
