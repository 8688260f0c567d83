//! One request queue of a disk.
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_backend::descriptor;
use virtio_backend::{Next, Pulse, QueueHandler, Rare, Ring, RingError};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;

use crate::bounce::Bounce;
use crate::device::Disk;
use crate::request::{Operation, Request, Status};
use crate::transfer::{Kind, Transfer, TransferError};
use crate::uring::{Ended, Uring};
use crate::writes::Whole;

/// How many requests are begun before the queue looks whether it is to stop.
const BATCH: usize = 64;

/// How long a call may take that the queue's own thread makes.
const QUICK: Duration = Duration::from_micros(500);

/// After one that took longer, so many requests go through the ring before the next is tried.
const CAUTION: u32 = 64;

/// How long a kernel that is short of memory is left alone.
const REST: Duration = Duration::from_millis(1);

/// Who carries transfers out.
pub enum Engine {
    /// The kernel, while the queue's thread does something else.
    Ring(Box<Uring<Request>>),
    /// The queue's thread, one after the other.
    Calls,
}

/// The handler of one queue.
pub struct RequestQueue {
    disk: Arc<Disk>,
    engine: Engine,
    /// Whether a write is durable when it completes: so for a driver that cannot flush (virtio 1.2, section 5.2.6.2).
    write_through: bool,
    failures: Failures,
    pulse: Arc<Pulse>,
    /// Requests that have been answered and not handed back.
    answered: Vec<(u16, u32)>,
    ended: Vec<Ended<Request>>,
    /// For writes of parts of blocks.
    bounce: Option<Bounce>,
    /// A transfer that is the only one, as far as is known yet.
    alone: Option<(Transfer, Request)>,
    /// How many requests are still to go through the ring whether or not they are alone.
    caution: u32,
}

/// What went wrong on the host, told ever more rarely.
#[derive(Default)]
struct Failures(Rare);

impl Failures {
    fn status(&mut self, transfer: &Transfer, outcome: Result<(), TransferError>) -> Status {
        let Err(error) = outcome else { return Status::Ok };
        if let Some(count) = self.0.again() {
            let inherited = if transfer.is_whole_flush() { ", and what an earlier process wrote" } else { "" };
            log::error!("{} the image{inherited}, failure {count}: {error}", transfer.verb());
        }
        Status::IoError
    }
}

impl RequestQueue {
    /// A queue of `disk` whose transfers are carried out by `engine`.
    pub fn new(disk: Arc<Disk>, engine: Engine) -> Self {
        Self {
            disk,
            engine,
            write_through: false,
            failures: Failures::default(),
            pulse: Arc::default(),
            answered: Vec::new(),
            ended: Vec::new(),
            bounce: None,
            alone: None,
            caution: 0,
        }
    }

    fn has_room(&self) -> bool {
        match &self.engine {
            Engine::Ring(ring) => ring.has_room(),
            Engine::Calls => true,
        }
    }

    /// Begins a request; one that can be answered at once is.
    fn begin(&mut self, mut request: Request) {
        let disk = Arc::clone(&self.disk);
        let kind = match std::mem::replace(&mut request.operation, Operation::Flush) {
            Operation::Refuse(status) => return self.answer(request, status),
            Operation::GetId { mut data } => {
                data.write(&disk.id);
                return self.answer(request, Status::Ok);
            }
            Operation::Write { .. } if disk.read_only => return self.answer(request, Status::IoError),
            Operation::Flush if disk.read_only => return self.answer(request, Status::Ok),
            Operation::Read { offset, data } => Kind::Read { offset, data },
            Operation::Write { offset, data } => Kind::Write { offset, data, durable: self.write_through },
            // fsync(2) tells of every failure to write since the image was opened that nobody has been told of.
            Operation::Flush => Kind::Flush { everything: disk.image.inherited() },
        };
        let mut transfer = Transfer::new(kind);
        if transfer.is_empty() {
            return self.answer(request, Status::Ok);
        }
        let alignment = disk.image.alignment();
        let partial = transfer.is_partial(alignment);
        if partial {
            // It waits for every other write.
            self.drain();
        } else if transfer.is_write() && alignment.is_some() {
            let leave = self.leave_to_write(&disk);
            transfer.admit(leave);
        }
        let outcome = match (&mut self.engine, alignment) {
            (_, Some(alignment)) if partial => {
                let bounce = self.bounce.get_or_insert_with(|| Bounce::new(alignment));
                self.pulse.storage(|| transfer.rewrite(&disk.image, bounce))
            }
            (Engine::Ring(ring), alignment) => {
                let first = self.alone.take();
                self.caution = self.caution.saturating_sub(1);
                if first.is_none()
                    && ring.is_idle()
                    && self.caution == 0
                    && !transfer.is_flush()
                    && !transfer.needs_bounce(alignment)
                {
                    self.alone = Some((transfer, request));
                    return;
                }
                return first.into_iter().chain([(transfer, request)]).for_each(|(it, tag)| ring.begin(it, tag));
            }
            (Engine::Calls, Some(alignment)) if transfer.needs_bounce(Some(alignment)) => {
                transfer.give(Box::new(Bounce::new(alignment)));
                self.pulse.storage(|| transfer.carry_out(&disk.image))
            }
            (Engine::Calls, _) => self.pulse.storage(|| transfer.carry_out(&disk.image)),
        };
        self.conclude(&transfer, request, outcome);
    }

