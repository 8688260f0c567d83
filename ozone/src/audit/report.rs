//! What the audit found, for people and as JSON.

use std::fmt::Write as _;

use serde::Serialize;

use super::descriptor::Descriptor;
use super::facts::{Limit, Unseen};
use crate::report::harmless;

/// A machine.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// Its name.
    pub name: String,
    /// Whether no promise is broken.
    pub holds: bool,
    /// Its processes, `ozone` first.
    pub processes: Vec<Process>,
}

/// One of its processes.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Process {
    /// What it is: `ozone`, `core`, or the device, as `blk/disk0`.
    pub name: String,
    /// Its id.
    pub pid: Option<i32>,
    /// Why nothing is said of it, if nothing is.
    pub absent: Option<String>,
    /// What was found.
    pub promises: Vec<Finding>,
    /// Its open descriptors.
    pub descriptors: Vec<Descriptor>,
    /// Its resource limits.
    pub limits: Vec<Limit>,
}

/// A promise, and what there is in its place.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Finding {
    /// The promise.
    pub promise: &'static str,
    /// Whether it holds.
    pub verdict: Verdict,
    /// What was found, on one line.
    pub found: String,
}

/// Why a promise is not known to hold, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Short {
    /// It does not; what was to show that it does and could not be read counts as this.
    Broken(String),
    /// This user may not see.
    Hidden(String),
    /// This host has nothing to keep it with.
    NotOffered(String),
}

impl Short {
    /// The words.
    pub fn words(self) -> String {
        match self {
            Self::Broken(words) | Self::Hidden(words) | Self::NotOffered(words) => words,
        }
    }
}

impl From<Unseen> for Short {
    fn from(unseen: Unseen) -> Self {
        match unseen {
            Unseen::Denied(why) => Self::Hidden(why),
            Unseen::Failed(why) => Self::Broken(why),
        }
    }
}

/// What comes of a promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It holds.
    Holds,
    /// It does not.
    Broken,
    /// Nobody but the process itself can know, or root.
    NotVisible,
    /// It does not, since this host has nothing to keep it with.
    NotOffered,
    /// It is none: this is only told.
    Told,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Holds => "holds",
            Self::Broken => "BROKEN",
            Self::NotVisible => "not visible",
            Self::NotOffered => "not offered",
            Self::Told => "told",
        }
    }
}

impl Finding {
    /// A finding; of `found` only what is harmless on a terminal is kept.
    pub fn new(promise: &'static str, verdict: Verdict, found: &str) -> Self {
        Self { promise, verdict, found: harmless(found) }
    }

    /// A promise that holds or does not.
    pub fn judged(promise: &'static str, judged: Result<String, Short>) -> Self {
        match judged {
            Ok(found) => Self::new(promise, Verdict::Holds, &found),
            Err(Short::Broken(found)) => Self::new(promise, Verdict::Broken, &found),
            Err(Short::Hidden(why)) => Self::new(promise, Verdict::NotVisible, &why),
            Err(Short::NotOffered(why)) => Self::new(promise, Verdict::NotOffered, &why),
        }
    }
}

impl Report {
    /// A report of processes, `ozone` first.
    pub fn new(name: &str, processes: Vec<Process>) -> Self {
        let broken = processes.iter().flat_map(|process| &process.promises).any(|it| it.verdict == Verdict::Broken);
        Self { name: name.to_owned(), holds: !broken, processes }
    }

