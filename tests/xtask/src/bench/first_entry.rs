//! When a host's KVM first enters a guest, by the kernel's own tracepoint.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

const TRACING: &str = "/sys/kernel/tracing";

/// The tracepoint `kvm:kvm_entry`, which switches recording off at its first hit. Given back on drop.
pub struct FirstEntry(());

impl FirstEntry {
    /// Takes the tracepoint.
    pub fn new() -> Result<Self> {
        write("tracing_on", "0")?;
        write("trace_clock", "mono")?;
        write("events/kvm/kvm_entry/trigger", "traceoff")?;
        write("events/kvm/kvm_entry/enable", "1")?;
        Ok(Self(()))
    }

    /// Waits for the next entry.
    pub fn arm(&self) -> Result<()> {
        write("trace", "")?;
        write("tracing_on", "1")
    }

    /// The time of the entry on CLOCK_MONOTONIC, if there was one.
    pub fn at(&self) -> Result<Option<Duration>> {
        let text = fs::read_to_string(Path::new(TRACING).join("trace")).context("read the kernel's trace")?;
        Ok(text.lines().find_map(time))
    }
}

impl Drop for FirstEntry {
    fn drop(&mut self) {
        let _ = write("events/kvm/kvm_entry/enable", "0");
        let _ = write("events/kvm/kvm_entry/trigger", "!traceoff");
    }
}

/// The time in a line such as `vcpu0-123 [000] d.... 12.345678: kvm_entry: vcpu 0`.
fn time(line: &str) -> Option<Duration> {
    let (before, _) = line.split_once(": kvm_entry:")?;
    Duration::try_from_secs_f64(before.split_whitespace().last()?.parse().ok()?).ok()
}

fn write(name: &str, text: &str) -> Result<()> {
    fs::write(Path::new(TRACING).join(name), text).with_context(|| format!("write {text} to {TRACING}/{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_an_entry_is_read() {
        let line = "           vcpu0-410     [001] d....    12.500000: kvm_entry: vcpu 0, rip 0xfff0";
        assert_eq!(time(line), Some(Duration::from_millis(12_500)));
        assert_eq!(time("# tracer: nop"), None);
    }
}
