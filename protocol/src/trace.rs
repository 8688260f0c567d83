//! When the steps of a launch were done, for `--boot-trace`. Nothing of this is recorded or sent unless `ozone` asks for it.

use std::fmt;

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::device::DeviceId;

/// One step of a launch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// What was done.
    pub point: Point,
    /// When it began; the same as [`Self::end`] for what takes no time. See [`now`].
    pub start: u64,
    /// When it was done.
    pub end: u64,
}

/// What a jailed process does in a launch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Point {
    /// The first message has arrived: from the entry of `main`.
    Told,
    /// Guest memory exists.
    Memory,
    /// The kernel and the initial ramdisk are in it.
    Kernel,
    /// KVM's machine exists, with interrupt controllers and memory.
    Machine,
    /// Every device has its place and its attendant.
    Devices,
    /// The vCPUs are made and parked.
    Processors,
    /// Every device is attached.
    Attached,
    /// A backend's device is open.
    Open,
    /// A backend's threads run.
    Threads,
    /// The run filter is installed.
    Filter,
    /// The first vCPU is about to enter the guest.
    FirstInstruction,
    /// The core greeted the device's backend, which answered.
    Handshake(DeviceId),
    /// The guest's driver has taken the device into use (virtio 1.2, section 2.1, DRIVER_OK).
    DriverOk(DeviceId),
}

impl fmt::Display for Point {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Told => "await first message",
            Self::Memory => "make memory",
            Self::Kernel => "load kernel",
            Self::Machine => "make machine",
            Self::Devices => "make devices",
            Self::Processors => "make vCPUs",
            Self::Attached => "await backends",
            Self::Open => "open device",
            Self::Threads => "start threads",
            Self::Filter => "install run filter",
            Self::FirstInstruction => "first guest instruction",
            Self::Handshake(device) => return write!(formatter, "handshake {device}"),
            Self::DriverOk(device) => return write!(formatter, "DRIVER_OK {device}"),
        })
    }
}

/// Nanoseconds of CLOCK_MONOTONIC, which is the same in every process of the host.
pub fn now() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(std::time::Duration::from).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// The steps of one thread, each of which begins where the one before was done.
#[derive(Debug)]
pub struct Laps {
    wanted: bool,
    last: u64,
    marks: Vec<Mark>,
}

impl Laps {
    /// Records from `start` on if it is `wanted`, else nothing.
    pub fn new(wanted: bool, start: u64) -> Self {
        Self { wanted, last: start, marks: Vec::new() }
    }

    /// `point` is done.
    pub fn done(&mut self, point: Point) {
        if self.wanted {
            let start = std::mem::replace(&mut self.last, now());
            self.marks.push(Mark { point, start, end: self.last });
        }
    }

    /// What was recorded, if it is wanted.
    pub fn finish(self) -> Option<Vec<Mark>> {
        self.wanted.then_some(self.marks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn laps_follow_each_other() {
        let mut laps = Laps::new(true, now());
        laps.done(Point::Told);
        laps.done(Point::Memory);
        let marks = laps.finish().unwrap();
        assert_eq!(marks[0].end, marks[1].start);
        assert!(marks.iter().all(|mark| mark.start <= mark.end && mark.end <= now()));
    }

    #[test]
    fn nothing_is_recorded_unless_wanted() {
        let mut laps = Laps::new(false, 0);
        laps.done(Point::Told);
        assert_eq!(laps.finish(), None);
    }
}
