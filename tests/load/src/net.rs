//! Load on a network interface, both ways, and what came of it.
//!
//! `transmit` is the driver's way to the tap, where the kernel counts and drops. `receive` is from a packet socket on the
//! kernel's side to the driver; as many frames are under way as the tap's queue holds, so that none has to be lost.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use protocol::{DeviceSpec, NetSpec};
use serde::{Deserialize, Serialize};
use vhost::vhost_user::Frontend;

use crate::cpu;
use crate::frame::{Frame, HEADER};
use crate::memory::Memory;
use crate::partner::{self, Process};
use crate::ring::{self, Ring, SIZE, WRITE};
use crate::vhost_net::VhostNet;
use crate::wire::{self, BATCH, Sender, Wire};

/// Frames under way from the kernel's side: half of what the tap's queue holds (its default length is 500).
const WINDOW: u64 = 256;

/// Without progress for so long something is broken.
const PATIENCE: Duration = Duration::from_secs(5);

/// Frames whose every byte is looked at before the clock starts.
const CHECKED: u64 = 300;

/// MAC, mergeable buffers.
const PLAIN: u64 = 1 << 5 | 1 << 15;

/// Partial checksums and TCPv4 segmentation, both ways.
const LARGE: u64 = 1 << 0 | 1 << 1 | 1 << 7 | 1 << 11;

/// The largest frame, in bytes: the kernel itself divides those of 64 KiB.
const LARGEST: usize = 65_535;

/// Bytes of a receive buffer, and of a part of a large frame.
const PAGE: usize = 4096;

/// Bytes of memory for one frame to be sent.
const ROOM: usize = 17 * PAGE;

/// Who moves frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum By {
    /// `ozone-net`, under its filters.
    Ozone,
    /// The kernel's vhost-net.
    VhostNet,
    /// Nobody: reads and writes on the tap itself, which is the limit.
    Raw,
}

/// Which way they go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Way {
    /// From the driver.
    Transmit,
    /// To the driver.
    Receive,
}

/// One measurement.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// Who moves the frames.
    #[arg(long, default_value = "ozone")]
    pub by: By,
    /// Which way.
    #[arg(long, default_value = "transmit")]
    pub way: Way,
    /// Bytes of a frame; those above 1514 are large segments of TCP, which the kernel is left to divide or to take whole.
    #[arg(long, default_value_t = 64)]
    pub bytes: usize,
    /// For how many milliseconds.
    #[arg(long, default_value_t = 1000)]
    pub milliseconds: u64,
    /// The executable, where it is not beside this one.
    #[arg(long)]
    pub executable: Option<PathBuf>,
}

/// What a measurement found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Found {
    /// Frames that arrived.
    pub frames: u64,
    /// In which time.
    pub seconds: f64,
    /// Frames that were sent and did not arrive.
    pub lost: u64,
    /// Processor time of the load generator, in nanoseconds, the kernel's side included.
    pub driver_cpu: u64,
    /// Processor time of the backend, in nanoseconds; without one that of the thread that stands for it.
    pub backend_cpu: u64,
    /// How often the driver kicked.
    pub kicks: u64,
}

/// Runs one measurement, in a network namespace of its own.
///
/// # Errors
/// A backend that fails, or frames that are not what they should be.
pub fn run(arguments: &Arguments) -> Result<Found> {
    ensure!((64..=LARGEST).contains(&arguments.bytes), "frames of 64 to {LARGEST} bytes");
    let frame = Frame { length: arguments.bytes };
    let time = Duration::from_millis(arguments.milliseconds);
    let wire = Wire::new()?;
    match (arguments.by, arguments.way) {
        (By::Raw, Way::Transmit) => raw_transmit(&wire, frame, time),
        (By::Raw, Way::Receive) => raw_receive(&wire, frame, time),
        (By::Ozone | By::VhostNet, way) => {
            let memory = Memory::new(2 * ring::BYTES + usize::from(SIZE) * ROOM)?;
            let mut driver = Driver::connect(arguments, &memory, &wire, frame)?;
            if way == Way::Transmit { driver.transmit(&wire, time) } else { driver.receive(&wire, time) }
        }
    }
}

