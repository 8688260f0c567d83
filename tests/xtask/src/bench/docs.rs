//! The tables in the documentation: what stands between two comments is replaced by what was measured.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::row::Report;
use super::table;

/// Puts each report's table between `<!-- bench NAME -->` and `<!-- end NAME -->`.
pub fn update(path: &Path, reports: &[Report]) -> Result<()> {
    let mut text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    for report in reports {
        text =
            replace(&text, report).with_context(|| format!("{} has no place for {}", path.display(), report.suite))?;
    }
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

fn replace(text: &str, report: &Report) -> Option<String> {
    let begin = format!("<!-- bench {} -->", report.suite);
    let end = format!("<!-- end {} -->", report.suite);
    let (before, rest) = text.split_once(&begin)?;
    let (_, after) = rest.split_once(&end)?;
    Some(format!("{before}{begin}\nOn {}:\n\n{}{end}{after}", report.place, table::markdown(report)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_between_the_comments_is_replaced() {
        let report = Report { suite: "x".into(), place: "a host".into(), rows: Vec::new(), missing: Vec::new() };
        let text = replace("a <!-- bench x -->old<!-- end x --> b", &report).unwrap();
        assert!(text.starts_with("a <!-- bench x -->\nOn a host:") && text.ends_with("<!-- end x --> b"), "{text}");
        assert!(!text.contains("old"));
        assert!(replace(&text, &report).unwrap() == text);
        assert!(replace("nothing", &report).is_none());
    }
}
