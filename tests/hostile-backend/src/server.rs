//! The core's requests (vhost-user specification, "Front-end message types"), answered well or badly.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use virtio_backend::memory::{Place, Table};
use vm_memory::GuestAddress;

use crate::image::Image;
use crate::inflight::{self, Others};
use crate::play::{self, Play};
use crate::vring::{EVENT_IDX, Vring};
use crate::wire::{self, Answer, Message};

/// Within the core's patience, and beyond it.
const LATE: Duration = Duration::from_secs(3);
const TOO_LATE: Duration = Duration::from_secs(12);

/// VIRTIO_F_VERSION_1, VIRTIO_RING_F_INDIRECT_DESC, VHOST_USER_F_PROTOCOL_FEATURES.
const FEATURES: u64 = 1 << 32 | 1 << 30 | EVENT_IDX | 1 << 28;

/// VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH.
const DISK_FEATURES: u64 = 1 << 2 | 1 << 6 | FLUSH;
const FLUSH: u64 = 1 << 9;

/// VIRTIO_BLK_F_MQ.
const MANY_QUEUES: u64 = 1 << 12;

/// MQ, REPLY_ACK, CONFIG, INFLIGHT_SHMFD, CONFIGURE_MEM_SLOTS.
const PROTOCOL: u64 = 1 << 0 | 1 << 3 | 1 << 9 | 1 << 12 | 1 << 15;

/// What becomes of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// It goes on.
    On,
    /// It is over, and the process with it.
    End,
    /// It is over, and the process stays.
    Close,
}

/// The disk as the core sees it.
pub struct Server {
    /// The connection, as long as it is open.
    pub socket: Option<OwnedFd>,
    /// Its queues.
    pub vrings: Vec<Vring>,
    image: Image,
    name: String,
    play: Play,
    sentinel: OwnedFd,
    table: Table,
    features: u64,
    requests: u32,
}

impl Server {
    /// A disk that the core knows nothing of yet.
    pub fn new(socket: OwnedFd, image: Image, name: String, queues: u16, play: Play, sentinel: OwnedFd) -> Self {
        let vrings = (0..queues).map(|_| Vring::default()).collect();
        let socket = Some(socket);
        Self { socket, vrings, image, name, play, sentinel, table: Table::default(), features: 0, requests: 0 }
    }

    /// Serves a queue that was kicked.
    pub fn kicked(&mut self, index: usize) -> Result<(), String> {
        let memory = Arc::new(self.table.memory().clone());
        let play = if let Play::Ring(play) = self.play { Some(play) } else { None };
        let Some(vring) = self.vrings.get_mut(index) else { return Ok(()) };
        vring.serve(&self.image, &self.name, &memory, play)
    }

    /// Deals with the next request. The control channel is one of the descriptors that a play hands over.
    pub fn request(&mut self, control: BorrowedFd<'_>) -> Result<Next, String> {
        let Some(socket) = &self.socket else { return Ok(Next::Close) };
        let Some(mut message) = wire::receive(socket)? else { return Ok(Next::End) };
        self.requests += 1;
        let play = match self.play {
            Play::Request(at, play) if at == self.requests => Some(play),
            _ => None,
        };
        let cut = self.play == Play::Inflight(play::Inflight::Cut);
        match message.request {
            GET_INFLIGHT_FD => {
                let region = self.inflight(&message, control)?;
                let mut payload = [region.size, region.offset].map(u64::to_ne_bytes).concat();
                payload.extend(message.payload.get(16..20).unwrap_or_default());
                payload.resize(message.payload.len().max(20), 0);
                let answer = Answer::new(GET_INFLIGHT_FD, payload);
                let next = self.answer(answer, &region.numbers, play)?;
                if cut {
                    region.cut();
                }
                Ok(next)
            }
            request => {
                let payload = self.reply(&mut message)?;
                let payload = payload.or_else(|| message.needs_reply.then(|| 0_u64.to_ne_bytes().to_vec()));
                let Some(payload) = payload else { return Ok(self.silent(play)) };
                self.answer(Answer::new(request, payload), &[], play)
            }
        }
    }

    /// A request to which there is no answer.
    fn silent(&mut self, play: Option<play::Request>) -> Next {
        match play {
            Some(play::Request::Close) => self.close(),
            Some(play::Request::Exit) => Next::End,
            _ => Next::On,
        }
    }

    fn close(&mut self) -> Next {
        self.socket = None;
        Next::Close
    }

    /// Sends an answer as the play has it.
    fn answer(&mut self, mut answer: Answer, files: &[i32], play: Option<play::Request>) -> Result<Next, String> {
        use play::Request::{Close, Exit, Half, Huge, Late, Long, Never, NoAnswer, Short, TooLate, WrongCode};
        match play {
            Some(Exit) => return Ok(Next::End),
            Some(Never) => return Ok(Next::On),
            Some(Late) => wait(LATE),
            Some(TooLate) => wait(TOO_LATE),
            Some(WrongCode) => answer.request += 1,
            Some(NoAnswer) => answer.flags = 1,
            Some(Short) => answer.size = answer.size.saturating_sub(1),
            Some(Long) => answer.size += 8,
            Some(Huge) => answer.size = u32::MAX,
            Some(Half | Close) | None => {}
        }
        let mut bytes = answer.bytes();
        if play == Some(Half) {
            bytes.truncate(bytes.len() / 2);
        }
        if let Some(socket) = &self.socket {
            wire::send(socket, &bytes, files)?;
        }
        Ok(if play == Some(Close) { self.close() } else { Next::On })
    }

