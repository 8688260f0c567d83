//! How long it is waited before a lost process is started again.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

/// A process that served for so long is no part of a series of failures.
const QUIET: Duration = Duration::from_millis(250);

/// The delay after the second failure of a series; each further one doubles it.
const FIRST: Duration = Duration::from_millis(20);

/// The longest delay, before jitter.
const CEILING: Duration = Duration::from_secs(10);

/// A series of failures, each soon after the last.
#[derive(Debug, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// The delay after a process that served for `served`, or never did. There is no last attempt.
    pub fn after(&mut self, served: Option<Duration>) -> Duration {
        if served.is_some_and(|served| served >= QUIET) {
            self.failures = 0;
        }
        let failures = self.failures;
        self.failures = failures.saturating_add(1);
        match failures.checked_sub(1) {
            None => Duration::ZERO,
            Some(doublings) => {
                let delay = FIRST.saturating_mul(1 << doublings.min(16)).min(CEILING);
                // A quarter more or less, so that machines which failed together do not start together.
                delay.mul_f64(0.75 + 0.5 * chance())
            }
        }
    }
}

/// A number from 0 to 1 that is another each time.
fn chance() -> f64 {
    // The standard library seeds every RandomState from the kernel's random numbers.
    let bits = RandomState::new().build_hasher().finish() >> 32;
    f64::from(u32::try_from(bits).unwrap_or(0)) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_a_ceiling_and_never_end() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.after(None), Duration::ZERO);
        for doublings in 0..100 {
            let middle = FIRST.saturating_mul(1 << doublings.min(9)).min(CEILING);
            let delay = backoff.after(Some(Duration::ZERO));
            assert!(delay >= middle.mul_f64(0.74) && delay <= middle.mul_f64(1.26), "{doublings}: {delay:?}");
        }
    }

    #[test]
    fn a_quiet_time_ends_a_series() {
        let mut backoff = Backoff::default();
        for _ in 0..5 {
            backoff.after(None);
        }
        assert_eq!(backoff.after(Some(QUIET)), Duration::ZERO);
        assert!(backoff.after(Some(Duration::ZERO)) > Duration::ZERO);
    }
}
