//! From the values of several runs to one row.

use super::row::{Figure, Row};

/// The values of one thing, metric by metric in the order in which they were first seen.
#[derive(Debug, Default)]
pub struct Values {
    metrics: Vec<(String, &'static str, Vec<f64>)>,
}

impl Values {
    /// Adds the figures of one run.
    pub fn add(&mut self, figures: Vec<Figure>) {
        for Figure { metric, unit, value } in figures {
            match self.metrics.iter_mut().find(|(known, ..)| *known == metric) {
                Some((.., values)) => values.push(value),
                None => self.metrics.push((metric, unit, vec![value])),
            }
        }
    }

    /// One row per metric.
    pub fn rows(self, name: &str, note: Option<&str>) -> Vec<Row> {
        let row = |(metric, unit, mut values): (String, &str, Vec<f64>)| {
            values.sort_by(f64::total_cmp);
            let (min, max) = (*values.first()?, *values.last()?);
            let unit = unit.to_owned();
            let note = note.map(str::to_owned);
            Some(Row { name: name.to_owned(), metric, unit, median: median(&values), min, max, n: values.len(), note })
        };
        self.metrics.into_iter().filter_map(row).collect()
    }
}

/// One row for all rows of the same thing and metric, each of which is one run.
pub fn merge(rows: Vec<Row>) -> Vec<Row> {
    let mut merged: Vec<(Row, Vec<f64>)> = Vec::new();
    for row in rows {
        let same = |known: &Row| (&known.name, &known.metric, &known.unit) == (&row.name, &row.metric, &row.unit);
        match merged.iter_mut().find(|(known, _)| same(known)) {
            Some((_, values)) => values.push(row.median),
            None => merged.push((row.clone(), vec![row.median])),
        }
    }
    let row = |(row, mut values): (Row, Vec<f64>)| {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        Some(Row { median: median(&values), min, max, n: values.len(), ..row })
    };
    merged.into_iter().filter_map(row).collect()
}

/// The middle of sorted values; of an even number of them the mean of the middle two.
fn median(sorted: &[f64]) -> f64 {
    let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
    let half = sorted.len() / 2;
    if sorted.len() % 2 == 1 { at(half) } else { f64::midpoint(at(half.wrapping_sub(1)), at(half)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_the_runs_is_told_with_its_bounds() {
        let mut values = Values::default();
        for value in [9.0, 1.0, 3.0, 5.0] {
            values.add(vec![Figure::new("a", "ms", value), Figure::new("b", "s", 1.0)]);
        }
        let rows = values.rows("x", Some("busy"));
        assert_eq!(rows.len(), 2);
        let Row { median, min, max, n, .. } = &rows[0];
        assert_eq!((*median, *min, *max, *n), (4.0, 1.0, 9.0, 4));
        assert_eq!(rows[1].note.as_deref(), Some("busy"));
    }

    #[test]
    fn runs_that_were_made_apart_become_one_row() {
        let row = |name: &str, median: f64| Row {
            name: name.into(),
            metric: "to init".into(),
            unit: "ms".into(),
            median,
            min: median,
            max: median,
            n: 1,
            note: None,
        };
        let rows = merge(vec![row("a", 3.0), row("b", 7.0), row("a", 1.0), row("a", 2.0)]);
        let found: Vec<_> = rows.iter().map(|row| (row.name.as_str(), row.median, row.min, row.max, row.n)).collect();
        assert_eq!(found, [("a", 2.0, 1.0, 3.0, 3), ("b", 7.0, 7.0, 7.0, 1)]);
    }
}
