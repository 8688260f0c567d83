//! What was acknowledged, written to another device than the one that is tried.
//!
//! A page of 4096 bytes says of 253 places which write was acknowledged last and which was seen last. Each page has two
//! homes and is written to them in turn, so that one that is torn or lost leaves the one before it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};

use crate::layout::Layout;
use crate::room::Room;
use crate::verdict::Known;

/// Bytes of a page.
const PAGE: usize = 4096;

/// Words in front of the entries: magic, page number, generation, places, layout, checksum.
const HEADER: usize = 6;

/// Places of a page; each has two words.
const ENTRIES: usize = (PAGE / 8 - HEADER) / 2;

const MAGIC: u64 = u64::from_le_bytes(*b"journal1");

/// The writing side.
#[derive(Debug)]
pub struct Journal {
    file: File,
    layout: Layout,
    /// What stands in each page.
    written: Vec<Vec<Known>>,
    generations: Vec<u64>,
    places: usize,
    room: Room,
}

/// How many bytes the journal of that many places takes.
#[must_use]
pub fn bytes(places: usize) -> u64 {
    (places.div_ceil(ENTRIES) * 2 * PAGE) as u64
}

impl Journal {
    /// A journal of `places` in `file`, whose writes have to be durable when they return.
    ///
    /// # Errors
    /// The file cannot be written, or has no room.
    pub fn create(file: File, layout: Layout, places: usize) -> Result<Self> {
        let pages = places.div_ceil(ENTRIES);
        let written =
            (0..pages).map(|page| vec![Known::default(); ENTRIES.min(places - page * ENTRIES)]).collect::<Vec<_>>();
        let mut journal = Self { file, layout, written, generations: vec![0; pages], places, room: Room::new(PAGE) };
        // Both homes of each: nothing of an earlier journal is left.
        for page in (0..pages).chain(0..pages) {
            journal.write(page)?;
        }
        Ok(journal)
    }

    /// Writes what has changed: `known` says it of each place. Returns how many pages that were.
    ///
    /// # Errors
    /// A page that cannot be written.
    pub fn update(&mut self, known: impl Fn(usize) -> Known) -> Result<usize> {
        let mut pages = 0;
        for page in 0..self.written.len() {
            let mut changed = false;
            for (entry, index) in self.written[page].iter_mut().zip(page * ENTRIES..) {
                let Known { acknowledged, seen, .. } = known(index);
                let now = Known { issued: 0, acknowledged, seen };
                changed |= *entry != now;
                *entry = now;
            }
            if changed {
                self.write(page)?;
                pages += 1;
            }
        }
        Ok(pages)
    }

    fn write(&mut self, page: usize) -> Result<()> {
        self.generations[page] += 1;
        let generation = self.generations[page];
        let mut words = [0; PAGE / 8];
        words[..HEADER - 1].copy_from_slice(&[MAGIC, page as u64, generation, self.places as u64, self.layout as u64]);
        for (entry, pair) in self.written[page].iter().zip(words[HEADER..].as_chunks_mut::<2>().0) {
            *pair = [entry.acknowledged, entry.seen];
        }
        words[HEADER - 1] = checksum(&words);
        for (word, to) in words.iter().zip(self.room.bytes_mut().as_chunks_mut::<8>().0) {
            *to = word.to_le_bytes();
        }
        self.file.write_all_at(self.room.bytes(), home(page, generation)).context("write the journal")
    }
}

fn home(page: usize, generation: u64) -> u64 {
    (page as u64 * 2 + generation % 2) * PAGE as u64
}

/// Of all words but its own.
fn checksum(words: &[u64; PAGE / 8]) -> u64 {
    let others = words.iter().enumerate().filter(|(index, _)| *index != HEADER - 1);
    others.fold(MAGIC, |sum, (_, word)| (sum ^ word).wrapping_mul(0x100_0000_01b3).rotate_left(7))
}

/// Reads a journal: the layout, and what is known of each place.
///
/// # Errors
/// It cannot be read, or is none.
pub fn read(file: &File) -> Result<(Layout, Vec<Known>)> {
    let first = newest(file, 0)?.context("this is no journal")?;
    let places = usize::try_from(first[3])?;
    let layout = if first[4] == Layout::Mixed as u64 { Layout::Mixed } else { Layout::Plain };
    let mut known = Vec::with_capacity(places);
    for page in 0..places.div_ceil(ENTRIES) {
        let words =
            newest(file, page)?.with_context(|| format!("both homes of the journal's page {page} are damaged"))?;
        ensure!(words[3] == first[3] && words[4] == first[4], "the journal's page {page} is of another journal");
        let entries = words[HEADER..].as_chunks::<2>().0.iter().take(places - page * ENTRIES);
        // How far the writer had got beyond that is not known.
        known.extend(entries.map(|pair| Known { issued: u64::MAX, acknowledged: pair[0], seen: pair[1] }));
    }
    Ok((layout, known))
}

/// The newer of a page's two homes that is whole.
fn newest(file: &File, page: usize) -> Result<Option<[u64; PAGE / 8]>> {
    let mut newest: Option<[u64; PAGE / 8]> = None;
    for parity in 0..2 {
        let mut bytes = [0; PAGE];
        file.read_exact_at(&mut bytes, home(page, parity)).context("read the journal")?;
        let parts = bytes.as_chunks::<8>().0;
        let words: [u64; PAGE / 8] = std::array::from_fn(|index| u64::from_le_bytes(parts[index]));
        let good = words[0] == MAGIC && words[1] == page as u64 && words[HEADER - 1] == checksum(&words);
        if good && newest.is_none_or(|other| other[2] < words[2]) {
            newest = Some(words);
        }
    }
    Ok(newest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal(places: usize) -> (File, Journal) {
        let file = tempfile::tempfile().unwrap();
        let journal = Journal::create(file.try_clone().unwrap(), Layout::Mixed, places).unwrap();
        (file, journal)
    }

    #[test]
    fn what_is_written_is_read() {
        let (file, mut journal) = journal(600);
        let known = |index: usize| Known { issued: 0, acknowledged: index as u64 * 3, seen: index as u64 };
        assert_eq!(journal.update(known).unwrap(), 3);
        assert_eq!(journal.update(known).unwrap(), 0, "nothing changed");
        let (layout, read) = read(&file).unwrap();
        assert_eq!((layout, read.len()), (Layout::Mixed, 600));
        for (index, entry) in read.iter().enumerate() {
            assert_eq!((entry.acknowledged, entry.seen), (index as u64 * 3, index as u64));
        }
        assert_eq!(file.metadata().unwrap().len(), bytes(600));
    }

    #[test]
    fn a_torn_page_leaves_the_one_before() {
        let (file, mut journal) = journal(10);
        for sequence in 1..=2 {
            journal.update(|_| Known { issued: 0, acknowledged: sequence, seen: 0 }).unwrap();
        }
        // The page was written four times: twice at first, then by the updates.
        file.write_all_at(&[0xff; 512], home(0, 4) + 2048).unwrap();
        assert_eq!(read(&file).unwrap().1[0].acknowledged, 1);
        file.write_all_at(&[0xff; 512], home(0, 3) + 2048).unwrap();
        assert!(read(&file).is_err());
    }
}
