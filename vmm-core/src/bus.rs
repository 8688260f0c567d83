//! Guest accesses to ports and to addresses without memory, and the devices that answer them.

use std::ops::Range;
use std::sync::Arc;

/// A device that answers accesses to a range of addresses.
///
/// Accesses come from every vCPU thread at once. They must not wait for another process; the one exception is a virtio
/// device's reset.
pub trait BusDevice: Send + Sync {
    /// The guest reads `data.len()` bytes at `offset` into the range. `data` holds all ones beforehand.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` at `offset` into the range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// One address space: ranges that do not overlap.
#[derive(Default)]
pub struct Bus {
    ranges: Vec<(Range<u64>, Arc<dyn BusDevice>)>,
}

impl Bus {
    /// Puts a device at a range of addresses. Of overlapping ranges the first inserted answers.
    pub fn insert(&mut self, range: Range<u64>, device: Arc<dyn BusDevice>) {
        self.ranges.push((range, device));
    }

    /// Answers a guest's read. Where nothing is, it reads as all ones, as on a real bus.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((offset, device)) = self.find(address) {
            device.read(offset, data);
        }
    }

    /// Answers a guest's write. Where nothing is, it is lost.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address) {
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64) -> Option<(u64, &Arc<dyn BusDevice>)> {
        let (range, device) = self.ranges.iter().find(|(range, _)| range.contains(&address))?;
        Some((address - range.start, device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Last(Mutex<(u64, Vec<u8>)>);

    impl BusDevice for Last {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&self, offset: u64, data: &[u8]) {
            *self.0.lock().unwrap() = (offset, data.to_vec());
        }
    }

    #[test]
    fn an_access_reaches_the_device_at_its_offset() {
        let device = Arc::new(Last::default());
        let mut bus = Bus::default();
        bus.insert(0x3f8..0x400, device.clone());
        bus.write(0x3f9, &[7]);
        assert_eq!(*device.0.lock().unwrap(), (1, vec![7]));
        let mut data = [0; 2];
        bus.read(0x3fa, &mut data);
        assert_eq!(data, [2, 2]);
    }

    #[test]
    fn nothing_reads_as_all_ones() {
        let mut data = [0; 4];
        Bus::default().read(0xcf8, &mut data);
        assert_eq!(data, [0xff; 4]);
        Bus::default().write(0xcf8, &data);
    }
}
