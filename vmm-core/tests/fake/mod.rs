//! A backend by hand: the back-end's half of vhost-user, message by message, so that it can break every rule.
//!
//! Every wait has a deadline and says what was awaited.
#![allow(unsafe_code, dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};

/// The longest that anything in a test may take.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Numbers of requests (vhost-user specification, "Front-end message types").
pub mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const GET_CONFIG: u32 = 24;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
}

/// VHOST_USER_F_PROTOCOL_FEATURES.
pub const PROTOCOL_FEATURES: u64 = 1 << 30;
/// MQ, REPLY_ACK and CONFIG.
pub const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 9;
/// VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD.
pub const INFLIGHT_SHMFD: u64 = 1 << 12;
/// VIRTIO_F_VERSION_1, VIRTIO_F_EVENT_IDX and VIRTIO_BLK_F_FLUSH.
pub const FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 9;

const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// One request of the core.
#[derive(Debug)]
pub struct Request {
    /// Its number.
    pub code: u32,
    flags: u32,
    /// What follows the header.
    pub body: Vec<u8>,
    /// The descriptors that came with it.
    pub files: Vec<File>,
}

impl Request {
    /// One that nobody made.
    pub fn new(code: u32, body: Vec<u8>) -> Self {
        Self { code, flags: 0, body, files: Vec::new() }
    }

    /// The word of 32 bits at `offset` of the body.
    pub fn word(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.body[offset..offset + 4].try_into().unwrap())
    }

    /// The body, which is one number.
    pub fn number(&self) -> u64 {
        u64::from_le_bytes(self.body[..8].try_into().unwrap())
    }

    /// Which file came with it.
    pub fn inode(&self) -> u64 {
        nix::sys::stat::fstat(&self.files[0]).unwrap().st_ino
    }
}

/// What a backend does with a request.
pub enum Act {
    /// Answers honestly.
    Answer,
    /// Ends, with its socket.
    Close,
    /// Says nothing, and goes on listening.
    Silence,
    /// Sends these bytes, with these descriptors.
    Send(Vec<u8>, Vec<OwnedFd>),
}

/// What an honest backend says of itself.
#[derive(Clone, Copy)]
pub struct Honest {
    /// Virtio features.
    pub features: u64,
    /// Features of the protocol.
    pub protocol: u64,
    /// Queues.
    pub queues: u64,
}

impl Default for Honest {
    fn default() -> Self {
        Self { features: FEATURES | PROTOCOL_FEATURES, protocol: PROTOCOL, queues: 2 }
    }
}

impl Honest {
    /// One that tracks what is in flight.
    pub fn tracking() -> Self {
        Self { protocol: PROTOCOL | INFLIGHT_SHMFD, ..Self::default() }
    }

    /// One that does as `script` says.
    pub fn start(self, script: impl FnMut(&Request) -> Act + Send + 'static) -> Fake {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(DEADLINE)).unwrap();
        let (heard, requests) = channel();
        let shared = ours.try_clone().unwrap();
        let answering = Arc::new(Mutex::new(()));
        let answers = answering.clone();
        let thread = std::thread::spawn(move || serve(self, ours, script, &heard, &answers));
        Fake { socket: Some(theirs.into()), shared, requests, answering, thread: Some(thread) }
    }

    /// One that does as it should.
    pub fn serve(self) -> Fake {
        self.start(|_| Act::Answer)
    }

    /// The answer to a request, without its header; none if none is due.
    fn reply(self, request: &Request) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
        let number = |number: u64| Some((number.to_le_bytes().to_vec(), Vec::new()));
        match request.code {
            request::GET_FEATURES => number(self.features),
            request::GET_PROTOCOL_FEATURES => number(self.protocol),
            request::GET_QUEUE_NUM => number(self.queues),
            request::GET_CONFIG => Some((request.body.clone(), Vec::new())),
            request::GET_VRING_BASE => Some((request.body.clone(), Vec::new())),
            request::GET_INFLIGHT_FD => Some(inflight(&request.body, 16 * 1024)),
            _ if request.flags & NEED_REPLY != 0 => number(0),
            _ => None,
        }
    }
}

