//! Unix sockets with a name in a held directory (unix(7)).
//!
//! A name is bound, tried and removed by way of its directory's descriptor, and the kernel follows no symbolic link that
//! stands there instead.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstat};
use nix::unistd::geteuid;

use crate::directory::{Directory, FileId, kind};

/// How long a listener may take to go: a program that has just been killed is about to.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// The longest name in bytes: with the directory's descriptor before it and a terminator after it, it has to fit 108.
pub const NAME_MAX: usize = 80;

/// Whether this is a socket, and the same as before if that is known.
pub fn is(stat: &FileStat, id: Option<FileId>) -> bool {
    let same = id.map_or(stat.st_uid == geteuid().as_raw(), |id| FileId::from(stat) == id);
    kind(stat) == SFlag::S_IFSOCK && same
}

/// Makes a listening socket that only this user and root can connect to; with what its file is.
///
/// # Errors
/// `EADDRINUSE` if anything has that name, and else what socket(2), bind(2) and listen(2) say; nothing is left then.
pub fn listen_at(
    directory: &Directory,
    name: &OsStr,
    kind: SockType,
    flags: SockFlag,
    backlog: i32,
) -> Result<(OwnedFd, FileId), Errno> {
    if name.len() > NAME_MAX {
        return Err(Errno::ENAMETOOLONG);
    }
    let socket = socket(AddressFamily::Unix, kind, flags | SockFlag::SOCK_CLOEXEC, None)?;
    // The file gets the mode of the socket, so that it is right from the first moment (unix_bind in net/unix/af_unix.c).
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(socket.as_raw_fd(), &address(directory, name)?)?;
    let made = || {
        let stat = directory.look(name)?;
        // Others may write the directory, and have put something else there.
        if !is(&stat, None) {
            return Err(Errno::ESTALE);
        }
        listen(&socket, Backlog::new(backlog)?)?;
        Ok(FileId::from(&stat))
    };
    match made() {
        Ok(id) => Ok((socket, id)),
        Err(errno) => {
            let _ = remove(directory, name, None);
            Err(errno)
        }
    }
}