    /// A line for each process and each promise that is broken; with `all`, for every promise.
    pub fn table(&self, all: bool) -> String {
        let findings = || self.processes.iter().flat_map(|process| &process.promises);
        let shown = |finding: &&Finding| all || finding.verdict == Verdict::Broken;
        let column = |lengths: &mut dyn Iterator<Item = usize>| lengths.max().unwrap_or(0);
        let names = column(&mut self.processes.iter().map(|process| process.name.len()));
        let words = column(&mut findings().filter(shown).map(|finding| finding.verdict.word().len()));
        let promises = column(&mut findings().filter(shown).map(|finding| finding.promise.len()));
        let mut text = String::new();
        for process in &self.processes {
            let pid = process.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
            let _ = writeln!(text, "{:names$}  {pid:7}  {}", process.name, process.summary());
            for Finding { promise, verdict, found } in process.promises.iter().filter(shown) {
                let _ = writeln!(text, "  {:words$}  {promise:promises$}  {found}", verdict.word());
            }
        }
        let broken = findings().filter(|finding| finding.verdict == Verdict::Broken).count();
        let outcome = match broken {
            0 => "every promise that can be seen from outside holds".to_owned(),
            1 => "1 promise does not hold".to_owned(),
            _ => format!("{broken} promises do not hold"),
        };
        let absent = self.processes.iter().filter(|process| process.absent.is_some()).count();
        let absent = if absent > 0 { format!("; not judged: {absent}") } else { String::new() };
        let _ = writeln!(text, "{}: {outcome}{absent}", self.name);
        text
    }
}

impl Process {
    fn summary(&self) -> String {
        if let Some(why) = &self.absent {
            return format!("not judged: {why}");
        }
        let count = |verdict| self.promises.iter().filter(|finding| finding.verdict == verdict).count();
        let (holds, broken) = (count(Verdict::Holds), count(Verdict::Broken));
        let besides =
            [(Verdict::NotVisible, "not visible from outside"), (Verdict::NotOffered, "not offered by this host")];
        let besides = besides.map(|(verdict, what)| match count(verdict) {
            0 => String::new(),
            count => format!(", {count} {what}"),
        });
        format!("{holds} of {} promises hold{}", holds + broken, besides.concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(verdict: Verdict) -> Report {
        let process = |name: &str, verdict| Process {
            name: name.to_owned(),
            pid: Some(99),
            absent: None,
            promises: vec![
                Finding::judged("empty environment", Ok("empty".to_owned())),
                Finding::new("no core dump", verdict, "Max core file size 1\u{1b}[2J"),
            ],
            descriptors: Vec::new(),
            limits: vec![Limit { name: "Max open files".to_owned(), soft: "64".to_owned(), hard: "64".to_owned() }],
        };
        Report::new("web1", vec![process("ozone", Verdict::Told), process("blk/disk0", verdict)])
    }

    #[test]
    fn a_table_shows_what_is_broken_and_all_of_it_only_if_asked() {
        let report = report(Verdict::Broken);
        assert!(!report.holds);
        let table = report.table(false);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines[0], "ozone      99       1 of 1 promises hold");
        assert_eq!(lines[1], "blk/disk0  99       1 of 2 promises hold");
        assert_eq!(lines[2], "  BROKEN  no core dump  Max core file size 1\\u{1b}[2J");
        assert_eq!(lines[3], "web1: 1 promise does not hold");
        assert_eq!(report.table(true).lines().count(), 7);
    }

    #[test]
    fn what_nobody_can_see_breaks_nothing() {
        let report = report(Verdict::NotVisible);
        assert!(report.holds);
        assert!(report.table(false).contains("1 of 1 promises hold, 1 not visible from outside"));
    }

    #[test]
    fn what_the_host_does_not_offer_is_counted_and_breaks_nothing() {
        let report = report(Verdict::NotOffered);
        assert!(report.holds);
        assert!(report.table(false).contains("1 of 1 promises hold, 1 not offered by this host"));
    }

    #[test]
    fn a_process_that_is_not_there_is_counted() {
        let mut report = report(Verdict::Holds);
        (report.processes[1].pid, report.processes[1].promises) = (None, Vec::new());
        report.processes[1].absent = Some("it is away".to_owned());
        let table = report.table(false);
        assert!(table.contains("blk/disk0  -        not judged: it is away\n"), "{table}");
        assert!(table.ends_with("holds; not judged: 1\n"), "{table}");
    }

    #[test]
    fn json_has_everything() {
        let json = serde_json::to_value(report(Verdict::Broken)).unwrap();
        assert_eq!(json["holds"], false);
        assert_eq!(json["processes"][1]["promises"][1]["verdict"], "broken");
        assert_eq!(json["processes"][0]["promises"][1]["verdict"], "told");
        assert_eq!(json["processes"][1]["limits"][0]["hard"], "64");
    }
}
