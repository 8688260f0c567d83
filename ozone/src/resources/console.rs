//! Where a console's bytes go on the host.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::socket::{SockFlag, SockType};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::{getpgrp, tcgetpgrp};
use protocol::ConsoleHost;

use super::terminal::Terminal;
use super::{ResourceError, reopen, said};
use crate::directory::walk::{self, Last, Named};
use crate::directory::{Directory, FileId, kind};
use crate::journal::{Entry, Identity, Journal, Object};
use crate::landlock::{Domain, Right};
use crate::socket;
use crate::spec::file::ConsoleFile;

/// Clients that may wait while another has the console.
const BACKLOG: i32 = 128;

/// The host side of a console, kept for the machine's lifetime.
#[derive(Debug)]
pub enum Place {
    /// The user's terminal.
    Terminal(Terminal),
    /// Plain input and output.
    Stream {
        /// Where input comes from.
        input: Option<OwnedFd>,
        /// Where output goes.
        output: OwnedFd,
    },
    /// A pseudo-terminal.
    Pty {
        /// The master side.
        master: OwnedFd,
        /// Held open, so that the master is not hung up while nobody has the other side open.
        slave: OwnedFd,
        /// The path of the other side.
        path: String,
    },
    /// A listening socket.
    Socket(Listener),
}

/// A listening unix socket, whose file goes with it.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    directory: Directory,
    name: OsString,
    /// Which file it is, so that another's is never removed.
    id: FileId,
    noted: Option<Entry>,
}

impl Listener {
    /// Its file is removed at the end.
    pub(super) fn allow(&self, domain: &mut Domain) -> Result<(), Errno> {
        domain.allow(&self.directory, Right::RemoveFile)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let removed = socket::remove(&self.directory, &self.name, Some(self.id));
        // One that could not be removed is left to 'ozone gc'.
        if removed.is_ok() {
            self.noted.take().into_iter().for_each(Entry::undone);
        }
    }
}

impl Place {
    /// What a backend process is handed.
    pub(super) fn host(
        &self,
        copy: impl Fn(&OwnedFd) -> Result<OwnedFd, ResourceError>,
    ) -> Result<ConsoleHost, ResourceError> {
        Ok(match self {
            Self::Terminal(terminal) => {
                let terminal = terminal.as_fd().try_clone_to_owned();
                let terminal = terminal.map_err(|error| ResourceError::host("duplicate a descriptor", said(&error)))?;
                ConsoleHost::Terminal { terminal: terminal.into() }
            }
            Self::Stream { input, output } => ConsoleHost::Stream {
                input: input.as_ref().map(|input| copy(input).map(Into::into)).transpose()?,
                output: copy(output)?.into(),
            },
            Self::Pty { master, .. } => ConsoleHost::Pty { master: copy(master)?.into() },
            Self::Socket(listener) => ConsoleHost::Socket { listener: copy(&listener.socket)?.into() },
        })
    }
}

/// Opens or makes the host side of a console.
///
/// # Errors
/// [`ResourceError`] naming the argument.
pub fn open(place: &ConsoleFile, argument: &str, journal: &Journal) -> Result<Place, ResourceError> {
    match place {
        ConsoleFile::Stdio => stdio(argument),
        ConsoleFile::Pty => pty(argument),
        ConsoleFile::File(path) => file(Path::new(path), argument),
        ConsoleFile::Socket(path) => listen(Path::new(path), argument, journal).map(Place::Socket),
    }
}

fn stdio(argument: &str) -> Result<Place, ResourceError> {
    if let Some(terminal) = Terminal::of_stdio() {
        return Ok(Place::Terminal(terminal));
    }
    let failed = |error: &io::Error| {
        ResourceError::host(argument, format!("duplicate standard input or output: {}", said(error)))
    };
    let (stdin, stdout) = (io::stdin(), io::stdout());
    // A terminal that is not in our foreground gives no input: reading it would take another program's.
    let others = stdin.is_terminal() && tcgetpgrp(&stdin) != Ok(getpgrp());
    let input = if others { None } else { Some(own_description(&stdin, OFlag::O_RDONLY)) };
    let input = input.transpose().map_err(|error| failed(&error))?;
    let output = own_description(&stdout, OFlag::O_WRONLY).map_err(|error| failed(&error))?;
    Ok(Place::Stream { input, output })
}

