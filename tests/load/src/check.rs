//! The data check: a stamped pattern goes through the device into the image, and comes back through it.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail, ensure};

use crate::disk::{Completion, Driver, Kind, Shape};
use crate::memory::Memory;
use crate::partner::Image;
use crate::stamp::{self, SECTOR, WORDS};

/// The generation of what [`stamp`] writes itself.
const WRITTEN_BY_FILE: u64 = 0;

/// The generation of what goes through the device.
const WRITTEN_BY_DEVICE: u64 = 1;

/// Makes an image of `bytes` that is stamped throughout, and on its medium.
///
/// # Errors
/// No room.
pub fn stamp(path: &Path, bytes: u64) -> Result<()> {
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    for sector in 0..bytes / SECTOR as u64 {
        for word in stamp::sector(sector, WRITTEN_BY_FILE) {
            file.write_all(&word.to_le_bytes())?;
        }
    }
    file.into_inner()?.sync_data().with_context(|| format!("stamp {}", path.display()))
}

/// Writes every block of the image through its device, in no order, reads all of them back, and looks into the image.
/// Returns how many bytes that were.
///
/// # Errors
/// The first damage that is found, or a backend that fails.
pub fn run(image: &Image, block: usize, depth: usize) -> Result<u64> {
    let shape = Shape { queues: image.queues.into(), depth, block, segment: 16_384.min(block) };
    let bytes = std::fs::metadata(&image.image).with_context(|| format!("ask for {}", image.image.display()))?.len();
    let blocks = bytes / block as u64;
    ensure!(blocks > 0, "an image of {bytes} bytes has no block");
    let memory = shape.memory()?;
    let mut driver = Driver::connect(image, &memory, shape, Completion::Call)?;
    let order = shuffled(blocks);
    all(&mut driver, &memory, shape, Kind::Write, &order)?;
    driver.send(0, 0, Kind::Flush, 0);
    driver.reap(&mut Vec::new())?;
    all(&mut driver, &memory, shape, Kind::Read, &order)?;
    drop(driver);
    look(&image.image, blocks * block as u64)?;
    Ok(blocks * block as u64)
}

/// All blocks, each once, in no order.
fn shuffled(blocks: u64) -> Vec<u64> {
    let mut order: Vec<u64> = (0..blocks).collect();
    let mut state = 7;
    for last in (1..order.len()).rev() {
        order.swap(last, (stamp::next(&mut state) % (last as u64 + 1)) as usize);
    }
    order
}

/// Writes or reads and verifies the blocks in this order.
fn all(driver: &mut Driver<'_>, memory: &Memory, shape: Shape, kind: Kind, order: &[u64]) -> Result<()> {
    let sectors = (shape.block / SECTOR) as u64;
    let mut rest = order.iter().copied();
    let mut flights = vec![None; shape.queues * shape.depth];
    let mut free: Vec<usize> = (0..flights.len()).collect();
    let mut done = Vec::new();
    loop {
        while let Some(slot) = free.pop() {
            let Some(block) = rest.next() else { break };
            let (queue, tag) = (slot / shape.depth, slot % shape.depth);
            fill(memory, driver.data(queue, tag), shape.block, kind, block * sectors);
            driver.send(queue, tag, kind, block * sectors);
            flights[slot] = Some(block);
        }
        if flights.iter().all(Option::is_none) {
            return Ok(());
        }
        driver.reap(&mut done)?;
        for it in &done {
            let slot = it.queue * shape.depth + it.tag;
            let block = flights[slot].take().with_context(|| format!("request {slot} was completed twice"))?;
            if kind == Kind::Read {
                verify(memory, driver.data(it.queue, it.tag), shape.block, block * sectors)?;
            }
            free.push(slot);
        }
    }
}

/// Puts into memory what is to be written, or what must not be left after a read.
fn fill(memory: &Memory, at: usize, bytes: usize, kind: Kind, first: u64) {
    for (sector, place) in (first..).zip((at..at + bytes).step_by(SECTOR)) {
        let words = if kind == Kind::Write { stamp::sector(sector, WRITTEN_BY_DEVICE) } else { [0; WORDS] };
        for (to, word) in memory.words(place, SECTOR).iter().zip(words) {
            to.store(word.to_le(), Ordering::Relaxed);
        }
    }
}

/// Looks at what was read.
fn verify(memory: &Memory, at: usize, bytes: usize, first: u64) -> Result<()> {
    for (sector, place) in (first..).zip((at..at + bytes).step_by(SECTOR)) {
        let found = memory.words(place, SECTOR);
        let words = std::array::from_fn(|index| u64::from_le(found[index].load(Ordering::Relaxed)));
        if let Err(damage) = stamp::verify(&words, sector, WRITTEN_BY_DEVICE) {
            bail!("sector {sector}, read through the device: {damage:?}");
        }
    }
    Ok(())
}

/// Looks at the image itself.
fn look(path: &Path, bytes: u64) -> Result<()> {
    let file = File::open(path)?;
    let mut block = vec![[[0; 8]; WORDS]; 256];
    let sectors = bytes / SECTOR as u64;
    for first in (0..sectors).step_by(block.len()) {
        let count = block.len().min((sectors - first) as usize);
        let part = &mut block[..count];
        file.read_exact_at(part.as_flattened_mut().as_flattened_mut(), first * SECTOR as u64)?;
        for (sector, words) in (first..).zip(part.iter()) {
            if let Err(damage) = stamp::verify(&words.map(u64::from_le_bytes), sector, WRITTEN_BY_DEVICE) {
                bail!("sector {sector} of {}: {damage:?}", path.display());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_byte_of_an_image_is_found() {
        let image = tempfile::NamedTempFile::new().unwrap();
        stamp(image.path(), 1 << 20).unwrap();
        assert!(look(image.path(), 1 << 20).is_err(), "nothing went through a device");
        let bytes: Vec<u8> =
            (0..2048).flat_map(|sector| stamp::sector(sector, WRITTEN_BY_DEVICE)).flat_map(u64::to_le_bytes).collect();
        image.as_file().write_all_at(&bytes, 0).unwrap();
        look(image.path(), 1 << 20).unwrap();
        image.as_file().write_all_at(&[bytes[777_777] ^ 1], 777_777).unwrap();
        assert!(look(image.path(), 1 << 20).is_err());
    }

    #[test]
    fn a_damaged_byte_of_what_was_read_is_found() {
        let memory = Memory::new(8192).unwrap();
        fill(&memory, 4096, 4096, Kind::Write, 40);
        verify(&memory, 4096, 4096, 40).unwrap();
        assert!(verify(&memory, 4096, 4096, 41).is_err(), "another place");
        memory.u8(4096 + 3000).fetch_xor(0x10, Ordering::Relaxed);
        assert!(verify(&memory, 4096, 4096, 40).is_err());
        fill(&memory, 4096, 4096, Kind::Read, 40);
        assert!(verify(&memory, 4096, 4096, 40).is_err(), "nothing was read");
    }
}
