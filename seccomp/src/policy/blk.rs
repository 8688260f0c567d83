//! The tables of `blk`.

use libc::{SYS_fdatasync, SYS_lseek, SYS_preadv, SYS_pwritev2};

use crate::filter::{Rule, allow};

/// Until it is ready, beyond what every backend needs.
pub const LAUNCH: &[Rule] = &[allow(SYS_lseek, "the size of the image or block device")];

/// Once it is ready, beyond what every backend may do.
pub const RUN: &[Rule] = &[
    allow(SYS_preadv, "reads of the image into guest memory"),
    allow(SYS_pwritev2, "writes of the image from guest memory, durable ones by a flag"),
    allow(SYS_fdatasync, "flushes of the image"),
];
