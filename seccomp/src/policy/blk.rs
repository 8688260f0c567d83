//! The tables of `blk`.

use libc::{
    AT_EMPTY_PATH, F_ADD_SEALS, MFD_ALLOW_SEALING, MFD_CLOEXEC, SYS_fcntl, SYS_fdatasync, SYS_fsync,
    SYS_io_uring_enter, SYS_io_uring_register, SYS_io_uring_setup, SYS_lseek, SYS_memfd_create, SYS_preadv,
    SYS_pwritev2, SYS_statx,
};

use crate::filter::{Check, Rule, allow, allow_if};

/// Until it is ready, beyond what every backend needs.
pub const LAUNCH: &[Rule] = &[
    allow(SYS_lseek, "the size of the image or block device"),
    allow_if(
        SYS_statx,
        &[Check::Equals(2, AT_EMPTY_PATH.unsigned_abs())],
        "what the image asks of buffers that go past the page cache, by its descriptor",
    ),
    allow(SYS_io_uring_setup, "a ring for every queue; none can be made later"),
    allow(SYS_io_uring_register, "the files of a ring and what it is restricted to, which nothing can change later"),
];

/// Once it is ready, beyond what every backend may do.
pub const RUN: &[Rule] = &[
    allow(SYS_io_uring_enter, "reads, writes and flushes of the image, and nothing else: the rings are restricted"),
    allow(SYS_preadv, "reads of the image where the host forbids io_uring"),
    allow(SYS_pwritev2, "writes of the image there, durable ones by a flag"),
    allow(SYS_fdatasync, "flushes of the image there"),
    allow(SYS_fsync, "the first flush of the image there after an earlier process"),
    allow_if(
        SYS_memfd_create,
        &[Check::Equals(1, MFD_CLOEXEC | MFD_ALLOW_SEALING)],
        "the record of what is in flight, when the core asks for one",
    ),
    allow_if(SYS_fcntl, &[Check::Equals(1, F_ADD_SEALS.unsigned_abs())], "the size of that record is sealed"),
];
