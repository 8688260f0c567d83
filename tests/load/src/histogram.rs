//! Latencies, counted in buckets that are 3 % wide.

/// Buckets per doubling.
const STEPS: u64 = 32;

/// Counts of values by size.
#[derive(Clone, Debug)]
pub struct Histogram {
    buckets: Vec<u64>,
    total: u64,
    largest: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: vec![0; 64 * 32], total: 0, largest: 0 }
    }
}

impl Histogram {
    /// Counts one value.
    pub fn add(&mut self, value: u64) {
        if let Some(count) = self.buckets.get_mut(bucket(value)) {
            *count += 1;
        }
        self.total += 1;
        self.largest = self.largest.max(value);
    }

    /// How many values there are.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The value that `share` of all values do not exceed; exact to 3 %. 0 if there are none.
    #[must_use]
    pub fn quantile(&self, share: f64) -> u64 {
        let wanted = (self.total as f64 * share).ceil() as u64;
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= wanted && *count > 0 {
                return top(index as u64).min(self.largest);
            }
        }
        self.largest
    }
}

/// Which bucket counts `value`. Values below [`STEPS`] have one each.
fn bucket(value: u64) -> usize {
    let doublings = value.checked_ilog2().unwrap_or(0).saturating_sub(STEPS.ilog2());
    (u64::from(doublings) * STEPS + (value >> doublings)) as usize
}

/// The largest value in bucket `index`.
fn top(index: u64) -> u64 {
    if index < 2 * STEPS {
        return index;
    }
    let doublings = index / STEPS - 1;
    ((index % STEPS + STEPS + 1) << doublings) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_contiguous_and_three_percent_wide() {
        for value in (0..5000).chain([u64::from(u32::MAX), 1 << 40, (1 << 40) + 12345]) {
            let top = top(bucket(value) as u64);
            assert!(value <= top && top - value <= value / STEPS, "{value}: {top}");
            assert!(bucket(top) == bucket(value) && bucket(top + 1) == bucket(value) + 1, "{value}");
        }
    }

    #[test]
    fn quantiles_are_those_of_the_values() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.quantile(0.5), 0);
        (1..=1000).for_each(|value| histogram.add(value));
        for (share, value) in [(0.5, 500), (0.99, 990), (1.0, 1000)] {
            let found = histogram.quantile(share);
            assert!((value..=value + value / 32).contains(&found), "{share}: {found}");
        }
    }
}
