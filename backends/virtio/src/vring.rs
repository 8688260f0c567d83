//! What the core has said about one virtqueue, until it is enough to start it.

use std::fs::File;
use std::sync::Arc;

use crate::descriptor::Call;
use crate::memory::Table;
use crate::ring::{LARGEST, Shape};

/// Places of a virtqueue in the addresses of the core (VHOST_USER_SET_VRING_ADDR).
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
}

/// One virtqueue as far as it has been described.
#[derive(Debug, Default)]
pub struct Vring {
    /// Number of descriptors.
    pub size: Option<u16>,
    /// Its places.
    pub addresses: Option<Addresses>,
    /// The next available entry, while the queue is stopped.
    pub base: u16,
    /// What the driver kicks: the queue is started by it and stopped by VHOST_USER_GET_VRING_BASE.
    pub kick: Option<Arc<File>>,
    /// How the driver is interrupted.
    pub call: Option<Arc<Call>>,
    /// How the core is told of a violation.
    pub error: Option<Arc<Call>>,
    /// Whether VHOST_USER_SET_VRING_ENABLE said so.
    pub enabled: bool,
    /// Whether its worker has it.
    pub running: bool,
}

/// What the core gave is not a virtqueue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VringError {
    /// Not a power of two within bounds.
    #[error("a queue of {0} descriptors (a power of two up to {LARGEST} is expected)")]
    Size(u32),
    /// An index that does not fit 16 bits.
    #[error("a base index of {0}")]
    Base(u32),
    /// An address outside of every memory region.
    #[error("the ring address {0:#x} is in no memory region")]
    Address(u64),
}

impl Vring {
    /// Takes the size.
    ///
    /// # Errors
    /// [`VringError::Size`].
    pub fn set_size(&mut self, size: u32) -> Result<(), VringError> {
        let valid = u16::try_from(size).ok().filter(|size| size.is_power_of_two() && *size <= LARGEST);
        self.size = Some(valid.ok_or(VringError::Size(size))?);
        Ok(())
    }

    /// Takes the index of the next available entry.
    ///
    /// # Errors
    /// [`VringError::Base`].
    pub fn set_base(&mut self, base: u32) -> Result<(), VringError> {
        self.base = u16::try_from(base).map_err(|_| VringError::Base(base))?;
        Ok(())
    }

    /// The queue's shape and kick, if it is to run now.
    ///
    /// `enabled` is the state of queues for which VHOST_USER_SET_VRING_ENABLE has no meaning.
    ///
    /// # Errors
    /// [`VringError::Address`].
    pub fn startable(&self, table: &Table, enabled: bool) -> Result<Option<(Shape, Arc<File>)>, VringError> {
        let (true, Some(size), Some(addresses), Some(kick)) =
            (self.enabled || enabled, self.size, self.addresses, &self.kick)
        else {
            return Ok(None);
        };
        let place = |user| table.translate(user).ok_or(VringError::Address(user));
        let shape = Shape {
            size,
            descriptors: place(addresses.descriptors)?,
            available: place(addresses.available)?,
            used: place(addresses.used)?,
            next_available: self.base,
        };
        Ok(Some((shape, Arc::clone(kick))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sizes_and_bases_of_split_queues_are_taken() {
        let mut vring = Vring::default();
        for size in [0, 3, 255, 2048, 65536, 65536 + 256, u32::MAX] {
            assert_eq!(vring.set_size(size), Err(VringError::Size(size)));
        }
        assert!(vring.size.is_none());
        vring.set_size(1).unwrap();
        vring.set_size(1024).unwrap();
        assert_eq!(vring.set_base(65536), Err(VringError::Base(65536)));
        vring.set_base(65535).unwrap();
        assert_eq!((vring.size, vring.base), (Some(1024), 65535));
    }

    #[test]
    fn nothing_starts_before_all_is_known() {
        assert!(Vring::default().startable(&Table::default(), true).unwrap().is_none());
    }
}
