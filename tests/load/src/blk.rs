//! Load on a disk, and what came of it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::cpu;
use crate::disk::{Completion, Driver, Kind, Shape};
use crate::histogram::Histogram;
use crate::partner::Image;
use crate::stamp::{self, SECTOR};

/// Of what was written in a measurement, so many blocks are looked at in the image afterwards.
const LOOKED_AT: usize = 1024;

/// What is done to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Pattern {
    /// Reads in no order.
    RandomRead,
    /// Writes in no order.
    RandomWrite,
    /// Reads one after the other; each queue begins elsewhere.
    Read,
    /// Writes one after the other; each queue begins elsewhere.
    Write,
}

/// One measurement.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// The disk.
    #[command(flatten)]
    pub image: Image,
    /// What is done.
    #[arg(long, default_value = "random-read")]
    pub pattern: Pattern,
    /// Bytes of a request.
    #[arg(long, default_value_t = 4096)]
    pub block: usize,
    /// The most bytes of one buffer of a request.
    #[arg(long, default_value_t = 65_536)]
    pub segment: usize,
    /// Requests in flight per queue.
    #[arg(long, default_value_t = 1)]
    pub depth: usize,
    /// How completions are learnt of.
    #[arg(long, default_value = "call")]
    pub completion: Completion,
    /// For how many milliseconds.
    #[arg(long, default_value_t = 1000)]
    pub milliseconds: u64,
}

/// What a measurement found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Found {
    /// Requests completed.
    pub operations: u64,
    /// Of which time.
    pub seconds: f64,
    /// The middle latency in nanoseconds.
    pub p50: u64,
    /// The latency that 99 of 100 do not exceed.
    pub p99: u64,
    /// Processor time of the load generator, in nanoseconds.
    pub driver_cpu: u64,
    /// Processor time of the backend, in nanoseconds.
    pub backend_cpu: u64,
    /// How often the driver kicked.
    pub kicks: u64,
    /// How often the driver slept until it was called.
    pub sleeps: u64,
}

/// Which blocks come next.
struct Blocks {
    random: bool,
    count: u64,
    state: u64,
    /// Where each queue is, if they go one after the other.
    next: Vec<u64>,
    /// Blocks that are in flight: two writes of one block have no order.
    busy: Vec<bool>,
}

impl Blocks {
    fn new(random: bool, count: u64, queues: usize) -> Self {
        let next = (0..queues as u64).map(|queue| count * queue / queues as u64).collect();
        Self { random, count, state: 1, next, busy: vec![false; count as usize] }
    }

    fn take(&mut self, queue: usize) -> u64 {
        loop {
            let block = if self.random {
                // The upper half of a product with the count: no division, and even.
                ((u128::from(stamp::next(&mut self.state)) * u128::from(self.count)) >> 64) as u64
            } else {
                let block = self.next[queue];
                self.next[queue] = if block + 1 == self.count { 0 } else { block + 1 };
                block
            };
            if !std::mem::replace(&mut self.busy[block as usize], true) {
                return block;
            }
        }
    }
}

/// A request in flight.
#[derive(Clone, Copy)]
struct Flight {
    block: u64,
    sent: Instant,
    number: u64,
}

