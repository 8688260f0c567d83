//! Lines on ozone's standard error. Nothing here ever waits for whoever reads them, but for a moment at the very end.
//!
//! A line that finds no room is lost and counted. How many were lost is said as soon as there is room again: the one loop that
//! waits for everything watches for that ([`room`], [`settle`]).

use std::io::{ErrorKind, IsTerminal};
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant, SystemTime};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{OutputFlags, tcgetattr};
use serde::{Deserialize, Serialize};

use crate::spec::policy::Word;
use crate::time;

mod sink;

use sink::Sink;

/// How long the last lines may wait for their reader, all of them together.
const LAST_PATIENCE: Duration = Duration::from_secs(1);

/// How long standard error is left alone that said there was room and had none.
const REST: Duration = Duration::from_millis(100);

/// The longest text of others in a line of ours, in bytes.
const FOREIGN: usize = 1024;

/// The form of a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object: time, vm, role, pid, level, message.
    Json,
}

impl Word for Format {
    const WORDS: &'static [(&'static str, Self)] = &[("text", Self::Text), ("json", Self::Json)];
}

/// How much a line matters. The names are those of the levels in [`protocol::log`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Something failed.
    Error,
    /// Something is not as it should be, and goes on.
    Warn,
    /// Something happened.
    Info,
    /// Something for whoever looks for a mistake.
    Debug,
    /// Likewise, at length.
    Trace,
}

impl Level {
    /// The level that a process's line begins with, and the rest. A line without one was written by something that knows of no
    /// levels, as the C library when it ends a process: that is worth a warning.
    fn of(line: &str) -> (Self, &str) {
        const WORDS: [(&str, Level); 5] = [
            ("error ", Level::Error),
            ("warn ", Level::Warn),
            ("info ", Level::Info),
            ("debug ", Level::Debug),
            ("trace ", Level::Trace),
        ];
        let found = WORDS.iter().find_map(|(word, level)| Some((*level, line.strip_prefix(word)?)));
        found.unwrap_or((Level::Warn, line))
    }
}

/// Whether there is something that waits for room in standard error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// Nothing waits.
    NotNeeded,
    /// It has to be watched for.
    Needed,
    /// It has to be watched for from then on.
    NeededAt(Instant),
}

/// A line in JSON.
#[derive(Serialize)]
struct Line<'a> {
    time: String,
    vm: &'a str,
    role: &'a str,
    pid: u32,
    level: Level,
    message: &'a str,
}

static STATE: Mutex<State> = Mutex::new(State::new());

#[derive(Debug)]
struct State {
    format: Format,
    /// The machine's name in JSON.
    vm: String,
    sink: Option<Sink>,
    /// The rest of a line of which standard error took the beginning.
    begun: Vec<u8>,
    /// Lines that nobody took.
    lost: u64,
    /// Whether standard error cannot be written for another reason than room: as a rule nobody is left who could read.
    gone: bool,
    /// Until when there is no use in asking for room.
    rests: Option<Instant>,
    /// Until when the last lines may wait.
    last: Option<Instant>,
}

/// Sets the form of all lines from now on, and finds out how standard error is written: nothing is opened for that later.
pub fn begin(format: Format) {
    if let Some(mut state) = state() {
        state.format = format;
        state.sink.get_or_insert_with(Sink::of_stderr);
        if state.vm.is_empty() {
            state.vm = vm(None);
        }
    }
}

/// Lets go of standard error, which has become another file: what waited for room in the old one is lost with it.
pub fn begin_anew() {
    if let Some(mut state) = state() {
        state.sink = None;
        state.begun.clear();
        state.lost = 0;
    }
}

/// The name of the machine that lines are about; without one it is `vm-PID`, as its control group is.
pub fn name(name: Option<&str>) {
    if let Some(mut state) = state() {
        state.vm = vm(name);
    }
}

fn vm(name: Option<&str>) -> String {
    name.map_or_else(|| format!("vm-{}", std::process::id()), str::to_owned)
}

/// Says that something happened, if whoever reads standard error has room for it.
pub fn say(text: &str) {
    put(Level::Info, text);
}

/// Says that something is not as it should be, likewise.
pub fn warn(text: &str) {
    put(Level::Warn, text);
}

fn put(level: Level, text: &str) {
    if let Some(mut state) = state() {
        let line = state.line("ozone", std::process::id(), level, text);
        state.put(&line);
    }
}

/// Hands a line of a child on, of which only its length and characters are known to be harmless ([`harmless`]).
pub fn pass(role: &str, pid: u32, line: &str) {
    if let Some(mut state) = state() {
        let line = match state.format {
            Format::Text => state.line("ozone", pid, Level::Info, &format!("[{role}] {line}")),
            Format::Json => {
                let (level, message) = Level::of(line);
                state.line(role, pid, level, message)
            }
        };
        state.put(&line);
    }
}

/// Says one of the lines that tell how it ended, and waits a moment for room.
pub fn say_last(level: Level, text: &str) {
    if let Some(mut state) = state() {
        let line = state.line("ozone", std::process::id(), level, text);
        let deadline = *state.last.get_or_insert_with(|| Instant::now() + LAST_PATIENCE);
        let mut written = false;
        // The line, and then the rest of it if there was room for its beginning only.
        loop {
            written = written || (state.settle() && state.write(&line));
            if (written && state.settle()) || state.gone || !is_writable(deadline) {
                break;
            }
        }
    }
}

/// Whether something waits for room in standard error.
pub fn room(now: Instant) -> Room {
    match state() {
        Some(state) if !state.is_settled() && !state.gone => match state.rests.filter(|until| *until > now) {
            Some(until) => Room::NeededAt(until),
            None => Room::Needed,
        },
        _ => Room::NotNeeded,
    }
}