    /// What is answered to a request, if anything but an acknowledgement is.
    fn reply(&mut self, message: &mut Message) -> Result<Option<Vec<u8>>, String> {
        let number = |value: u64| Ok(Some(value.to_ne_bytes().to_vec()));
        let (index, value) = (message.u32(0) as usize, message.u32(4));
        match message.request {
            GET_FEATURES => return number(self.offered()),
            GET_PROTOCOL_FEATURES => return number(PROTOCOL),
            GET_QUEUE_NUM => return number(self.queues() as u64),
            GET_MAX_MEM_SLOTS => return number(8),
            GET_CONFIG => return Ok(Some(self.config(message))),
            GET_VRING_BASE => {
                let base = self.vrings.get_mut(index).map_or(0, Vring::stop);
                return Ok(Some([message.u32(0), base.into()].map(u32::to_ne_bytes).concat()));
            }
            SET_FEATURES => self.features = message.u64(0),
            SET_MEM_TABLE => self.set_table(message)?,
            ADD_MEM_REG => {
                // Eight bytes of padding come first.
                let file = message.files.pop().ok_or("a region without a descriptor")?;
                self.table = self.table.with(place(message, 8), file).map_err(|error| error.to_string())?;
            }
            SET_VRING_NUM => self.change(index, |vring| vring.size = value as u16),
            SET_VRING_BASE => self.change(index, |vring| vring.base = value as u16),
            SET_VRING_ADDR => {
                // Descriptors, used, available.
                let find = |offset| self.table.translate(message.u64(offset)).ok_or("a ring outside of memory");
                let places: [GuestAddress; 3] = [find(8)?, find(24)?, find(16)?];
                self.change(index, |vring| vring.places = Some(places));
            }
            SET_VRING_KICK | SET_VRING_CALL => {
                let file = message.files.pop();
                let kick = message.request == SET_VRING_KICK;
                self.change(index & 0xff, |vring| if kick { vring.kick = file } else { vring.call = file });
            }
            SET_VRING_ENABLE => self.change(index, |vring| vring.enabled = value != 0),
            _ => {}
        }
        for vring in self.vrings.iter_mut().filter(|vring| !vring.is_running()) {
            vring.start(self.features)?;
        }
        Ok(None)
    }

    fn change(&mut self, index: usize, change: impl FnOnce(&mut Vring)) {
        if let Some(vring) = self.vrings.get_mut(index) {
            change(vring);
        }
    }

    fn offered(&self) -> u64 {
        let many = if self.vrings.len() > 1 { MANY_QUEUES } else { 0 };
        let all = FEATURES | DISK_FEATURES | many;
        if self.play == Play::Offer(play::Offer::Features) { all & !FLUSH } else { all }
    }

    fn queues(&self) -> usize {
        let fewer = self.play == Play::Offer(play::Offer::Queues);
        if fewer { self.vrings.len().saturating_sub(1) } else { self.vrings.len() }
    }

    fn set_table(&mut self, message: &mut Message) -> Result<(), String> {
        let mut table = Table::default();
        let files: Vec<File> = message.files.drain(..).collect();
        for (region, file) in files.into_iter().enumerate() {
            table = table.with(place(message, 8 + 32 * region), file).map_err(|error| error.to_string())?;
        }
        self.table = table;
        Ok(())
    }

    /// The configuration space (virtio 1.2, section 5.2.4), as much of it as was asked for.
    fn config(&self, message: &Message) -> Vec<u8> {
        let less = self.play == Play::Offer(play::Offer::Capacity);
        let mut config = (if less { self.image.capacity / 2 } else { self.image.capacity }).to_le_bytes().to_vec();
        config.extend([0, 0, 0, 0, 126, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0]);
        config.extend([0; 10]);
        config.extend((self.vrings.len() as u16).to_le_bytes());
        config.resize(256, 0);
        let (start, length) = (message.u32(0) as usize, message.u32(4) as usize);
        let mut payload = message.payload.get(..12).unwrap_or_default().to_vec();
        payload.extend(config.get(start..start.saturating_add(length)).unwrap_or_default());
        payload
    }

    fn inflight(&self, message: &Message, control: BorrowedFd<'_>) -> Result<inflight::Region, String> {
        let play = if let Play::Inflight(play) = self.play { Some(play) } else { None };
        let others = Others { image: self.image.file.as_fd(), sentinel: self.sentinel.as_fd(), control };
        // Behind the size and the offset: how many queues, and of what size.
        let word = message.u32(16);
        inflight::make(play, word as u16, (word >> 16) as u16, &others)
    }
}

/// The region at `offset` of a message.
fn place(message: &Message, offset: usize) -> Place {
    let [guest, size, user, start] = std::array::from_fn(|word| message.u64(offset + 8 * word));
    Place { guest, size, user, offset: start }
}

/// Waits by the one call that the filters have for it.
fn wait(time: Duration) {
    let _ = nix::poll::ppoll(&mut [], Some(time.into()), None);
}

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
const GET_CONFIG: u32 = 24;
const GET_INFLIGHT_FD: u32 = 31;
const GET_MAX_MEM_SLOTS: u32 = 36;
const ADD_MEM_REG: u32 = 37;
