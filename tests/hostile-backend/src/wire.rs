//! Messages of vhost-user (vhost-user specification, "Message Specification"), good and bad ones.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};

use crate::sys;

/// Bytes of a header: request, flags, size.
const HEADER: usize = 12;

/// No request is longer.
const PAYLOAD: usize = 4096;

/// The flags of an answer: version 1, and that it is one.
pub const ANSWER: u32 = 1 | 1 << 2;

/// The flag of a request that wants to be acknowledged.
const NEED_REPLY: u32 = 1 << 3;

/// A request of the core.
#[derive(Debug)]
pub struct Message {
    /// Which request.
    pub request: u32,
    /// Whether an acknowledgement is wanted if there is no other answer.
    pub needs_reply: bool,
    /// What follows the header.
    pub payload: Vec<u8>,
    /// What came with it.
    pub files: Vec<File>,
}

impl Message {
    /// The eight bytes at `offset` of the payload; 0 beyond its end.
    pub fn u64(&self, offset: usize) -> u64 {
        self.payload.get(offset..).and_then(<[u8]>::first_chunk).map_or(0, |bytes| u64::from_ne_bytes(*bytes))
    }

    /// The four bytes at `offset` of the payload; 0 beyond its end.
    pub fn u32(&self, offset: usize) -> u32 {
        self.payload.get(offset..).and_then(<[u8]>::first_chunk).map_or(0, |bytes| u32::from_ne_bytes(*bytes))
    }
}

/// A request's answer, or what is sent in its place.
#[derive(Debug, Default)]
pub struct Answer {
    /// Which request it says it answers.
    pub request: u32,
    /// Its flags.
    pub flags: u32,
    /// How long it says the rest is.
    pub size: u32,
    /// The rest.
    pub payload: Vec<u8>,
}

impl Answer {
    /// As it should be.
    pub fn new(request: u32, payload: Vec<u8>) -> Self {
        Self { request, flags: ANSWER, size: u32::try_from(payload.len()).unwrap_or(u32::MAX), payload }
    }

    /// The bytes on the wire.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = [self.request, self.flags, self.size].map(u32::to_ne_bytes).concat();
        bytes.extend(&self.payload);
        bytes
    }
}

/// Receives a request; `None` when the core has closed the connection.
pub fn receive(socket: &OwnedFd) -> Result<Option<Message>, String> {
    let mut header = [0; HEADER];
    let Some(files) = fill(socket, &mut header)? else { return Ok(None) };
    let [request, flags, size] =
        std::array::from_fn(|index| header.as_chunks::<4>().0.get(index).map_or(0, |bytes| u32::from_ne_bytes(*bytes)));
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    if size > PAYLOAD {
        return Err(format!("request {request} of {size} bytes"));
    }
    let mut payload = vec![0; size];
    if size > 0 && fill(socket, &mut payload)?.is_none() {
        return Ok(None);
    }
    Ok(Some(Message { request, needs_reply: flags & NEED_REPLY != 0, payload, files }))
}

/// Fills `bytes`; `None` at the end of the connection.
fn fill(socket: &OwnedFd, bytes: &mut [u8]) -> Result<Option<Vec<File>>, String> {
    let (mut done, mut files) = (0, Vec::new());
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let mut control = nix::cmsg_space!([RawFd; 32]);
        let mut parts = [IoSliceMut::new(rest)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = match recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags) {
            Ok(message) => message,
            Err(Errno::EINTR) => continue,
            Err(Errno::ECONNRESET) => return Ok(None),
            Err(errno) => return Err(format!("receive: {errno}")),
        };
        for part in message.cmsgs().map_err(|errno| format!("receive: {errno}"))? {
            if let ControlMessageOwned::ScmRights(numbers) = part {
                files.extend(sys::received(&numbers));
            }
        }
        if message.bytes == 0 {
            return Ok(None);
        }
        done += message.bytes;
    }
    Ok(Some(files))
}

/// Sends bytes and descriptors.
pub fn send(socket: &OwnedFd, bytes: &[u8], files: &[RawFd]) -> Result<(), String> {
    let rights = [ControlMessage::ScmRights(files)];
    let control = if files.is_empty() { &rights[..0] } else { &rights[..] };
    sendmsg::<UnixAddr>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None)
        .map(drop)
        .map_err(|errno| format!("send: {errno}"))
}
