//! What a machine uses, as its control groups say (Documentation/admin-guide/cgroup-v2.rst).

use super::directory::{Directory, value};
use crate::control::message::{IoUsage, MemoryUsage, ProcessUsage, Usage};

/// What the machine's group and its leaves say; what a controller that is not there would say is left out.
pub fn read<'a>(machine: &Directory, leaves: impl Iterator<Item = (&'a str, &'a Directory)>) -> Usage {
    let number = |name: &str| machine.read(name).ok()?.trim().parse().ok();
    let memory = number("memory.current").map(|current| MemoryUsage {
        current,
        peak: number("memory.peak"),
        kills: kills(machine),
    });
    Usage {
        cgroup: machine.path().display().to_string(),
        cpu_usec: cpu(machine).0,
        memory,
        processes: leaves.map(|(name, leaf)| process(name, leaf)).collect(),
    }
}

/// How many processes the kernel has killed because of a limit on memory.
pub fn kills(machine: &Directory) -> u64 {
    machine.read("memory.events").ok().and_then(|text| value(&text, "oom_kill")).unwrap_or(0)
}

fn process(name: &str, leaf: &Directory) -> ProcessUsage {
    let (cpu_usec, throttled) = cpu(leaf);
    ProcessUsage {
        process: name.to_owned(),
        cpu_usec,
        throttled,
        pids: leaf.read("pids.current").ok().and_then(|text| text.trim().parse().ok()),
        io: leaf.read("io.stat").map(|text| io(&text)).unwrap_or_default(),
    }
}

/// Processor time in microseconds, and how often it was held back, where it can be.
fn cpu(directory: &Directory) -> (u64, Option<u64>) {
    let text = directory.read("cpu.stat").unwrap_or_default();
    (value(&text, "usage_usec").unwrap_or(0), value(&text, "nr_throttled"))
}

fn io(text: &str) -> Vec<IoUsage> {
    let device = |line: &str| {
        let (device, rest) = line.split_once(' ')?;
        let number = |key: &str| {
            let found = rest.split(' ').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='));
            found.and_then(|number| number.parse().ok())
        };
        Some(IoUsage {
            device: device.to_owned(),
            read_bytes: number("rbytes")?,
            written_bytes: number("wbytes")?,
            reads: number("rios")?,
            writes: number("wios")?,
        })
    };
    text.lines().filter_map(device).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn block_devices_are_read_with_their_counts() {
        let text = "8:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n253:0 \n";
        let expected = IoUsage { device: "8:0".to_owned(), read_bytes: 4096, written_bytes: 8192, reads: 1, writes: 2 };
        assert_eq!(io(text), [expected]);
    }

    #[test]
    fn what_is_not_there_is_left_out() {
        let parent = tempfile::tempdir().unwrap();
        fs::write(parent.path().join("cpu.stat"), "usage_usec 70\nuser_usec 60\n").unwrap();
        let directory = Directory::root(parent.path()).unwrap();
        let usage = read(&directory, [("core", &directory)].into_iter());
        assert_eq!((usage.cpu_usec, usage.memory.is_none()), (70, true));
        let [core] = &usage.processes[..] else { panic!("{usage:?}") };
        assert_eq!((core.cpu_usec, core.throttled, core.pids, core.io.len()), (70, None, None, 0));
    }
}
