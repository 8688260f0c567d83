//! A virtio device as the transport and the backend's attendant share it.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use protocol::{DeviceId, DeviceKind};
use vmm_sys_util::eventfd::EventFd;

use super::attendant::Command;
use super::conversation::Conversation;
use super::signals::QueueEvents;
use super::state::QueueState;

use crate::event::{Event, Events};

/// How long a vCPU that reset a device waits for its queues to stop: a backend is hung up on when its time is over
/// ([`STOP_PATIENCE`](super::conversation::STOP_PATIENCE)), and then `ozone` has to end it and to wait for what it began.
pub const RESET_DEADLINE: Duration = Duration::from_secs(45);

/// What a backend offered when it was first attached. It never changes afterwards.
#[derive(Debug)]
pub struct Offer {
    /// The virtio features that the guest is shown.
    pub features: u64,
    /// The queues, in order.
    pub queues: Vec<QueueEvents>,
}

/// What a transport asks of the queues when the driver is ready.
#[derive(Clone, Debug)]
pub struct Activation {
    /// What the driver accepted.
    pub features: u64,
    /// The queues, ready ones and others.
    pub queues: Vec<QueueState>,
}

/// One device.
pub struct Device {
    /// The device's name.
    pub id: DeviceId,
    /// What it is.
    pub kind: DeviceKind,
    /// Empty until the backend was attached; no vCPU runs before that.
    pub offer: OnceLock<Offer>,
    config: Mutex<Vec<u8>>,
    /// Interrupts the guest for a configuration change.
    config_interrupt: EventFd,
    commands: Sender<Command>,
    conversation: Mutex<Conversation>,
    events: Events,
    config_changed: AtomicBool,
    generation: AtomicU32,
    failed: AtomicBool,
}

impl Device {
    /// A device without a backend, and the queue its attendant serves.
    pub fn new(id: DeviceId, kind: DeviceKind, config_interrupt: EventFd, events: Events) -> (Self, Receiver<Command>) {
        let (commands, received) = channel();
        let device = Self {
            id,
            kind,
            offer: OnceLock::new(),
            config: Mutex::default(),
            config_interrupt,
            commands,
            conversation: Mutex::default(),
            events,
            config_changed: AtomicBool::new(false),
            generation: AtomicU32::new(0),
            failed: AtomicBool::new(false),
        };
        (device, received)
    }

    /// Gives the attendant something to do. Never waits.
    pub fn command(&self, command: Command) {
        self.conversation().begin();
        if self.commands.send(command).is_err() {
            self.fail();
        }
        // The main thread counts the time from now on.
        let _ = self.events.send(Event::Conversation);
    }

    /// The attendant has done a command.
    pub fn done(&self) {
        let idle = {
            let mut conversation = self.conversation();
            conversation.end();
            conversation.deadline().is_none()
        };
        if idle {
            // The main thread stops counting now, and not at a deadline in the middle of something else.
            let _ = self.events.send(Event::Conversation);
        }
    }

    /// What is under way with the backend.
    pub fn conversation(&self) -> MutexGuard<'_, Conversation> {
        self.conversation.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device's configuration space.
    pub fn config(&self) -> MutexGuard<'_, Vec<u8>> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the configuration space and tells the driver, if it is another one.
    pub fn change_config(&self, config: Vec<u8>) {
        if std::mem::replace(&mut *self.config(), config.clone()) != config {
            self.notify_config_change();
        }
    }

    /// Starts the queues. Never waits: what the guest does meanwhile is kept in the kick descriptors.
    pub fn start(&self, activation: Activation) {
        self.command(Command::Start(activation));
    }

    /// Stops the queues, forgets what the driver set up and waits until no queue is served, so that the guest may reuse
    /// their memory at once. A backend that was lost counts only when it is gone.
    ///
    /// Linux's virtio-mmio driver frees its rings right after the write that resets the device, without polling.
    /// Answers whether that was so within `deadline`; after a `false` the caller's vCPU must not run again.
    pub fn stop(&self, deadline: Duration) -> bool {
        let (stopped, wait) = channel();
        self.command(Command::Stop(stopped));
        // An attendant that is gone has no queue running.
        !matches!(wait.recv_timeout(deadline), Err(RecvTimeoutError::Timeout))
    }

    /// The driver reset the device: it is whole again, and what it said of itself is forgotten.
    pub fn mend(&self) {
        self.failed.store(false, Ordering::Release);
        self.acknowledge_config_change();
    }

    /// Marks the device as broken until the driver resets it, and tells the driver (virtio 1.2, section 2.1.2).
    pub fn fail(&self) {
        if !self.failed.swap(true, Ordering::AcqRel) {
            self.notify_config_change();
        }
    }

    /// Whether the device is broken.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    fn notify_config_change(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.config_changed.store(true, Ordering::Release);
        // EAGAIN: an interrupt is on its way already.
        let _ = self.config_interrupt.write(1);
    }

    /// Where a configuration change is signalled.
    #[cfg(test)]
    pub fn config_interrupt_for_test(&self) -> &EventFd {
        &self.config_interrupt
    }

    /// The configuration's generation (virtio 1.2, section 2.5).
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// Whether a configuration change has not been acknowledged.
    pub fn config_changed(&self) -> bool {
        self.config_changed.load(Ordering::Acquire)
    }

    /// The driver acknowledged the configuration change.
    pub fn acknowledge_config_change(&self) {
        self.config_changed.store(false, Ordering::Release);
    }
}
