//! The queues of a tap (Linux, Documentation/networking/tuntap.rst).
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
};

/// What the tap may leave to the guest: linux/if_tun.h, TUN_F_CSUM and the following.
const OFFLOADS: [(u32, u64); 4] = [
    (VIRTIO_NET_F_GUEST_CSUM, 0x01),
    (VIRTIO_NET_F_GUEST_TSO4, 0x02),
    (VIRTIO_NET_F_GUEST_TSO6, 0x04),
    (VIRTIO_NET_F_GUEST_ECN, 0x08),
];

/// linux/if_tun.h, IFF_ATTACH_QUEUE and IFF_DETACH_QUEUE.
const ATTACH: i16 = 0x0200;
const DETACH: i16 = 0x0400;

nix::ioctl_write_int!(set_offload, b'T', 208);
nix::ioctl_write_ptr!(set_queue, b'T', 217, libc::c_int);

/// One queue of a tap.
#[derive(Debug)]
pub struct Tap(OwnedFd);

impl Tap {
    /// A queue that is attached, does not block, and has a header of 12 bytes.
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Lets the kernel leave to the guest what the driver's `features` say it can do. It holds for all queues.
    ///
    /// # Errors
    /// What ioctl(2) answers.
    pub fn set_offloads(&self, features: u64) -> nix::Result<()> {
        let accepted = |feature: u32| features & (1 << feature) != 0;
        // Without partial checksums there is no segmentation either (virtio 1.2, section 5.1.3.1).
        let flags = if accepted(VIRTIO_NET_F_GUEST_CSUM) {
            OFFLOADS.iter().filter(|(feature, _)| accepted(*feature)).fold(0, |flags, (_, flag)| flags | flag)
        } else {
            0
        };
        // SAFETY: the request takes a number and touches no memory of this process.
        unsafe { set_offload(self.0.as_raw_fd(), flags) }.map(drop)
    }

    /// Has the kernel use this queue, or not. If it does already, or does not, that is no error: a process that died may have
    /// said so or not.
    ///
    /// # Errors
    /// What ioctl(2) answers.
    pub fn attach(&self, attached: bool) -> nix::Result<()> {
        // SAFETY: all zeroes are a valid `struct ifreq`.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_flags = if attached { ATTACH } else { DETACH };
        // SAFETY: the request reads one `struct ifreq` at the address given, although its number says that it takes an int.
        match unsafe { set_queue(self.0.as_raw_fd(), (&raw const request).cast()) } {
            Ok(_) | Err(Errno::EINVAL) => Ok(()),
            Err(errno) => Err(errno),
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
