//! How each kind of object is undone. Whatever stands in its place and is something else stays.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::stat::SFlag;
use nix::unistd::geteuid;

use super::{Identity, Object};
use crate::cgroup::{self, CgroupError};
use crate::control::server;
use crate::directory::{Directory, FileId, kind};
use crate::socket;

/// How long what goes with the descriptors of a killed process may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// What came of undoing an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Undone {
    /// It was there, and is removed.
    Removed,
    /// It was not there any more.
    Gone,
    /// Something else is there, and stays: what and where, as a clause.
    Replaced(String),
}

/// Why an object is still there.
#[derive(Debug, thiserror::Error)]
pub enum UndoError {
    /// The system says no.
    #[error("{}: {}", .path.display(), .errno.desc())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What the system says.
        errno: Errno,
    },
    /// A program listens on the socket.
    #[error("{}: a program listens on it", .0.display())]
    Listener(PathBuf),
    /// A process holds the interface.
    #[error("interface {0} is still there: a process holds it; it goes with that")]
    Interface(String),
    /// A control group cannot be removed.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

/// Undoes an object. `own` is the machine's directory.
pub(super) fn undo(object: &Object, identity: Option<&Identity>, own: &Directory) -> Result<Undone, UndoError> {
    let id = identity.and_then(Identity::file);
    match object {
        Object::Control => {
            // Nobody else gets there, and whoever listened is dead: the machine's lock is ours.
            let failed = |errno| UndoError::File { path: own.path_of(server::NAME), errno };
            let removed = socket::remove(own, OsStr::new(server::NAME), None).map_err(failed)?;
            Ok(if removed { Undone::Removed } else { Undone::Gone })
        }
        Object::Socket { directory, id: parent, name } => undo_socket(directory, *parent, OsStr::new(name), id),
        Object::Unnamed { directory, id: parent, name } => undo_unnamed(directory, *parent, OsStr::new(name), id),
        Object::CommonCgroup { path } => Ok(cgroup::undo_common(path)),
        Object::Cgroup { path } => Ok(cgroup::undo(path, id)?),
        Object::Controllers { path } => Ok(cgroup::undo_controllers(path)),
        Object::Tap => match identity {
            Some(Identity::Interface { name, index }) => await_interface(name, *index),
            _ => Ok(Undone::Gone),
        },
        Object::Uids { .. } => Ok(Undone::Gone),
    }
}

/// The directory that was at this path, if it is there still.
fn find(path: &Path, id: FileId) -> Result<Result<Directory, Undone>, Errno> {
    match Directory::without_links(path) {
        Ok(directory) if directory.id() == Ok(id) => Ok(Ok(directory)),
        Ok(_) | Err(Errno::ELOOP | Errno::ENOTDIR) => {
            Ok(Err(Undone::Replaced(format!("{} is not the directory that it was", path.display()))))
        }
        Err(Errno::ENOENT) => Ok(Err(Undone::Gone)),
        Err(errno) => Err(errno),
    }
}

/// Removes a file that has not got its name. One that was not yet written down is this user's, and there is nothing in it.
fn undo_unnamed(path: &Path, parent: FileId, name: &OsStr, id: Option<FileId>) -> Result<Undone, UndoError> {
    let file = path.join(name);
    let failed = |errno| UndoError::File { path: file.clone(), errno };
    let directory = match find(path, parent).map_err(failed)? {
        Ok(directory) => directory,
        Err(undone) => return Ok(undone),
    };
    let found = match directory.look(name) {
        Err(Errno::ENOENT) => return Ok(Undone::Gone),
        found => found.map_err(failed)?,
    };
    let is_it = match id {
        Some(id) => FileId::from(&found) == id,
        None => found.st_uid == geteuid().as_raw() && found.st_size == 0,
    };
    if kind(&found) != SFlag::S_IFREG || !is_it {
        return Ok(Undone::Replaced(format!("{} is not the file that it was", file.display())));
    }
    match directory.unlink(name) {
        Ok(()) => Ok(Undone::Removed),
        Err(Errno::ENOENT) => Ok(Undone::Gone),
        Err(errno) => Err(failed(errno)),
    }
}

fn undo_socket(path: &Path, parent: FileId, name: &OsStr, id: Option<FileId>) -> Result<Undone, UndoError> {
    let socket = path.join(name);
    let failed = |errno| UndoError::File { path: socket.clone(), errno };
    let directory = match find(path, parent).map_err(failed)? {
        Ok(directory) => directory,
        Err(undone) => return Ok(undone),
    };
    match directory.look(name) {
        Err(Errno::ENOENT) => return Ok(Undone::Gone),
        Err(errno) => return Err(failed(errno)),
        Ok(found) if !socket::is(&found, id) => {
            return Ok(Undone::Replaced(format!("{} is not the socket that it was", socket.display())));
        }
        Ok(_) => {}
    }
    if socket::is_listened_on(&directory, name, Instant::now() + PATIENCE) {
        return match id {
            Some(_) => Err(UndoError::Listener(socket)),
            None => Ok(Undone::Replaced(format!("{} is another program's socket", socket.display()))),
        };
    }
    let removed = socket::remove(&directory, name, id).map_err(failed)?;
    Ok(if removed { Undone::Removed } else { Undone::Gone })
}

