//! Whether other processes used the processors while something was measured.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ozone_tests::process_table;

/// /proc counts in hundredths of a second (USER_HZ, proc(5)).
const TICK: Duration = Duration::from_millis(10);

/// A row is marked when others used more than this part of all processors' time.
const THRESHOLD: f64 = 0.05;

/// Processor time of others while one thing was measured, over all its runs.
#[derive(Debug, Default)]
pub struct Noise {
    others: Duration,
    available: Duration,
}

/// The counters at the beginning of a run.
pub struct Mark {
    at: Instant,
    busy: u64,
    ours: u64,
}

impl Mark {
    /// Reads the counters.
    pub fn now() -> Result<Self> {
        // Ours first: what is used between the two readings counts as others' rather than disappearing.
        let ours = ours()?;
        Ok(Self { at: Instant::now(), busy: busy(&fs::read_to_string("/proc/stat")?).context("/proc/stat")?, ours })
    }
}

impl Noise {
    /// Adds what happened since `mark`.
    pub fn add(&mut self, mark: &Mark) -> Result<()> {
        let now = Mark::now()?;
        let ticks = (now.busy.saturating_sub(mark.busy)).saturating_sub(now.ours.saturating_sub(mark.ours));
        self.others += TICK * u32::try_from(ticks).unwrap_or(u32::MAX);
        self.available += now.at.duration_since(mark.at) * processors();
        Ok(())
    }

    /// The note of a row that was disturbed.
    pub fn note(&self) -> Option<String> {
        // Two ticks are what counting in ticks gets wrong by itself.
        let others = self.others.saturating_sub(2 * TICK).as_secs_f64();
        let part = others / self.available.as_secs_f64().max(f64::MIN_POSITIVE);
        (part > THRESHOLD).then(|| format!("others used {:.0} % of the processors", part * 100.0))
    }
}

/// How many processors there are.
pub fn processors() -> u32 {
    std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(1))
}

/// Busy ticks of all processors: everything but idle and waiting for input and output. Guests' time is in `user` too.
fn busy(stat: &str) -> Option<u64> {
    let fields: Vec<u64> = stat.lines().next()?.split_whitespace().skip(1).map_while(|it| it.parse().ok()).collect();
    let [user, nice, system, _idle, _iowait, interrupt, soft_interrupt, steal, ..] = fields.as_slice() else {
        return None;
    };
    Some(user + nice + system + interrupt + soft_interrupt + steal)
}

/// Ticks of this process, of everything below it, and of what these have reaped.
fn ours() -> Result<u64> {
    let own = i32::try_from(std::process::id())?;
    let tree: BTreeSet<i32> = process_table::descendants(own)?;
    let ticks = |pid| ticks(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?);
    Ok(tree.into_iter().filter_map(ticks).sum())
}

/// utime, stime, cutime and cstime: fields 14 to 17 of /proc/PID/stat. The second field may hold anything.
fn ticks(stat: &str) -> Option<u64> {
    let rest = stat.rsplit_once(')')?.1;
    Some(rest.split_whitespace().skip(11).take(4).filter_map(|it| it.parse::<u64>().ok()).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_the_right_fields() {
        assert_eq!(busy("cpu  1 2 4 100 200 8 16 32 64 0\n"), Some(63));
        assert_eq!(ticks("7 (a ) b) S 1 2 3 4 5 6 7 8 9 10 100 20 3 4 20 0 1"), Some(127));
    }

    #[test]
    fn only_others_are_noise() {
        let quiet = Noise { others: Duration::from_millis(40), available: Duration::from_secs(2) };
        assert_eq!(quiet.note(), None);
        let loud = Noise { others: Duration::from_secs(1), available: Duration::from_secs(2) };
        assert!(loud.note().is_some_and(|note| note.contains("49 %")));
    }
}