/// Removes the name of a socket, if it still is one, and the same if that is known; whether it did.
///
/// # Errors
/// What unlinkat(2) says.
pub fn remove(directory: &Directory, name: &OsStr, id: Option<FileId>) -> Result<bool, Errno> {
    match directory.look(name) {
        Ok(stat) if is(&stat, id) => match directory.unlink(name) {
            Ok(()) => Ok(true),
            // Whoever may write the directory has taken it away, or put a directory there.
            Err(Errno::ENOENT | Errno::EISDIR) => Ok(false),
            Err(errno) => Err(errno),
        },
        Ok(_) | Err(Errno::ENOENT) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Whether a program listens on the socket of that name, and does not end by the deadline.
pub fn is_listened_on(directory: &Directory, name: &OsStr, deadline: Instant) -> bool {
    // The file itself, whatever becomes of its name.
    let Ok(file) = directory.file(name, OFlag::O_PATH, Mode::empty()) else { return false };
    if !fstat(&file).is_ok_and(|stat| kind(&stat) == SFlag::S_IFSOCK) {
        return false;
    }
    loop {
        match probe(&file) {
            Ok(probe) => {
                let left = deadline.saturating_duration_since(Instant::now());
                let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
                // Without events to wait for it is the hang-up that is waited for.
                if !matches!(poll(&mut [PollFd::new(probe.as_fd(), PollFlags::empty())], timeout), Ok(1)) {
                    return true;
                }
            }
            Err(Errno::ECONNREFUSED | Errno::ENOENT) => return false,
            // Of another type, or with a full backlog: somebody has it.
            Err(_) if Instant::now() >= deadline => return true,
            Err(_) => {}
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn probe(file: &File) -> Result<OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let mut outcome = Err(Errno::EPROTOTYPE);
    for kind in [SockType::Stream, SockType::SeqPacket] {
        // Without waiting for room in the backlog.
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let probe = socket(AddressFamily::Unix, kind, flags, None)?;
        outcome = connect(probe.as_raw_fd(), &UnixAddr::new(path.as_str())?).map(|()| probe);
        if !matches!(outcome, Err(Errno::EPROTOTYPE)) {
            break;
        }
    }
    outcome
}

fn address(directory: &Directory, name: &OsStr) -> Result<UnixAddr, Errno> {
    let prefix = format!("/proc/self/fd/{}/", directory.as_fd().as_raw_fd());
    UnixAddr::new([prefix.as_bytes(), name.as_bytes()].concat().as_slice())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;
    use std::path::Path;

    fn listener(directory: &Path, name: &str) -> Result<(OwnedFd, FileId), Errno> {
        let directory = Directory::at(directory).unwrap();
        listen_at(&directory, OsStr::new(name), SockType::Stream, SockFlag::empty(), 1)
    }

    #[test]
    fn a_socket_is_private_from_the_first_moment_and_takes_no_name_that_is_taken() {
        let base = tempfile::tempdir().unwrap();
        let (_socket, _) = listener(base.path(), "socket").unwrap();
        assert_eq!(fs::symlink_metadata(base.path().join("socket")).unwrap().permissions().mode() & 0o7777, 0o600);
        fs::write(base.path().join("file"), "kept").unwrap();
        symlink("nowhere", base.path().join("link")).unwrap();
        for name in ["socket", "file", "link"] {
            assert_eq!(listener(base.path(), name).unwrap_err(), Errno::EADDRINUSE, "{name}");
        }
        assert!(!base.path().join("nowhere").exists());
        assert_eq!(listener(base.path(), &"x".repeat(NAME_MAX + 1)).unwrap_err(), Errno::ENAMETOOLONG);
        assert!(listener(base.path(), &"x".repeat(NAME_MAX)).is_ok());
    }

    #[test]
    fn only_the_same_socket_is_removed() {
        let base = tempfile::tempdir().unwrap();
        let directory = Directory::at(base.path()).unwrap();
        let name = OsStr::new("socket");
        let (socket, id) = listener(base.path(), "socket").unwrap();
        assert!(is_listened_on(&directory, name, Instant::now()));
        drop(socket);
        assert!(!is_listened_on(&directory, name, Instant::now()));
        let (_, other) = listener(base.path(), "other").unwrap();
        assert_eq!(remove(&directory, name, Some(other)), Ok(false));
        assert_eq!(remove(&directory, name, Some(id)), Ok(true));
        assert_eq!(remove(&directory, name, Some(id)), Ok(false), "it is gone");
        fs::write(base.path().join("socket"), "kept").unwrap();
        assert_eq!(remove(&directory, name, None), Ok(false));
        assert!(!is_listened_on(&directory, name, Instant::now()));
        assert_eq!(fs::read_to_string(base.path().join("socket")).unwrap(), "kept");
    }

    #[test]
    fn a_listener_of_another_type_or_with_a_full_backlog_counts() {
        let base = tempfile::tempdir().unwrap();
        let directory = Directory::at(base.path()).unwrap();
        let packets = listen_at(&directory, OsStr::new("packets"), SockType::SeqPacket, SockFlag::empty(), 1).unwrap();
        assert!(is_listened_on(&directory, OsStr::new("packets"), Instant::now()));
        drop(packets);
        let datagrams = std::os::unix::net::UnixDatagram::bind(base.path().join("datagrams")).unwrap();
        assert!(is_listened_on(&directory, OsStr::new("datagrams"), Instant::now()));
        drop(datagrams);
        let listener = UnixListener::bind(base.path().join("full")).unwrap();
        listen(&listener, Backlog::new(0).unwrap()).unwrap();
        let file = directory.file(OsStr::new("full"), OFlag::O_PATH, Mode::empty()).unwrap();
        let full: Vec<_> = std::iter::from_fn(|| probe(&file).ok()).take(16).collect();
        assert!(full.len() < 16, "the backlog has an end");
        assert!(is_listened_on(&directory, OsStr::new("full"), Instant::now()));
    }
}
