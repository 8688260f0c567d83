//! The conversation with a backend (vhost-user specification): one attendant thread per device.
//!
//! The backend is presumed hostile: every reply is checked, and one that never comes holds up this thread alone, until
//! the main thread hangs up ([`super::conversation`]).

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

use kvm_ioctls::VmFd;
use protocol::log::Rare;
use protocol::trace::Point;
use protocol::{DeviceKind, Fault};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::conversation::PATIENCE;
use super::device::{Activation, Device, Offer, QueueEvents};
use super::mmio::Wiring;
use super::state::{QUEUE_SIZE, QueueState, VERSION_1};
use crate::event::{Event, Events};
use crate::memory::Memory;
use crate::trace::Tracer;

/// What an attendant is asked to do.
#[derive(Debug)]
pub enum Command {
    /// Greet the backend behind this socket.
    Attach(OwnedFd),
    /// The driver is ready: start the queues.
    Start(Activation),
    /// The driver reset the device: stop the queues, then answer.
    Stop(Sender<()>),
    /// The configuration space is another now.
    ReadConfig,
}

/// Why a backend cannot be used.
#[derive(Debug, thiserror::Error)]
enum BackendError {
    #[error("{step}: {source}")]
    Request { step: &'static str, source: vhost::Error },
    #[error("it does not offer {0}")]
    Lacks(&'static str),
    #[error("it answered {0}")]
    Absurd(String),
    #[error("{0}")]
    Host(Fault),
    #[error("the core could not make a descriptor: {0}")]
    Descriptor(std::io::Error),
}

/// Names the request that failed.
fn at(step: &'static str) -> impl Fn(vhost::Error) -> BackendError {
    move |source| BackendError::Request { step, source }
}

/// The thread's state.
pub struct Attendant {
    device: Arc<Device>,
    vm: Arc<VmFd>,
    memory: Memory,
    wiring: Wiring,
    events: Events,
    tracer: Tracer,
    backend: Option<Frontend>,
    running: Vec<usize>,
    /// Resets that wait for queues which did not stop: nobody may answer them before the backend is dead.
    unstopped: Vec<Sender<()>>,
    misplaced_rings: Rare,
}

/// A ring that the driver put where no memory is.
#[derive(Debug)]
struct Misplaced {
    queue: usize,
    ring: &'static str,
    address: u64,
}

impl Attendant {
    /// An attendant without a backend.
    pub fn new(
        device: Arc<Device>,
        vm: Arc<VmFd>,
        memory: Memory,
        wiring: Wiring,
        events: Events,
        tracer: Tracer,
    ) -> Self {
        Self {
            device,
            vm,
            memory,
            wiring,
            events,
            tracer,
            backend: None,
            running: Vec::new(),
            unstopped: Vec::new(),
            misplaced_rings: Rare::default(),
        }
    }

    /// Serves commands until the device is gone.
    pub fn serve(mut self, commands: &Receiver<Command>) {
        for command in commands {
            let outcome = match command {
                Command::Attach(socket) => {
                    let start = self.tracer.now();
                    self.attach(socket).map(|()| {
                        self.tracer.done(start, || Point::Handshake(self.device.id.clone()));
                        Some(Event::Attached(self.device.id.clone()))
                    })
                }
                Command::Start(activation) => self.start(&activation).map(|()| None),
                Command::Stop(stopped) => {
                    let outcome = self.stop();
                    if outcome.is_ok() {
                        let _ = stopped.send(());
                    } else {
                        self.unstopped.push(stopped);
                    }
                    outcome.map(|()| None)
                }
                Command::ReadConfig => self.read_config().map(|()| None),
            };
            let overdue = self.device.conversation().is_overdue();
            self.device.done();
            let event = outcome.unwrap_or_else(|error| {
                // After an error the conversation has no known position: the backend is not spoken to again.
                self.backend = None;
                self.running.clear();
                self.device.fail();
                Some(match error {
                    BackendError::Host(fault) => Event::Failed(fault),
                    error if overdue => {
                        let reason = format!("it did not answer within {} s: {error}", PATIENCE.as_secs());
                        Event::Lost(self.device.id.clone(), reason)
                    }
                    error => Event::Lost(self.device.id.clone(), error.to_string()),
                })
            });
            if let Some(event) = event
                && self.events.send(event).is_err()
            {
                return;
            }
        }
    }

    fn attach(&mut self, socket: OwnedFd) -> Result<(), BackendError> {
        let most_queues = u64::from(self.device.kind.most_virtqueues());
        let socket = UnixStream::from(socket);
        self.device.conversation().over(socket.try_clone().map_err(BackendError::Descriptor)?);
        let mut backend = Frontend::from_stream(socket, most_queues);
        backend.set_owner().map_err(at("SET_OWNER"))?;
        let features = backend.get_features().map_err(at("GET_FEATURES"))?;
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(BackendError::Lacks("protocol features"));
        }
        if features & VERSION_1 == 0 {
            return Err(BackendError::Lacks("virtio 1"));
        }
        let needed =
            VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::CONFIG;
        let offered = backend.get_protocol_features().map_err(at("GET_PROTOCOL_FEATURES"))?;
        if !offered.contains(needed) {
            return Err(BackendError::Lacks("the protocol features MQ, REPLY_ACK and CONFIG"));
        }
        backend.set_protocol_features(needed).map_err(at("SET_PROTOCOL_FEATURES"))?;
        backend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let queues = backend.get_queue_num().map_err(at("GET_QUEUE_NUM"))?;
        if queues == 0 || queues > most_queues {
            return Err(BackendError::Absurd(format!("{queues} queues")));
        }
        let config = get_config(&mut backend, self.device.kind)?;
        let features =
            features & !VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() & !VhostUserVirtioFeatures::LOG_ALL.bits();
        self.accept(features, queues as usize)?;
        self.device.change_config(config);
        self.backend = Some(backend);
        Ok(())
    }

    /// Takes the first incarnation's offer for the device's; a later one has to offer no less.
    fn accept(&self, features: u64, queues: usize) -> Result<(), BackendError> {
        if let Some(offer) = self.device.offer.get() {
            if offer.features & !features != 0 {
                let missing = offer.features & !features;
                return Err(BackendError::Absurd(format!("fewer features than before: without {missing:#x}")));
            }
            if offer.queues.len() > queues {
                return Err(BackendError::Absurd(format!("{queues} queues and had {} before", offer.queues.len())));
            }
            return Ok(());
        }
        let mut events = Vec::with_capacity(queues);
        for queue in 0..queues {
            let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(BackendError::Descriptor);
            let signals = QueueEvents { kick: event()?, call: event()? };
            self.wiring.connect(&self.vm, queue, &signals).map_err(BackendError::Host)?;
            events.push(signals);
        }
        let offer = Offer { features, queues: events };
        self.device.offer.set(offer).map_err(|_| BackendError::Absurd(String::from("two offers at once")))
    }

    fn start(&mut self, activation: &Activation) -> Result<(), BackendError> {
        let (Some(backend), Some(offer)) = (self.backend.as_mut(), self.device.offer.get()) else {
            return Ok(());
        };
        // Before the first request: a driver's mistake is told to the driver, and the backend hears nothing of it.
        let mut ready = Vec::new();
        for (index, queue) in activation.queues.iter().enumerate().filter(|(_, queue)| queue.ready) {
            match rings(&self.memory, index, queue) {
                Ok(rings) => ready.push((index, queue.size, rings)),
                Err(Misplaced { queue, ring, address }) => {
                    if let Some(times) = self.misplaced_rings.again() {
                        let id = &self.device.id;
                        log::warn!(
                            "{id}: queue {queue}: the driver put its {ring} at {address:#x}, outside of memory ({times} times)"
                        );
                    }
                    self.device.fail();
                    return Ok(());
                }
            }
        }
        let features = activation.features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        backend.set_features(features).map_err(at("SET_FEATURES"))?;
        let mut regions = Vec::with_capacity(self.memory.num_regions());
        for region in self.memory.iter() {
            regions.push(VhostUserMemoryRegionInfo::from_guest_region(region).map_err(at("SET_MEM_TABLE"))?);
        }
        backend.set_mem_table(&regions).map_err(at("SET_MEM_TABLE"))?;
        for (index, size, rings) in ready {
            let Some(signals) = offer.queues.get(index) else { continue };
            backend.set_vring_num(index, size).map_err(at("SET_VRING_NUM"))?;
            backend.set_vring_addr(index, &rings).map_err(at("SET_VRING_ADDR"))?;
            backend.set_vring_base(index, 0).map_err(at("SET_VRING_BASE"))?;
            backend.set_vring_call(index, &signals.call).map_err(at("SET_VRING_CALL"))?;
            backend.set_vring_kick(index, &signals.kick).map_err(at("SET_VRING_KICK"))?;
            self.running.push(index);
            backend.set_vring_enable(index, true).map_err(at("SET_VRING_ENABLE"))?;
        }
        // What the driver added while the queues were being started waits in the rings. EAGAIN: signalled already.
        for signals in self.running.iter().filter_map(|index| offer.queues.get(*index)) {
            let _ = signals.kick.write(1);
            let _ = signals.call.write(1);
        }
        Ok(())
    }

    fn read_config(&mut self) -> Result<(), BackendError> {
        if let Some(backend) = self.backend.as_mut() {
            self.device.change_config(get_config(backend, self.device.kind)?);
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), BackendError> {
        let running = std::mem::take(&mut self.running);
        if let Some(backend) = self.backend.as_mut() {
            for index in running {
                backend.get_vring_base(index).map_err(at("GET_VRING_BASE"))?;
            }
        }
        Ok(())
    }
}

/// The device's configuration space, as long as its kind defines it.
fn get_config(backend: &mut Frontend, kind: DeviceKind) -> Result<Vec<u8>, BackendError> {
    let size: u8 = match kind {
        // virtio 1.2, sections 5.2.4, 5.1.4 and 5.3.4.
        DeviceKind::Blk => 60,
        DeviceKind::Net => 12,
        DeviceKind::Console => 12,
    };
    let empty = vec![0; usize::from(size)];
    let (answer, config) =
        backend.get_config(0, u32::from(size), VhostUserConfigFlags::empty(), &empty).map_err(at("GET_CONFIG"))?;
    if answer.offset != 0 || config.len() != usize::from(size) {
        return Err(BackendError::Absurd(format!("{} bytes of configuration instead of {size}", config.len())));
    }
    Ok(config)
}

/// The rings' addresses in this process, which is how the memory table lets the backend find them.
fn rings(memory: &Memory, index: usize, queue: &QueueState) -> Result<VringConfigData, Misplaced> {
    let size = usize::from(queue.size);
    let find = |ring: &'static str, address: u64, length: usize| {
        let outside = || Misplaced { queue: index, ring, address };
        let slice = memory.get_slice(GuestAddress(address), length).map_err(|_| outside())?;
        Ok(slice.ptr_guard().as_ptr() as u64)
    };
    Ok(VringConfigData {
        queue_max_size: QUEUE_SIZE,
        queue_size: queue.size,
        flags: 0,
        desc_table_addr: find("descriptor table", queue.descriptors, size * 16)?,
        avail_ring_addr: find("available ring", queue.available, size * 2 + 6)?,
        used_ring_addr: find("used ring", queue.used, size * 8 + 6)?,
        log_addr: None,
    })
}
