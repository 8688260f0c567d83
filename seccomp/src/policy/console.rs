//! The tables of `console`.

use libc::{F_GETFL, F_SETFL, SYS_accept4, SYS_fcntl, SYS_ioctl};

use crate::filter::{Check, Rule, allow, allow_if};

/// asm-generic/ioctls.h; TIOCSTI, which would type on the user's terminal, is none of them.
const TCGETS: u32 = 0x5401;
const TCSETS: u32 = 0x5402;
const TIOCGWINSZ: u32 = 0x5413;

/// Until it is ready, beyond what every backend needs.
pub const LAUNCH: &[Rule] = &[
    allow_if(SYS_ioctl, &[Check::Equals(1, TCGETS)], "how the terminal is, to restore it"),
    allow_if(SYS_ioctl, &[Check::Equals(1, TIOCGWINSZ)], "the size of the terminal"),
    allow_if(SYS_fcntl, &[Check::Equals(1, F_GETFL.unsigned_abs())], "a pseudo-terminal is made non-blocking"),
    allow_if(SYS_fcntl, &[Check::Equals(1, F_SETFL.unsigned_abs())], "a pseudo-terminal is made non-blocking"),
];

/// Once it is ready, beyond what every backend may do.
pub const RUN: &[Rule] = &[
    allow(SYS_accept4, "the clients of a console on a socket"),
    allow_if(SYS_ioctl, &[Check::Equals(1, TCSETS)], "the terminal is restored at the end"),
];
