//! What a sector holds, so that one that is lost, stale, misplaced or damaged is told from a good one.
//!
//! A sector of 64 words: its number, the generation of the write, 61 words that follow from those two, and a checksum
//! of all the others. Words are little-endian.

/// Words of 8 bytes in a sector.
pub const WORDS: usize = 64;

/// Bytes in a sector.
pub const SECTOR: usize = WORDS * 8;

/// How a sector is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// Its words do not add up to its checksum.
    Checksum,
    /// It is a good sector, but of another place.
    Place(u64),
    /// It is a good sector of this place, but of another write.
    Generation(u64),
    /// Its checksum is right and its contents are not what was written.
    Contents,
}

/// The contents of `sector` as of `generation`.
#[must_use]
pub fn sector(sector: u64, generation: u64) -> [u64; WORDS] {
    let mut words = [0; WORDS];
    let mut state = sector.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ generation.rotate_left(32);
    for word in &mut words {
        *word = next(&mut state);
    }
    [words[0], words[1]] = [sector, generation];
    words[WORDS - 1] = checksum(&words);
    words
}

/// Looks whether `words` are the contents of `expected` as of `generation`.
///
/// # Errors
/// What is wrong with them.
pub fn verify(words: &[u64; WORDS], expected: u64, generation: u64) -> Result<(), Damage> {
    if checksum(words) != words[WORDS - 1] {
        return Err(Damage::Checksum);
    }
    if words[0] != expected {
        return Err(Damage::Place(words[0]));
    }
    if words[1] != generation {
        return Err(Damage::Generation(words[1]));
    }
    if *words == sector(expected, generation) { Ok(()) } else { Err(Damage::Contents) }
}

/// Of all words but the last. The order of the words counts.
fn checksum(words: &[u64; WORDS]) -> u64 {
    words[..WORDS - 1].iter().fold(0x6f7a_6f6e_6500_0001, |sum: u64, word| (sum ^ word).wrapping_mul(0x100_0000_01b3))
}

/// The next of a sequence of well-mixed numbers (splitmix64).
pub fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_good_sector_passes() {
        assert_eq!(verify(&sector(7, 3), 7, 3), Ok(()));
    }

    #[test]
    fn every_flipped_bit_is_found() {
        for bit in 0..SECTOR * 8 {
            let mut words = sector(7, 3);
            words[bit / 64] ^= 1 << (bit % 64);
            assert_eq!(verify(&words, 7, 3), Err(Damage::Checksum), "bit {bit}");
        }
    }

    #[test]
    fn misplaced_stale_exchanged_and_empty_sectors_are_found() {
        assert_eq!(verify(&sector(8, 3), 7, 3), Err(Damage::Place(8)));
        assert_eq!(verify(&sector(7, 2), 7, 3), Err(Damage::Generation(2)));
        let mut exchanged = sector(7, 3);
        exchanged.swap(10, 11);
        assert_eq!(verify(&exchanged, 7, 3), Err(Damage::Checksum));
        assert_eq!(verify(&[0; WORDS], 0, 0), Err(Damage::Checksum));
        let mut consistent = sector(7, 3);
        consistent[5] ^= 1;
        consistent[WORDS - 1] = checksum(&consistent);
        assert_eq!(verify(&consistent, 7, 3), Err(Damage::Contents));
    }
}
