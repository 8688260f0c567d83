//! One request queue of a disk.
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::sync::Arc;

use virtio_backend::{Next, Pulse, QueueHandler, Rare, Ring, RingError};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;

use crate::device::Disk;
use crate::engine::EngineError;
use crate::request::{Operation, Request, Status};

/// How many requests are served before the queue looks whether it is to stop.
const BATCH: usize = 64;

/// The handler of one queue.
pub struct RequestQueue {
    disk: Arc<Disk>,
    /// Whether a write is durable when it completes: so for a driver that cannot flush (virtio 1.2, section 5.2.6.2).
    write_through: bool,
    failures: Rare,
    pulse: Arc<Pulse>,
}

impl RequestQueue {
    /// A queue of `disk`.
    pub fn new(disk: Arc<Disk>) -> Self {
        Self { disk, write_through: false, failures: Rare::default(), pulse: Arc::default() }
    }

    fn carry_out(&mut self, operation: Operation) -> Status {
        let (disk, pulse) = (&self.disk, &self.pulse);
        let (what, outcome) = match operation {
            Operation::Refuse(status) => return status,
            Operation::GetId { mut data } => {
                data.write(&disk.id);
                return Status::Ok;
            }
            Operation::Write { .. } if disk.read_only => return Status::IoError,
            Operation::Read { offset, data } => ("read", pulse.storage(|| disk.engine.read(offset, data))),
            Operation::Write { offset, data } => {
                ("write", pulse.storage(|| disk.engine.write(offset, data, self.write_through)))
            }
            Operation::Flush if disk.read_only => return Status::Ok,
            Operation::Flush => ("flush", pulse.storage(|| disk.engine.flush())),
        };
        match outcome {
            Ok(()) => Status::Ok,
            Err(error) => {
                self.complain(what, error);
                Status::IoError
            }
        }
    }

    fn complain(&mut self, what: &str, error: EngineError) {
        if let Some(count) = self.failures.again() {
            log::error!("{what} the image, failure {count}: {error}");
        }
    }
}

impl QueueHandler for RequestQueue {
    fn pulse(&self) -> Arc<Pulse> {
        Arc::clone(&self.pulse)
    }

    fn start(&mut self, features: u64) {
        self.write_through = features & (1 << VIRTIO_BLK_F_FLUSH) == 0;
    }

    fn run(&mut self, ring: &mut Ring) -> Result<Next, RingError> {
        ring.quiet()?;
        for _ in 0..BATCH {
            let Some(chain) = ring.pop()? else {
                return Ok(if ring.listen()? { Next::Again } else { Next::Wait });
            };
            let mut request = Request::parse(chain, self.disk.capacity)?;
            let head = request.head;
            let operation = std::mem::replace(&mut request.operation, Operation::Flush);
            let status = self.carry_out(operation);
            ring.complete(head, request.answer(status))?;
            ring.signal()?;
        }
        Ok(Next::Again)
    }
}
