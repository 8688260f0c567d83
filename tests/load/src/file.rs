//! Load on a file or a block device from processes that wait for each call, as a guest's programs do.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::uio::{pread, pwrite};
use nix::unistd::{Whence, lseek};
use serde::{Deserialize, Serialize};

use crate::blk::Pattern;
use crate::histogram::Histogram;
use crate::stamp;

/// What buffers and offsets past the page cache are multiples of.
const PAGE: usize = 4096;

/// One measurement.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// The file or block device.
    #[arg(long)]
    pub path: PathBuf,
    /// What is done.
    #[arg(long, default_value = "random-read")]
    pub pattern: Pattern,
    /// Bytes of a request.
    #[arg(long, default_value_t = PAGE)]
    pub block: usize,
    /// How many threads do it.
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
    /// For how many milliseconds.
    #[arg(long, default_value_t = 1000)]
    pub milliseconds: u64,
}

/// What a measurement found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Found {
    /// Requests completed.
    pub operations: u64,
    /// In which time.
    pub seconds: f64,
    /// The middle latency in nanoseconds.
    pub p50: u64,
    /// The latency that 99 of 100 do not exceed.
    pub p99: u64,
}

/// Runs one measurement past the page cache.
///
/// # Errors
/// A file that cannot be opened, read or written.
pub fn run(arguments: &Arguments) -> Result<Found> {
    let Arguments { path, pattern, block, threads, .. } = arguments;
    ensure!(*threads > 0 && *block > 0 && block.is_multiple_of(512), "at least one thread, blocks of whole sectors");
    let file = File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(path);
    let file = file.with_context(|| format!("open {}", path.display()))?;
    let blocks = lseek(&file, 0, Whence::SeekEnd)?.unsigned_abs() / *block as u64;
    ensure!(blocks > 0, "{} has no block", path.display());
    let reads = matches!(pattern, Pattern::RandomRead | Pattern::Read);
    let random = matches!(pattern, Pattern::RandomRead | Pattern::RandomWrite);
    let start = Instant::now();
    let end = start + Duration::from_millis(arguments.milliseconds);
    let thread = |index: usize| -> Result<Histogram> {
        let mut room = vec![index as u8; block + PAGE];
        let aligned = room.as_ptr().align_offset(PAGE);
        let buffer = &mut room[aligned..][..*block];
        let mut histogram = Histogram::default();
        let mut state = index as u64;
        let mut next = blocks * index as u64 / *threads as u64;
        let mut now = Instant::now();
        while now < end {
            next = if random { stamp::next(&mut state) % blocks } else { (next + 1) % blocks };
            let offset = i64::try_from(next * *block as u64)?;
            let count = if reads { pread(&file, buffer, offset)? } else { pwrite(&file, buffer, offset)? };
            ensure!(count == *block, "{count} bytes of block {next}");
            let done = Instant::now();
            histogram.add(u64::try_from((done - now).as_nanos())?);
            now = done;
        }
        Ok(histogram)
    };
    let mut all = Histogram::default();
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..*threads).map(|index| scope.spawn(move || thread(index))).collect();
        for thread in running {
            all.merge(&thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??);
        }
        anyhow::Ok(())
    })?;
    let seconds = start.elapsed().as_secs_f64();
    Ok(Found { operations: all.total(), seconds, p50: all.quantile(0.5), p99: all.quantile(0.99) })
}
