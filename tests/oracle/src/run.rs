//! What runs in the guest: writes in flight at a given depth, each place written again only once its last write was
//! acknowledged, and read back now and then.

use std::fs::File;
use std::io::BufRead;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use nix::unistd::{Whence, lseek};
use serde::{Deserialize, Serialize};

use crate::block::{self, Version};
use crate::journal::{self, Journal};
use crate::layout::Layout;
use crate::room::Room;
use crate::stalls::{Stall, Stalls};
use crate::stamp;
use crate::verdict::{Faults, Known};

/// How long the journal rests when nothing has changed.
const REST: Duration = Duration::from_millis(2);

/// So many errors are told one by one.
const TOLD: usize = 20;

/// What is done to a disk.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// The disk: a file or a block device, zero at first.
    #[arg(long)]
    pub path: PathBuf,
    /// Where acknowledgements are written down: another file or block device.
    #[arg(long)]
    pub journal: Option<PathBuf>,
    /// What is written at once.
    #[arg(long, default_value = "plain")]
    pub layout: Layout,
    /// How many requests are in flight.
    #[arg(long, default_value_t = 32)]
    pub depth: u16,
    /// Of a hundred writes, how many are read back at once.
    #[arg(long, default_value_t = 10)]
    pub read_percent: u64,
    /// Where the sequence of random numbers begins.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// The shortest stall that is told, in milliseconds.
    #[arg(long, default_value_t = 5)]
    pub stall: u64,
    /// For how many milliseconds; without it until a line says "stop". The line "progress" is answered in between.
    #[arg(long)]
    pub milliseconds: Option<u64>,
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Found {
    /// Writes that were begun.
    pub writes: u64,
    /// Writes that were acknowledged.
    pub acknowledged: u64,
    /// Reads, those of the end among them.
    pub reads: u64,
    /// How the disk broke its word.
    #[serde(flatten)]
    pub faults: Faults,
    /// Reads and writes that failed.
    pub io_errors: u64,
    /// The longest time without a completion.
    pub longest_stall_ms: f64,
    /// Every time without one, as long as the shortest that was asked for: start in microseconds since 1970, and length in
    /// microseconds.
    pub stalls: Vec<Stall>,
    /// The first faults and errors, in words.
    pub told: Vec<String>,
}

/// How far it has got.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Progress {
    /// Writes that were acknowledged.
    pub acknowledged: u64,
    /// What the clock shows, in microseconds since 1970.
    pub now: u64,
}

/// One place's state. Whoever has set `busy` has the place to itself.
#[derive(Debug, Default)]
struct Slot {
    busy: AtomicBool,
    issued: AtomicU64,
    acknowledged: AtomicU64,
    seen: AtomicU64,
}

impl Slot {
    fn known(&self) -> Known {
        Known {
            issued: self.issued.load(Ordering::Relaxed),
            acknowledged: self.acknowledged.load(Ordering::Relaxed),
            seen: self.seen.load(Ordering::Relaxed),
        }
    }
}

/// What all threads work on.
struct Disk<'a> {
    file: File,
    layout: Layout,
    slots: Vec<Slot>,
    stop: &'a AtomicBool,
    acknowledged: &'a AtomicU64,
    stalls: Mutex<Stalls>,
}

/// Tries a disk.
///
/// # Errors
/// It cannot be opened, or the journal cannot be written. What the disk does wrong is no error but found.
pub fn run(arguments: &Arguments) -> Result<Found> {
    let stop = AtomicBool::new(false);
    let acknowledged = AtomicU64::new(0);
    let file = open(&arguments.path, libc::O_DIRECT)?;
    let bytes = lseek(&file, 0, Whence::SeekEnd)?.unsigned_abs();
    let count = arguments.layout.places(bytes);
    ensure!(count > usize::from(arguments.depth), "{} is too small", arguments.path.display());
    let disk = Disk {
        file,
        layout: arguments.layout,
        slots: (0..count).map(|_| Slot::default()).collect(),
        stop: &stop,
        acknowledged: &acknowledged,
        stalls: Mutex::new(Stalls::new(Duration::from_millis(arguments.stall), SystemTime::now())),
    };
    let journal = arguments.journal.as_deref().map(|path| disk.journal(path)).transpose()?;
    println!("oracle: running");

    let (start, ended) = (Instant::now(), AtomicBool::new(false));
    let (found, journal) = thread::scope(|scope| {
        let (disk, ended) = (&disk, &ended);
        let journal = journal.map(|journal| scope.spawn(move || disk.keep(journal, ended)));
        let writers: Vec<_> =
            (0..arguments.depth).map(|writer| scope.spawn(move || disk.write(writer, arguments))).collect();
        match arguments.milliseconds {
            Some(milliseconds) => thread::sleep(Duration::from_millis(milliseconds).saturating_sub(start.elapsed())),
            None => obey(&acknowledged),
        }
        stop.store(true, Ordering::Relaxed);
        let mut found = Found::default();
        let ends: Vec<_> = writers.into_iter().map(thread::ScopedJoinHandle::join).collect();
        // The journal ends even if a writer did not end well, or nothing here ever would.
        let parts = disk.read_all(arguments.depth);
        ended.store(true, Ordering::Relaxed);
        for part in ends.into_iter().chain(parts) {
            found.merge(part.map_err(|_| anyhow::anyhow!("a thread panicked"))?);
        }
        let journal = journal.map(|thread| thread.join().map_err(|_| anyhow::anyhow!("the journal panicked")));
        anyhow::Ok((found, journal.transpose()?))
    })?;
    journal.transpose()?;
    let (longest, stalls) = disk.stalls.into_inner().unwrap_or_else(PoisonError::into_inner).into_found();
    Ok(Found { longest_stall_ms: longest.as_secs_f64() * 1e3, stalls, ..found })
}

