//! Where a console's bytes go on the host.

use std::fs::{self, File};
use std::io::{self, ErrorKind, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::stat::{Mode, SFlag, fstat, umask};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::{getpgrp, tcgetpgrp};
use protocol::ConsoleHost;

use super::terminal::Terminal;
use super::{ResourceError, reopen, said};
use crate::landlock::{Domain, Right};
use crate::spec::file::ConsoleFile;

/// How long a listener may take to go: the console of a machine that has just been killed is about to.
const LISTENER_PATIENCE: Duration = Duration::from_secs(2);

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
    path: PathBuf,
    /// Device and inode of the file, so that another's is never removed.
    file: (u64, u64),
}

impl Listener {
    /// Its file is removed at the end.
    pub(super) fn allow(&self, domain: &mut Domain) -> Result<(), Errno> {
        let directory = self.path.parent().filter(|directory| !directory.as_os_str().is_empty());
        domain.allow_at(directory.unwrap_or(Path::new(".")), Right::RemoveFile)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|now| (now.dev(), now.ino()) == self.file);
        if ours {
            let _ = fs::remove_file(&self.path);
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
pub fn open(place: &ConsoleFile, argument: &str) -> Result<Place, ResourceError> {
    match place {
        ConsoleFile::Stdio => stdio(argument),
        ConsoleFile::Pty => pty(argument),
        ConsoleFile::File(path) => file(Path::new(path), argument),
        ConsoleFile::Socket(path) => socket(Path::new(path), argument).map(Place::Socket),
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
    let failed =
        |errno: nix::errno::Errno| ResourceError::host(argument, format!("make a pseudo-terminal: {}", errno.desc()));
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
    let mut options = File::options();
    // Without O_NONBLOCK the open of a FIFO waits for a reader.
    options.append(true).create(true).mode(0o600).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    let file = options.open(path).map_err(|error| wrong(said(&error)))?;
    let metadata = file.metadata().map_err(|error| wrong(said(&error)))?;
    if !metadata.is_file() && !metadata.file_type().is_char_device() {
        return Err(wrong("is not a file".to_owned()));
    }
    let flags = OFlag::O_APPEND;
    fcntl(&file, FcntlArg::F_SETFL(flags)).map_err(|errno| wrong(errno.desc().to_owned()))?;
    Ok(Place::Stream { input: None, output: file.into() })
}

/// Whether a program listens on a socket, and does not end in a moment.
fn is_listened_on(path: &Path) -> bool {
    let deadline = Instant::now() + LISTENER_PATIENCE;
    while let Ok(probe) = UnixStream::connect(path) {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        // Without events to wait for it is the hang-up that is waited for.
        if !matches!(poll(&mut [PollFd::new(probe.as_fd(), PollFlags::empty())], timeout), Ok(1)) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

fn socket(path: &Path, argument: &str) -> Result<Listener, ResourceError> {
    let wrong = |problem: String| ResourceError::input(argument, problem);
    // sun_path with its terminator (unix(7)).
    if path.as_os_str().len() > 107 {
        return Err(wrong("a socket's path has at most 107 bytes".to_owned()));
    }
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(wrong("exists and is not a socket; it is left alone".to_owned()));
        }
        Ok(_) => {
            // One that nobody listens on is left over from a run that was killed.
            if is_listened_on(path) {
                return Err(wrong("another program listens on this socket".to_owned()));
            }
            fs::remove_file(path).map_err(|error| wrong(said(&error)))?;
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(wrong(said(&error))),
    }
    // The mode has to be right from the first moment. ozone has one thread, so nobody else sees the mask.
    let before = umask(Mode::from_bits_truncate(0o177));
    let bound = UnixListener::bind(path);
    umask(before);
    let listener = bound.map_err(|error| wrong(said(&error)))?;
    let made = fs::symlink_metadata(path).map_err(|error| wrong(said(&error)))?;
    Ok(Listener { socket: listener.into(), path: path.to_owned(), file: (made.dev(), made.ino()) })
}
