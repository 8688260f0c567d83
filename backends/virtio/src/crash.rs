//! Points at which the process can be made to end at once, as by SIGKILL: for tests, and only with the feature
//! `crash-points`.
//!
//! The disk's serial number arms one of them: `cp-POINT-N`, of which POINT is `fetch`, `io`, `element`, `index` or
//! `commit` ([`Point`]) and N, from 1, says at which passage of any queue the process ends (`cp-index-37`). With `-d` at
//! its end (`cp-index-37-d`) the device does not offer VIRTIO_RING_F_INDIRECT_DESC. Any other serial number arms nothing.
#![allow(unsafe_code)]

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// The exit code: that of a process which SIGKILL has ended, as a shell tells it.
pub const CODE: i32 = 137;

/// How far a request has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// Its chain was taken and is recorded as in flight.
    Fetch,
    /// The host has done its part, and nothing is published.
    Io,
    /// Its used element is written, and the index of the used ring is not.
    Element,
    /// The index of the used ring is written, and the chain still recorded as in flight.
    Index,
    /// The record says that nothing of it is in flight.
    Commit,
}

#[derive(Debug, PartialEq, Eq)]
struct Plan {
    point: Point,
    passage: u64,
    direct: bool,
}

static PLAN: OnceLock<Plan> = OnceLock::new();
static PASSED: AtomicU64 = AtomicU64::new(0);

/// Arms the point that `serial` names, if it names one.
pub fn arm(serial: &str) {
    if let Some(plan) = parse(serial) {
        // There is one disk per process.
        let _ = PLAN.set(plan);
    }
}

fn parse(serial: &str) -> Option<Plan> {
    let mut words = serial.split('-');
    if words.next() != Some("cp") {
        return None;
    }
    let point = match words.next()? {
        "fetch" => Point::Fetch,
        "io" => Point::Io,
        "element" => Point::Element,
        "index" => Point::Index,
        "commit" => Point::Commit,
        _ => return None,
    };
    let passage = words.next()?.parse().ok().filter(|&passage| passage > 0)?;
    match (words.next(), words.next()) {
        (None, None) => Some(Plan { point, passage, direct: false }),
        (Some("d"), None) => Some(Plan { point, passage, direct: true }),
        _ => None,
    }
}

/// Whether indirect descriptors are not to be offered.
pub fn without_indirect() -> bool {
    PLAN.get().is_some_and(|plan| plan.direct)
}

/// A thread is at `point`: ends the process if it is time.
pub fn pass(point: Point) {
    let Some(plan) = PLAN.get().filter(|plan| plan.point == point) else { return };
    if PASSED.fetch_add(1, Ordering::Relaxed).saturating_add(1) == plan.passage {
        // SAFETY: it ends the process without running anything more of it.
        unsafe { libc::_exit(CODE) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_numbers_name_points() {
        let plan = |point, passage, direct| Some(Plan { point, passage, direct });
        assert_eq!(parse("cp-index-37"), plan(Point::Index, 37, false));
        assert_eq!(parse("cp-element-1000-d"), plan(Point::Element, 1000, true));
        for other in ["root", "cp", "cp-io", "cp-io-0", "cp-io-x", "cp-disk-1", "cp-io-1-x", "cp-io-1-d-d", "xcp-io-1"]
        {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
