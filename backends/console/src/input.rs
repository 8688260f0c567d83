//! From the host to the guest.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use nix::sys::epoll::{Epoll, EpollEvent, EpollTimeout};
use nix::sys::socket::{SockFlag, accept4};
use protocol::FromBackend;
use virtio_backend::Outbox;
use virtio_backend::descriptor::wait;

use crate::buffer::Buffer;
use crate::escape::Escape;
use crate::output::Client;

/// How long a socket that accepts nobody is left alone.
const REST: Duration = Duration::from_secs(1);

/// Reads once. Waits for something if the descriptor itself does not; `None` at the end of input.
fn read<'b>(fd: BorrowedFd<'_>, chunk: &'b mut [u8]) -> Option<&'b [u8]> {
    loop {
        match nix::unistd::read(fd, chunk) {
            Ok(0) => return None,
            Ok(count) => return chunk.get(..count),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                // Whatever it says, the next read tells.
                let _ = wait(&mut [PollFd::new(fd, PollFlags::POLLIN)], None);
            }
            Err(errno) => {
                log::warn!("read console input: {errno}");
                return None;
            }
        }
    }
}

/// The user's terminal, until it ends. What the guest does not take in time is dropped, as by any terminal, since the
/// escape has to be seen even then.
pub fn terminal(terminal: BorrowedFd<'_>, buffer: &Buffer, outbox: &Outbox) {
    let (mut escape, mut chunk, mut guest) = (Escape::default(), [0; 1024], Vec::new());
    let mut dropped = 0_usize;
    while let Some(bytes) = read(terminal, &mut chunk) {
        guest.clear();
        if escape.filter(bytes, &mut guest) {
            outbox.send(FromBackend::Leave);
        }
        let lost = guest.len().saturating_sub(buffer.push(&guest));
        if lost > 0 && dropped == 0 {
            log::warn!("the guest reads no console input: what is typed is dropped");
        }
        dropped = if lost == 0 { 0 } else { dropped.saturating_add(lost) };
    }
    log::info!("end of console input");
}

/// A pipe or a file, until it ends; likewise the serial port's output. Either waits for room.
pub fn stream(input: BorrowedFd<'_>, buffer: &Buffer) {
    let mut chunk = [0; 4096];
    while let Some(bytes) = read(input, &mut chunk) {
        buffer.push_all(bytes);
    }
}

/// The master of a pseudo-terminal, for ever.
///
/// While nobody has the slave open, poll(2) reports a hang-up and read(2) EIO; so it is watched edge-triggered through
/// `edges`, which reports the next byte, whoever writes it.
pub fn pty(master: BorrowedFd<'_>, edges: &Epoll, buffer: &Buffer) -> ! {
    let mut chunk = [0; 1024];
    loop {
        match nix::unistd::read(master, &mut chunk) {
            Ok(count) if count > 0 => buffer.push_all(chunk.get(..count).unwrap_or_default()),
            Err(Errno::EINTR) => {}
            _ => {
                let _ = edges.wait(&mut [EpollEvent::empty()], EpollTimeout::NONE);
            }
        }
    }
}

/// A listening socket, for ever: one client at a time.
pub fn socket(listener: BorrowedFd<'_>, current: &Client, buffer: &Buffer) -> ! {
    let mut complained = false;
    loop {
        match accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK) {
            Ok(fd) => {
                let client = Arc::new(owned(fd));
                let set = |client| *current.lock().unwrap_or_else(PoisonError::into_inner) = client;
                set(Some(Arc::clone(&client)));
                serve(client.as_fd(), buffer);
                set(None);
            }
            Err(Errno::EAGAIN) => {
                let _ = wait(&mut [PollFd::new(listener, PollFlags::POLLIN)], None);
            }
            Err(Errno::EINTR | Errno::ECONNABORTED) => {}
            Err(errno) => {
                if !std::mem::replace(&mut complained, true) {
                    log::error!("accept a client of the console: {errno}");
                }
                let _ = wait(&mut [], Some(REST));
            }
        }
    }
}

#[allow(unsafe_code)]
fn owned(fd: i32) -> OwnedFd {
    // SAFETY: accept4(2) has just made it for this process, and nothing else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// One client, until it goes. One that goes while the guest reads nothing is noticed too.
fn serve(client: BorrowedFd<'_>, buffer: &Buffer) {
    let mut chunk = [0; 1024];
    loop {
        let room = buffer.has_room(chunk.len());
        let wanted = if room { PollFlags::POLLIN } else { PollFlags::from_bits_retain(libc::POLLRDHUP) };
        let mut fds = [PollFd::new(client, wanted), PollFd::new(buffer.emptied().as_fd(), PollFlags::POLLIN)];
        match wait(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(_) => return,
        }
        let [on_client, on_room] = fds.map(|fd| fd.any().unwrap_or(true));
        if on_room {
            buffer.emptied().lower();
        }
        if on_client && !room {
            return;
        }
        if on_client {
            match nix::unistd::read(client, &mut chunk) {
                Ok(count) if count > 0 => buffer.push_all(chunk.get(..count).unwrap_or_default()),
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                _ => return,
            }
        }
    }
}
