//! What a suite finds: one row per thing and metric, and the file that holds them.

use serde::{Deserialize, Serialize};

/// One metric of one thing over all runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What was measured, such as `ozone` or `read 4 KiB, depth 32`.
    pub name: String,
    /// What about it, such as `to init`.
    pub metric: String,
    /// The unit of the three values, such as `ms`.
    pub unit: String,
    /// The middle of the runs.
    pub median: f64,
    /// The least of them.
    pub min: f64,
    /// The greatest of them.
    pub max: f64,
    /// How many runs there were, the dropped first one not counted.
    pub n: usize,
    /// What has to be known to read the row, such as that other processes used the processors meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// One value of one run.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    /// As [`Row::metric`].
    pub metric: String,
    /// As [`Row::unit`].
    pub unit: &'static str,
    /// The value.
    pub value: f64,
}

impl Figure {
    /// A value of a metric.
    pub fn new(metric: impl Into<String>, unit: &'static str, value: f64) -> Self {
        Self { metric: metric.into(), unit, value }
    }
}

/// The rows of one suite, as they are written to a file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The suite's name.
    pub suite: String,
    /// Where it ran, in words: kernel and processors.
    pub place: String,
    /// What it found.
    pub rows: Vec<Row>,
    /// Partners that were not there, in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<String>,
}

impl Report {
    /// Adds what another report of the same suite has.
    pub fn add(&mut self, other: Self) {
        self.rows.extend(other.rows);
        for missing in other.missing {
            if !self.missing.contains(&missing) {
                self.missing.push(missing);
            }
        }
    }
}
