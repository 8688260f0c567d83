//! From the guest to the host.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use virtio_backend::Rare;
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
    let mut writer = Writer::default();
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

#[derive(Default)]
struct Writer {
    /// Whether output is being dropped.
    dropping: bool,
    /// Whether the log says so. Guest and reader can make it begin and end over and over.
    told: bool,
    reported: Rare,
    /// Bytes that nobody took, since the log last said how many.
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
        if !std::mem::replace(&mut self.dropping, true) && self.reported.again().is_some() {
            self.told = true;
            log::warn!("nobody reads the console: its output is dropped");
        }
        self.dropped = self.dropped.saturating_add(count as u64);
    }

    fn heard(&mut self) {
        self.deaf = false;
        self.dropping = false;
        if std::mem::take(&mut self.told) {
            log::warn!("the console is read again: {} bytes of its output were dropped", self.dropped);
            self.dropped = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Lines that were logged; no other test of this executable logs.
    static LINES: AtomicUsize = AtomicUsize::new(0);

    struct Count;

    impl log::Log for Count {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }

        fn log(&self, _: &log::Record<'_>) {
            LINES.fetch_add(1, Ordering::Relaxed);
        }

        fn flush(&self) {}
    }

    #[test]
    fn a_reader_that_comes_and_goes_does_not_fill_the_log() {
        log::set_logger(&Count).unwrap();
        log::set_max_level(log::LevelFilter::Info);
        let mut writer = Writer::default();
        for _ in 0..1000 {
            writer.drop(1);
            writer.drop(1);
            writer.heard();
            writer.heard();
        }
        // Both ends of rounds 1, 2, 3, 4, 8, … 512.
        assert_eq!(LINES.load(Ordering::Relaxed), 2 * 11);
        assert_eq!(writer.dropped, 2 * (1000 - 512), "what is not told yet is kept for the next line");
    }
}
