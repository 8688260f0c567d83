//! When nothing was completed, and for how long.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// No more stalls than this are kept; later ones are left out.
const KEPT: usize = 1 << 16;

/// A time without a completion: microseconds since 1970 at its start, and how many microseconds it took.
pub type Stall = (u64, u64);

/// Looks for gaps between completions.
#[derive(Debug)]
pub struct Stalls {
    least: Duration,
    last: SystemTime,
    longest: Duration,
    found: Vec<Stall>,
}

impl Stalls {
    /// Begins at `now`; gaps shorter than `least` do not count.
    #[must_use]
    pub fn new(least: Duration, now: SystemTime) -> Self {
        Self { least, last: now, longest: Duration::ZERO, found: Vec::new() }
    }

    /// Something was completed.
    pub fn completed(&mut self, now: SystemTime) {
        // Threads may come here in another order than they looked at the clock.
        let Ok(gap) = now.duration_since(self.last) else { return };
        if gap >= self.least && self.found.len() < KEPT {
            self.found.push((since_1970(self.last), microseconds(gap)));
        }
        self.longest = self.longest.max(gap);
        self.last = now;
    }

    /// The longest gap, and all that counted in their order.
    #[must_use]
    pub fn into_found(self) -> (Duration, Vec<Stall>) {
        (self.longest, self.found)
    }
}

/// Microseconds since 1970.
#[must_use]
pub fn since_1970(time: SystemTime) -> u64 {
    microseconds(time.duration_since(UNIX_EPOCH).unwrap_or_default())
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_found_and_short_ones_left_out() {
        let at = |milliseconds| UNIX_EPOCH + Duration::from_millis(milliseconds);
        let mut stalls = Stalls::new(Duration::from_millis(10), at(1000));
        for time in [1001, 1003, 1050, 1049, 1055, 1065] {
            stalls.completed(at(time));
        }
        let (longest, found) = stalls.into_found();
        assert_eq!(longest, Duration::from_millis(47));
        assert_eq!(found, [(1_003_000, 47_000), (1_055_000, 10_000)]);
    }
}
