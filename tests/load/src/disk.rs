//! A driver of virtio-blk (virtio 1.2, section 5.2): its queues, and the requests in flight.

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use vhost::vhost_user::Frontend;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::frontend;
use crate::memory::Memory;
use crate::partner::{Image, Process};
use crate::ring::{self, Buffer, Ring, SIZE, WRITE};
use crate::stamp::SECTOR;

/// Without an answer for so long the backend is taken for dead.
const PATIENCE: Duration = Duration::from_secs(10);

/// Flush, block size, the most segments, and several queues.
const FEATURES: u64 = 1 << 9 | 1 << 6 | 1 << 2 | 1 << 12;

/// The status byte of a request that is under way.
const PENDING: u8 = 0xee;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// VIRTIO_BLK_T_IN.
    Read = 0,
    /// VIRTIO_BLK_T_OUT.
    Write = 1,
    /// VIRTIO_BLK_T_FLUSH.
    Flush = 4,
}

/// How the driver learns of a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Completion {
    /// It looks at the used rings all the time and asks for no interrupts.
    Poll,
    /// It sleeps until the call descriptor of a queue is signalled.
    Call,
}

/// The sizes of all requests of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Queues.
    pub queues: usize,
    /// Requests in flight per queue.
    pub depth: usize,
    /// Bytes of each request.
    pub block: usize,
    /// The most bytes of one buffer of a request.
    pub segment: usize,
}

impl Shape {
    fn check(&self) -> Result<()> {
        ensure!((1..=usize::from(SIZE)).contains(&self.depth), "a depth of 1 to {SIZE}");
        ensure!(self.queues > 0, "at least one queue");
        ensure!(self.block > 0 && self.block.is_multiple_of(SECTOR), "blocks of whole sectors");
        ensure!(self.segment.is_multiple_of(SECTOR) && self.segment > 0, "segments of whole sectors");
        ensure!(
            self.block.div_ceil(self.segment) + 2 <= ring::BUFFERS,
            "at most {} segments in a block",
            ring::BUFFERS - 2
        );
        Ok(())
    }

    /// The room for the data of one request: whole pages.
    fn room(&self) -> usize {
        self.block.next_multiple_of(4096)
    }

    /// Memory for all queues and all data.
    ///
    /// # Errors
    /// Sizes that do not fit together, or no memory.
    pub fn memory(&self) -> Result<Memory> {
        self.check()?;
        Memory::new(self.queues * (ring::BYTES + self.depth * self.room()))
    }
}

/// One completed request.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// The queue.
    pub queue: usize,
    /// The request, from 0 to the depth.
    pub tag: usize,
}

/// A disk that is connected.
pub struct Driver<'m> {
    memory: &'m Memory,
    shape: Shape,
    rings: Vec<Ring<'m>>,
    completion: Completion,
    calls: Epoll,
    /// How often the driver has slept until a call came.
    pub sleeps: u64,
    _frontend: Frontend,
    /// The backend.
    pub backend: Process,
}

