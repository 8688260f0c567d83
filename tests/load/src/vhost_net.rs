//! The kernel's vhost-net as a network device: the driver's queues are those that a vhost-user backend gets, but a thread of
//! the kernel serves them.

use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vhost::net::VhostNet as _;
use vhost::vhost_kern::net::Net;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::cpu;
use crate::memory::{Memory, USER};
use crate::ring::{FEATURES, Ring, SIZE};
use crate::wire::Wire;

/// VIRTIO_NET_F_MRG_RXBUF. The other features of a network device are the tap's.
const MERGEABLE: u64 = 1 << 15;

/// A device that serves its queues, until it is dropped.
pub struct VhostNet {
    device: Net<Arc<GuestMemoryMmap>>,
    /// Where the kernel counts the processor time of the device's thread.
    worker: PathBuf,
    /// Whether that thread counts as one of this process, as it does since Linux 6.4.
    pub is_ours: bool,
}

impl VhostNet {
    /// A device between `rings`, the queue to the driver first, and the tap of `wire`. `large` leaves large frames undivided.
    ///
    /// # Errors
    /// No /dev/vhost-net, or one that lacks what the driver needs.
    pub fn start(memory: &Memory, rings: &mut [Ring<'_>], wire: &Wire, large: bool) -> Result<Self> {
        if large {
            wire.offload()?;
        }
        // The kernel takes addresses of this process, which has the driver's memory a second time for it.
        let file = FileOffset::new(memory.file().try_clone()?, 0);
        let mapped = GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), memory.size(), Some(file))])?;
        let region = VhostUserMemoryRegionInfo {
            userspace_addr: mapped.get_host_address(GuestAddress(0))? as u64,
            ..memory.region()
        };
        let device = Net::new(Arc::new(mapped)).context("open /dev/vhost-net")?;
        device.set_owner().context("VHOST_SET_OWNER")?;
        let wanted = FEATURES | MERGEABLE;
        let features = device.get_features().context("VHOST_GET_FEATURES")? & wanted;
        ensure!(features == wanted, "vhost-net does not offer {:#x}", wanted & !features);
        device.set_features(features).context("VHOST_SET_FEATURES")?;
        device.set_mem_table(&[region]).context("VHOST_SET_MEM_TABLE")?;
        let tap = File::from(wire.tap.try_clone()?);
        for (index, ring) in rings.iter_mut().enumerate() {
            ring.accept(features);
            enable(&device, index, ring, &tap).with_context(|| format!("enable queue {index}"))?;
        }
        let (worker, is_ours) = worker()?;
        Ok(Self { device, worker, is_ours })
    }

    /// Processor time that the kernel's thread has used.
    ///
    /// # Errors
    /// It is gone.
    pub fn cpu(&self) -> Result<Duration> {
        cpu::of_task(&self.worker).with_context(|| format!("{}: vhost-net's thread is gone", self.worker.display()))
    }
}

impl Drop for VhostNet {
    fn drop(&mut self) {
        // The queues go away before the memory does.
        for index in 0..2 {
            let _ = self.device.set_backend(index, None);
        }
    }
}

fn enable(device: &Net<Arc<GuestMemoryMmap>>, index: usize, ring: &Ring<'_>, tap: &File) -> vhost::Result<()> {
    let places = ring.places();
    // Here they are guest physical addresses, as in virtio; with vhost-user they are the front-end's own.
    let places = VringConfigData {
        desc_table_addr: places.desc_table_addr - USER,
        used_ring_addr: places.used_ring_addr - USER,
        avail_ring_addr: places.avail_ring_addr - USER,
        ..places
    };
    device.set_vring_num(index, SIZE)?;
    device.set_vring_addr(index, &places)?;
    device.set_vring_base(index, 0)?;
    device.set_vring_call(index, &ring.call)?;
    device.set_vring_kick(index, &ring.kick)?;
    device.set_backend(index, Some(tap))
}

/// The counters of the kernel's thread for this process: a thread of the process since Linux 6.4, a process before.
fn worker() -> Result<(PathBuf, bool)> {
    let name = format!("vhost-{}", std::process::id());
    for (directory, is_ours) in [("/proc/self/task", true), ("/proc", false)] {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            if fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim() == name) {
                return Ok((path.join("schedstat"), is_ours));
            }
        }
    }
    anyhow::bail!("the kernel has no thread {name}")
}