/// Runs one measurement. Reads expect an image that [`crate::check::stamp`] has stamped; each one is looked at.
///
/// # Errors
/// A backend that fails, or data that is not what it should be.
pub fn run(arguments: &Arguments) -> Result<Found> {
    let Arguments { image, block, depth, .. } = arguments;
    let shape = Shape { queues: image.queues.into(), depth: *depth, block: *block, segment: arguments.segment };
    let reads = matches!(arguments.pattern, Pattern::RandomRead | Pattern::Read);
    let random = matches!(arguments.pattern, Pattern::RandomRead | Pattern::RandomWrite);
    let bytes = std::fs::metadata(&image.image).with_context(|| format!("ask for {}", image.image.display()))?.len();
    let count = bytes / *block as u64;
    ensure!(count >= (shape.queues * depth) as u64, "an image of {bytes} bytes is too small");
    let memory = shape.memory()?;
    let mut driver = Driver::connect(image, &memory, shape, arguments.completion)?;
    let mut blocks = Blocks::new(random, count, shape.queues);
    let per_block = (*block / SECTOR) as u64;
    let mut written = if reads { Vec::new() } else { vec![0; count as usize] };
    let mut histogram = Histogram::default();
    let mut number = 0;
    let mut flights = Vec::new();

    let (own, theirs) = (cpu::own()?, driver.backend.cpu()?);
    let start = Instant::now();
    let end = start + Duration::from_millis(arguments.milliseconds);
    let mut send = |driver: &mut Driver<'_>, blocks: &mut Blocks, queue: usize, tag: usize, now: Instant| {
        let block = blocks.take(queue);
        number += 1;
        if !reads {
            let data = driver.data(queue, tag);
            memory.u64(data).store(block, Ordering::Relaxed);
            memory.u64(data + 8).store(number, Ordering::Relaxed);
        }
        driver.send(queue, tag, if reads { Kind::Read } else { Kind::Write }, block * per_block);
        Flight { block, sent: now, number }
    };
    for index in 0..shape.queues * depth {
        flights.push(send(&mut driver, &mut blocks, index / depth, index % depth, start));
    }
    let mut in_flight = flights.len();
    let mut done = Vec::with_capacity(in_flight);
    let mut now = start;
    while in_flight > 0 {
        driver.reap(&mut done)?;
        now = Instant::now();
        for it in &done {
            let flight = &mut flights[it.queue * depth + it.tag];
            histogram.add(u64::try_from((now - flight.sent).as_nanos())?);
            blocks.busy[flight.block as usize] = false;
            if reads {
                let found = memory.u64(driver.data(it.queue, it.tag)).load(Ordering::Relaxed);
                ensure!(found == flight.block * per_block, "block {}: has the data of sector {found}", flight.block);
            } else {
                written[flight.block as usize] = flight.number;
            }
            if now < end {
                *flight = send(&mut driver, &mut blocks, it.queue, it.tag, now);
            } else {
                in_flight -= 1;
            }
        }
    }
    let found = Found {
        operations: histogram.total(),
        seconds: (now - start).as_secs_f64(),
        p50: histogram.quantile(0.5),
        p99: histogram.quantile(0.99),
        driver_cpu: u64::try_from((cpu::own()? - own).as_nanos())?,
        backend_cpu: u64::try_from((driver.backend.cpu()? - theirs).as_nanos())?,
        kicks: driver.kicks(),
        sleeps: driver.sleeps,
    };
    look(&image.image, *block, &written)?;
    Ok(found)
}

/// Looks whether the image has the last write of some of the blocks that were written.
fn look(image: &std::path::Path, block: usize, written: &[u64]) -> Result<()> {
    let file = File::open(image)?;
    let blocks = (0_u64..).zip(written).filter(|(_, number)| **number > 0).take(LOOKED_AT);
    for (index, number) in blocks {
        let mut words = [[0; 8]; 2];
        file.read_exact_at(words.as_flattened_mut(), index * block as u64)?;
        let found = words.map(u64::from_le_bytes);
        ensure!(found == [index, *number], "block {index}: has {found:?} instead of write {number}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_lost_write_is_found() {
        let mut image = tempfile::NamedTempFile::new().unwrap();
        for word in [[0_u64, 7], [0, 0], [2, 9]] {
            let mut block = [0; 512];
            block[..8].copy_from_slice(&word[0].to_le_bytes());
            block[8..16].copy_from_slice(&word[1].to_le_bytes());
            image.write_all(&block).unwrap();
        }
        assert!(look(image.path(), 512, &[7, 0, 9]).is_ok());
        assert!(look(image.path(), 512, &[8, 0, 9]).is_err(), "an older write");
        assert!(look(image.path(), 512, &[7, 1, 9]).is_err(), "no write");
    }

    #[test]
    fn no_block_is_in_flight_twice() {
        let mut blocks = Blocks::new(true, 64, 1);
        let mut taken: Vec<u64> = (0..64).map(|_| blocks.take(0)).collect();
        taken.sort_unstable();
        assert_eq!(taken, (0..64).collect::<Vec<_>>());
    }

    #[test]
    fn queues_begin_apart_and_go_round() {
        let mut blocks = Blocks::new(false, 4, 2);
        assert_eq!([blocks.take(0), blocks.take(1), blocks.take(1)], [0, 2, 3]);
        blocks.busy[0] = false;
        assert_eq!(blocks.take(1), 0);
    }
}
