//! The disk as the driver sees it: features and configuration space (virtio 1.2, sections 5.2.3 and 5.2.4).

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use protocol::{DeviceSpec, Fault};
use virtio_backend::{Device, Opened, Outbox, QueueHandler};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_ID_BYTES,
};

use crate::image::Image;
use crate::queue::{Engine, RequestQueue};
use crate::request::SECTOR;
use crate::uring::Uring;

/// The most data buffers of a request: with header and status they fill a queue of 256 descriptors.
const SEGMENTS: u32 = 254;

/// The largest block that a driver is told of, in bytes: Linux gives a disk up whose blocks are larger than its pages.
const LARGEST_BLOCK: u64 = 4096;

/// Size of the configuration space in bytes.
const CONFIG: usize = 60;

/// What every queue of the disk shares.
pub struct Disk {
    /// The image.
    pub image: Image,
    /// Its size in bytes: whole blocks.
    pub capacity: u64,
    /// The smallest piece that is read and written as it is, in bytes: a multiple of [`SECTOR`].
    pub block: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// The answer to VIRTIO_BLK_T_GET_ID, padded with zeroes.
    pub id: [u8; VIRTIO_BLK_ID_BYTES as usize],
}

/// The disk itself.
pub struct BlkDevice {
    disk: Arc<Disk>,
    queues: u16,
    /// Reads as closed at its other end when this process and everything it began are gone.
    _sentinel: OwnedFd,
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
    #[cfg(feature = "crash-points")]
    virtio_backend::crash::arm(&name);
    let image = Image::new(spec.image.into_fd(), spec.direct, spec.successor)
        .map_err(|errno| Fault::input(format!("ask how disk '{name}' is to be read and written: {errno}")))?;
    let size = image.size().map_err(|errno| Fault::input(format!("ask the size of disk '{name}': {errno}")))?;
    // Past the page cache only whole blocks can be read and written.
    let block = image.alignment().map_or(SECTOR, |alignment| SECTOR.max(alignment.place as u64));
    let capacity = size - size % block;
    if capacity == 0 {
        return Err(Fault::input(format!("disk '{name}' has {size} bytes: at least one block of {block} is needed")));
    }
    if capacity != size {
        log::warn!("disk '{name}' ends with {} bytes that are no block: the guest does not see them", size - capacity);
    }
    if spec.queues == 0 {
        return Err(Fault::internal(format!("disk '{name}' was given no queue")));
    }
    let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
    id.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from);
    let sentinel = spec.sentinel.into_fd();
    let engines = engines(&name, &image, &sentinel, spec.queues);
    let disk = Arc::new(Disk { image, capacity, block, read_only: spec.read_only, id });
    let queue = |engine| Box::new(RequestQueue::new(Arc::clone(&disk), engine)) as Box<dyn QueueHandler>;
    let queues = engines.into_iter().map(queue).collect();
    Ok(Opened { device: BlkDevice { disk, queues: spec.queues, _sentinel: sentinel }, queues })
}

/// A ring for every queue, or for none where the host does not let this process have them.
fn engines(name: &str, image: &Image, sentinel: &OwnedFd, queues: u16) -> Vec<Engine> {
    let rings = (0..queues).map(|_| Uring::new(image, sentinel.as_fd()).map(|ring| Engine::Ring(Box::new(ring))));
    rings.collect::<Result<Vec<_>, _>>().unwrap_or_else(|error| {
        log::warn!("disk '{name}': no io_uring ({error}), so each queue carries out one request after the other");
        (0..queues).map(|_| Engine::Calls).collect()
    })
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
        config.extend(u32::try_from(self.disk.block.min(LARGEST_BLOCK)).unwrap_or(0).to_le_bytes()); // blk_size
        config.extend([0; 8]); // topology, not offered
        config.extend([1, 0]); // writeback, unused0
        config.extend(self.queues.to_le_bytes());
        config.resize(CONFIG, 0);
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Alignment;

    /// Capacity and block size as the driver is told them, of a disk of 1 MiB.
    fn told(block: u64) -> (Vec<u8>, Vec<u8>) {
        let mut image = Image::new(tempfile::tempfile().unwrap().into(), false, false).unwrap();
        image.pretend(Alignment { address: 512, place: usize::try_from(block).unwrap() });
        let disk = Arc::new(Disk { image, capacity: 1 << 20, block, read_only: false, id: [0; 20] });
        let (_, sentinel) = std::io::pipe().unwrap();
        let config = BlkDevice { disk, queues: 1, _sentinel: sentinel.into() }.config();
        (config[..8].to_vec(), config[20..24].to_vec())
    }

    #[test]
    fn the_driver_is_told_the_block_that_the_image_wants() {
        for (block, expected) in [(512, 512_u32), (4096, 4096), (65_536, 4096)] {
            let (capacity, block) = told(block);
            assert_eq!(capacity, 2048_u64.to_le_bytes(), "sectors of 512 bytes, whatever the block is");
            assert_eq!(block, expected.to_le_bytes());
        }
    }
}