/// Answers every line of standard input with the time in microseconds since 1970, until one says "stop".
pub fn clock() {
    for line in std::io::stdin().lock().lines().map_while(Result::ok).take_while(|line| line.trim() != "stop") {
        println!("{line} {}", crate::stalls::since_1970(SystemTime::now()));
    }
}

/// Does what the lines of standard input say, until one says "stop" or there are no more.
fn obey(acknowledged: &AtomicU64) {
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        match line.trim() {
            "stop" => return,
            "progress" => {
                let now = crate::stalls::since_1970(SystemTime::now());
                let progress = Progress { acknowledged: acknowledged.load(Ordering::Relaxed), now };
                println!("{}", serde_json::to_string(&progress).unwrap_or_default());
            }
            _ => {}
        }
    }
}

fn open(path: &Path, flags: i32) -> Result<File> {
    let file = File::options().read(true).write(true).custom_flags(flags).open(path);
    file.with_context(|| format!("open {}", path.display()))
}

impl Disk<'_> {
    fn journal(&self, path: &Path) -> Result<Journal> {
        let file = open(path, libc::O_DIRECT | libc::O_DSYNC)?;
        let (room, needed) = (lseek(&file, 0, Whence::SeekEnd)?.unsigned_abs(), journal::bytes(self.slots.len()));
        ensure!(room >= needed, "{} has {room} bytes and needs {needed}", path.display());
        Journal::create(file, self.layout, self.slots.len())
    }

    /// Writes down what was acknowledged, until all is over and written down.
    fn keep(&self, mut journal: Journal, ended: &AtomicBool) -> Result<()> {
        loop {
            // Looked at first: what comes before the end is in the last update.
            let last = ended.load(Ordering::Relaxed);
            let pages = journal.update(|index| self.slots.get(index).map(Slot::known).unwrap_or_default())?;
            if last {
                return Ok(());
            }
            if pages == 0 {
                thread::sleep(REST);
            }
        }
    }

    fn completed(&self) {
        let mut stalls = self.stalls.lock().unwrap_or_else(PoisonError::into_inner);
        stalls.completed(SystemTime::now());
    }

    /// One of the writers: keeps one request in flight.
    fn write(&self, writer: u16, arguments: &Arguments) -> Found {
        let mut found = Found::default();
        let mut room = Room::new(self.layout.largest());
        let mut state = arguments.seed ^ u64::from(writer) << 48;
        while !self.stop.load(Ordering::Relaxed) {
            let index = (stamp::next(&mut state) % self.slots.len() as u64) as usize;
            let slot = &self.slots[index];
            if slot.busy.swap(true, Ordering::Acquire) {
                continue;
            }
            let place = self.layout.place(index);
            let sequence = slot.issued.fetch_add(1, Ordering::Relaxed) + 1;
            let bytes = &mut room.bytes_mut()[..place.bytes()];
            block::fill(bytes, place, Version { sequence, writer });
            found.writes += 1;
            let outcome = self.file.write_at(bytes, place.offset());
            self.completed();
            match outcome {
                Ok(count) if count == place.bytes() => {
                    slot.acknowledged.store(sequence, Ordering::Relaxed);
                    self.acknowledged.fetch_add(1, Ordering::Relaxed);
                    found.acknowledged += 1;
                }
                outcome => found.error("write", index, &outcome),
            }
            if stamp::next(&mut state) % 100 < arguments.read_percent {
                self.read(index, &mut room, &mut found);
            }
            slot.busy.store(false, Ordering::Release);
        }
        found
    }

    /// Reads a place that is this thread's, and judges it.
    fn read(&self, index: usize, room: &mut Room, found: &mut Found) {
        let place = self.layout.place(index);
        let bytes = &mut room.bytes_mut()[..place.bytes()];
        // What a read leaves alone must not look like what it should have read.
        bytes.fill(0x5a);
        found.reads += 1;
        let outcome = self.file.read_at(bytes, place.offset());
        self.completed();
        if !matches!(outcome, Ok(count) if count == place.bytes()) {
            found.error("read", index, &outcome);
            return;
        }
        let (slot, content) = (&self.slots[index], block::look(bytes, place));
        if let Some(fault) = slot.known().judge(content) {
            found.faults.add(fault);
            found.tell(format!("place {index}: {fault:?}: {content:?} where {:?}", slot.known()));
        }
        if let block::Content::Whole(sequence) = content {
            slot.seen.fetch_max(sequence, Ordering::Relaxed);
        }
    }

    /// Reads every place.
    fn read_all(&self, depth: u16) -> Vec<thread::Result<Found>> {
        let next = AtomicU64::new(0);
        let read = || {
            let mut found = Found::default();
            let mut room = Room::new(self.layout.largest());
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed) as usize;
                if index >= self.slots.len() {
                    return found;
                }
                self.read(index, &mut room, &mut found);
            }
        };
        thread::scope(|scope| {
            let readers: Vec<_> = (0..depth).map(|_| scope.spawn(read)).collect();
            readers.into_iter().map(thread::ScopedJoinHandle::join).collect()
        })
    }
}

