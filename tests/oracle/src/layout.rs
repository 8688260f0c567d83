//! Which parts of a disk are written as one: places of one size, or of many.

use serde::{Deserialize, Serialize};

use crate::stamp::SECTOR;

/// How a disk is divided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// Places of 4 KiB.
    #[default]
    Plain,
    /// Places from 64 KiB down to 512 bytes, in groups of 128 KiB.
    Mixed,
}

/// What is written by one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The number of its first sector.
    pub sector: u64,
    /// How many sectors it has.
    pub sectors: usize,
}

impl Place {
    /// Its offset in bytes.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.sector * SECTOR as u64
    }

    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.sectors * SECTOR
    }
}

/// The places of a group: sectors of each, which are naturally aligned because they only get smaller.
const GROUP: [usize; 9] = [128, 64, 32, 16, 8, 4, 2, 1, 1];

impl Layout {
    fn group(self) -> &'static [usize] {
        match self {
            Self::Plain => &[8],
            Self::Mixed => &GROUP,
        }
    }

    fn group_sectors(self) -> usize {
        self.group().iter().sum()
    }

    /// How many places a disk of that many bytes has.
    #[must_use]
    pub fn places(self, bytes: u64) -> usize {
        let groups = bytes / (self.group_sectors() * SECTOR) as u64;
        groups as usize * self.group().len()
    }

    /// The place of that number.
    #[must_use]
    pub fn place(self, index: usize) -> Place {
        let group = self.group();
        let (round, within) = (index / group.len(), index % group.len());
        let before: usize = group[..within].iter().sum();
        Place { sector: (round * self.group_sectors() + before) as u64, sectors: group[within] }
    }

    /// The bytes of the largest place.
    #[must_use]
    pub fn largest(self) -> usize {
        self.group()[0] * SECTOR
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_aligned_and_leave_no_sector_out() {
        for layout in [Layout::Plain, Layout::Mixed] {
            let mut next = 0;
            for index in 0..layout.places(1 << 20) {
                let place = layout.place(index);
                assert_eq!(place.sector, next);
                assert!(place.sector.is_multiple_of(place.sectors as u64), "{place:?}");
                next += place.sectors as u64;
            }
            assert_eq!(next, (1 << 20) / SECTOR as u64);
        }
    }
}
