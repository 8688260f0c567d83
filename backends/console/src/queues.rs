//! The two queues of the port (virtio 1.2, section 5.3.6).
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use virtio_backend::{Chain, Next, QueueHandler, Ring, RingError};

use crate::buffer::Buffer;

/// How many chains or chunks are dealt with before a queue looks whether it is to stop.
const BATCH: usize = 64;

/// Size of a chunk in bytes.
const CHUNK: usize = 4096;

/// The receive queue: input into the buffers that the guest offers.
pub struct Receive {
    input: Arc<Buffer>,
}

impl Receive {
    /// A queue that takes its bytes from `input`.
    pub fn new(input: Arc<Buffer>) -> Self {
        Self { input }
    }

    /// Fills one chain as far as there is input, and returns the number of bytes.
    fn fill(&self, chain: &mut Chain) -> u32 {
        let (mut total, mut chunk) = (0_usize, [0; CHUNK]);
        loop {
            let length = chain.writable.len().min(CHUNK);
            let count = self.input.pop(chunk.get_mut(..length).unwrap_or_default());
            if count == 0 {
                return u32::try_from(total).unwrap_or(u32::MAX);
            }
            total = total.saturating_add(chain.writable.write(chunk.get(..count).unwrap_or_default()));
        }
    }
}

impl QueueHandler for Receive {
    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.input.filled()]
    }

    fn run(&mut self, ring: &mut Ring) -> Result<Next, RingError> {
        ring.quiet()?;
        for _ in 0..BATCH {
            if self.input.is_empty() {
                ring.signal()?;
                return Ok(Next::Wait);
            }
            match ring.pop()? {
                Some(mut chain) => {
                    let written = self.fill(&mut chain);
                    ring.complete(chain.head, written)?;
                }
                None => {
                    if !ring.listen()? {
                        ring.signal()?;
                        return Ok(Next::Wait);
                    }
                }
            }
        }
        ring.signal()?;
        Ok(Next::Again)
    }
}

/// The transmit queue: output from the guest. A chain that does not fit stays where it is, and the guest waits.
pub struct Transmit {
    output: Arc<Buffer>,
    current: Option<Chain>,
    /// Bytes of `current` that were read and not passed on yet.
    carried: Vec<u8>,
}

impl Transmit {
    /// A queue that puts its bytes into `output`.
    pub fn new(output: Arc<Buffer>) -> Self {
        Self { output, current: None, carried: Vec::new() }
    }

    /// Passes on what was read; whether all of it.
    fn pass_on(&mut self) -> bool {
        let count = self.output.push(&self.carried);
        self.carried.drain(..count);
        self.carried.is_empty()
    }
}

impl QueueHandler for Transmit {
    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.output.emptied().as_fd()]
    }

    fn run(&mut self, ring: &mut Ring) -> Result<Next, RingError> {
        ring.quiet()?;
        let mut next = Next::Again;
        for _ in 0..BATCH {
            if !self.pass_on() {
                next = Next::Wait;
                break;
            }
            match self.current.as_mut() {
                Some(chain) if chain.readable.is_empty() => {
                    let head = chain.head;
                    self.current = None;
                    ring.complete(head, 0)?;
                }
                Some(chain) => {
                    let mut chunk = [0; CHUNK];
                    let count = chain.readable.read(&mut chunk);
                    self.carried.extend_from_slice(chunk.get(..count).unwrap_or_default());
                }
                None => {
                    self.current = ring.pop()?;
                    if self.current.is_none() && !ring.listen()? {
                        next = Next::Wait;
                        break;
                    }
                }
            }
        }
        ring.signal()?;
        Ok(next)
    }

    fn stop(&mut self, ring: &mut Ring) -> Result<(), RingError> {
        // The chain is transmitted anew after a restart: its bytes may come twice, but none is lost.
        if let Some(chain) = self.current.take() {
            ring.unpop(std::iter::once(chain.head));
        }
        self.carried.clear();
        Ok(())
    }
}
