//! The tables of `net`.

use libc::{SYS_ioctl, SYS_readv, SYS_writev};

use crate::filter::{Check, Rule, allow, allow_if};

/// linux/if_tun.h: `_IOW('T', 208, unsigned int)` and `_IOW('T', 217, int)`.
const TUNSETOFFLOAD: u32 = 0x4004_54d0;
const TUNSETQUEUE: u32 = 0x4004_54d9;

/// Once it is ready, beyond what every backend may do.
pub const RUN: &[Rule] = &[
    allow(SYS_readv, "frames from the tap into guest memory"),
    allow(SYS_writev, "frames from guest memory to the tap"),
    allow_if(SYS_ioctl, &[Check::Equals(1, TUNSETOFFLOAD)], "the offloads that the driver accepted"),
    allow_if(SYS_ioctl, &[Check::Equals(1, TUNSETQUEUE)], "queues of the tap that the driver takes into use or leaves"),
];
