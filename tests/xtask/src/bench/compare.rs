//! Everything that is compared runs in turns, so that what changes on the machine meanwhile meets all of it.

use std::cell::RefCell;
use std::path::PathBuf;

use anyhow::Result;

use super::noise::{Mark, Noise};
use super::row::{Figure, Row};
use super::stats::Values;

/// How often a contender is tried before it is left out.
const ATTEMPTS: u32 = 3;

/// What a suite is given.
pub struct Context {
    /// How many runs count; one more is made first and dropped.
    pub runs: usize,
    /// A folder with executables of partners, searched before Debian's packages.
    pub partners: Option<PathBuf>,
    /// Whether everything is to be measured, however long it takes.
    pub full: bool,
    /// The only contender that is to be measured.
    pub only: Option<String>,
    /// Partners that were not there, in words.
    missing: RefCell<Vec<String>>,
}

/// Something that is measured again and again.
pub struct Contender<'a> {
    name: String,
    measure: Box<dyn FnMut() -> Result<Vec<Figure>> + 'a>,
}

impl<'a> Contender<'a> {
    /// `measure` measures once. It ends what it starts.
    pub fn new(name: impl Into<String>, measure: impl FnMut() -> Result<Vec<Figure>> + 'a) -> Self {
        Self { name: name.into(), measure: Box::new(measure) }
    }
}

impl Context {
    /// A context for `runs` runs.
    pub fn new(runs: usize, partners: Option<PathBuf>, full: bool) -> Self {
        Self { runs, partners, full, only: None, missing: RefCell::default() }
    }

    /// Notes that a partner is not there; the suite goes on without it.
    pub fn lacks(&self, what: impl Into<String>) {
        let what = what.into();
        // Some things are found missing in every run.
        if !self.missing.borrow().contains(&what) {
            eprintln!("… not measured: {what}");
            self.missing.borrow_mut().push(what);
        }
    }

    /// Notes that something failed: all of it in the log, its first line below the table.
    fn failed(&self, what: &str, error: &anyhow::Error) {
        let text = format!("{error:#}");
        eprintln!("… {what}: {text}");
        let first = text.lines().next().unwrap_or_default();
        self.lacks(format!("{what}: {}", first.trim_end_matches("; last seen:")));
    }

    /// The partners that were not there.
    pub fn into_missing(self) -> Vec<String> {
        self.missing.into_inner()
    }

    /// Measures the contenders in turns. One that fails is tried again: an emulated host loses a guest now and then. One
    /// that fails [`ATTEMPTS`] times running is left out from then on. Both are said below the table.
    ///
    /// # Errors
    /// Only when /proc cannot be read.
    pub fn compare(&self, contenders: Vec<Contender<'_>>) -> Result<Vec<Row>> {
        let wanted = |it: &Contender<'_>| self.only.as_ref().is_none_or(|only| *only == it.name);
        let contenders = contenders.into_iter().filter(wanted);
        let mut entries: Vec<_> = contenders.map(|it| (it, Values::default(), Noise::default(), true)).collect();
        for run in 0..=self.runs {
            for (contender, values, noise, works) in entries.iter_mut().filter(|(.., works)| *works) {
                let mut mark = Mark::now()?;
                let mut outcome = (contender.measure)();
                for _ in 1..ATTEMPTS {
                    let Err(error) = &outcome else { break };
                    self.failed(&format!("{}: a run that was made again", contender.name), error);
                    mark = Mark::now()?;
                    outcome = (contender.measure)();
                }
                match outcome {
                    Ok(figures) if run > 0 => {
                        noise.add(&mark)?;
                        values.add(figures);
                    }
                    Ok(_) => {}
                    Err(error) => {
                        *works = false;
                        self.failed(&contender.name, &error);
                    }
                }
            }
        }
        Ok(entries
            .into_iter()
            .flat_map(|(it, values, noise, _)| values.rows(&it.name, noise.note().as_deref()))
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contenders_take_turns_and_their_first_run_is_dropped() {
        let order = RefCell::new(String::new());
        // `fails` has the numbers of the calls that fail.
        let contender = |name: &'static str, fails: &'static [u32]| {
            let (order, mut count) = (&order, 0);
            Contender::new(name, move || {
                order.borrow_mut().push_str(name);
                count += 1;
                anyhow::ensure!(!fails.contains(&count), "none here");
                Ok(vec![Figure::new("count", "", f64::from(count))])
            })
        };
        let context = Context::new(2, None, false);
        let contenders = vec![contender("a", &[]), contender("b", &[1, 2, 3]), contender("c", &[2])];
        let rows = context.compare(contenders).unwrap();
        assert_eq!(*order.borrow(), "abbbcaccac");
        assert_eq!(rows.iter().map(|row| (row.name.as_str(), row.min)).collect::<Vec<_>>(), [("a", 2.0), ("c", 3.0)]);
        let again =
            ["b: a run that was made again: none here", "b: none here", "c: a run that was made again: none here"];
        assert_eq!(context.into_missing(), again);
    }
}