/// A tap that was made for a run is never removed: it goes with the last process that holds it, and until then is theirs.
fn await_interface(name: &str, index: u32) -> Result<Undone, UndoError> {
    let deadline = Instant::now() + PATIENCE;
    while if_nametoindex(name) == Ok(index) {
        if Instant::now() >= deadline {
            return Err(UndoError::Interface(name.to_owned()));
        }
        // Polled: the kernel gets to it when the killed processes are gone.
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(Undone::Gone)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    use nix::sys::socket::{SockFlag, SockType};

    struct Made {
        base: tempfile::TempDir,
        path: PathBuf,
        parent: FileId,
        id: FileId,
        socket: std::os::fd::OwnedFd,
    }

    fn made() -> Made {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().canonicalize().unwrap().join("d");
        fs::create_dir(&path).unwrap();
        let directory = Directory::at(&path).unwrap();
        let name = OsStr::new("socket");
        let (socket, id) = socket::listen_at(&directory, name, SockType::Stream, SockFlag::empty(), 1).unwrap();
        Made { parent: directory.id().unwrap(), base, path, id, socket }
    }

    impl Made {
        fn undo(&self, id: Option<FileId>) -> Result<Undone, UndoError> {
            undo_socket(&self.path, self.parent, OsStr::new("socket"), id)
        }
    }

    #[test]
    fn a_socket_that_nobody_listens_on_goes() {
        for known in [true, false] {
            let made = made();
            let id = known.then_some(made.id);
            match (made.undo(id), known) {
                (Err(UndoError::Listener(_)), true) | (Ok(Undone::Replaced(_)), false) => {}
                other => panic!("{other:?}"),
            }
            let Made { base, path, parent, socket, .. } = made;
            drop(socket);
            let name = OsStr::new("socket");
            assert_eq!(undo_socket(&path, parent, name, id).unwrap(), Undone::Removed);
            assert_eq!(undo_socket(&path, parent, name, id).unwrap(), Undone::Gone);
            drop(base);
            assert_eq!(undo_socket(&path, parent, name, id).unwrap(), Undone::Gone);
        }
    }

    #[test]
    fn what_took_its_place_stays() {
        let made = made();
        let socket = made.path.join("socket");
        let replaced = |id| matches!(made.undo(id).unwrap(), Undone::Replaced(_));
        fs::remove_file(&socket).unwrap();
        fs::write(&socket, "mine").unwrap();
        assert!(replaced(Some(made.id)) && replaced(None));
        assert_eq!(fs::read_to_string(&socket).unwrap(), "mine");
        fs::remove_file(&socket).unwrap();
        symlink("elsewhere", &socket).unwrap();
        assert!(replaced(Some(made.id)) && replaced(None));
        assert!(fs::symlink_metadata(&socket).is_ok());
        // A directory that took the place of its own, with a socket of that name in it.
        fs::rename(&made.path, made.base.path().join("moved")).unwrap();
        fs::create_dir(&made.path).unwrap();
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        assert!(replaced(None));
        assert!(socket.exists());
        fs::remove_dir_all(&made.path).unwrap();
        symlink("moved", &made.path).unwrap();
        assert!(replaced(None));
    }

    #[test]
    fn a_file_without_its_name_goes_and_no_other() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().canonicalize().unwrap();
        let (directory, name) = (Directory::at(&path).unwrap(), OsStr::new(".status.json.0"));
        let undo = |id| undo_unnamed(&path, directory.id().unwrap(), name, id).unwrap();
        assert_eq!(undo(None), Undone::Gone);
        let made = |text: &str| {
            // Beside it, so that the inode is another one.
            fs::write(path.join("other"), text).unwrap();
            fs::rename(path.join("other"), path.join(name)).unwrap();
            FileId::from(&directory.look(name).unwrap())
        };
        let id = made("half");
        assert_eq!((undo(Some(id)), undo(Some(id))), (Undone::Removed, Undone::Gone));
        made("");
        assert_eq!(undo(None), Undone::Removed);
        let id = made("half");
        made("mine");
        assert!(matches!((undo(Some(id)), undo(None)), (Undone::Replaced(_), Undone::Replaced(_))));
        assert_eq!(fs::read_to_string(path.join(name)).unwrap(), "mine");
        fs::remove_file(path.join(name)).unwrap();
        symlink("elsewhere", path.join(name)).unwrap();
        assert!(matches!((undo(Some(id)), undo(None)), (Undone::Replaced(_), Undone::Replaced(_))));
        let elsewhere = tempfile::tempdir().unwrap();
        let parent = Directory::at(elsewhere.path()).unwrap().id().unwrap();
        assert!(matches!(undo_unnamed(&path, parent, name, None).unwrap(), Undone::Replaced(_)));
    }

    #[test]
    fn an_interface_is_awaited_and_never_removed() {
        let index = if_nametoindex("lo").unwrap();
        assert!(matches!(await_interface("lo", index), Err(UndoError::Interface(_))));
        assert_eq!(await_interface("lo", index + 1).unwrap(), Undone::Gone);
    }
}
