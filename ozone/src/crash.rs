//! Points at which `ozone` kills itself: for tests, and only with the feature `crash-points`.
//!
//! The variable `OZONE_CRASH_POINT` says at which passage, from 1, of any point it happens. Without it nothing does.
#![allow(unsafe_code)]

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::libc;

/// What arms it.
pub const VARIABLE: &str = "OZONE_CRASH_POINT";

/// A pidfd of this process: once `ozone` is confined it can send SIGKILL by such a descriptor, and no other signal.
static OWN: OnceLock<libc::c_long> = OnceLock::new();

static PASSED: AtomicU64 = AtomicU64::new(0);

/// Passes a point: whether this is where to end.
pub fn is_reached() -> bool {
    // At the first point nothing is confined yet.
    // SAFETY: numbers only (pidfd_open(2)). The descriptor is never closed.
    OWN.get_or_init(|| unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) });
    let wanted = std::env::var(VARIABLE).ok().and_then(|text| text.parse::<u64>().ok());
    wanted == Some(PASSED.fetch_add(1, Ordering::Relaxed) + 1)
}

/// Ends the process with SIGKILL, after a line that says where.
pub fn end(point: &str) {
    crate::report::say(&format!("crash point: {point}"));
    let none: *const libc::siginfo_t = std::ptr::null();
    let own = OWN.get().copied().unwrap_or(-1);
    // SAFETY: a null siginfo is allowed (pidfd_send_signal(2)); the other arguments are numbers.
    unsafe { libc::syscall(libc::SYS_pidfd_send_signal, own, libc::SIGKILL, none, 0) };
}

/// Passes a point, and ends there if it is the one.
pub fn pass(point: &str) {
    if is_reached() {
        end(point);
    }
}
