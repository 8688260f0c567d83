//! Event descriptors: our own, and those of the core, which may be anything.
//!
//! The core shares the open file descriptions that it sends and may change their flags at any time. So a kick is never
//! read but watched edge-triggered, which needs no reading, and a call that blocks can be released from another thread.
#![allow(unsafe_code)]

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Why a descriptor of the core was refused.
#[derive(Debug, thiserror::Error)]
pub enum DescriptorError {
    /// It cannot be asked what it is.
    #[error("ask what a received descriptor is: {0}")]
    Ask(Errno),
    /// It is a file, a directory, a socket, a pipe or a device.
    #[error("a received descriptor is not an eventfd")]
    Kind,
}

/// fstat(2) by its own call number: the C library's function uses another call in each of its versions, one of which
/// takes a path.
pub(crate) fn status(fd: BorrowedFd<'_>) -> nix::Result<libc::stat> {
    let mut status = MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: the call writes one `struct stat` into the room that is exactly that large, and touches nothing else.
    Errno::result(unsafe { libc::syscall(libc::SYS_fstat, fd.as_raw_fd(), status.as_mut_ptr()) })?;
    // SAFETY: all zeroes are a valid `struct stat`, and the call has filled it in.
    Ok(unsafe { status.assume_init() })
}

/// Sets close-on-exec, which the vhost crate does not ask for when it receives.
///
/// # Errors
/// What fcntl(2) answers.
pub fn close_on_exec(file: &File) -> nix::Result<()> {
    fcntl(file.as_fd(), FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map(drop)
}

/// Takes an event descriptor of the core. Only anonymous inodes pass, of which eventfds are one kind (they have no file
/// type, inode(7)): no write to any other kind of those can block.
///
/// # Errors
/// [`DescriptorError`].
pub fn event(file: File) -> Result<File, DescriptorError> {
    close_on_exec(&file).map_err(DescriptorError::Ask)?;
    let status = status(file.as_fd()).map_err(DescriptorError::Ask)?;
    if status.st_mode & libc::S_IFMT != 0 { Err(DescriptorError::Kind) } else { Ok(file) }
}

/// The descriptor by which a queue interrupts the driver (VHOST_USER_SET_VRING_CALL).
#[derive(Debug)]
pub struct Call {
    file: File,
    failed: AtomicBool,
}

impl Call {
    /// A call through `file`, which [`event`] has passed.
    pub fn new(file: File) -> Self {
        Self { file, failed: AtomicBool::new(false) }
    }

    /// Signals once. After an error that is not for want of room it is never tried again.
    pub fn signal(&self) {
        if self.failed.load(Ordering::Relaxed) {
            return;
        }
        match nix::unistd::write(&self.file, &1_u64.to_ne_bytes()) {
            // A counter that is full is a signal that has been given.
            Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(errno) => {
                self.failed.store(true, Ordering::Relaxed);
                log::error!("the call descriptor of a queue cannot be signalled and is given up: {errno}");
            }
        }
    }

    /// Releases a thread that waits in [`signal`](Self::signal) because someone has filled the counter up.
    pub fn release(&self) {
        let mut room = [PollFd::new(self.file.as_fd(), PollFlags::POLLOUT)];
        // Only a full counter is emptied: an interrupt that is merely pending stays.
        if matches!(wait(&mut room, Some(Duration::ZERO)), Ok(0)) {
            let mut counter = [0_u8; 8];
            read_now(self.file.as_fd(), &mut counter);
        }
    }
}

/// poll(2) by ppoll(2): the filters answer the former with an error. Without `timeout` it waits for ever.
///
/// # Errors
/// What ppoll(2) answers.
pub fn wait(fds: &mut [PollFd<'_>], timeout: Option<Duration>) -> nix::Result<usize> {
    nix::poll::ppoll(fds, timeout.map(Into::into), None).map(|count| usize::try_from(count).unwrap_or(0))
}

/// Reads without waiting, whatever the flags of the open file description are.
fn read_now(fd: BorrowedFd<'_>, bytes: &mut [u8]) {
    let part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // The result is of no interest: what could not be read was not there.
    // SAFETY: one part, which is the whole of a slice that this function has for itself.
    let _ = unsafe { libc::preadv2(fd.as_raw_fd(), &raw const part, 1, -1, libc::RWF_NOWAIT) };
}

/// An eventfd of our own, which nobody else has.
#[derive(Debug)]
pub struct Wake(EventFd);

impl Wake {
    /// A new one, not raised.
    ///
    /// # Errors
    /// What eventfd(2) answers.
    pub fn new() -> nix::Result<Self> {
        EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map(Self)
    }

    /// Raises it.
    pub fn raise(&self) {
        // It can only fail for a full counter, and every waiter empties it.
        let _ = self.0.write(1);
    }

    /// Waits until it is raised and lowers it.
    pub fn lower(&self) {
        while self.0.read() == Err(Errno::EINTR) {}
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;
    use std::sync::Arc;

    #[test]
    fn only_anonymous_inodes_pass_as_events() {
        assert!(matches!(event(File::open("/dev/zero").unwrap()), Err(DescriptorError::Kind)));
        assert!(matches!(event(File::open("/proc/self/exe").unwrap()), Err(DescriptorError::Kind)));
        let (reader, _writer) = nix::unistd::pipe().unwrap();
        assert!(matches!(event(reader.into()), Err(DescriptorError::Kind)));
        let good = OwnedFd::from(EventFd::new().unwrap());
        event(good.into()).unwrap();
    }

    #[test]
    fn a_call_that_blocks_can_be_released() {
        let eventfd = EventFd::new().unwrap();
        eventfd.write(u64::MAX - 1).unwrap();
        let call = Arc::new(Call::new(File::from(OwnedFd::from(eventfd))));
        let (sender, receiver) = std::sync::mpsc::channel();
        let caller = Arc::clone(&call);
        std::thread::spawn(move || {
            caller.signal();
            sender.send(()).unwrap();
        });
        assert!(receiver.recv_timeout(Duration::from_millis(50)).is_err(), "the counter is full");
        call.release();
        receiver.recv_timeout(Duration::from_secs(10)).unwrap();
    }

    #[test]
    fn a_pending_interrupt_survives_a_release() {
        let eventfd = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        let call = Call::new(eventfd.as_fd().try_clone_to_owned().unwrap().into());
        call.signal();
        call.release();
        assert_eq!(eventfd.read(), Ok(1));
    }
}