/// Standard error has room: says what waits for it.
pub fn settle() {
    if let Some(mut state) = state() {
        let before = (state.begun.len(), state.lost);
        if !state.settle() && (state.begun.len(), state.lost) == before {
            state.rests = Some(Instant::now() + REST);
        }
    }
}

/// There is one thread, so it is locked only where the panic of a line tells of itself.
fn state() -> Option<MutexGuard<'static, State>> {
    match STATE.try_lock() {
        Ok(state) => Some(state),
        Err(TryLockError::Poisoned(poisoned)) => Some(PoisonError::into_inner(poisoned)),
        Err(TryLockError::WouldBlock) => None,
    }
}

impl State {
    const fn new() -> Self {
        Self {
            format: Format::Text,
            vm: String::new(),
            sink: None,
            begun: Vec::new(),
            lost: 0,
            gone: false,
            rests: None,
            last: None,
        }
    }

    /// A line with its end.
    fn line(&self, role: &str, pid: u32, level: Level, message: &str) -> Vec<u8> {
        let mut line = match self.format {
            Format::Text => format!("ozone: {message}").into_bytes(),
            Format::Json => {
                let time = time::rfc3339(SystemTime::now());
                // Text and numbers only, which can always be written.
                serde_json::to_vec(&Line { time, vm: &self.vm, role, pid, level, message }).unwrap_or_default()
            }
        };
        line.extend(end());
        line
    }

    /// Writes a line, or counts it as lost.
    fn put(&mut self, line: &[u8]) {
        if !self.settle() || !self.write(line) {
            self.lost = self.lost.saturating_add(1);
        }
    }

    /// Writes what waits; `false` if some of it still does.
    fn settle(&mut self) -> bool {
        let begun = std::mem::take(&mut self.begun);
        if !begun.is_empty() && !self.write(&begun) {
            self.begun = begun;
        }
        if self.begun.is_empty() && self.lost > 0 {
            let text = format!("{} lines were lost: standard error was not read", self.lost);
            let line = self.line("ozone", std::process::id(), Level::Warn, &text);
            if self.write(&line) {
                self.lost = 0;
            }
        }
        self.is_settled()
    }

    fn is_settled(&self) -> bool {
        self.begun.is_empty() && self.lost == 0
    }

    /// Writes the beginning of a line at least, and keeps the rest of it; `false` if there is no room at all.
    fn write(&mut self, line: &[u8]) -> bool {
        match self.sink.get_or_insert_with(Sink::of_stderr).write(line) {
            Ok(0) if !line.is_empty() => false,
            Ok(length) => {
                (self.gone, self.rests) = (false, None);
                self.begun = line.get(length..).unwrap_or_default().to_vec();
                true
            }
            Err(error) => {
                self.gone = error.kind() != ErrorKind::WouldBlock;
                false
            }
        }
    }
}

/// Waits for room; `false` at the deadline.
fn is_writable(deadline: Instant) -> bool {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return false;
    }
    let stderr = std::io::stderr();
    let mut fds = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
    let found = poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO));
    if found == Ok(1) {
        // A terminal may say so and have less room than a line break takes.
        let _ = poll(&mut [], 1_u8);
    }
    found != Ok(0)
}

/// The end of a line.
fn end() -> &'static [u8] {
    let stderr = std::io::stderr();
    // A console has made the terminal raw: line breaks are not completed by it.
    let raw = stderr.is_terminal()
        && tcgetattr(&stderr).is_ok_and(|settings| !settings.output_flags.contains(OutputFlags::OPOST));
    if raw { b"\r\n" } else { b"\n" }
}

/// Text of another process, made harmless: one line, of bounded length, without control characters.
pub fn harmless(text: &str) -> String {
    let mut line = String::with_capacity(text.len().min(FOREIGN));
    for character in text.chars() {
        if line.len() >= FOREIGN {
            line.push('…');
            break;
        }
        // Control characters, and those that change the direction or looks of what stands around them.
        if character.is_control()
            || matches!(character, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_cannot_break_out_of_its_line() {
        assert_eq!(harmless("a\nozone: fine\u{1b}[2J\r"), "a\\nozone: fine\\u{1b}[2J\\r");
        assert_eq!(harmless("\u{202e}x"), "\\u{202e}x");
        assert!(harmless(&"x".repeat(1 << 20)).len() < FOREIGN + 8);
    }

    #[test]
    fn a_level_is_the_first_word_of_a_line() {
        assert_eq!(Level::of("error forbidden"), (Level::Error, "forbidden"));
        assert_eq!(Level::of("info a b"), (Level::Info, "a b"));
        assert_eq!(Level::of("information"), (Level::Warn, "information"));
        assert_eq!(Level::of("free(): invalid pointer"), (Level::Warn, "free(): invalid pointer"));
    }

    #[test]
    fn a_line_in_json_is_one_object_whatever_is_in_it() {
        let state = State { format: Format::Json, vm: "web1".to_owned(), ..State::new() };
        let line = state.line("blk/disk0", 77, Level::Warn, "\"}\\ {\"level\":\"info\"\n");
        assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
        let value: serde_json::Value = serde_json::from_slice(&line).unwrap();
        let expected = serde_json::json!({
            "time": value["time"], "vm": "web1", "role": "blk/disk0", "pid": 77, "level": "warn",
            "message": "\"}\\ {\"level\":\"info\"\n",
        });
        assert_eq!(value, expected);
        assert!(value["time"].as_str().is_some_and(|time| time.len() == 27 && time.ends_with('Z')), "{value}");
    }
}
