//! The log of a jailed process: lines on standard error, which `ozone` reads from a bounded pipe.
//!
//! A line is one write(2) of at most [`LINE`] bytes, so that lines of several threads never mix (pipe(7), PIPE_BUF).
//! What a guest can make happen over and over is logged ever more rarely ([`Rare`]). When the pipe is full the line is dropped and counted; no thread ever waits for the log.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use log::{Level, LevelFilter, Log, Metadata, Record};

/// The longest line in bytes, its line break included; a longer one is cut.
pub const LINE: usize = 1024;

struct Lines {
    dropped: AtomicU64,
}

static LINES: Lines = Lines { dropped: AtomicU64::new(0) };

/// Sends the `log` macros of this process to standard error from now on.
pub fn install() {
    if log::set_logger(&LINES).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

impl Lines {
    fn write(&self, level: Level, text: &str) -> bool {
        let mut line = format!("{} {}", level.as_str().to_ascii_lowercase(), text.replace(['\n', '\r'], " "));
        let mut end = line.len().min(LINE - 1);
        while !line.is_char_boundary(end) {
            end -= 1;
        }
        line.truncate(end);
        line.push('\n');
        std::io::stderr().write(line.as_bytes()).is_ok()
    }
}

impl Log for Lines {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        if dropped > 0 && !self.write(Level::Warn, &format!("{dropped} log lines were lost: the log pipe was full")) {
            self.dropped.fetch_add(dropped, Ordering::Relaxed);
        }
        if !self.write(record.level(), &record.args().to_string()) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn flush(&self) {}
}

/// Counts occurrences, and says which of them to log.
#[derive(Debug, Default)]
pub struct Rare(u64);

impl Rare {
    /// One more; its number if it is to be logged: the first four, then each that is a power of two.
    pub fn again(&mut self) -> Option<u64> {
        self.0 = self.0.saturating_add(1);
        (self.0 <= 4 || self.0.is_power_of_two()).then_some(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_becomes_a_trickle() {
        let mut rare = Rare::default();
        let logged: Vec<u64> = (0..1000).filter_map(|_| rare.again()).collect();
        assert_eq!(logged, [1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512]);
    }
}