    /// Waits, if need be, until a write of whole blocks may begin.
    fn leave_to_write(&mut self, disk: &Disk) -> Whole {
        disk.image.writes.try_whole().unwrap_or_else(|| {
            self.drain();
            self.pulse.storage(|| disk.image.writes.whole())
        })
    }

    fn conclude(&mut self, transfer: &Transfer, request: Request, outcome: Result<(), TransferError>) {
        if outcome.is_ok() && transfer.is_whole_flush() {
            self.disk.image.settled();
        }
        let status = self.failures.status(transfer, outcome);
        self.answer(request, status);
    }

    fn answer(&mut self, request: Request, status: Status) {
        let head = request.head;
        self.answered.push((head, request.answer(status)));
    }

    /// Carries out the only transfer there is. As long as the host's storage is quick, that is quicker than to be told of
    /// its end; when it is not, the thread waits for it once and is cautious from then on.
    fn carry_out_alone(&mut self) {
        let Some((mut transfer, request)) = self.alone.take() else { return };
        let begun = Instant::now();
        let outcome = self.pulse.storage(|| transfer.carry_out(&self.disk.image));
        if begun.elapsed() > QUICK {
            self.caution = CAUTION;
        }
        self.conclude(&transfer, request, outcome);
    }

    /// Tells the kernel what was begun, and takes what has come to its end.
    fn submit_and_reap(&mut self) {
        let Engine::Ring(ring) = &mut self.engine else { return };
        let submitted = self.pulse.storage(|| ring.submit());
        if submitted.is_err() {
            self.pause();
        }
        let Engine::Ring(ring) = &mut self.engine else { return };
        let (disk, pulse) = (&self.disk, &self.pulse);
        ring.reap(&mut self.ended, |transfer| pulse.storage(|| transfer.carry_out(&disk.image)));
        let mut ended = std::mem::take(&mut self.ended);
        for Ended { transfer, tag, outcome } in ended.drain(..) {
            self.conclude(&transfer, tag, outcome);
        }
        self.ended = ended;
    }

    /// Whatever the kernel lacks, it is not gained by asking without a pause.
    fn pause(&self) {
        let _ = self.pulse.storage(|| descriptor::wait(&mut [], Some(REST)));
    }

    /// Whether there is something that nobody carries out yet.
    fn has_begun(&mut self) -> bool {
        match &mut self.engine {
            Engine::Ring(ring) => self.alone.is_some() || ring.is_pending(),
            Engine::Calls => false,
        }
    }

    /// Sees to what was begun, and hands back what has come to its end.
    fn advance(&mut self, ring: &mut Ring) -> Result<(), RingError> {
        self.carry_out_alone();
        self.submit_and_reap();
        self.publish(ring)
    }

    /// Sees to what was begun until nothing of it is under way.
    fn drain(&mut self) {
        self.carry_out_alone();
        loop {
            self.submit_and_reap();
            let Engine::Ring(uring) = &mut self.engine else { break };
            if uring.is_idle() {
                break;
            }
            if self.pulse.storage(|| uring.wait()).is_err() {
                self.pause();
            }
        }
    }

    /// Hands back what has been answered.
    fn publish(&mut self, ring: &mut Ring) -> Result<(), RingError> {
        #[cfg(feature = "crash-points")]
        if !self.answered.is_empty() {
            virtio_backend::crash::pass(virtio_backend::crash::Point::Io);
        }
        ring.complete_together(&self.answered)?;
        self.answered.clear();
        ring.signal()
    }

