//! The back-end's half of vhost-user (vhost-user specification, "Front-end message types").
//!
//! A request that makes no sense is answered with an error (REPLY_ACK) and one line in the log; the connection goes on.
//! Only a message that is no message ends it.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use protocol::FromBackend;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::descriptor::{self, Call};
use crate::device::Device;
use crate::inflight::{Inflight, Layout};
use crate::memory::{MemoryError, Place, SLOTS, Table};
use crate::outbox::Outbox;
use crate::ring::Ring;
use crate::vring::{Addresses, Vring};
use crate::worker::{Job, Worker};

/// What the library offers for every device, besides the device's own features.
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Size of the configuration space in bytes (vhost-user specification, VHOST_USER_MAX_CONFIG_SIZE).
const CONFIG: usize = 256;

/// The device as the core sees it.
pub struct Server<D> {
    device: Arc<D>,
    workers: Vec<Worker>,
    vrings: Vec<Vring>,
    table: Table,
    /// Where the queues record what they have in flight.
    inflight: Option<Arc<Inflight>>,
    features: Option<u64>,
    outbox: Outbox,
    /// Complaints made already: a core that repeats itself does not fill the log.
    complaints: BTreeSet<String>,
}

/// How many different complaints are logged for one connection.
const COMPLAINTS: usize = 64;

/// Answers requests until the connection ends, and says why it did.
pub fn serve<D: Device>(socket: UnixStream, server: Server<D>) -> String {
    let mut connection = BackendReqHandler::from_stream(socket, Arc::new(Mutex::new(server)));
    loop {
        match connection.handle_request() {
            // The stream is in step after a request that was refused, and the refusal has been sent if it was asked for.
            Ok(()) | Err(Error::ReqHandlerError(_) | Error::SocketRetry(_)) => {}
            Err(Error::Disconnected) => return "the vhost-user connection was closed".into(),
            Err(error) => return format!("the vhost-user connection is given up: {error}"),
        }
    }
}

impl<D: Device> Server<D> {
    /// A device that the core knows nothing of yet; one worker per queue.
    pub fn new(device: Arc<D>, workers: Vec<Worker>, outbox: Outbox) -> Self {
        let vrings = workers.iter().map(|_| Vring::default()).collect();
        Self {
            device,
            workers,
            vrings,
            table: Table::default(),
            inflight: None,
            features: None,
            outbox,
            complaints: BTreeSet::new(),
        }
    }

    fn offered(&self) -> u64 {
        #[cfg(feature = "crash-points")]
        if crate::crash::without_indirect() {
            return (FEATURES & !(1 << VIRTIO_RING_F_INDIRECT_DESC)) | self.device.features();
        }
        FEATURES | self.device.features()
    }

    /// Refuses a request, with a line in the log the first time.
    fn refuse<T>(&mut self, request: &str, reason: impl std::fmt::Display) -> Result<T> {
        let complaint = format!("{request} refused: {reason}");
        if self.complaints.len() < COMPLAINTS && self.complaints.insert(complaint.clone()) {
            log::warn!("{complaint}");
        }
        Err(Error::ReqHandlerError(std::io::Error::other(complaint)))
    }

    fn index(&mut self, request: &str, index: u32) -> Result<usize> {
        match usize::try_from(index).ok().filter(|&index| index < self.vrings.len()) {
            Some(index) => Ok(index),
            None => self.refuse(request, format_args!("there is no queue {index}")),
        }
    }

    fn stop(&mut self, index: usize) {
        let (Some(vring), Some(worker)) = (self.vrings.get_mut(index), self.workers.get_mut(index)) else { return };
        vring.running = false;
        if let Some(next_available) = worker.stop() {
            vring.base = next_available;
        }
    }

    /// Starts the queue if all is there that it takes. One that cannot start has to be kicked off anew.
    fn settle(&mut self, index: usize) -> std::result::Result<(), String> {
        let outcome = self.start(index);
        if let (Err(_), Some(vring)) = (&outcome, self.vrings.get_mut(index)) {
            vring.kick = None;
        }
        outcome
    }

