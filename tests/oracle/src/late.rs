//! Whether a read that was under way when its device was reset still reaches the memory that it was for.
//!
//! A driver of its own, in the guest, for a disk whose kernel driver was unbound: it begins reads, resets the device while
//! the disk's backend is dead or dying, and from that instant on uses the memory for something else, as any driver may.

mod map;

use std::io::BufRead;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use map::{Memory, Registers};

/// What the memory is used for after the reset.
const PATTERN: u8 = 0xa5;

/// Pages of the memory: the queue, the request's header and status, and what is read into.
const QUEUE: usize = 0;
const REQUEST: usize = 1;
const DATA: usize = 2;
/// With a header and a status for each read, as many as there are descriptors.
const DATA_PAGES: usize = 12;
/// How many reads they are for.
const READS: usize = 2;

const PAGE: usize = 4096;

/// Descriptors of the queue (virtio 1.2, section 2.7).
const SIZE: usize = 16;
/// Where the queue's parts are in its page.
const AVAILABLE: usize = 1024;
const USED: usize = 2048;

/// Where the device says up to which request it has looked (virtio 1.2, section 2.7.10).
const LOOKED: usize = USED + 4 + 8 * SIZE;

/// VIRTIO_RING_F_EVENT_IDX.
const EVENT_INDEX: u32 = 1 << 29;

/// The device takes a request within this.
const PATIENCE: Duration = Duration::from_secs(20);

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Registers of virtio-mmio (virtio 1.2, section 4.2.2).
mod register {
    pub const MAGIC: usize = 0x00;
    pub const DRIVER_FEATURES: usize = 0x20;
    pub const DRIVER_FEATURES_SELECT: usize = 0x24;
    pub const QUEUE_SELECT: usize = 0x30;
    pub const QUEUE_SIZE: usize = 0x38;
    pub const QUEUE_READY: usize = 0x44;
    pub const QUEUE_NOTIFY: usize = 0x50;
    pub const STATUS: usize = 0x70;
    pub const QUEUE_DESCRIPTORS: usize = 0x80;
    pub const QUEUE_DRIVER: usize = 0x90;
    pub const QUEUE_DEVICE: usize = 0xa0;
}

/// One attempt.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// Where the device's registers are.
    #[arg(long, value_parser = address)]
    pub registers: u64,
    /// For how many milliseconds the memory is watched after the reset.
    #[arg(long, default_value_t = 3000)]
    pub watch: u64,
}

fn address(text: &str) -> Result<u64, String> {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).map_err(|error| error.to_string())
}

/// What came of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Late {
    /// How long the reset took, in milliseconds.
    pub reset_ms: u64,
    /// Bytes of the memory that changed after the reset.
    pub overwritten: usize,
    /// Whether one of the reads had been answered before the reset.
    pub answered: bool,
}

/// Begins reads, says so, and resets the device when a line of standard input comes.
///
/// # Errors
/// The registers or the memory cannot be had; they are no disk's; the memory was moved meanwhile.
pub fn run(arguments: &Arguments) -> Result<Late> {
    let registers = Registers::map(arguments.registers)?;
    ensure!(registers.read(register::MAGIC) == 0x7472_6976, "these are no virtio registers");
    let memory = Memory::new(DATA + DATA_PAGES)?;
    let pages = memory.physical()?;
    set_up(&registers, &pages)?;
    begin_reads(&registers, &memory, &pages);
    let start = Instant::now();
    while usize::from(memory.u16(LOOKED)) != READS {
        ensure!(start.elapsed() < PATIENCE, "the device did not take the reads for {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
    println!("oracle: in flight");
    std::io::stdin().lock().lines().next().context("nobody said when")??;

    let answered = memory.u16(USED + 2) != 0;
    let start = Instant::now();
    registers.write(register::STATUS, 0);
    let reset = start.elapsed();
    memory.fill(PATTERN);
    let (start, time) = (Instant::now(), Duration::from_millis(arguments.watch));
    let mut overwritten = 0;
    while start.elapsed() < time {
        overwritten = overwritten.max(memory.other_than(PATTERN));
        std::thread::sleep(Duration::from_millis(1));
    }
    if memory.physical()? != pages {
        bail!("the kernel moved the memory");
    }
    Ok(Late { reset_ms: u64::try_from(reset.as_millis())?, overwritten, answered })
}

/// The steps of virtio 1.2, section 3.1.1, with one queue and two features.
fn set_up(registers: &Registers, pages: &[u64]) -> Result<()> {
    for status in [0, 1, 3] {
        registers.write(register::STATUS, status);
    }
    for (select, features) in [(0, EVENT_INDEX), (1, 1)] {
        registers.write(register::DRIVER_FEATURES_SELECT, select);
        registers.write(register::DRIVER_FEATURES, features);
    }
    registers.write(register::STATUS, 0xb);
    ensure!(registers.read(register::STATUS) == 0xb, "the device does not take its features");
    registers.write(register::QUEUE_SELECT, 0);
    registers.write(register::QUEUE_SIZE, SIZE as u32);
    let queue = pages[QUEUE];
    for (place, part) in
        [(register::QUEUE_DESCRIPTORS, 0), (register::QUEUE_DRIVER, AVAILABLE), (register::QUEUE_DEVICE, USED)]
    {
        let address = queue + part as u64;
        registers.write(place, address as u32);
        registers.write(place + 4, (address >> 32) as u32);
    }
    registers.write(register::QUEUE_READY, 1);
    registers.write(register::STATUS, 0xf);
    ensure!(registers.read(register::STATUS) == 0xf, "the device does not start");
    Ok(())
}

/// Two reads of the disk's first pages (virtio 1.2, section 5.2.6): a single one the backend may carry out by a call that
/// no other process can come before the end of.
fn begin_reads(registers: &Registers, memory: &Memory, pages: &[u64]) {
    let mut index = 0;
    for (read, data) in pages[DATA..].chunks(DATA_PAGES / READS).enumerate() {
        let head = index;
        // Header and status of each; type 0 and sector 0, for the page is zero.
        let request = pages[REQUEST] + 512 * read as u64;
        let parts = data.iter().map(|page| (*page, PAGE, WRITE));
        let chain: Vec<_> = [(request, 16, 0)].into_iter().chain(parts).chain([(request + 64, 1, WRITE)]).collect();
        for (at, (address, length, flags)) in chain.iter().enumerate() {
            let flags = if at + 1 == chain.len() { *flags } else { flags | NEXT };
            memory.put_u64(16 * index, *address);
            memory.put_u64(16 * index + 8, *length as u64 | u64::from(flags) << 32 | (index as u64 + 1) << 48);
            index += 1;
        }
        memory.put_u16(AVAILABLE + 4 + 2 * read, head as u16);
    }
    memory.put_u16(AVAILABLE + 2, READS as u16);
    registers.write(register::QUEUE_NOTIFY, 0);
}