impl Found {
    fn error(&mut self, what: &str, index: usize, outcome: &std::io::Result<usize>) {
        self.io_errors += 1;
        self.tell(format!("{what} of place {index}: {outcome:?}"));
    }

    fn tell(&mut self, text: String) {
        if self.told.len() < TOLD {
            self.told.push(text);
        }
    }

    fn merge(&mut self, other: Self) {
        self.writes += other.writes;
        self.acknowledged += other.acknowledged;
        self.reads += other.reads;
        self.faults.merge(&other.faults);
        self.io_errors += other.io_errors;
        let room = TOLD.saturating_sub(self.told.len());
        self.told.extend(other.told.into_iter().take(room));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(path: &Path, journal: &Path, layout: Layout) -> Arguments {
        Arguments {
            path: path.into(),
            journal: Some(journal.into()),
            layout,
            depth: 8,
            read_percent: 50,
            seed: 1,
            stall: 1000,
            milliseconds: Some(100),
        }
    }

    #[test]
    fn an_honest_file_passes_and_its_journal_says_the_same() {
        // In the build's own directory: a temporary file system need not take input and output past its cache.
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        for layout in [Layout::Plain, Layout::Mixed] {
            let (image, journal) = (directory.path().join("image"), directory.path().join("journal"));
            File::create(&image).unwrap().set_len(1 << 20).unwrap();
            File::create(&journal).unwrap().set_len(1 << 20).unwrap();
            let found = run(&arguments(&image, &journal, layout)).unwrap();
            assert!(found.faults.is_clean() && found.io_errors == 0, "{found:?}");
            assert!(found.acknowledged > 0 && found.acknowledged == found.writes && found.reads > 0, "{found:?}");
            let checked = crate::check::check(&image, &journal).unwrap();
            assert!(checked.faults.is_clean(), "{checked:?}");
            assert_eq!(checked.acknowledged, found.acknowledged, "every acknowledgement is in the journal");
        }
    }

    #[test]
    fn each_kind_of_fault_is_found_by_a_read() {
        let file = tempfile::tempfile().unwrap();
        let (stop, acknowledged) = (AtomicBool::new(false), AtomicU64::new(0));
        let disk = Disk {
            file,
            layout: Layout::Plain,
            slots: (0..4).map(|_| Slot::default()).collect(),
            stop: &stop,
            acknowledged: &acknowledged,
            stalls: Mutex::new(Stalls::new(Duration::from_secs(1), SystemTime::now())),
        };
        let mut bytes = vec![0; 4096];
        for (index, (there, seen)) in [(2, 2), (1, 0), (1, 2), (3, 0)].into_iter().enumerate() {
            let place = disk.layout.place(index);
            block::fill(&mut bytes, place, Version { sequence: there, writer: 0 });
            disk.file.write_all_at(&bytes, place.offset()).unwrap();
            disk.slots[index].issued.store(2, Ordering::Relaxed);
            disk.slots[index].acknowledged.store(2, Ordering::Relaxed);
            disk.slots[index].seen.store(seen, Ordering::Relaxed);
        }
        let mut found = Found::default();
        for part in disk.read_all(1) {
            found.merge(part.unwrap());
        }
        assert_eq!(found.faults, Faults { verify_errors: 1, lost_acknowledged: 1, stale_overwrites: 1 }, "{found:?}");
        assert_eq!((found.reads, found.io_errors, found.told.len()), (4, 0, 3));
    }
}
