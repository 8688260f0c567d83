//! What a transport remembers of a device, whatever its registers look like: it can be saved and restored.

use serde::{Deserialize, Serialize};

/// The version of [`TransportState`]'s layout.
pub const VERSION: u32 = 1;

/// The longest queue a driver may ask for.
pub const QUEUE_SIZE: u16 = 256;

/// Device status bits (virtio 1.2, section 2.1).
pub mod status {
    /// The driver knows how to drive the device and all of it is set up.
    pub const DRIVER_OK: u32 = 4;
    /// Feature negotiation is complete.
    pub const FEATURES_OK: u32 = 8;
    /// The device met an error from which it cannot recover.
    pub const NEEDS_RESET: u32 = 64;
}

/// VIRTIO_F_VERSION_1 (virtio 1.2, section 6).
pub const VERSION_1: u64 = 1 << 32;

/// One queue as the driver configured it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Entries, a power of two up to [`QUEUE_SIZE`].
    pub size: u16,
    /// Whether the driver handed the queue over.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest physical address of the available ring, the driver area.
    pub available: u64,
    /// Guest physical address of the used ring, the device area.
    pub used: u64,
}

impl Default for QueueState {
    fn default() -> Self {
        Self { size: QUEUE_SIZE, ready: false, descriptors: 0, available: 0, used: 0 }
    }
}

/// Everything a driver told the transport since the last reset.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// [`VERSION`].
    pub version: u32,
    /// The status register, without NEEDS_RESET.
    pub status: u32,
    /// Which half of the device's features is shown.
    pub device_features_select: u32,
    /// Which half of the driver's features is written.
    pub driver_features_select: u32,
    /// What the driver accepted.
    pub driver_features: u64,
    /// Which queue the queue registers are about.
    pub queue_select: u32,
    /// The queues.
    pub queues: Vec<QueueState>,
}

impl TransportState {
    /// The state after a reset of a device with `queues` queues.
    pub fn new(queues: usize) -> Self {
        Self {
            version: VERSION,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: vec![QueueState::default(); queues],
        }
    }
}