/// A descriptor for what a standard stream stands for: a pipe or device is opened anew, so that flags set on it do not reach
/// the caller's; a file is not, since its position is shared with the caller on purpose.
fn own_description(stream: impl AsFd, access: OFlag) -> io::Result<OwnedFd> {
    let kind = SFlag::from_bits_truncate(fstat(stream.as_fd())?.st_mode) & SFlag::S_IFMT;
    let opened = match kind {
        // Without O_NONBLOCK the open of a FIFO waits for the other side.
        SFlag::S_IFIFO | SFlag::S_IFCHR => reopen(stream.as_fd(), access | OFlag::O_NONBLOCK).ok(),
        _ => None,
    };
    if let Some(opened) = &opened {
        fcntl(opened, FcntlArg::F_SETFL(OFlag::empty()))?;
    }
    opened.map_or_else(|| stream.as_fd().try_clone_to_owned(), Ok)
}

fn pty(argument: &str) -> Result<Place, ResourceError> {
    let failed = |errno: Errno| ResourceError::host(argument, format!("make a pseudo-terminal: {}", errno.desc()));
    let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).map_err(failed)?;
    grantpt(&master).map_err(failed)?;
    unlockpt(&master).map_err(failed)?;
    let path = ptsname_r(&master).map_err(failed)?;
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let slave = nix::fcntl::open(path.as_str(), flags, Mode::empty()).map_err(failed)?;
    // Its line discipline would echo the guest's output back as input until a user's program makes it raw.
    let mut settings = tcgetattr(&slave).map_err(failed)?;
    cfmakeraw(&mut settings);
    tcsetattr(&slave, SetArg::TCSANOW, &settings).map_err(failed)?;
    let master = master.as_fd().try_clone_to_owned();
    let master = master.map_err(|error| ResourceError::host(argument, said(&error)))?;
    Ok(Place::Pty { master, slave, path })
}

fn file(path: &Path, argument: &str) -> Result<Place, ResourceError> {
    let wrong = |problem: String| ResourceError::input(argument, problem);
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    let file = walk::open_for_writing(path, OFlag::O_APPEND, mode).map_err(|error| wrong(error.to_string()))?;
    let metadata = file.metadata().map_err(|error| wrong(said(&error)))?;
    if !metadata.is_file() && !metadata.file_type().is_char_device() {
        return Err(wrong("is not a file".to_owned()));
    }
    let flags = OFlag::O_APPEND;
    fcntl(&file, FcntlArg::F_SETFL(flags)).map_err(|errno| wrong(errno.desc().to_owned()))?;
    Ok(Place::Stream { input: None, output: file.into() })
}

fn listen(path: &Path, argument: &str, journal: &Journal) -> Result<Listener, ResourceError> {
    let wrong = |problem: String| ResourceError::input(argument, problem);
    let said = |errno: Errno| wrong(errno.desc().to_owned());
    // sun_path with its terminator (unix(7)): nobody could connect to a longer one.
    if path.as_os_str().len() > 107 {
        return Err(wrong("a socket's path has at most 107 bytes".to_owned()));
    }
    let Named { directory, name, .. } = walk::resolve(path, Last::Itself).map_err(|error| wrong(error.to_string()))?;
    if name.len() > socket::NAME_MAX {
        return Err(wrong(format!("a socket's name in its directory has at most {} bytes", socket::NAME_MAX)));
    }
    match directory.look(&name) {
        Ok(found) if kind(&found) != SFlag::S_IFSOCK => {
            return Err(wrong("exists and is not a socket; it is left alone".to_owned()));
        }
        Ok(found) => {
            // One that nobody listens on is left over from a run that was killed.
            if socket::is_listened_on(&directory, &name, Instant::now() + socket::PATIENCE) {
                return Err(wrong("another program listens on this socket".to_owned()));
            }
            if directory.look(&name).is_ok_and(|now| FileId::from(&now) == FileId::from(&found)) {
                directory.unlink(&name).map_err(said)?;
            }
        }
        Err(Errno::ENOENT) => {}
        Err(errno) => return Err(said(errno)),
    }
    let object = Object::Socket {
        directory: directory.path().to_owned(),
        id: directory.id().map_err(said)?,
        name: name.to_string_lossy().into_owned(),
    };
    let made = journal.make(object, || {
        let (socket, id) =
            socket::listen_at(&directory, &name, SockType::Stream, SockFlag::empty(), BACKLOG).map_err(said)?;
        Ok::<_, ResourceError>(((socket, id), Some(Identity::File(id))))
    });
    let ((socket, id), entry) = made?;
    Ok(Listener { socket, directory, name, id, noted: Some(entry) })
}
