//! Standard error, written without ever waiting.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{MsgFlags, send};
use nix::sys::stat::{SFlag, fstat};

use crate::resources::reopen;

/// How standard error is written.
#[derive(Debug)]
pub enum Sink {
    /// A pipe, a terminal or another device: by an open file description of our own, which does not wait.
    Own(File),
    /// A socket, which can be asked each time not to wait.
    Socket,
    /// A file, where nobody has to make room.
    File,
    /// What cannot be opened anew, because it belongs to another user: it is made not to wait for the moment of a write. Whoever
    /// shares it may see that.
    Shared,
}

impl Sink {
    /// How standard error has to be written.
    pub fn of_stderr() -> Self {
        let stderr = io::stderr();
        let mode = fstat(&stderr).map_or(0, |status| status.st_mode);
        match SFlag::from_bits_truncate(mode) & SFlag::S_IFMT {
            SFlag::S_IFREG => Self::File,
            SFlag::S_IFSOCK => Self::Socket,
            // Without O_NONBLOCK the open of a FIFO without a reader waits for one.
            SFlag::S_IFIFO | SFlag::S_IFCHR => match reopen(stderr.as_fd(), OFlag::O_WRONLY | OFlag::O_NONBLOCK) {
                Ok(own) => Self::Own(own.into()),
                Err(_) => Self::Shared,
            },
            _ => Self::Shared,
        }
    }

    /// Writes as much as there is room for.
    ///
    /// # Errors
    /// What write(2) says; `WouldBlock` for no room at all.
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut stderr = io::stderr();
        match self {
            Self::Own(own) => {
                let mut own = own;
                own.write(bytes)
            }
            Self::Socket => {
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                Ok(send(stderr.as_raw_fd(), bytes, flags)?)
            }
            Self::File => stderr.write(bytes),
            Self::Shared => {
                let flags = OFlag::from_bits_retain(fcntl(&stderr, FcntlArg::F_GETFL)?);
                fcntl(&stderr, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
                let written = stderr.write(bytes);
                fcntl(&stderr, FcntlArg::F_SETFL(flags))?;
                written
            }
        }
    }
}
