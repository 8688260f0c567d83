//! Backends killed at random times, and how long the guest had to wait for each.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use oracle::stalls::{Stall, since_1970};
use oracle::stamp;

use crate::backends;

/// A new process of a device appears within this, whatever came before.
const PATIENCE: Duration = Duration::from_secs(60);

/// Half of all processes are killed within this after they were first seen: before, in and soon after their handshake.
const EARLY: Duration = Duration::from_millis(150);

/// The others serve for so long at least: only that ends a series of failures, after each of which the product waits longer.
const SERVED: Duration = Duration::from_millis(320);

/// And for no longer than this.
const LATE: Duration = Duration::from_millis(500);

/// Numbers in no order that can be had again.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Begins a sequence.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Of the system's choice, where none was asked for.
    #[must_use]
    pub fn any_seed() -> u64 {
        // 48 bits: a number that can be typed again.
        since_1970(SystemTime::now()).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16
    }

    /// A time up to `most`.
    pub fn time(&mut self, most: Duration) -> Duration {
        let microseconds = u64::try_from(most.as_micros()).unwrap_or(u64::MAX).max(1);
        Duration::from_micros(stamp::next(&mut self.0) % microseconds)
    }
}

/// One process that was killed.
#[derive(Clone, Copy, Debug)]
pub struct Kill {
    /// When, in microseconds since 1970 on the host's clock.
    pub at: u64,
    /// Which.
    pub pid: i32,
    /// Whether it had served long enough to be no part of a series of failures: its successor is started at once.
    pub served: bool,
}

/// Kills the process of that name, and each that comes after it, at a random time after it was first seen.
pub fn at_random(ozone: i32, role: &str, count: usize, random: &mut Random) -> Result<Vec<Kill>> {
    let mut kills: Vec<Kill> = Vec::with_capacity(count);
    while kills.len() < count {
        let last = kills.last().map(|kill| kill.pid);
        let pid = backends::await_other(ozone, role, last, PATIENCE)
            .with_context(|| format!("after {} kills", kills.len()))?;
        let early = stamp::next(&mut random.0).is_multiple_of(2);
        std::thread::sleep(if early { random.time(EARLY) } else { SERVED + random.time(LATE - SERVED) });
        let at = since_1970(SystemTime::now());
        if backends::signal(pid, rustix::process::Signal::KILL)? {
            kills.push(Kill { at, pid, served: !early });
        }
    }
    Ok(kills)
}

/// What the guest saw of one kill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    /// The longest time without a completion that began with it or after it, and before the next kill.
    pub stall: Duration,
    /// From the kill to the completion that ended that.
    pub back: Duration,
    /// Whether the process that was killed had served.
    pub served: bool,
}

/// The waits for all kills. `offset` is how far the guest's clock is ahead of the host's, in microseconds.
#[must_use]
pub fn waits(kills: &[Kill], stalls: &[Stall], offset: i64) -> Vec<Wait> {
    let next = kills.iter().skip(1).map(|kill| kill.at).chain([u64::MAX]);
    let wait = |(kill, next): (&Kill, u64)| {
        let (from, to) = (kill.at.saturating_add_signed(offset), next.saturating_add_signed(offset));
        // What was completed before the kill may reach the guest's program after it: so the longest, not the first. One that
        // lasts beyond the next kill is the next one's, unless it is both's.
        let mine = |(start, length): &&Stall| start + length > from && (start + length <= to || *start <= from);
        let after = stalls.iter().filter(mine);
        let (start, length) = after.max_by_key(|(_, length)| *length)?;
        let (stall, back) = (Duration::from_micros(*length), Duration::from_micros(start + length - from));
        Some(Wait { stall, back, served: kill.served })
    };
    kills.iter().zip(next).filter_map(wait).collect()
}

/// The value that `part` of the sorted values do not exceed; nothing of none.
#[must_use]
pub fn quantile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let index = (sorted.len() as f64 * part).ceil() as usize;
    sorted.get(index.saturating_sub(1)).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kill_has_the_longest_stall_until_the_next() {
        let kills = [1000, 5000, 9000].map(|at| Kill { at, pid: 1, served: true });
        let stalls = [(0, 500), (1010, 20), (1050, 300), (4900, 400), (20_000, 1)];
        let ms = Duration::from_micros;
        let served = true;
        let expected = [(300, 350), (400, 300)].map(|(stall, back)| Wait { stall: ms(stall), back: ms(back), served });
        assert_eq!(waits(&kills[..2], &stalls[..4], 0), expected);
        let ahead = stalls.map(|(start, length)| (start + 7_000_000, length));
        assert_eq!(waits(&kills[..2], &ahead[..4], 7_000_000), expected);
    }

    #[test]
    fn quantiles_are_values_that_were_there() {
        let values = [3.0, 1.0, 2.0, 4.0];
        assert_eq!((quantile(&values, 0.5), quantile(&values, 0.99), quantile(&[], 0.5)), (2.0, 4.0, 0.0));
    }
}
