//! The tables of `blk`.

use libc::{
    F_ADD_SEALS, MFD_ALLOW_SEALING, MFD_CLOEXEC, SYS_fcntl, SYS_fdatasync, SYS_lseek, SYS_memfd_create, SYS_preadv,
    SYS_pwritev2,
};

use crate::filter::{Check, Rule, allow, allow_if};

/// Until it is ready, beyond what every backend needs.
pub const LAUNCH: &[Rule] = &[allow(SYS_lseek, "the size of the image or block device")];

/// Once it is ready, beyond what every backend may do.
pub const RUN: &[Rule] = &[
    allow(SYS_preadv, "reads of the image into guest memory"),
    allow(SYS_pwritev2, "writes of the image from guest memory, durable ones by a flag"),
    allow(SYS_fdatasync, "flushes of the image"),
    allow_if(
        SYS_memfd_create,
        &[Check::Equals(1, MFD_CLOEXEC | MFD_ALLOW_SEALING)],
        "the record of what is in flight, when the core asks for one",
    ),
    allow_if(SYS_fcntl, &[Check::Equals(1, F_ADD_SEALS.unsigned_abs())], "the size of that record is sealed"),
];
