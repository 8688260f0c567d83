//! The two signals of a queue, which every backend of the device shares with the core, one after the other.
//!
//! Whoever holds an eventfd shares its flags and its counter: a hostile backend may make it blocking and fill it up, and
//! then a write waits until somebody reads. So the core writes a signal only while no other process has it: before the
//! first time that it is given to a new incarnation of the backend. Main and vCPU threads write none at all.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The two signals of a queue. They outlive backends.
#[derive(Debug)]
pub struct QueueEvents {
    /// From the guest to the backend: bound to the notification register by an ioeventfd.
    pub kick: EventFd,
    /// From the backend to the guest: bound to the interrupt by an irqfd. It is the same eventfd for all queues of a device:
    /// they share an edge-triggered interrupt, and of several irqfds on one such the kernel may swallow an edge that falls
    /// between the rise and the fall of another's (Linux, ioapic_set_irq).
    pub call: EventFd,
}

impl QueueEvents {
    /// Those of `count` queues of a device, not signalled.
    ///
    /// # Errors
    /// What eventfd(2) answers.
    pub fn of_device(count: usize) -> io::Result<Vec<Self>> {
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK);
        let call = event()?;
        (0..count).map(|_| Ok(Self { kick: event()?, call: call.try_clone()? })).collect()
    }

    /// Signals the kick, and the call if it `is_first` of the device's queues to be given away, exactly once, and undoes what an earlier holder did to them. It never waits, provided that no other
    /// process holds them: the caller sees to that.
    ///
    /// The kick stands for all that the driver did while nobody listened, the call for what an earlier incarnation put
    /// into the used ring without a word.
    ///
    /// # Errors
    /// What fcntl(2) and write(2) answer.
    pub fn renew(&self, is_first: bool) -> io::Result<()> {
        let call = is_first.then_some(&self.call);
        for event in std::iter::once(&self.kick).chain(call) {
            // SAFETY: the number is that of an open descriptor, which `event` owns for longer than this borrow lasts.
            let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
            fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
            // Nothing to read is what an honest holder leaves.
            let _ = event.read();
            event.write(1)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_queues_have_one_call_and_each_its_kick() {
        let signals = QueueEvents::of_device(2).unwrap();
        let [first, second] = &signals[..] else { panic!("{signals:?}") };
        first.call.write(1).unwrap();
        assert_eq!(second.call.read().unwrap(), 1);
        first.kick.write(1).unwrap();
        assert_eq!(second.kick.read().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn what_a_hostile_holder_left_is_undone() {
        let signals = QueueEvents::of_device(1).unwrap().remove(0);
        for event in [&signals.kick, &signals.call] {
            // SAFETY: as above.
            let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
            fcntl(fd, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
            event.write(u64::MAX - 1).unwrap();
        }
        // A write would wait for ever here.
        signals.renew(true).unwrap();
        assert_eq!(signals.kick.read().unwrap(), 1);
        assert_eq!(signals.call.read().unwrap(), 1);
        assert_eq!(signals.call.read().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
