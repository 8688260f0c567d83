//! Memory of processes and of the host, in KiB.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// The name of a mapping of guest memory (memfd_create(2)).
const GUEST: &str = "/memfd:guest-memory";

/// How long the host may take to come to rest, how often it is looked at, how many times in a row nothing may change, and
/// what change in KiB is none. The kernel takes namespaces apart one after the other, with pauses.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(500);
const QUIET: u32 = 6;
const REST: u64 = 128;

/// Memory of one process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Its share of everything but guest memory: shared pages count in parts (Pss, proc(5)).
    pub proportional: u64,
    /// What it shares with nobody, guest memory left out.
    pub private: u64,
    /// Its share of guest memory.
    pub guest: u64,
}

impl Footprint {
    /// What a process has now; a process that has ended has nothing.
    pub fn of(pid: i32) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps");
        Ok(parse(&fs::read_to_string(&path).with_context(|| path)?))
    }
}

fn parse(smaps: &str) -> Footprint {
    let mut footprint = Footprint::default();
    let mut in_guest = false;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let Some((first, value)) = words.next().zip(words.next()) else { continue };
        let kib = || value.parse::<u64>().unwrap_or(0);
        match first {
            "Pss:" if in_guest => footprint.guest += kib(),
            "Pss:" => footprint.proportional += kib(),
            "Private_Clean:" | "Private_Dirty:" if !in_guest => footprint.private += kib(),
            // A mapping's first line begins with its addresses.
            _ if !first.ends_with(':') => in_guest = line.contains(GUEST),
            _ => {}
        }
    }
    footprint
}

/// MemAvailable of the host in KiB, once it has come to rest: ended processes give their memory back bit by bit.
pub fn settled() -> Result<u64> {
    let deadline = Instant::now() + PATIENCE;
    let mut last = available()?;
    let mut quiet = 0;
    while quiet < QUIET && Instant::now() < deadline {
        thread::sleep(PAUSE);
        let now = available()?;
        quiet = if now.abs_diff(last) <= REST { quiet + 1 } else { 0 };
        last = now;
    }
    Ok(last)
}

/// MemAvailable of the host in KiB, its per-processor counters folded in first.
pub fn available() -> Result<u64> {
    // Only root may, and the counters are then off by some pages.
    let _ = fs::read("/proc/sys/vm/stat_refresh");
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let value = line.and_then(|line| line.split_whitespace().next()).context("MemAvailable")?;
    Ok(value.parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_told_apart() {
        let smaps = "7f00-7f10 rw-s 0 00:01 7    /memfd:guest-memory-0 (deleted)\nRss:  9 kB\nPss:     40 kB\n\
                     Private_Dirty:  30 kB\nVmFlags: rd wr\n5500-5600 r--p 0 08:01 3   /bin/x\nPss:  3 kB\n\
                     Private_Clean:   1 kB\nPrivate_Dirty:   2 kB\nAnonHugePages: 5 kB\n";
        assert_eq!(parse(smaps), Footprint { proportional: 3, private: 3, guest: 40 });
    }
}
