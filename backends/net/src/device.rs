//! The network interface as the driver sees it (virtio 1.2, sections 5.1.3 and 5.1.4).

use std::sync::{Arc, Mutex, PoisonError};

use protocol::{DeviceSpec, Fault, FromBackend};
use virtio_backend::{Device, Opened, Outbox, QueueHandler, Rare};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use crate::control::{Control, Third};
use crate::receive::Receive;
use crate::tap::Tap;
use crate::transmit::Transmit;

/// What is offered for any tap.
const FEATURES: [u32; 12] = [
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
];

/// The queues of the tap, one per pair of virtqueues, of which the kernel uses as many as the driver does.
pub struct Pairs {
    taps: Vec<Arc<Tap>>,
    used: Mutex<Used>,
    outbox: Outbox,
}

/// How many pairs are used.
struct Used {
    pairs: usize,
    /// Numbers that `ozone` was not told of.
    untold: Rare,
}

impl Pairs {
    /// Attaches the first `count` queues and detaches the others; `false` if there are not so many or the kernel refuses.
    ///
    /// `ozone` has been told when this returns, so that the driver may be: a process that takes over from this one is then
    /// given the number that the driver relies on, whenever this one ends.
    pub fn use_first(&self, count: usize) -> bool {
        let Some(pairs) = u16::try_from(count).ok().filter(|_| (1..=self.taps.len()).contains(&count)) else {
            return false;
        };
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        if used.pairs == count {
            return true;
        }
        if !attach_first(&self.taps, count) {
            return false;
        }
        used.pairs = count;
        if !self.outbox.send_now(&FromBackend::Pairs { pairs })
            && let Some(times) = used.untold.again()
        {
            log::warn!("ozone does not read: it does not know how many queue pairs are used ({times} times)");
        }
        true
    }
}

/// Attaches the first `count` queues and detaches the others; `false` if the kernel refuses.
fn attach_first(taps: &[Arc<Tap>], count: usize) -> bool {
    for (index, tap) in taps.iter().enumerate() {
        let attached = index < count;
        if let Err(errno) = tap.attach(attached) {
            let verb = if attached { "attach" } else { "detach" };
            log::error!("{verb} queue {index} of the tap: {errno}");
            return false;
        }
    }
    true
}

/// The network interface itself.
pub struct NetDevice {
    pairs: Arc<Pairs>,
    mac: [u8; 6],
    mtu: u16,
}

/// Opens the interface that `spec` describes.
///
/// # Errors
/// An interface without a queue, or a tap that is none.
pub fn open(spec: DeviceSpec, outbox: &Outbox) -> Result<Opened<NetDevice>, Fault> {
    let DeviceSpec::Net(spec) = spec else {
        return Err(Fault::internal("ozone-net was started for a device that is not a network interface"));
    };
    let taps: Vec<Arc<Tap>> = spec.taps.into_iter().map(|tap| Arc::new(Tap::new(tap.into_fd()))).collect();
    let Some(first) = taps.first() else {
        return Err(Fault::internal("ozone-net was given no queue of a tap"));
    };
    first.set_offloads(0).map_err(|errno| Fault::input(format!("set the offloads of the tap: {errno}")))?;
    // As ozone knows already.
    let used = usize::from(spec.pairs);
    if !(1..=taps.len()).contains(&used) || !attach_first(&taps, used) {
        return Err(Fault::host("attach the queues of the tap that are in use, and detach the others: see the log"));
    }
    let pairs = Arc::new(Pairs {
        taps,
        used: Mutex::new(Used { pairs: used, untold: Rare::default() }),
        outbox: outbox.clone(),
    });
    let several = pairs.taps.len() > 1;
    let mut queues: Vec<Box<dyn QueueHandler>> = Vec::new();
    for (index, tap) in pairs.taps.iter().enumerate() {
        let receive = Box::new(Receive::new(Arc::clone(tap), spec.mtu));
        if index == 1 {
            queues.push(Box::new(Third::new(Control::new(Arc::clone(&pairs)), receive)));
        } else {
            queues.push(receive);
        }
        queues.push(Box::new(Transmit::new(Arc::clone(tap))));
    }
    if several {
        queues.push(Box::new(Control::new(Arc::clone(&pairs))));
    }
    Ok(Opened { device: NetDevice { pairs, mac: spec.mac, mtu: spec.mtu }, queues })
}

impl Device for NetDevice {
    fn features(&self) -> u64 {
        let several: &[u32] = if self.pairs.taps.len() > 1 { &[VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_VQ] } else { &[] };
        FEATURES.iter().chain(several).fold(0, |features, bit| features | 1 << bit)
    }

    fn config(&self) -> Vec<u8> {
        let pairs = u16::try_from(self.pairs.taps.len()).unwrap_or(u16::MAX);
        let link = u16::try_from(VIRTIO_NET_S_LINK_UP).unwrap_or(1);
        let mut config = self.mac.to_vec();
        config.extend(link.to_le_bytes());
        config.extend(pairs.to_le_bytes());
        config.extend(self.mtu.to_le_bytes());
        config
    }

    fn negotiated(&self, features: u64) {
        if let Some(Err(errno)) = self.pairs.taps.first().map(|tap| tap.set_offloads(features)) {
            log::error!("set the offloads of the tap: {errno}");
        }
    }
}
