//! From the guest to the host.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use virtio_backend::descriptor::wait;

use crate::buffer::Buffer;

/// How long a pseudo-terminal or a client may take no bytes before they are dropped.
const PATIENCE: Duration = Duration::from_secs(1);

/// The client of a socket, while there is one.
pub type Client = Arc<Mutex<Option<Arc<OwnedFd>>>>;

/// Where output goes.
pub enum Output {
    /// A terminal, a file or a pipe: the guest waits while it is full.
    Patient(Arc<OwnedFd>),
    /// A pseudo-terminal: non-blocking, and perhaps nobody reads it.
    Impatient(Arc<OwnedFd>),
    /// The client of a socket, likewise.
    Client(Client),
}

/// Writes all that comes into `buffer`, for ever.
pub fn run(buffer: &Buffer, output: &Output) -> ! {
    let mut writer = Writer { dropped: 0, deaf: false };
    let mut chunk = [0; 4096];
    loop {
        let count = buffer.wait(&mut chunk);
        let bytes = chunk.get(..count).unwrap_or_default();
        match output {
            Output::Patient(fd) => writer.write(fd.as_fd(), bytes, None),
            Output::Impatient(fd) => writer.write(fd.as_fd(), bytes, Some(PATIENCE)),
            Output::Client(client) => {
                let client = client.lock().unwrap_or_else(PoisonError::into_inner).clone();
                match client {
                    Some(fd) => writer.write(fd.as_fd(), bytes, Some(PATIENCE)),
                    None => writer.drop(bytes.len()),
                }
            }
        }
    }
}

struct Writer {
    /// Bytes that nobody took.
    dropped: u64,
    /// Whether the reader took nothing for so long that it is not waited for any more.
    deaf: bool,
}

impl Writer {
    fn write(&mut self, fd: BorrowedFd<'_>, mut bytes: &[u8], patience: Option<Duration>) {
        while !bytes.is_empty() {
            match nix::unistd::write(fd, bytes) {
                Ok(count) => {
                    bytes = bytes.get(count..).unwrap_or_default();
                    self.heard();
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    let patience = if self.deaf { Some(Duration::ZERO) } else { patience };
                    let mut room = [PollFd::new(fd, PollFlags::POLLOUT)];
                    if matches!(wait(&mut room, patience), Ok(0)) {
                        self.deaf = true;
                        return self.drop(bytes.len());
                    }
                    // Hung up: poll(2) says so at once and for ever.
                    if room.iter().all(|room| !room.revents().is_some_and(|e| e.contains(PollFlags::POLLOUT))) {
                        return self.drop(bytes.len());
                    }
                }
                // A pipe without a reader, a terminal that is gone: the machine runs on without it.
                Err(_) => return self.drop(bytes.len()),
            }
        }
    }

    fn drop(&mut self, count: usize) {
        if self.dropped == 0 {
            log::warn!("nobody reads the console: its output is dropped");
        }
        self.dropped = self.dropped.saturating_add(count as u64);
    }

    fn heard(&mut self) {
        self.deaf = false;
        if self.dropped > 0 {
            log::warn!("the console is read again: {} bytes of its output were dropped", self.dropped);
            self.dropped = 0;
        }
    }
}