    fn start(&mut self, index: usize) -> std::result::Result<(), String> {
        let (Some(vring), Some(worker)) = (self.vrings.get_mut(index), self.workers.get_mut(index)) else {
            return Ok(());
        };
        let features = self.features.unwrap_or(0);
        // Without protocol features a ring is enabled from the start (vhost-user specification, "Ring states").
        let enabled = features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0;
        let Some((shape, kick)) = vring.startable(&self.table, enabled).map_err(|error| error.to_string())? else {
            return Ok(());
        };
        let memory = Arc::new(self.table.memory().clone());
        let record = self.inflight.as_ref().map(|inflight| inflight.part(index, shape.size)).transpose();
        let record = record.map_err(|error| format!("queue {index} cannot start: {error}"))?;
        let ring = Ring::new(shape, features, memory, vring.call.clone(), record)
            .map_err(|error| format!("queue {index} cannot start: {error}"))?;
        let requests = ring.resubmissions();
        if requests > 0 {
            self.outbox.send(FromBackend::Resubmitted { requests });
        }
        worker.start(Job { ring, kick, error: vring.error.clone(), features }, vring.call.clone());
        vring.running = true;
        Ok(())
    }

    /// Changes what is known of a queue, which is stopped meanwhile.
    fn change(&mut self, request: &str, index: usize, change: impl FnOnce(&mut Vring)) -> Result<()> {
        self.stop(index);
        if let Some(vring) = self.vrings.get_mut(index) {
            change(vring);
        }
        self.settle(index).or_else(|reason| self.refuse(request, reason))
    }

    /// Changes what concerns every queue. All are stopped meanwhile, those that ran go on.
    fn change_all(&mut self, request: &str, change: impl FnOnce(&mut Self)) -> Result<()> {
        let running: Vec<usize> = (0..).zip(&self.vrings).filter(|(_, vring)| vring.running).map(|(i, _)| i).collect();
        running.iter().for_each(|&index| self.stop(index));
        change(self);
        let mut outcome = Ok(());
        for index in running {
            outcome = outcome.and(self.settle(index));
        }
        outcome.or_else(|reason| self.refuse(request, reason))
    }

    /// A request that is allowed only while its queue is stopped.
    fn stopped(&mut self, request: &str, index: u32) -> Result<&mut Vring> {
        let at = self.index(request, index)?;
        if self.vrings.get(at).is_some_and(|vring| vring.running) {
            return self.refuse(request, format_args!("queue {index} is running"));
        }
        // The index was checked above.
        self.vrings.get_mut(at).ok_or(Error::InvalidParam)
    }

    fn event(&mut self, request: &str, file: Option<File>) -> Result<Option<File>> {
        match file.map(descriptor::event).transpose() {
            Ok(event) => Ok(event),
            Err(error) => self.refuse(request, error),
        }
    }

    fn set_table(&mut self, request: &str, table: std::result::Result<Table, MemoryError>) -> Result<()> {
        match table {
            Ok(table) => self.change_all(request, |server| server.table = table),
            Err(error) => self.refuse(request, error),
        }
    }
}

fn place(region: &VhostUserMemoryRegion) -> Place {
    Place {
        guest: region.guest_phys_addr,
        size: region.memory_size,
        user: region.user_addr,
        offset: region.mmap_offset,
    }
}

