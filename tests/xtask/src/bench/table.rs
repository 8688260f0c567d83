//! Rows as a table for people: on the terminal and in the documentation.

use super::row::{Report, Row};

/// A Markdown table.
pub fn markdown(report: &Report) -> String {
    let mut cells = vec![["what", "metric", "median", "min", "max", "runs", "note"].map(str::to_owned)];
    cells.extend(report.rows.iter().map(row));
    let width = |column: usize| cells.iter().filter_map(|row| Some(row.get(column)?.chars().count())).max();
    let widths: [usize; 7] = std::array::from_fn(|column| width(column).unwrap_or(0).max(3));
    let mut text = String::new();
    for (index, row) in cells.iter().enumerate() {
        let padded = row.iter().zip(widths).enumerate().map(|(column, (cell, width))| match column {
            2..=5 => format!("{cell:>width$}"),
            _ => format!("{cell:width$}"),
        });
        text.push_str(&format!("| {} |\n", padded.collect::<Vec<_>>().join(" | ")));
        if index == 0 {
            let rule = widths.iter().enumerate().map(|(column, width)| match column {
                2..=5 => format!("{}:", "-".repeat(width - 1)),
                _ => "-".repeat(*width),
            });
            text.push_str(&format!("| {} |\n", rule.collect::<Vec<_>>().join(" | ")));
        }
    }
    // The rest of an error, such as what a console showed, is in the file of --json.
    for missing in report.missing.iter().filter_map(|missing| missing.lines().next()) {
        text.push_str(&format!("\nNot measured: {missing}\n"));
    }
    text
}

fn row(row: &Row) -> [String; 7] {
    let with_unit =
        if row.unit.is_empty() { number(row.median) } else { format!("{} {}", number(row.median), row.unit) };
    [
        row.name.clone(),
        row.metric.clone(),
        with_unit,
        number(row.min),
        number(row.max),
        row.n.to_string(),
        row.note.clone().unwrap_or_default(),
    ]
}

/// Three significant digits, or all digits before the point, with commas between thousands.
pub fn number(value: f64) -> String {
    let size = value.abs();
    let text = match size {
        _ if size == 0.0 => "0".to_owned(),
        _ if size < 1.0 => format!("{value:.3}"),
        _ if size < 10.0 => format!("{value:.2}"),
        _ if size < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    };
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let mut grouped = String::new();
    for (place, digit) in whole.chars().enumerate() {
        let left = whole.len() - place;
        if place > 0 && left.is_multiple_of(3) && !grouped.ends_with('-') {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (0.1234, "0.123"),
            (1.234, "1.23"),
            (12.34, "12.3"),
            (123.4, "123"),
            (1_234_567.0, "1,234,567"),
        ] {
            assert_eq!(number(value), text);
        }
    }
}
