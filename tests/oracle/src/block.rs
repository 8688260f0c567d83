//! What one write puts into its place: every sector says which sector it is, of which write, and adds up.

use crate::layout::Place;
use crate::stamp::{self, Damage, SECTOR, WORDS};

/// Which write of a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// The first write of a place is 1; 0 is a place that was never written.
    pub sequence: u64,
    /// Which writer it was.
    pub writer: u16,
}

impl Version {
    fn generation(self) -> u64 {
        self.sequence << 16 | u64::from(self.writer)
    }
}

/// What a place was found to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// One write, or zeroes of before the first.
    Whole(u64),
    /// Sectors of different writes, from the oldest to the newest of them.
    Torn(u64, u64),
    /// Something that was never written there.
    Damaged(Damage),
}

/// Puts what `version` of `place` is into `bytes`, which are as long as the place.
pub fn fill(bytes: &mut [u8], place: Place, version: Version) {
    for (sector, room) in (place.sector..).zip(bytes.as_chunks_mut::<SECTOR>().0) {
        let words = stamp::sector(sector, version.generation());
        for (word, to) in words.iter().zip(room.as_chunks_mut::<8>().0) {
            *to = word.to_le_bytes();
        }
    }
}

/// Tells what `bytes`, read from `place`, are.
#[must_use]
pub fn look(bytes: &[u8], place: Place) -> Content {
    let (mut oldest, mut newest) = (u64::MAX, 0);
    for (sector, bytes) in (place.sector..).zip(bytes.as_chunks::<SECTOR>().0) {
        let parts = bytes.as_chunks::<8>().0;
        let words: [u64; WORDS] = std::array::from_fn(|index| u64::from_le_bytes(parts[index]));
        let sequence = if words == [0; WORDS] {
            0
        } else if let Err(damage) = stamp::verify(&words, sector, words[1]) {
            return Content::Damaged(damage);
        } else {
            words[1] >> 16
        };
        (oldest, newest) = (oldest.min(sequence), newest.max(sequence));
    }
    if oldest == newest { Content::Whole(newest) } else { Content::Torn(oldest, newest) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place = Place { sector: 24, sectors: 8 };

    fn written(place: Place, sequence: u64) -> Vec<u8> {
        let mut bytes = vec![0; place.bytes()];
        fill(&mut bytes, place, Version { sequence, writer: 7 });
        bytes
    }

    #[test]
    fn a_write_is_known_again() {
        assert_eq!(look(&written(PLACE, 5), PLACE), Content::Whole(5));
        assert_eq!(look(&[0; 4096], PLACE), Content::Whole(0));
    }

    #[test]
    fn a_torn_write_shows_its_parts() {
        let mut torn = written(PLACE, 5);
        torn[..512].copy_from_slice(&written(PLACE, 6)[..512]);
        assert_eq!(look(&torn, PLACE), Content::Torn(5, 6));
        torn[1024..1536].fill(0);
        assert_eq!(look(&torn, PLACE), Content::Torn(0, 6));
    }

    #[test]
    fn another_place_and_a_flipped_bit_are_damage() {
        let other = Place { sector: 32, ..PLACE };
        assert_eq!(look(&written(other, 5), PLACE), Content::Damaged(Damage::Place(32)));
        let mut flipped = written(PLACE, 5);
        flipped[4000] ^= 1;
        assert_eq!(look(&flipped, PLACE), Content::Damaged(Damage::Checksum));
    }
}
