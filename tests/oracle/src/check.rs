//! The look from outside: does the image hold what the journal says was acknowledged?

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::verdict::Faults;
use crate::{block, journal};

/// So many faults are told one by one.
const TOLD: usize = 20;

/// What the image was found to hold.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Checked {
    /// Places that were ever acknowledged.
    pub places: u64,
    /// Acknowledged writes, the overwritten ones too.
    pub acknowledged: u64,
    /// How the disk broke its word.
    #[serde(flatten)]
    pub faults: Faults,
    /// The first faults, in words.
    pub told: Vec<String>,
}

/// Compares an image with its journal, once nobody writes to either any more.
///
/// # Errors
/// One of them cannot be read.
pub fn check(image: &Path, journal: &Path) -> Result<Checked> {
    let open = |path: &Path| File::open(path).with_context(|| format!("open {}", path.display()));
    let (image, journal) = (open(image)?, open(journal)?);
    let (layout, known) = journal::read(&journal)?;
    let mut bytes = vec![0; layout.largest()];
    let mut checked = Checked::default();
    for (index, known) in known.iter().enumerate() {
        let place = layout.place(index);
        let bytes = &mut bytes[..place.bytes()];
        image.read_exact_at(bytes, place.offset()).with_context(|| format!("read sector {}", place.sector))?;
        let found = block::look(bytes, place);
        checked.places += u64::from(known.acknowledged > 0);
        checked.acknowledged += known.acknowledged;
        if let Some(fault) = known.judge(found) {
            checked.faults.add(fault);
            if checked.told.len() < TOLD {
                checked.told.push(format!(
                    "sector {}: {fault:?}: {found:?}, and {} was acknowledged, {} seen",
                    place.sector, known.acknowledged, known.seen
                ));
            }
        }
    }
    Ok(checked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::Version;
    use crate::journal::Journal;
    use crate::layout::Layout;
    use crate::verdict::Known;
    use tempfile::NamedTempFile;

    const PLACES: usize = 64;

    fn write(image: &File, index: usize, sequence: u64) {
        let place = Layout::Plain.place(index);
        let mut bytes = vec![0; place.bytes()];
        block::fill(&mut bytes, place, Version { sequence, writer: 1 });
        image.write_all_at(&bytes, place.offset()).unwrap();
    }

    /// Every place was written and acknowledged twice; the even ones were read back.
    fn honest() -> (NamedTempFile, NamedTempFile) {
        let (image, journal) = (NamedTempFile::new().unwrap(), NamedTempFile::new().unwrap());
        let file = journal.as_file().try_clone().unwrap();
        let known =
            |index: usize| Known { issued: 0, acknowledged: 2, seen: if index.is_multiple_of(2) { 2 } else { 0 } };
        Journal::create(file, Layout::Plain, PLACES).unwrap().update(known).unwrap();
        (0..PLACES).for_each(|index| write(image.as_file(), index, 2));
        (image, journal)
    }

    fn faults(image: &NamedTempFile, journal: &NamedTempFile) -> (u64, u64, u64) {
        let Faults { verify_errors, lost_acknowledged, stale_overwrites } =
            check(image.path(), journal.path()).unwrap().faults;
        (verify_errors, lost_acknowledged, stale_overwrites)
    }

    #[test]
    fn an_honest_image_passes() {
        let (image, journal) = honest();
        let checked = check(image.path(), journal.path()).unwrap();
        assert!(checked.faults.is_clean(), "{checked:?}");
        assert_eq!((checked.places, checked.acknowledged), (PLACES as u64, 2 * PLACES as u64));
        write(image.as_file(), 5, 3);
        assert_eq!(faults(&image, &journal), (0, 0, 0), "acknowledged or not, nobody wrote that down");
    }

    #[test]
    fn a_dropped_write_is_lost() {
        let (image, journal) = honest();
        write(image.as_file(), 5, 1);
        assert_eq!(faults(&image, &journal), (0, 1, 0));
        image.as_file().write_all_at(&[0; 4096], 7 * 4096).unwrap();
        assert_eq!(faults(&image, &journal), (0, 2, 0), "zeroes: not even the first is there");
    }

    #[test]
    fn an_old_write_that_comes_back_is_stale() {
        let (image, journal) = honest();
        write(image.as_file(), 6, 1);
        assert_eq!(faults(&image, &journal), (0, 0, 1));
    }

    #[test]
    fn a_torn_write_is_found() {
        let (image, journal) = honest();
        let mut half = [0; 2048];
        let mut whole = vec![0; 4096];
        block::fill(&mut whole, Layout::Plain.place(9), Version { sequence: 1, writer: 1 });
        half.copy_from_slice(&whole[..2048]);
        image.as_file().write_all_at(&half, 9 * 4096).unwrap();
        assert_eq!(faults(&image, &journal), (0, 1, 0), "half of an acknowledged write is missing");
        image.as_file().write_all_at(&half, 10 * 4096).unwrap();
        assert_eq!(faults(&image, &journal), (1, 1, 0), "half of another place");
        image.as_file().write_all_at(&[0xa5; 100], 11 * 4096 + 700).unwrap();
        assert_eq!(faults(&image, &journal), (2, 1, 0), "torn within a sector");
    }
}
