//! Handing a driver's queues to a backend (vhost-user specification, "Ring states"): at DRIVER_OK, to each later
//! incarnation, and after a pause.
//!
//! A queue goes on from the index of its used ring: whatever was taken from the available ring beyond it has not been
//! answered.

use std::sync::atomic::Ordering;

use protocol::DeviceKind;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserVirtioFeatures;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::device::Activation;
use super::features;
use super::incarnation::{BackendError, Incarnation, at};
use super::inflight::Region;
use super::signals::QueueEvents;
use super::state::{QUEUE_SIZE, QueueState};
use crate::memory::Memory;

/// What a driver set up, from DRIVER_OK to the reset of the device. It outlives backends.
pub struct Setup {
    activation: Activation,
    /// The queues that some incarnation may have served.
    started: Vec<usize>,
    /// What is in flight, from the first start of queues on.
    region: Option<Region>,
}

/// Why the queues were not handed over.
pub enum ReplayError {
    /// The driver's mistake, of which the backend has heard nothing.
    Driver(Misplaced),
    /// The backend cannot use what an earlier one recorded, and no other could. It is not to blame, and goes on.
    Record(BackendError),
    /// The backend's doing.
    Backend(BackendError),
}

impl From<BackendError> for ReplayError {
    fn from(error: BackendError) -> Self {
        Self::Backend(error)
    }
}

/// A ring that the driver put where no memory is.
#[derive(Debug, thiserror::Error)]
#[error("queue {queue}: the driver put its {ring} at {address:#x}, outside of memory")]
pub struct Misplaced {
    queue: usize,
    ring: &'static str,
    address: u64,
}

impl Setup {
    /// As the driver made it at DRIVER_OK.
    pub fn new(activation: Activation) -> Self {
        Self { activation, started: Vec::new(), region: None }
    }

    /// Checks that `incarnation` offers every feature that was agreed on with the driver, and can go on from what an
    /// earlier one left in flight.
    ///
    /// # Errors
    /// [`BackendError::Lacks`], naming the first thing that is missing.
    pub fn check(&self, incarnation: &Incarnation, kind: DeviceKind) -> Result<(), BackendError> {
        if self.region.is_some() && !incarnation.tracks {
            let name = "VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD, by which an earlier one recorded what is in flight";
            return Err(BackendError::Lacks(String::from(name)));
        }
        let missing = self.activation.features & !incarnation.features;
        if missing == 0 {
            return Ok(());
        }
        let name = features::name(kind, missing.trailing_zeros());
        Err(BackendError::Lacks(format!("{name}, which was agreed on with the driver")))
    }

    /// Starts every ready queue in `incarnation`; `signals` are those of all queues.
    ///
    /// # Errors
    /// [`ReplayError`].
    pub fn hand_over(
        &mut self,
        incarnation: &mut Incarnation,
        memory: &Memory,
        signals: &[QueueEvents],
    ) -> Result<(), ReplayError> {
        // Before the first request: a driver's mistake is told to the driver, and the backend hears nothing of it.
        let mut ready = Vec::new();
        for (index, queue) in self.activation.queues.iter().enumerate().filter(|(_, queue)| queue.ready) {
            let rings = rings(memory, index, queue).map_err(ReplayError::Driver)?;
            ready.push((index, *queue, rings));
        }
        let frontend = &mut incarnation.frontend;
        let features = self.activation.features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        frontend.set_features(features).map_err(at("SET_FEATURES"))?;
        let mut regions = Vec::with_capacity(memory.num_regions());
        for region in memory.iter() {
            regions.push(VhostUserMemoryRegionInfo::from_guest_region(region).map_err(at("SET_MEM_TABLE"))?);
        }
        frontend.set_mem_table(&regions).map_err(at("SET_MEM_TABLE"))?;
        // Before the kicks, with which rings start. Queues may differ in size: the region has room for the largest.
        if incarnation.tracks
            && let Some(largest) = ready.iter().map(|(_, queue, _)| queue.size).max()
        {
            let (region, inherited) = match self.region.take() {
                Some(region) => (region, true),
                None => (Region::get(frontend, count(signals)?, largest)?, false),
            };
            // It is the one to be used from now on, whatever becomes of this incarnation.
            match self.region.insert(region).set(frontend) {
                Err(error) if inherited && error.is_refusal() => return Err(ReplayError::Record(error)),
                outcome => outcome?,
            }
        }
        for (index, queue, rings) in ready {
            let Some(signals) = signals.get(index) else { continue };
            // Before the first incarnation serves it there is nothing of ours in the ring, whatever memory says: a driver need
            // not have zeroed what is the device's to write, and a backend goes on where the index in memory is.
            let base = if self.started.contains(&index) {
                used_index(memory, &queue)
            } else {
                begin_used_ring(memory, &queue);
                0
            };
            frontend.set_vring_num(index, queue.size).map_err(at("SET_VRING_NUM"))?;
            frontend.set_vring_addr(index, &rings).map_err(at("SET_VRING_ADDR"))?;
            frontend.set_vring_base(index, base).map_err(at("SET_VRING_BASE"))?;
            // One that has the signals already has lost none since its queues stopped, and looks at a ring that is
            // enabled of itself; while it lives, a write of ours could wait for it.
            if !incarnation.given.contains(&index) {
                // The call is given with the first queue, and is the backend's from then on.
                signals.renew(incarnation.given.is_empty()).map_err(BackendError::Descriptor)?;
                incarnation.given.push(index);
            }
            frontend.set_vring_call(index, &signals.call).map_err(at("SET_VRING_CALL"))?;
            // The kick starts a ring that was enabled earlier, answered or not.
            incarnation.running.push(index);
            if !self.started.contains(&index) {
                self.started.push(index);
            }
            frontend.set_vring_kick(index, &signals.kick).map_err(at("SET_VRING_KICK"))?;
            frontend.set_vring_enable(index, true).map_err(at("SET_VRING_ENABLE"))?;
        }
        Ok(())
    }
}

/// How many queues a device has.
fn count(signals: &[QueueEvents]) -> Result<u16, BackendError> {
    let count = signals.len();
    u16::try_from(count).map_err(|_| BackendError::Absurd(format!("{count} queues")))
}

/// The index of a queue's used ring (virtio 1.2, section 2.7.8): how many chains were answered, modulo 2^16.
fn used_index(memory: &Memory, queue: &QueueState) -> u16 {
    let idx = queue.used.checked_add(2).map(GuestAddress);
    // The whole ring has been found in memory.
    idx.and_then(|idx| memory.load::<u16>(idx, Ordering::Acquire).ok()).map_or(0, u16::from_le)
}

/// Has the used ring begin, as it does for a device that has used nothing: its index "starts at 0" (virtio 1.2, section 2.7.8).
fn begin_used_ring(memory: &Memory, queue: &QueueState) {
    if let Some(idx) = queue.used.checked_add(2).map(GuestAddress) {
        // The whole ring has been found in memory.
        let _ = memory.store(0_u16, idx, Ordering::Release);
    }
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