    /// Does a bounded amount of work.
    fn serve(&mut self, ring: &mut Ring) -> Result<Next, RingError> {
        ring.quiet()?;
        let (mut next, mut full) = (Next::Again, false);
        for _ in 0..BATCH {
            if !self.has_room() {
                full = true;
                break;
            }
            let Some(chain) = ring.pop()? else {
                if self.has_begun() {
                    // Before the driver is asked for a kick: it may have more by then, and spares itself one.
                    self.advance(ring)?;
                } else if !ring.listen()? {
                    next = Next::Wait;
                    break;
                }
                continue;
            };
            self.begin(Request::parse(chain, self.disk.capacity)?);
            if matches!(self.engine, Engine::Calls) {
                self.publish(ring)?;
            }
        }
        self.advance(ring)?;
        if full && !self.has_room() {
            // The end of a transfer is what to wait for, not a kick: the driver was asked for none. Had all of them come to
            // their end by now, nothing would wake this thread any more.
            next = Next::Wait;
        }
        Ok(if self.has_begun() { Next::Again } else { next })
    }
}

impl QueueHandler for RequestQueue {
    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        match &self.engine {
            Engine::Ring(ring) => vec![ring.as_fd()],
            Engine::Calls => Vec::new(),
        }
    }

    fn pulse(&self) -> Arc<Pulse> {
        Arc::clone(&self.pulse)
    }

    fn start(&mut self, features: u64) {
        self.write_through = features & (1 << VIRTIO_BLK_F_FLUSH) == 0;
    }

    fn run(&mut self, ring: &mut Ring) -> Result<Next, RingError> {
        let next = self.serve(ring);
        if next.is_err() {
            // Nobody looks after it from here to the stop, and writes of other queues may be waiting for it.
            self.drain();
        }
        next
    }

    fn stop(&mut self, ring: &mut Ring) -> Result<(), RingError> {
        self.drain();
        self.publish(ring)
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod tests {
    use super::*;
    use crate::image::{Alignment, Image};
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::FileExt;
    use virtio_backend::ring::Shape;
    use virtio_backend::{Buffers, Chain, Memory};
    use virtio_bindings::virtio_blk::VIRTIO_BLK_T_FLUSH;
    use vm_memory::{Bytes, GuestAddress};

    const STATUS: GuestAddress = GuestAddress(0x1000);

    fn disk(image: Image) -> Arc<Disk> {
        Arc::new(Disk { image, capacity: 1 << 20, block: 512, read_only: false, id: [0; 20] })
    }

    /// Has `queue` carry out a flush; returns its status.
    fn flush(queue: &mut RequestQueue) -> u8 {
        let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap());
        memory.write_obj(VIRTIO_BLK_T_FLUSH.to_le(), GuestAddress(0)).unwrap();
        memory.write_obj(0xee_u8, STATUS).unwrap();
        let buffers = || Buffers::new(Arc::clone(&memory));
        let mut chain = Chain { head: 0, readable: buffers(), writable: buffers() };
        chain.readable.push(GuestAddress(0), 16).unwrap();
        chain.writable.push(STATUS, 1).unwrap();
        queue.begin(Request::parse(chain, 512).unwrap());
        if let Engine::Ring(ring) = &mut queue.engine {
            ring.submit().unwrap();
            ring.wait().unwrap();
        }
        queue.submit_and_reap();
        memory.read_obj(STATUS).unwrap()
    }

    /// Has `queue` begin a write of `length` bytes, each of which is `fill`.
    fn write(queue: &mut RequestQueue, memory: &Arc<Memory>, sector: u64, length: usize, fill: u8) {
        let data = GuestAddress(0x10000 * (u64::from(fill) + 1));
        let header = [&1_u32.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        memory.write_slice(&header, GuestAddress(0)).unwrap();
        memory.write_slice(&vec![fill; length], data).unwrap();
        let buffers = || Buffers::new(Arc::clone(memory));
        let mut chain = Chain { head: 0, readable: buffers(), writable: buffers() };
        chain.readable.push(GuestAddress(0), 16).unwrap();
        chain.readable.push(data, length).unwrap();
        chain.writable.push(STATUS, 1).unwrap();
        queue.begin(Request::parse(chain, 1 << 20).unwrap());
    }

    #[test]
    fn a_write_of_parts_of_blocks_neither_undoes_another_nor_is_undone() {
        for number in 0..2 {
            let file = tempfile::tempfile().unwrap();
            file.set_len(1 << 20).unwrap();
            let mut image = Image::new(file.try_clone().unwrap().into(), false, false).unwrap();
            image.pretend(Alignment { address: 512, place: 4096 });
            let engine = engines(&image).into_iter().nth(number).unwrap();
            let mut queue = RequestQueue::new(disk(image), engine);
            let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), 0x100_0000)]).unwrap());
            // Begun, and not submitted before the third comes.
            write(&mut queue, &memory, 0, 4096, 1);
            write(&mut queue, &memory, 8, 8192, 2);
            write(&mut queue, &memory, 9, 512, 3);
            write(&mut queue, &memory, 0, 4096, 4);
            queue.drain();
            let mut found = vec![0; 0x3000];
            file.read_exact_at(&mut found, 0).unwrap();
            let expected = [(4096, 4), (512, 2), (512, 3), (7168, 2)].map(|(length, fill)| vec![fill; length]).concat();
            assert!(found == expected, "engine {number}");
            assert!(queue.disk.image.writes.try_whole().is_some(), "every write has been given up");
            queue.disk.image.writes.alone(|| ());
        }
    }

    #[test]
    fn a_queue_that_is_given_up_holds_no_writes_of_others_up() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let mut image = Image::new(file.into(), false, false).unwrap();
        image.pretend(Alignment { address: 512, place: 4096 });
        let [_, engine] = engines(&image);
        let mut queue = RequestQueue::new(disk(image), engine);
        let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), 0x100_0000)]).unwrap());
        write(&mut queue, &memory, 0, 4096, 1);
        write(&mut queue, &memory, 8, 4096, 2);
        let shape = Shape {
            size: 8,
            descriptors: GuestAddress(0x2000),
            available: GuestAddress(0x3000),
            used: GuestAddress(0x4000),
            next_available: 0,
        };
        let mut ring = Ring::new(shape, 0, Arc::clone(&memory), None, None).unwrap();
        // More than the ring can hold.
        memory.write_obj(9_u16, GuestAddress(0x3002)).unwrap();
        assert!(queue.run(&mut ring).is_err());
        assert_eq!(Arc::strong_count(&queue.disk.image.writes), 1, "writes are under way that nobody looks after");
    }

    #[test]
    fn a_queue_that_was_full_does_not_wait_for_what_is_over() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let image = Image::new(file.into(), false, false).unwrap();
        let [_, engine] = engines(&image);
        let mut queue = RequestQueue::new(disk(image), engine);
        let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), 0x100_0000)]).unwrap());
        let shape = Shape {
            size: 256,
            descriptors: GuestAddress(0x2000),
            available: GuestAddress(0x4000),
            used: GuestAddress(0x5000),
            next_available: 0,
        };
        let mut ring = Ring::new(shape, 1 << 29, Arc::clone(&memory), None, None).unwrap();
        while queue.has_room() {
            write(&mut queue, &memory, 0, 512, 1);
        }
        // The driver's next request; a kick comes for it only if one was asked for.
        memory.write_obj(1_u16, GuestAddress(0x4002)).unwrap();
        let next = queue.run(&mut ring);
        let Engine::Ring(uring) = &queue.engine else { panic!() };
        assert!(
            !uring.is_idle() || !matches!(next, Ok(Next::Wait)),
            "nothing is under way, and a request is there that nobody will kick for"
        );
    }

    fn engines(image: &Image) -> [Engine; 2] {
        let (_, sentinel) = std::io::pipe().unwrap();
        [Engine::Calls, Engine::Ring(Box::new(Uring::new(image, sentinel.as_fd()).unwrap()))]
    }

    #[test]
    fn a_successors_flushes_ask_about_everything_until_one_succeeds() {
        for number in 0..2 {
            let image = Image::new(tempfile::tempfile().unwrap().into(), false, true).unwrap();
            let engine = engines(&image).into_iter().nth(number).unwrap();
            let mut queue = RequestQueue::new(disk(image), engine);
            assert!(queue.disk.image.inherited());
            assert_eq!(flush(&mut queue), 0);
            assert!(!queue.disk.image.inherited());
            assert_eq!(flush(&mut queue), 0);

            // A pipe cannot be flushed.
            let (_reader, writer) = std::io::pipe().unwrap();
            let image = Image::new(OwnedFd::from(writer), false, true).unwrap();
            let engine = engines(&image).into_iter().nth(number).unwrap();
            let mut queue = RequestQueue::new(disk(image), engine);
            assert_eq!(flush(&mut queue), 1);
            assert!(queue.disk.image.inherited(), "nobody knows yet what became of it");
        }
    }
}
