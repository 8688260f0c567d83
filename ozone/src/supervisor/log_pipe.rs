//! The log of a child: what it writes to its standard error, as lines of bounded length and number.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use seccomp::forbidden::Call;

use crate::process::Process;
use crate::report;

/// The longest line in bytes; what is beyond is left out.
const LINE: usize = protocol::log::LINE;

/// How many bytes one look takes at most: a flood gets no more of ozone's time than this per [`REST`].
const LOOK: usize = 64 * 1024;

/// How many lines a child may print at once, and one more for every [`PER_LINE`] since.
const BURST: u32 = 200;
const PER_LINE: Duration = Duration::from_millis(50);

/// How long a child that has used up its lines is not looked at.
const REST: Duration = Duration::from_millis(100);

/// The read end of a child's log pipe.
#[derive(Debug)]
pub struct LogPipe {
    pipe: File,
    open: bool,
    /// Whether lines that only inform are left out.
    quiet: bool,
    lines: Lines,
}

impl LogPipe {
    /// Takes the read end, which is non-blocking.
    pub fn new(pipe: OwnedFd) -> Self {
        Self { pipe: File::from(pipe), open: true, quiet: false, lines: Lines::new(Instant::now()) }
    }

    /// Goes on with what another pipe has used up of its lines: a process that dies again and again prints no more than one
    /// that lives.
    pub fn succeed(&mut self, last: &Self) {
        (self.lines.left, self.lines.refilled, self.lines.rest) =
            (last.lines.left, last.lines.refilled, last.lines.rest);
    }

    /// When the pipe may be looked at again; `None` for now. An ended pipe is never looked at.
    pub fn rests_until(&self, now: Instant) -> Option<Instant> {
        self.lines.rest.filter(|until| *until > now)
    }

    /// Whether there can be more.
    pub fn is_open(&self) -> bool {
        self.open
    }

    /// Leaves out lines that only inform, from now on: of an end that ozone has told or is about to tell.
    pub fn quiet(&mut self) {
        self.quiet = true;
    }

    /// The forbidden system call that the child reported last, of what has been read.
    pub fn reported(&self) -> Option<Call> {
        self.lines.reported
    }

    /// Prints what is there.
    pub fn pump(&mut self, process: &Process, pid: Pid) {
        let mut bytes = [0; 4096];
        for _ in 0..LOOK / bytes.len() {
            match self.pipe.read(&mut bytes) {
                Ok(0) => {
                    self.open = false;
                    break;
                }
                Ok(length) => {
                    let now = Instant::now();
                    let text = bytes.get(..length).unwrap_or_default();
                    let quiet = self.quiet;
                    self.lines.take(text, now, |line| print(process, pid, quiet, line));
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
    }

    /// Prints what is there when no more will come, the count of lost lines included.
    pub fn finish(&mut self, process: &Process, pid: Pid) {
        self.pump(process, pid);
        let quiet = self.quiet;
        self.lines.finish(|line| print(process, pid, quiet, line));
    }
}

fn print(process: &Process, pid: Pid, quiet: bool, line: &str) {
    // The level comes first in a line of protocol::log.
    if !(quiet && line.starts_with("info ")) {
        report::pass(&process.to_string(), pid.as_raw().unsigned_abs(), line);
    }
}

impl AsFd for LogPipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

/// Cuts a stream of bytes into lines and lets a bounded number through.
#[derive(Debug)]
struct Lines {
    partial: Vec<u8>,
    /// Lines that may be printed now.
    left: u32,
    refilled: Instant,
    lost: u64,
    rest: Option<Instant>,
    /// The last forbidden system call that a line named, whether that line was printed or not.
    reported: Option<Call>,
}

impl Lines {
    fn new(now: Instant) -> Self {
        Self { partial: Vec::new(), left: BURST, refilled: now, lost: 0, rest: None, reported: None }
    }

    fn take(&mut self, bytes: &[u8], now: Instant, mut print: impl FnMut(&str)) {
        self.refill(now);
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (text, ended) = match part.split_last() {
                Some((b'\n', text)) => (text, true),
                _ => (part, false),
            };
            let room = LINE.saturating_sub(self.partial.len());
            self.partial.extend_from_slice(text.get(..text.len().min(room)).unwrap_or_default());
            if ended {
                let line = std::mem::take(&mut self.partial);
                self.line(&line, now, &mut print);
            }
        }
    }

    fn line(&mut self, line: &[u8], now: Instant, print: &mut impl FnMut(&str)) {
        let text = String::from_utf8_lossy(line);
        self.reported = Call::reported_by(&text).or(self.reported);
        if self.left == 0 {
            self.lost += 1;
            self.rest = Some(now + REST);
            return;
        }
        if self.lost > 0 {
            print(&format!("warn {} lines were lost: too many at once", self.lost));
            self.lost = 0;
        }
        self.left -= 1;
        print(&report::harmless(&text));
    }

    fn refill(&mut self, now: Instant) {
        let earned = now.saturating_duration_since(self.refilled).as_millis() / PER_LINE.as_millis();
        if earned > 0 {
            self.left = BURST.min(self.left.saturating_add(u32::try_from(earned).unwrap_or(BURST)));
            self.refilled = now;
        }
    }

    fn finish(&mut self, mut print: impl FnMut(&str)) {
        if !self.partial.is_empty() {
            let line = std::mem::take(&mut self.partial);
            print(&report::harmless(&String::from_utf8_lossy(&line)));
        }
        if self.lost > 0 {
            print(&format!("warn {} lines were lost: too many at once", self.lost));
            self.lost = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collect(lines: &mut Lines, bytes: &[u8], now: Instant) -> Vec<String> {
        let mut printed = Vec::new();
        lines.take(bytes, now, |line| printed.push(line.to_owned()));
        printed
    }

    #[test]
    fn lines_are_put_together_and_cut() {
        let now = Instant::now();
        let mut lines = Lines::new(now);
        assert!(collect(&mut lines, b"info al", now).is_empty());
        assert_eq!(collect(&mut lines, b"pha\nbeta\n", now), ["info alpha", "beta"]);
        let long = [vec![b'x'; 100_000], b"\nnext\n".to_vec()].concat();
        let printed = collect(&mut lines, &long, now);
        assert_eq!(printed.len(), 2);
        assert!(printed[0].len() <= LINE + 8);
        assert_eq!(printed[1], "next");
        assert_eq!(collect(&mut lines, b"\xff\x1b[31m\n", now), ["\u{fffd}\\u{1b}[31m"]);
    }

    #[test]
    fn a_flood_is_counted_and_later_lines_come_through() {
        let now = Instant::now();
        let mut lines = Lines::new(now);
        let flood = b"noise\n".repeat(10_000);
        assert_eq!(collect(&mut lines, &flood, now).len(), BURST as usize);
        assert!(lines.rest.is_some());
        assert!(collect(&mut lines, b"error forbidden system call 41 (socket)\n", now).is_empty());
        assert_eq!(lines.reported.unwrap().to_string(), "socket (41)", "though it is not printed");
        let later = now + Duration::from_secs(1);
        let printed = collect(&mut lines, b"signal\n", later);
        assert_eq!(printed, ["warn 9801 lines were lost: too many at once", "signal"]);
    }
}