/// An inflight region of `size` bytes, and the reply that says so to a request with this body.
pub fn inflight(body: &[u8], size: u64) -> (Vec<u8>, Vec<OwnedFd>) {
    let memory = memfd_create("inflight", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    nix::unistd::ftruncate(&memory, size.try_into().unwrap()).unwrap();
    fcntl(&memory, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
    let mut reply = body.to_vec();
    reply[..8].copy_from_slice(&size.to_le_bytes());
    (reply, vec![memory])
}

/// The message that answers `request` with `body`.
pub fn message(request: &Request, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).unwrap();
    let header = [request.code, 1 | REPLY, size].map(u32::to_le_bytes);
    [header.as_flattened(), body].concat()
}

/// A backend that runs.
pub struct Fake {
    /// The core's end of the vhost-user socket, until it is taken.
    pub socket: Option<OwnedFd>,
    shared: UnixStream,
    requests: Receiver<Request>,
    /// Held from a request to its answer.
    answering: Arc<Mutex<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Fake {
    /// The core's end of the socket.
    pub fn take_socket(&mut self) -> OwnedFd {
        self.socket.take().unwrap()
    }

    /// The next request.
    pub fn next(&self, awaited: &str) -> Request {
        self.requests.recv_timeout(DEADLINE).unwrap_or_else(|error| panic!("no {awaited} from the core: {error}"))
    }

    /// All requests up to one with number `last`.
    pub fn until(&self, last: u32) -> Vec<Request> {
        let mut requests = Vec::new();
        loop {
            let request = self.next(&format!("request {last}"));
            let code = request.code;
            requests.push(request);
            if code == last {
                return requests;
            }
        }
    }

    /// All requests that have come.
    pub fn heard(&self) -> Vec<Request> {
        self.requests.try_iter().collect()
    }

    /// Sends bytes unasked, with these descriptors. What has been seen of requests has been answered.
    pub fn push(&self, bytes: &[u8], files: &[OwnedFd]) {
        drop(self.answering.lock().unwrap());
        send(&self.shared, bytes, files).unwrap();
    }

    /// Waits until the core has closed the conversation.
    pub fn closed(mut self) {
        self.thread.take().unwrap().join().unwrap();
    }

    /// Ends it as a kill does. What has been seen of requests has been answered.
    pub fn die(mut self) {
        drop(self.answering.lock().unwrap());
        let _ = self.shared.shutdown(std::net::Shutdown::Both);
        self.thread.take().unwrap().join().unwrap();
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        let _ = self.shared.shutdown(std::net::Shutdown::Both);
    }
}

fn serve(
    honest: Honest,
    mut socket: UnixStream,
    mut script: impl FnMut(&Request) -> Act,
    heard: &Sender<Request>,
    answering: &Mutex<()>,
) {
    while let Some(request) = receive(&mut socket) {
        let _answering = answering.lock().unwrap();
        let act = script(&request);
        let reply = match act {
            Act::Answer => honest.reply(&request).map(|(body, files)| (message(&request, &body), files)),
            Act::Close => {
                let _ = socket.shutdown(std::net::Shutdown::Both);
                let _ = heard.send(request);
                return;
            }
            Act::Silence => None,
            Act::Send(bytes, files) => Some((bytes, files)),
        };
        let _ = heard.send(request);
        if let Some((bytes, files)) = reply {
            // A core that has hung up is the end, which the next receive tells.
            let _ = send(&socket, &bytes, &files);
        }
    }
}

fn send(socket: &UnixStream, bytes: &[u8], files: &[OwnedFd]) -> nix::Result<usize> {
    let fds: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
    sendmsg::<UnixAddr>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None)
}

/// Whether nobody has the pipe's other end open any more, or will not have within [`DEADLINE`].
pub fn ends(pipe: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::try_from(DEADLINE).unwrap()).unwrap() > 0
}

/// The next request, or none at the end of the conversation.
fn receive(socket: &mut UnixStream) -> Option<Request> {
    let mut header = [0; 12];
    let mut control = nix::cmsg_space!([RawFd; 32]);
    let (count, files) = {
        let mut buffers = [IoSliceMut::new(&mut header)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut buffers, Some(&mut control), flags).ok()?;
        let mut files = Vec::new();
        for part in message.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(fds) = part {
                // SAFETY: the kernel has just made these descriptors for this process and nothing else knows them.
                files.extend(fds.into_iter().map(|fd| unsafe { File::from_raw_fd(fd) }));
            }
        }
        (message.bytes, files)
    };
    if count == 0 {
        return None;
    }
    socket.read_exact(&mut header[count..]).ok()?;
    let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
    let mut body = vec![0; word(8) as usize];
    socket.read_exact(&mut body).ok()?;
    Some(Request { code: word(0), flags: word(4), body, files })
}
