//! `--boot-trace`: when every process of a launch did what, in the Chrome trace event format, which Perfetto opens.
//!
//! What is recorded is held in memory, up to a limit, and written at the end of the run.

use std::cell::RefCell;
use std::fmt::Display;
use std::fs::File;
use std::io::Write;

use nix::unistd::Pid;
use protocol::trace::{Mark, Point, now};
use serde_json::{Value, json};

use crate::process::Process;
use crate::report;

/// The most events that are kept: a machine that resets itself again and again would fill the memory.
const MOST: usize = 10_000;

/// What was recorded; nothing if no trace is wanted.
#[derive(Debug)]
pub struct Trace(Option<Recording>);

#[derive(Debug)]
struct Recording {
    file: File,
    events: RefCell<Vec<Value>>,
    /// The processes of the present incarnation, by place, and when each was done with its jail.
    children: RefCell<Vec<(Pid, u64)>>,
}

impl Trace {
    /// A trace that will be written to `file`, if there is one.
    pub fn new(file: Option<File>) -> Self {
        let recording = |file| Recording { file, events: RefCell::default(), children: RefCell::default() };
        let trace = Self(file.map(recording));
        trace.name(Pid::this(), &"ozone");
        trace
    }

    /// Whether a trace is wanted.
    pub fn is_wanted(&self) -> bool {
        self.0.is_some()
    }

    /// The time, if a trace is wanted; see [`protocol::trace::now`].
    pub fn now(&self) -> u64 {
        if self.is_wanted() { now() } else { 0 }
    }

    /// `ozone` did `what` from `start` until now.
    pub fn done(&self, start: u64, what: &dyn Display) {
        self.step(Pid::this(), what, start, self.now());
    }

    /// `ozone` knew from `end` on which machine it is to run, and has claimed its name since.
    pub fn resolved(&self, start: u64, end: u64) {
        self.step(Pid::this(), &"resolve the machine", start, end);
        self.done(end, &"claim the name");
    }

    /// The process `pid` did `what`.
    pub fn step(&self, pid: Pid, what: &dyn Display, start: u64, end: u64) {
        let micro = |time: u64| time as f64 / 1000.0;
        let length = end.saturating_sub(start);
        self.add(|| match length {
            0 => json!({ "name": what.to_string(), "ph": "i", "s": "p", "ts": micro(end), "pid": pid.as_raw(), "tid": 0 }),
            _ => json!({
                "name": what.to_string(), "ph": "X", "ts": micro(start), "dur": micro(length), "pid": pid.as_raw(), "tid": 0
            }),
        });
    }

    /// The next incarnation has no process yet.
    pub fn begin(&self) {
        if let Some(recording) = &self.0 {
            recording.children.borrow_mut().clear();
        }
    }

    /// The next process is in its jail, which took these steps, each from when until when.
    pub fn jailed(&self, pid: Pid, process: &Process, steps: &[(&'static str, u64, u64)]) {
        let Some(recording) = &self.0 else { return };
        self.name(pid, process);
        for (step, start, end) in steps {
            self.step(pid, step, *start, *end);
        }
        recording.children.borrow_mut().push((pid, steps.last().map_or(0, |(.., end)| *end)));
    }

    /// The child at `place` tells what it did.
    pub fn told(&self, place: usize, marks: &[Mark]) {
        let child = self.0.as_ref().and_then(|recording| recording.children.borrow().get(place).copied());
        let Some((pid, jailed)) = child else { return };
        for Mark { point, start, end } in marks {
            // The child's jail ends where its executable begins.
            if *point == Point::Told {
                self.step(pid, &"execveat", jailed, *start);
            }
            self.step(pid, point, *start, *end);
        }
    }

    fn name(&self, pid: Pid, name: &dyn Display) {
        let arguments = || json!({ "name": name.to_string() });
        self.add(|| json!({ "name": "process_name", "ph": "M", "pid": pid.as_raw(), "args": arguments() }));
    }

    fn add(&self, event: impl FnOnce() -> Value) {
        if let Some(recording) = &self.0 {
            let mut events = recording.events.borrow_mut();
            if events.len() < MOST {
                events.push(event());
            }
        }
    }

    /// Writes the trace. A failure is told, and changes nothing about how the machine ended.
    pub fn write(&self) {
        let Some(Recording { file, events, .. }) = &self.0 else { return };
        let trace = json!({ "displayTimeUnit": "ms", "traceEvents": *events.borrow() });
        let mut file = file;
        if let Err(error) = file.write_all(trace.to_string().as_bytes()) {
            report::warn(&format!("--boot-trace: {error}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};

    #[test]
    fn steps_are_written_with_their_process_and_times() {
        let mut file = tempfile::tempfile().unwrap();
        let trace = Trace::new(Some(file.try_clone().unwrap()));
        trace.jailed(Pid::from_raw(77), &Process::Core, &[("setsid", 500, 1_000)]);
        trace.told(0, &[Mark { point: Point::Told, start: 1_500, end: 2_000 }]);
        trace.told(0, &[Mark { point: Point::Kernel, start: 2_000, end: 5_500 }]);
        trace.told(9, &[Mark { point: Point::Memory, start: 1, end: 2 }]);
        for _ in 0..2 * MOST {
            trace.told(0, &[Mark { point: Point::FirstInstruction, start: 6_000, end: 6_000 }]);
        }
        trace.write();
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        let trace: Value = serde_json::from_str(&text).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        assert_eq!(events.len(), MOST);
        assert_eq!(events[1]["args"]["name"], "core");
        assert_eq!(
            (&events[3]["name"], &events[3]["ts"], &events[3]["dur"]),
            (&json!("execveat"), &json!(1.0), &json!(0.5))
        );
        let kernel = &events[5];
        assert_eq!((&kernel["name"], &kernel["pid"]), (&json!("load kernel"), &json!(77)));
        assert_eq!((&kernel["ts"], &kernel["dur"]), (&json!(2.0), &json!(3.5)));
        assert_eq!(events[6]["ph"], "i");
    }

    #[test]
    fn nothing_is_recorded_unless_wanted() {
        let trace = Trace::new(None);
        assert_eq!(trace.now(), 0);
        trace.done(0, &"nothing");
        trace.write();
    }
}