impl<'m> Driver<'m> {
    /// Starts the backend of `image` and connects to it. `memory` is that of `shape`.
    ///
    /// # Errors
    /// A backend that does not start, or refuses.
    pub fn connect(image: &Image, memory: &'m Memory, shape: Shape, completion: Completion) -> Result<Self> {
        shape.check()?;
        let (backend, socket) = image.start()?;
        let rings = (0..shape.queues).map(|index| Ring::new(memory, index));
        let mut rings = rings.collect::<Result<Vec<_>>>()?;
        let (frontend, _) = frontend::connect(socket, memory, &mut rings, FEATURES)?;
        let calls = Epoll::new()?;
        for (index, ring) in (0..).zip(&rings) {
            // Watched edge-triggered, a call needs no reading.
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, index);
            calls.ctl(ControlOperation::Add, ring.call.as_raw_fd(), event)?;
            ring.quiet();
        }
        Ok(Self { memory, shape, rings, completion, calls, sleeps: 0, _frontend: frontend, backend })
    }

    /// The address of a request's data.
    #[must_use]
    pub fn data(&self, queue: usize, tag: usize) -> usize {
        let index = queue * self.shape.depth + tag;
        self.shape.queues * ring::BYTES + index * self.shape.room()
    }

    /// Offers a request; it goes with the next [`reap`](Self::reap).
    pub fn send(&mut self, queue: usize, tag: usize, kind: Kind, sector: u64) {
        let data = self.data(queue, tag);
        let ring = &mut self.rings[queue];
        let head = tag as u16;
        let header = ring.drawer(head);
        let status = header + 16;
        self.memory.u32(header).store((kind as u32).to_le(), Ordering::Relaxed);
        self.memory.u64(header + 8).store(sector.to_le(), Ordering::Relaxed);
        self.memory.u8(status).store(PENDING, Ordering::Relaxed);
        let flags = if kind == Kind::Read { WRITE } else { 0 };
        let mut buffers: [Buffer; ring::BUFFERS] = [(0, 0, 0); ring::BUFFERS];
        buffers[0] = (header, 16, 0);
        let mut count = 1;
        let bytes = if kind == Kind::Flush { 0 } else { self.shape.block };
        for start in (0..bytes).step_by(self.shape.segment) {
            buffers[count] = (data + start, self.shape.segment.min(bytes - start), flags);
            count += 1;
        }
        buffers[count] = (status, 1, WRITE);
        ring.describe(head, &buffers[..=count]);
        ring.offer(head);
    }

    /// Sends what was offered, and takes what has been completed; waits until there is something.
    ///
    /// # Errors
    /// A request that failed, or a backend that does not answer.
    pub fn reap(&mut self, done: &mut Vec<Done>) -> Result<()> {
        done.clear();
        for ring in &mut self.rings {
            ring.publish()?;
        }
        let (start, mut looks) = (Instant::now(), 0_u32);
        loop {
            for queue in 0..self.rings.len() {
                self.take(queue, done)?;
            }
            if !done.is_empty() {
                return Ok(());
            }
            match self.completion {
                Completion::Poll => {
                    std::hint::spin_loop();
                    // The clock is not free, so it is looked at now and then.
                    looks = looks.wrapping_add(1);
                    if looks.is_multiple_of(1 << 16) && start.elapsed() > PATIENCE {
                        bail!("no answer for {PATIENCE:?}");
                    }
                }
                Completion::Call => self.sleep()?,
            }
        }
    }

    fn take(&mut self, queue: usize, done: &mut Vec<Done>) -> Result<()> {
        let ring = &mut self.rings[queue];
        let before = done.len();
        while let Some((head, _)) = ring.reap() {
            let tag = usize::from(head);
            ensure!(tag < self.shape.depth, "queue {queue}: there is no request {head}");
            let status = self.memory.u8(ring.drawer(head) + 16).load(Ordering::Relaxed);
            ensure!(status == 0, "queue {queue}: request {head} was answered with {status:#x}");
            done.push(Done { queue, tag });
        }
        if done.len() > before {
            ring.quiet();
        }
        Ok(())
    }

    fn sleep(&mut self) -> Result<()> {
        // All of them are asked, even after the first that has something.
        let pending = self.rings.iter().filter(|ring| ring.listen()).count();
        if pending > 0 {
            return Ok(());
        }
        self.sleeps += 1;
        let mut events = [EpollEvent::default(); 8];
        let timeout = i32::try_from(PATIENCE.as_millis()).unwrap_or(i32::MAX);
        let count = self.calls.wait(timeout, &mut events)?;
        ensure!(count > 0, "no interrupt for {PATIENCE:?}");
        Ok(())
    }

    /// How often the driver has kicked.
    #[must_use]
    pub fn kicks(&self) -> u64 {
        self.rings.iter().map(|ring| ring.kicks).sum()
    }
}