impl<D: Device> VhostUserBackendReqHandlerMut for Server<D> {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    /// Out of use since it has no agreed meaning; a back-end should ignore it.
    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.refuse("RESET_DEVICE", "not offered")
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.offered();
        if unknown != 0 {
            return self.refuse("SET_FEATURES", format_args!("the features {unknown:#x} were not offered"));
        }
        self.change_all("SET_FEATURES", |server| {
            server.features = Some(features);
            server.device.negotiated(features);
        })
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let mut regions = regions.iter().zip(files);
        let table = regions.try_fold(Table::default(), |table, (region, file)| table.with(place(region), file));
        self.set_table("SET_MEM_TABLE", table).map(|()| None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let outcome = self.stopped("SET_VRING_NUM", index)?.set_size(num);
        outcome.or_else(|error| self.refuse("SET_VRING_NUM", error))
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let at = self.index("SET_VRING_ADDR", index)?;
        let addresses = Addresses { descriptors, available, used };
        if let Some(outside) = [descriptors, available, used].into_iter().find(|&a| self.table.translate(a).is_none()) {
            return self.refuse("SET_VRING_ADDR", format_args!("{outside:#x} is in no memory region"));
        }
        self.change("SET_VRING_ADDR", at, |vring| vring.addresses = Some(addresses))
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let outcome = self.stopped("SET_VRING_BASE", index)?.set_base(base);
        outcome.or_else(|error| self.refuse("SET_VRING_BASE", error))
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        // There is no reply that says no: an error here ends the connection.
        let at = self.index("GET_VRING_BASE", index).map_err(|_| Error::InvalidParam)?;
        self.stop(at);
        let vring = self.vrings.get_mut(at).ok_or(Error::InvalidParam)?;
        (vring.kick, vring.call, vring.error) = (None, None, None);
        Ok(VhostUserVringState::new(index, vring.base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let at = self.index("SET_VRING_KICK", index.into())?;
        let kick = self.event("SET_VRING_KICK", file)?;
        let Some(kick) = kick else {
            return self.refuse("SET_VRING_KICK", "a queue without a kick descriptor would have to be polled");
        };
        self.change("SET_VRING_KICK", at, |vring| vring.kick = Some(Arc::new(kick)))
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let at = self.index("SET_VRING_CALL", index.into())?;
        let call = self.event("SET_VRING_CALL", file)?.map(|file| Arc::new(Call::new(file)));
        self.change("SET_VRING_CALL", at, |vring| vring.call = call)
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let at = self.index("SET_VRING_ERR", index.into())?;
        let error = self.event("SET_VRING_ERR", file)?.map(|file| Arc::new(Call::new(file)));
        self.change("SET_VRING_ERR", at, |vring| vring.error = error)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        let tracking = self.device.tracks_inflight().then_some(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | tracking.unwrap_or(VhostUserProtocolFeatures::empty()))
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.get_protocol_features()?.bits();
        if unknown != 0 {
            return self.refuse("SET_PROTOCOL_FEATURES", format_args!("{unknown:#x} were not offered"));
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let at = self.index("SET_VRING_ENABLE", index)?;
        // To stop a queue waits for all that it has begun: not for nothing.
        if self.vrings.get(at).is_some_and(|vring| vring.running && vring.enabled == enable) {
            return Ok(());
        }
        self.change("SET_VRING_ENABLE", at, |vring| vring.enabled = enable)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let mut config = self.device.config();
        config.resize(CONFIG, 0);
        let range = usize::try_from(offset).ok().zip(usize::try_from(size).ok());
        let bytes = range.and_then(|(start, size)| config.get(start..start.checked_add(size)?));
        match bytes {
            Some(bytes) => Ok(bytes.to_vec()),
            None => self.refuse("GET_CONFIG", format_args!("{size} bytes at {offset}")),
        }
    }

    fn set_config(&mut self, _offset: u32, _bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.refuse("SET_CONFIG", "no device here has a field that the driver may write")
    }

    fn set_gpu_socket(&mut self, _socket: GpuBackend) -> Result<()> {
        self.refuse("GPU_SET_SOCKET", "not offered")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        self.refuse("GET_SHARED_OBJECT", "not offered")
    }

    /// Makes memory and keeps nothing of it: it comes into force when the core sends it back.
    fn get_inflight_fd(&mut self, inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, size) = (inflight.num_queues, inflight.queue_size);
        let made = Layout::new(queues, size, self.vrings.len()).and_then(|layout| Ok((layout, layout.make()?)));
        match made {
            Ok((layout, file)) => Ok((VhostUserInflight::new(layout.bytes() as u64, 0, queues, size), file)),
            // There is no reply that says no: an error here ends the connection.
            Err(error) => self.refuse("GET_INFLIGHT_FD", error).map_err(|_: Error| Error::InvalidParam),
        }
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        if let Some(index) = self.vrings.iter().position(|vring| vring.running) {
            return self.refuse("SET_INFLIGHT_FD", format_args!("queue {index} is running"));
        }
        let layout = Layout::new(inflight.num_queues, inflight.queue_size, self.vrings.len());
        match layout.and_then(|layout| Inflight::map(file, inflight.mmap_size, inflight.mmap_offset, layout)) {
            Ok(mapped) => {
                self.inflight = Some(Arc::new(mapped));
                Ok(())
            }
            Err(error) => self.refuse("SET_INFLIGHT_FD", error),
        }
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(SLOTS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        let table = self.table.with(place(region), file);
        self.set_table("ADD_MEM_REG", table).map(|()| None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let table = self.table.without(place(region));
        self.set_table("REM_MEM_REG", table)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        file: File,
    ) -> Result<Option<File>> {
        let number = file.as_raw_fd();
        self.refuse("SET_DEVICE_STATE_FD", format_args!("not offered (descriptor {number})"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        self.refuse("CHECK_DEVICE_STATE", "not offered")
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("shared memory regions are not offered"))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("dirty logging is not offered"))
    }
}
