//! The disk as the driver sees it: features and configuration space (virtio 1.2, sections 5.2.3 and 5.2.4).

use std::sync::Arc;

use protocol::{DeviceSpec, Fault};
use virtio_backend::{Device, Opened, Outbox, QueueHandler};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_ID_BYTES,
};

use crate::engine::Engine;
use crate::queue::RequestQueue;
use crate::request::SECTOR;

/// The most data buffers of a request: with header and status they fill a queue of 256 descriptors.
const SEGMENTS: u32 = 254;

/// Size of the configuration space in bytes.
const CONFIG: usize = 60;

/// What every queue of the disk shares.
pub struct Disk {
    /// The image.
    pub engine: Engine,
    /// Its size in bytes: whole sectors.
    pub capacity: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// The answer to VIRTIO_BLK_T_GET_ID, padded with zeroes.
    pub id: [u8; VIRTIO_BLK_ID_BYTES as usize],
}

/// The disk itself.
pub struct BlkDevice {
    disk: Arc<Disk>,
    queues: u16,
}

/// Opens the disk that `spec` describes.
///
/// # Errors
/// An image without a sector, or one that cannot be asked for its size.
pub fn open(spec: DeviceSpec, _outbox: &Outbox) -> Result<Opened<BlkDevice>, Fault> {
    let DeviceSpec::Blk(spec) = spec else {
        return Err(Fault::internal("ozone-blk was started for a device that is not a disk"));
    };
    let name = spec.serial;
    let engine = Engine::new(spec.image.into_fd());
    let size = engine.size().map_err(|errno| Fault::input(format!("ask the size of disk '{name}': {errno}")))?;
    let capacity = size - size % SECTOR;
    if capacity == 0 {
        return Err(Fault::input(format!("disk '{name}' has {size} bytes: at least one sector of {SECTOR} is needed")));
    }
    if capacity != size {
        log::warn!("disk '{name}' ends with {} bytes that are no sector: the guest does not see them", size - capacity);
    }
    if spec.queues == 0 {
        return Err(Fault::internal(format!("disk '{name}' was given no queue")));
    }
    let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
    id.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from);
    let disk = Arc::new(Disk { engine, capacity, read_only: spec.read_only, id });
    let queue = |_| Box::new(RequestQueue::new(Arc::clone(&disk))) as Box<dyn QueueHandler>;
    let queues = (0..spec.queues).map(queue).collect();
    Ok(Opened { device: BlkDevice { disk, queues: spec.queues }, queues })
}

impl Device for BlkDevice {
    fn features(&self) -> u64 {
        let mut bits = vec![VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_SEG_MAX];
        bits.extend(self.disk.read_only.then_some(VIRTIO_BLK_F_RO));
        bits.extend((self.queues > 1).then_some(VIRTIO_BLK_F_MQ));
        bits.into_iter().fold(0, |features, bit| features | 1 << bit)
    }

    fn tracks_inflight(&self) -> bool {
        true
    }

    fn config(&self) -> Vec<u8> {
        let mut config = Vec::with_capacity(CONFIG);
        config.extend((self.disk.capacity / SECTOR).to_le_bytes());
        config.extend(0_u32.to_le_bytes()); // size_max, not offered
        config.extend(SEGMENTS.to_le_bytes());
        config.extend([0; 4]); // geometry, not offered
        config.extend(u32::try_from(SECTOR).unwrap_or(0).to_le_bytes()); // blk_size
        config.extend([0; 8]); // topology, not offered
        config.extend([1, 0]); // writeback, unused0
        config.extend(self.queues.to_le_bytes());
        config.resize(CONFIG, 0);
        config
    }
}
