//! A virtqueue (virtio 1.2, section 2.7), served in order.

use std::fs::File;
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use virtio_backend::Memory;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::disk;
use crate::image::Image;
use crate::play;

/// VIRTIO_RING_F_EVENT_IDX.
pub const EVENT_IDX: u64 = 1 << 29;

/// What is known of a queue.
#[derive(Debug, Default)]
pub struct Vring {
    /// How many descriptors it has.
    pub size: u16,
    /// Where it goes on.
    pub base: u16,
    /// Its three parts: descriptors, available, used.
    pub places: Option<[GuestAddress; 3]>,
    /// What the driver signals.
    pub kick: Option<File>,
    /// What signals the driver.
    pub call: Option<File>,
    /// Whether it is to be served.
    pub enabled: bool,
    queue: Option<Queue>,
}

impl Vring {
    /// Whether it is being served.
    pub fn is_running(&self) -> bool {
        self.queue.is_some()
    }

    /// Starts it if all is there.
    pub fn start(&mut self, features: u64) -> Result<(), String> {
        let (Some([descriptors, available, used]), Some(_), true) = (self.places, &self.kick, self.enabled) else {
            return Ok(());
        };
        let text = |error| format!("start a queue: {error}");
        let mut queue = Queue::new(1024).map_err(text)?;
        queue.try_set_size(self.size).map_err(text)?;
        queue.try_set_desc_table_address(descriptors).map_err(text)?;
        queue.try_set_avail_ring_address(available).map_err(text)?;
        queue.try_set_used_ring_address(used).map_err(text)?;
        queue.set_event_idx(features & EVENT_IDX != 0);
        queue.set_next_avail(self.base);
        queue.set_next_used(self.base);
        queue.set_ready(true);
        self.queue = Some(queue);
        Ok(())
    }

    /// Stops it; returns where it would go on.
    pub fn stop(&mut self) -> u16 {
        if let Some(queue) = self.queue.take() {
            self.base = queue.next_avail();
        }
        (self.kick, self.call, self.enabled) = (None, None, false);
        self.base
    }

    /// Serves what the driver has made available, or plays with it.
    pub fn serve(
        &mut self,
        image: &Image,
        name: &str,
        memory: &Arc<Memory>,
        play: Option<play::Ring>,
    ) -> Result<(), String> {
        let (Some(queue), Some(kick), Some(call)) = (&mut self.queue, &mut self.kick, &mut self.call) else {
            return Ok(());
        };
        let mut counter = [0; 8];
        // Nothing to read: somebody else was faster.
        let _ = kick.read(&mut counter);
        let text = |error| format!("serve a queue: {error}");
        loop {
            // An index that jumped: the queue is given up, as an honest device does.
            let available = queue.avail_idx(memory.as_ref(), Ordering::Acquire).map_err(text)?.0;
            if available.wrapping_sub(queue.next_avail()) > queue.size() {
                log::warn!("a queue is at {available} and was at {}: given up", queue.next_avail());
                self.queue = None;
                return Ok(());
            }
            while let Some(chain) = queue.pop_descriptor_chain(Arc::clone(memory)) {
                let head = chain.head_index();
                if let Some(play) = play {
                    perform(play, queue, memory, head, [kick, call])?;
                }
                let Some(written) = disk::carry_out(image, name, memory, chain) else {
                    // What is there after an index went back was answered long ago.
                    log::warn!("a queue has a request that is none: given up");
                    self.queue = None;
                    return Ok(());
                };
                queue.add_used(memory.as_ref(), head, written).map_err(text)?;
                if queue.needs_notification(memory.as_ref()).map_err(text)? {
                    let _ = call.write(&1_u64.to_ne_bytes());
                }
            }
            if !queue.enable_notification(memory.as_ref()).map_err(text)? {
                return Ok(());
            }
        }
    }
}

/// Does to the queue what no honest device does; the request of `head` is answered afterwards.
fn perform(
    play: play::Ring,
    queue: &mut Queue,
    memory: &Arc<Memory>,
    head: u16,
    events: [&mut File; 2],
) -> Result<(), String> {
    let text = |error| format!("play with a queue: {error}");
    match play {
        play::Ring::HeadTwice => queue.add_used(memory.as_ref(), head, 1).map_err(text),
        play::Ring::HeadUnknown => queue.add_used(memory.as_ref(), (head + 7) % queue.size(), 1).map_err(text),
        play::Ring::UsedJump | play::Ring::UsedBack => {
            let by = if play == play::Ring::UsedJump { 0x8000 } else { 0xfff0 };
            let index = GuestAddress(queue.used_ring() + 2);
            let now: u16 = memory.read_obj(index).map_err(|error| format!("the used index: {error}"))?;
            memory.write_obj(now.wrapping_add(by), index).map_err(|error| format!("the used index: {error}"))?;
            Err("the used index is wrong now: whoever is next has to deal with it".to_owned())
        }
        play::Ring::EventsFull => {
            for event in events {
                let _ = event.write(&(u64::MAX - 1).to_ne_bytes());
            }
            Err("kick and call are full now: whoever is next has to deal with it".to_owned())
        }
        play::Ring::EventsBlock => {
            for event in events {
                let _ = fcntl(&*event, FcntlArg::F_SETFL(OFlag::empty()));
            }
            Ok(())
        }
    }
}
