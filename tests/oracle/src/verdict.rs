//! What a place must hold, and what it means if it does not.

use serde::{Deserialize, Serialize};

use crate::block::Content;

/// What is known of a place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// The newest write that was begun; [`u64::MAX`] where that is not known.
    pub issued: u64,
    /// The newest write that was acknowledged.
    pub acknowledged: u64,
    /// The newest write that was ever read back.
    pub seen: u64,
}

/// How a disk broke its word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The place holds what was never written there.
    Verify,
    /// A write that was acknowledged is not there, and never was seen.
    Lost,
    /// A write that was there has been replaced by an older one.
    Stale,
}

impl Known {
    /// Judges what was found in the place.
    #[must_use]
    pub fn judge(&self, found: Content) -> Option<Fault> {
        let (oldest, newest, whole) = match found {
            Content::Whole(sequence) => (sequence, sequence, true),
            Content::Torn(oldest, newest) => (oldest, newest, false),
            Content::Damaged(_) => return Some(Fault::Verify),
        };
        // Half a write is all right only as long as a write is under way.
        if newest > self.issued || !whole && self.issued == self.acknowledged {
            return Some(Fault::Verify);
        }
        match oldest {
            sequence if sequence >= self.acknowledged.max(self.seen) => None,
            sequence if self.seen > sequence => Some(Fault::Stale),
            _ => Some(Fault::Lost),
        }
    }
}

/// How often a disk broke its word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Faults {
    /// Places with what was never written there.
    pub verify_errors: u64,
    /// Acknowledged writes that are not there.
    pub lost_acknowledged: u64,
    /// Writes that an older one has replaced.
    pub stale_overwrites: u64,
}

impl Faults {
    /// Counts a verdict.
    pub fn add(&mut self, fault: Fault) {
        match fault {
            Fault::Verify => self.verify_errors += 1,
            Fault::Lost => self.lost_acknowledged += 1,
            Fault::Stale => self.stale_overwrites += 1,
        }
    }

    /// Adds another's.
    pub fn merge(&mut self, other: &Self) {
        self.verify_errors += other.verify_errors;
        self.lost_acknowledged += other.lost_acknowledged;
        self.stale_overwrites += other.stale_overwrites;
    }

    /// Whether there was none.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        *self == Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stamp::Damage;

    const QUIET: Known = Known { issued: 5, acknowledged: 5, seen: 3 };
    const UNDER_WAY: Known = Known { issued: 6, acknowledged: 5, seen: 3 };

    #[test]
    fn the_acknowledged_write_and_one_under_way_are_right() {
        assert_eq!(QUIET.judge(Content::Whole(5)), None);
        assert_eq!(UNDER_WAY.judge(Content::Whole(5)), None);
        assert_eq!(UNDER_WAY.judge(Content::Whole(6)), None);
        assert_eq!(UNDER_WAY.judge(Content::Torn(5, 6)), None);
        assert_eq!(Known::default().judge(Content::Whole(0)), None, "never written");
    }

    #[test]
    fn an_acknowledged_write_that_never_was_there_is_lost() {
        assert_eq!(QUIET.judge(Content::Whole(4)), Some(Fault::Lost));
        assert_eq!(QUIET.judge(Content::Whole(3)), Some(Fault::Lost));
        assert_eq!(UNDER_WAY.judge(Content::Torn(4, 6)), Some(Fault::Lost));
    }

    #[test]
    fn what_was_seen_and_is_older_now_is_stale() {
        assert_eq!(QUIET.judge(Content::Whole(2)), Some(Fault::Stale));
        assert_eq!(Known { seen: 5, ..QUIET }.judge(Content::Whole(4)), Some(Fault::Stale));
        assert_eq!(Known { issued: 6, acknowledged: 5, seen: 6 }.judge(Content::Whole(5)), Some(Fault::Stale));
    }

    #[test]
    fn what_nobody_wrote_is_an_error() {
        assert_eq!(QUIET.judge(Content::Whole(6)), Some(Fault::Verify), "never issued");
        assert_eq!(QUIET.judge(Content::Torn(4, 5)), Some(Fault::Verify), "nothing is under way");
        assert_eq!(QUIET.judge(Content::Damaged(Damage::Checksum)), Some(Fault::Verify));
    }
}
