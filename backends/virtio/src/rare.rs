//! What a guest can make happen over and over goes into the log ever more rarely.

/// Counts occurrences, and says which of them to log.
#[derive(Debug, Default)]
pub struct Rare(u64);

impl Rare {
    /// One more; its number if it is to be logged: the first four, then each that is a power of two.
    pub fn again(&mut self) -> Option<u64> {
        self.0 = self.0.saturating_add(1);
        (self.0 <= 4 || self.0.is_power_of_two()).then_some(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_becomes_a_trickle() {
        let mut rare = Rare::default();
        let logged: Vec<u64> = (0..1000).filter_map(|_| rare.again()).collect();
        assert_eq!(logged, [1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512]);
    }
}