/// A network interface that is connected.
struct Driver<'m> {
    memory: &'m Memory,
    frame: Frame,
    /// To the driver, and from it.
    rings: [Ring<'m>; 2],
    backend: Process,
    _frontend: Option<Frontend>,
}

impl<'m> Driver<'m> {
    fn connect(arguments: &Arguments, memory: &'m Memory, wire: &Wire, frame: Frame) -> Result<Self> {
        let mut rings = [Ring::new(memory, 0)?, Ring::new(memory, 1)?];
        let (backend, frontend) = match arguments.by {
            By::VhostNet => {
                let device = VhostNet::start(memory, &mut rings, wire, frame.is_large())?;
                (Process::Kernel(device), None)
            }
            _ => {
                let (backend, frontend) = Self::vhost_user(arguments, memory, &mut rings, wire, frame)?;
                (backend, Some(frontend))
            }
        };
        rings.iter().for_each(Ring::quiet);
        Ok(Self { memory, frame, rings, backend, _frontend: frontend })
    }

    fn vhost_user(
        arguments: &Arguments,
        memory: &Memory,
        rings: &mut [Ring<'_>],
        wire: &Wire,
        frame: Frame,
    ) -> Result<(Process, Frontend)> {
        let taps = vec![wire.tap.try_clone()?.into()];
        let spec = DeviceSpec::Net(NetSpec { taps, pairs: 1, mac: [0x52, 0x54, 0, 1, 2, 3], mtu: 1500 });
        let (backend, socket) = partner::ozone(arguments.executable.as_deref(), "ozone-net", spec)?;
        let wanted = if frame.is_large() { PLAIN | LARGE } else { PLAIN };
        let (frontend, features) = crate::frontend::connect(socket, memory, rings, wanted)?;
        ensure!(features & wanted == wanted, "the backend does not offer {:#x}", wanted & !features);
        Ok((backend, frontend))
    }

    fn place(head: u16) -> usize {
        2 * ring::BYTES + usize::from(head) * ROOM
    }

    /// Measures the way to the tap.
    fn transmit(&mut self, wire: &Wire, time: Duration) -> Result<Found> {
        // A small frame has a page with its header; a large one has its header apart, as Linux describes them.
        for head in 0..SIZE {
            let start = Self::place(head);
            self.memory.put(start, &self.frame.header());
            self.memory.put(start + HEADER, &self.frame.bytes(0));
            let end = start + HEADER + self.frame.length;
            let starts = (start..end).step_by(PAGE);
            let parts: Vec<_> = starts.map(|at| (at, PAGE.min(end - at), 0)).collect();
            self.rings[1].describe(head, &parts);
        }
        if !self.frame.is_large() {
            self.check_transmit(wire)?;
        }
        let before = wire.counters()?;
        let before_cpu = self.backend.both()?;
        let kicks = self.rings[1].kicks;
        let start = Instant::now();
        (0..SIZE).for_each(|head| self.rings[1].offer(head));
        let (mut sent, mut in_flight, mut last) = (0, u64::from(SIZE), start);
        while in_flight > 0 {
            self.rings[1].publish()?;
            let mut count = 0;
            let now = Instant::now();
            while let Some((head, _)) = self.rings[1].reap() {
                count += 1;
                if now - start < time {
                    self.rings[1].offer(head);
                } else {
                    in_flight -= 1;
                }
            }
            sent += count;
            if count > 0 {
                (last, _) = (now, self.rings[1].quiet());
            }
            ensure!(now - last < PATIENCE, "no frame was taken for {PATIENCE:?}");
        }
        let seconds = (last - start).as_secs_f64();
        let (after, after_cpu) = (wire.counters()?, self.backend.both()?);
        let frames = after.received - before.received;
        let bytes = after.received_bytes - before.received_bytes;
        ensure!(bytes == frames * self.frame.length as u64, "{bytes} bytes in {frames} frames");
        Ok(Found {
            frames,
            seconds,
            lost: sent - frames,
            driver_cpu: u64::try_from((after_cpu.0 - before_cpu.0).as_nanos())?,
            backend_cpu: u64::try_from((after_cpu.1 - before_cpu.1).as_nanos())?,
            kicks: self.rings[1].kicks - kicks,
        })
    }

    /// Sends frames one at a time and looks at every byte of them on the kernel's side.
    fn check_transmit(&mut self, wire: &Wire) -> Result<()> {
        let socket = wire.socket(true, false)?;
        let mut found = vec![0; 2048];
        for number in 0..CHECKED {
            let head = (number % u64::from(SIZE)) as u16;
            self.memory.u64(Self::place(head) + HEADER + self.frame.number_at()).store(number, Ordering::Relaxed);
            self.rings[1].offer(head);
            self.rings[1].publish()?;
            ensure!(wire::readable(&socket, 5000)?, "frame {number} did not come out of the tap");
            let length = nix::unistd::read(&socket, &mut found)?;
            ensure!(self.frame.check(&found[..length]) == Some(number), "frame {number} came out damaged");
            let start = Instant::now();
            while self.rings[1].reap().is_none() {
                ensure!(start.elapsed() < PATIENCE, "frame {number} was not completed");
            }
        }
        self.rings[1].quiet();
        Ok(())
    }

    /// Measures the way from the kernel's side.
    fn receive(&mut self, wire: &Wire, time: Duration) -> Result<Found> {
        for head in 0..SIZE {
            self.rings[0].describe(head, &[(Self::place(head), PAGE, WRITE)]);
            self.rings[0].offer(head);
        }
        self.rings[0].publish()?;
        let mut sender = Sender::new(wire, self.frame)?;
        let mut arrived = Arrived::default();
        let start = Instant::now();
        while arrived.next < CHECKED {
            ensure!(start.elapsed() < PATIENCE, "{} frames of {CHECKED} came", arrived.next);
            self.exchange(&mut sender, &mut arrived, true, CHECKED)?;
        }
        let before = arrived;
        let before_cpu = self.backend.both()?;
        let kicks = self.rings[0].kicks;
        let start = Instant::now();
        let mut last = start;
        while last - start < time {
            let count = arrived.frames;
            self.exchange(&mut sender, &mut arrived, false, u64::MAX)?;
            let now = Instant::now();
            if arrived.frames > count {
                last = now;
            }
            ensure!(now - last < PATIENCE, "no frame came for {PATIENCE:?}");
        }
        let after_cpu = self.backend.both()?;
        Ok(Found {
            frames: arrived.frames - before.frames,
            seconds: (last - start).as_secs_f64(),
            lost: arrived.lost - before.lost,
            driver_cpu: u64::try_from((after_cpu.0 - before_cpu.0).as_nanos())?,
            backend_cpu: u64::try_from((after_cpu.1 - before_cpu.1).as_nanos())?,
            kicks: self.rings[0].kicks - kicks,
        })
    }

    /// Sends as far as there is room under way, and takes what has come. With `check` it looks at every byte.
    fn exchange(&mut self, sender: &mut Sender, arrived: &mut Arrived, check: bool, until: u64) -> Result<()> {
        let room = WINDOW.saturating_sub(sender.next - arrived.next).min(until.saturating_sub(sender.next));
        if room >= BATCH as u64 || room > 0 && sender.next == arrived.next {
            sender.send(room as usize)?;
        }
        let ring = &mut self.rings[0];
        let mut any = false;
        while let Some((head, written)) = ring.reap() {
            any = true;
            let first = Self::place(head);
            let parts = self.memory.u16(first + HEADER - 2).load(Ordering::Relaxed);
            let number = self.memory.u64(first + HEADER + self.frame.number_at()).load(Ordering::Relaxed);
            let mut bytes = Vec::new();
            let mut length = 0;
            let mut part = (head, written as usize);
            for left in (0..parts).rev() {
                length += part.1;
                if check {
                    let at = Self::place(part.0);
                    bytes.extend((at..at + part.1).map(|at| self.memory.u8(at).load(Ordering::Relaxed)));
                }
                ring.offer(part.0);
                if left > 0 {
                    let (head, written) = ring.reap().context("a frame whose parts do not come together")?;
                    part = (head, written as usize);
                }
            }
            // Others are the kernel's own.
            if length == HEADER + self.frame.length && number >= arrived.next && number < sender.next {
                ensure!(!check || self.frame.check(&bytes[HEADER..]) == Some(number), "frame {number} came damaged");
                arrived.lost += number - arrived.next;
                arrived.next = number + 1;
                arrived.frames += 1;
            } else if length == HEADER + self.frame.length {
                bail!("frame {number} came where {} was next", arrived.next);
            }
        }
        if any {
            ring.quiet();
            ring.publish()?;
        }
        Ok(())
    }
}

/// What has come to the driver.
#[derive(Clone, Copy, Debug, Default)]
struct Arrived {
    frames: u64,
    lost: u64,
    /// The number of the next frame.
    next: u64,
}

/// Writes on the tap from a single thread.
fn raw_transmit(wire: &Wire, frame: Frame, time: Duration) -> Result<Found> {
    // As many as a driver's queue has: from the cache alone the limit would be another one.
    let packets: Vec<_> = (0..SIZE).map(|_| [&frame.header()[..], &frame.bytes(0)].concat()).collect();
    let mut packets = packets.iter().cycle();
    let (before, own, start) = (wire.counters()?, cpu::own()?, Instant::now());
    let mut sent = 0;
    while start.elapsed() < time {
        for packet in packets.by_ref().take(BATCH) {
            sent += u64::from(wire::now(nix::unistd::write(&wire.tap, packet))?.is_some());
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let frames = wire.counters()?.received - before.received;
    let backend_cpu = u64::try_from((cpu::own()? - own).as_nanos())?;
    Ok(Found { frames, seconds, lost: sent - frames, driver_cpu: 0, backend_cpu, kicks: 0 })
}

/// Reads from the tap in one thread what another one sends.
fn raw_receive(wire: &Wire, frame: Frame, time: Duration) -> Result<Found> {
    if frame.is_large() {
        wire.offload()?;
    }
    let mut sender = Sender::new(wire, frame)?;
    let stop = AtomicBool::new(false);
    let arrived = std::sync::atomic::AtomicU64::new(0);
    let start = Instant::now();
    let own = cpu::own()?;
    let reading = || -> Result<(u64, Duration)> {
        let before = cpu::thread()?;
        let mut packet = vec![0; HEADER + 65_536 + 64];
        let (mut frames, mut next) = (0, 0);
        while !stop.load(Ordering::Relaxed) {
            let Some(length) = wire::now(nix::unistd::read(&wire.tap, &mut packet))? else {
                wire::readable(&wire.tap, 10)?;
                continue;
            };
            if length != HEADER + frame.length {
                continue;
            }
            let at = HEADER + frame.number_at();
            let number = u64::from_le_bytes(*packet[at..].first_chunk().context("a short frame")?);
            ensure!(number >= next, "frame {number} came where {next} was next");
            (frames, next) = (frames + 1, number + 1);
            arrived.store(next, Ordering::Release);
        }
        Ok((frames, cpu::thread()? - before))
    };
    std::thread::scope(|scope| {
        let reader = scope.spawn(reading);
        let mut outcome = Ok(());
        while outcome.is_ok() && start.elapsed() < time && !reader.is_finished() {
            let room = WINDOW.saturating_sub(sender.next - arrived.load(Ordering::Acquire));
            if room >= BATCH as u64 {
                outcome = sender.send(room as usize).map(drop);
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        stop.store(true, Ordering::Relaxed);
        let (frames, device) = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
        outcome?;
        let driver = (cpu::own()? - own).saturating_sub(device);
        let lost = arrived.load(Ordering::Relaxed) - frames;
        let [driver_cpu, backend_cpu] = [driver, device].map(|time| time.as_nanos() as u64);
        Ok(Found { frames, seconds, lost, driver_cpu, backend_cpu, kicks: 0 })
    })
}
