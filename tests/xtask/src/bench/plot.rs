//! A picture of a suite: for every metric a group of bars, the runs' least and greatest value as a line across.

use std::fmt::Write;

use super::row::{Report, Row};
use super::table::number;

const LABEL: f64 = 330.0;
const BAR: f64 = 420.0;
const VALUE: f64 = 150.0;
const LINE: f64 = 20.0;
const COLOURS: [&str; 6] = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377"];

/// The SVG.
pub fn svg(report: &Report) -> String {
    let mut metrics: Vec<(&str, &str)> = Vec::new();
    let mut names: Vec<&str> = Vec::new();
    for row in &report.rows {
        if !metrics.contains(&(&row.metric, &row.unit)) {
            metrics.push((&row.metric, &row.unit));
        }
        if !names.contains(&row.name.as_str()) {
            names.push(&row.name);
        }
    }
    let mut body = String::new();
    let mut top = LINE * 2.0;
    text(&mut body, 10.0, LINE * 1.2, "start", "bold", &report.suite);
    for (metric, unit) in metrics {
        let rows: Vec<&Row> = report.rows.iter().filter(|row| row.metric == metric && row.unit == unit).collect();
        let unit = if unit.is_empty() { String::new() } else { format!(", {unit}") };
        text(&mut body, 10.0, top + LINE * 0.7, "start", "bold", &format!("{metric}{unit}"));
        top += LINE;
        let most = rows.iter().map(|row| row.max).fold(f64::MIN_POSITIVE, f64::max);
        for row in rows {
            let colour = names.iter().position(|name| *name == row.name).unwrap_or(0) % COLOURS.len();
            bar(&mut body, top, row, most, COLOURS.get(colour).copied().unwrap_or("black"));
            top += LINE;
        }
        top += LINE * 0.5;
    }
    let width = LABEL + BAR + VALUE;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{top}\" viewBox=\"0 0 {width} {top}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n"
    )
}

fn bar(body: &mut String, top: f64, row: &Row, most: f64, colour: &str) {
    let at = |value: f64| LABEL + (value / most).clamp(0.0, 1.0) * BAR;
    let middle = top + LINE * 0.5;
    text(body, LABEL - 8.0, top + LINE * 0.7, "end", "normal", &row.name);
    let _ = writeln!(
        body,
        "<rect x=\"{LABEL}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{colour}\"/>\
         <line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{middle:.1}\" y2=\"{middle:.1}\" stroke=\"black\"/>",
        top + LINE * 0.15,
        at(row.median) - LABEL,
        LINE * 0.7,
        at(row.min),
        at(row.max),
    );
    let mark = if row.note.is_some() { " *" } else { "" };
    text(body, at(row.max) + 6.0, top + LINE * 0.7, "start", "normal", &format!("{}{mark}", number(row.median)));
}

fn text(body: &mut String, x: f64, y: f64, anchor: &str, weight: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(
        body,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-weight=\"{weight}\">{words}</text>"
    );
}
