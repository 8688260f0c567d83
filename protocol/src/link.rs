//! Messages with descriptors over a `SOCK_SEQPACKET` socket.
//!
//! One datagram is one JSON message. A [`Descriptor`] is an ordinary field of a message: it travels as SCM_RIGHTS
//! beside the text and stands in the text as its index. A message whose descriptors and text do not match is refused
//! whole, and every descriptor that came with it is closed.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::io::{self, IoSlice, IoSliceMut};
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, recvmsg, sendmsg,
    socketpair,
};
use serde::de::{DeserializeOwned, Error as _};
use serde::ser::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The longest message in bytes.
pub const MESSAGE: usize = 128 * 1024;

/// The most descriptors in one message.
pub const DESCRIPTORS: usize = 32;

/// The number under which a child finds its control socket.
pub const CONTROL: RawFd = 3;

/// The version of the messages in this crate.
pub const VERSION: u32 = 1;

/// Why a message could not be sent or received. After any of these but [`LinkError::WouldBlock`] the link is of no use.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The other end is gone.
    #[error("the control channel was closed by the other side")]
    Closed,
    /// Nothing to receive, or no room to send, without waiting.
    #[error("the control channel is not ready")]
    WouldBlock,
    /// sendmsg(2) failed.
    #[error("send on the control channel: {0}")]
    Send(Errno),
    /// recvmsg(2) failed.
    #[error("receive on the control channel: {0}")]
    Receive(Errno),
    /// The message is longer than [`MESSAGE`] or has more than [`DESCRIPTORS`] descriptors.
    #[error("a message on the control channel is too large")]
    TooLarge,
    /// The text or the descriptors are not a message of this direction.
    #[error("malformed message on the control channel: {0}")]
    Malformed(String),
    /// The first message was not a greeting of a version that is understood.
    #[error(
        "the other side of the control channel speaks version {0}, this one {VERSION}: install executables of one release"
    )]
    Version(u32),
}

/// A file descriptor as a field of a message.
#[derive(Debug)]
pub struct Descriptor(OwnedFd);

thread_local! {
    /// The descriptors of the message being written; `None` outside of a send.
    static OUTGOING: RefCell<Option<Vec<RawFd>>> = const { RefCell::new(None) };
    /// The descriptors of the message being read; `None` outside of a receive.
    static INCOMING: RefCell<Option<Vec<Option<OwnedFd>>>> = const { RefCell::new(None) };
}

impl Descriptor {
    /// The descriptor itself.
    pub fn into_fd(self) -> OwnedFd {
        self.0
    }
}

impl From<OwnedFd> for Descriptor {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Serialize for Descriptor {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let index = OUTGOING.with_borrow_mut(|outgoing| {
            let fds = outgoing.as_mut().ok_or_else(|| S::Error::custom("a descriptor outside of a message"))?;
            fds.push(self.0.as_raw_fd());
            Ok(fds.len() - 1)
        })?;
        serializer.serialize_u64(index as u64)
    }
}

impl<'de> Deserialize<'de> for Descriptor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let index = usize::deserialize(deserializer)?;
        INCOMING.with_borrow_mut(|incoming| {
            let fds = incoming.as_mut().ok_or_else(|| D::Error::custom("a descriptor outside of a message"))?;
            let fd = fds.get_mut(index).and_then(Option::take);
            fd.map(Self).ok_or_else(|| D::Error::custom(format!("descriptor {index} did not come with the message")))
        })
    }
}

/// The first message in each direction.
#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    version: u32,
    /// Optional abilities of the sender; unknown ones are ignored.
    features: Vec<String>,
}

/// One end of a control channel: it sends `S` and receives `R`.
///
/// Any thread may send; one thread at a time may receive.
///
/// A greeting is sent when the channel is made; the first message received has to be the other side's.
#[derive(Debug)]
pub struct Channel<S, R> {
    socket: OwnedFd,
    greeted: AtomicBool,
    direction: PhantomData<fn(S) -> R>,
}

impl<S: Serialize, R: DeserializeOwned> Channel<S, R> {
    /// A connected pair: this side's channel, and the socket to be handed to a child as descriptor [`CONTROL`].
    ///
    /// # Errors
    /// What socketpair(2) answers, or the greeting's [`LinkError`].
    pub fn pair() -> Result<(Self, OwnedFd), LinkError> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(LinkError::Send)?;
        Ok((Self::connected(ours)?, theirs))
    }

    /// One end of a connected `SOCK_SEQPACKET` socket.
    ///
    /// # Errors
    /// The greeting's [`LinkError`].
    pub fn connected(socket: OwnedFd) -> Result<Self, LinkError> {
        Self::over(socket).map_err(|(error, _)| error)
    }

    /// The child's end: descriptor [`CONTROL`], as left by the jailer.
    ///
    /// # Errors
    /// [`LinkError::Send`] when the descriptor is not a socket, as when the executable is started by hand.
    pub fn inherited() -> Result<Self, LinkError> {
        // SAFETY: the jailer leaves exactly the descriptors 0 to 3 open and this is called once, first thing in main;
        // when started by hand the number may be closed, in which case every use answers EBADF.
        let socket = unsafe { OwnedFd::from_raw_fd(CONTROL) };
        Self::over(socket).map_err(|(error, socket)| {
            // A number that is no open descriptor must not reach close(2) through drop: the standard library aborts on it.
            let _ = socket.into_raw_fd();
            error
        })
    }

    fn over(socket: OwnedFd) -> Result<Self, (LinkError, OwnedFd)> {
        // The first message of a socket has room whoever is at the other end; ozone waits for nobody even so.
        let hello = Hello { version: VERSION, features: Vec::new() };
        if let Err(error) = send(socket.as_fd(), &hello, MsgFlags::MSG_DONTWAIT) {
            return Err((error, socket));
        }
        Ok(Self { socket, greeted: AtomicBool::new(false), direction: PhantomData })
    }

    /// Sends a message and waits for room if need be. Descriptors are duplicated into the receiver.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn send(&self, message: &S) -> Result<(), LinkError> {
        send(self.socket.as_fd(), message, MsgFlags::empty())
    }

    /// Sends a message, or answers [`LinkError::WouldBlock`] when the other side has left too many unread.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn try_send(&self, message: &S) -> Result<(), LinkError> {
        send(self.socket.as_fd(), message, MsgFlags::MSG_DONTWAIT)
    }

    /// Receives a message and waits for one.
    ///
    /// # Errors
    /// See [`LinkError`]; [`LinkError::Closed`] at the end.
    pub fn receive(&self) -> Result<R, LinkError> {
        self.receive_with(MsgFlags::empty())
    }

    /// Receives a message that is there already, or answers [`LinkError::WouldBlock`].
    ///
    /// # Errors
    /// See [`LinkError`]; [`LinkError::Closed`] at the end.
    pub fn try_receive(&self) -> Result<R, LinkError> {
        self.receive_with(MsgFlags::MSG_DONTWAIT)
    }

    fn receive_with(&self, flags: MsgFlags) -> Result<R, LinkError> {
        if !self.greeted.load(Ordering::Relaxed) {
            let hello: Hello = receive(self.socket.as_fd(), flags)?;
            if hello.version != VERSION {
                return Err(LinkError::Version(hello.version));
            }
            self.greeted.store(true, Ordering::Relaxed);
        }
        receive(self.socket.as_fd(), flags)
    }
}

impl<S, R> AsFd for Channel<S, R> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn send(socket: BorrowedFd<'_>, message: &impl Serialize, flags: MsgFlags) -> Result<(), LinkError> {
    OUTGOING.set(Some(Vec::new()));
    let text = serde_json::to_vec(message);
    let fds = OUTGOING.take().unwrap_or_default();
    let text = text.map_err(|error| LinkError::Malformed(error.to_string()))?;
    if text.len() > MESSAGE || fds.len() > DESCRIPTORS {
        return Err(LinkError::TooLarge);
    }
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
    let flags = flags | MsgFlags::MSG_NOSIGNAL;
    loop {
        match sendmsg::<UnixAddr>(socket.as_raw_fd(), &[IoSlice::new(&text)], control, flags, None) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Err(LinkError::WouldBlock),
            Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(LinkError::Closed),
            Err(errno) => return Err(LinkError::Send(errno)),
        }
    }
}

fn receive<T: DeserializeOwned>(socket: BorrowedFd<'_>, flags: MsgFlags) -> Result<T, LinkError> {
    let mut text = vec![0; MESSAGE];
    let mut control = nix::cmsg_space!([RawFd; DESCRIPTORS]);
    let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
    let (length, truncated, fds) = loop {
        let mut buffers = [IoSliceMut::new(&mut text)];
        match recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut buffers, Some(&mut control), flags) {
            Ok(message) => {
                let mut fds = Vec::new();
                for part in message.cmsgs().map_err(LinkError::Receive)? {
                    if let ControlMessageOwned::ScmRights(received) = part {
                        // SAFETY: the kernel has just made these descriptors for this process and nothing else knows them.
                        fds.extend(received.into_iter().map(|fd| Some(unsafe { OwnedFd::from_raw_fd(fd) })));
                    }
                }
                break (message.bytes, message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC), fds);
            }
            // A sender that ended with messages of ours unread leaves a pending ECONNRESET, which is reported once and
            // before what it had sent: its last words are still in the queue.
            Err(Errno::EINTR | Errno::ECONNRESET) => {}
            Err(Errno::EAGAIN) => return Err(LinkError::WouldBlock),
            Err(errno) => return Err(LinkError::Receive(errno)),
        }
    };
    if truncated {
        return Err(LinkError::TooLarge);
    }
    if length == 0 {
        return Err(LinkError::Closed);
    }
    INCOMING.set(Some(fds));
    let message = serde_json::from_slice(text.get(..length).unwrap_or_default());
    let unclaimed = INCOMING.take().unwrap_or_default().into_iter().flatten().count();
    let message = message.map_err(|error| LinkError::Malformed(error.to_string()))?;
    if unclaimed > 0 {
        return Err(LinkError::Malformed(format!("{unclaimed} descriptors without a field")));
    }
    Ok(message)
}

impl From<LinkError> for io::Error {
    fn from(error: LinkError) -> Self {
        io::Error::other(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};

    #[derive(Serialize, Deserialize)]
    struct Carry {
        name: String,
        fds: Vec<Descriptor>,
    }

    #[derive(Serialize, Deserialize, Debug)]
    struct Plain {
        name: String,
    }

    fn connected<A, B>() -> (Channel<A, B>, Channel<B, A>)
    where
        A: Serialize + DeserializeOwned,
        B: Serialize + DeserializeOwned,
    {
        let (ours, theirs) = Channel::pair().unwrap();
        (ours, Channel::connected(theirs).unwrap())
    }

    #[test]
    fn descriptors_arrive_as_fields_in_order() {
        let (here, there) = connected::<Carry, Plain>();
        let (reader, writer) = nix::unistd::pipe().unwrap();
        here.send(&Carry { name: "pipe".into(), fds: vec![reader.into(), writer.into()] }).unwrap();
        let Carry { name, fds } = there.receive().unwrap();
        assert_eq!(name, "pipe");
        let mut files: Vec<File> = fds.into_iter().map(|fd| File::from(fd.into_fd())).collect();
        files[1].write_all(b"through").unwrap();
        let mut text = [0; 7];
        files[0].read_exact(&mut text).unwrap();
        assert_eq!(&text, b"through");
    }

    #[test]
    fn an_unclaimed_descriptor_is_refused_and_closed() {
        let (ours, theirs) = Channel::<Carry, Plain>::pair().unwrap();
        let there = Channel::<Plain, Plain>::connected(theirs).unwrap();
        let (reader, writer) = nix::unistd::pipe().unwrap();
        ours.send(&Carry { name: "extra".into(), fds: vec![writer.into()] }).unwrap();
        assert!(matches!(there.receive(), Err(LinkError::Malformed(_))));
        let mut rest = Vec::new();
        File::from(reader).read_to_end(&mut rest).unwrap();
        assert!(rest.is_empty(), "the write end is closed everywhere, or this would not have ended");
    }

    #[test]
    fn a_missing_descriptor_is_refused() {
        let (ours, theirs) = Channel::<serde_json::Value, Plain>::pair().unwrap();
        let there = Channel::<Plain, Carry>::connected(theirs).unwrap();
        ours.send(&serde_json::json!({"name": "none", "fds": [0]})).unwrap();
        assert!(matches!(there.receive(), Err(LinkError::Malformed(_))));
    }

    #[test]
    fn one_descriptor_cannot_be_claimed_twice() {
        let (ours, theirs) = Channel::<serde_json::Value, Plain>::pair().unwrap();
        let there = Channel::<Plain, Carry>::connected(theirs).unwrap();
        ours.send(&serde_json::json!({"name": "none", "fds": [0, 0]})).unwrap();
        assert!(matches!(there.receive(), Err(LinkError::Malformed(_))));
    }

    #[test]
    fn the_first_message_has_to_be_a_greeting() {
        let (ours, theirs) = Channel::<Plain, Plain>::pair().unwrap();
        send(theirs.as_fd(), &Plain { name: "hasty".into() }, MsgFlags::empty()).unwrap();
        assert!(matches!(ours.receive(), Err(LinkError::Malformed(_))));
        let (ours, theirs) = Channel::<Plain, Plain>::pair().unwrap();
        send(theirs.as_fd(), &Hello { version: VERSION + 1, features: vec![] }, MsgFlags::empty()).unwrap();
        assert!(matches!(ours.receive(), Err(LinkError::Version(_))));
    }

    #[test]
    fn a_full_channel_never_blocks_the_sender() {
        let (here, _there) = connected::<Plain, Plain>();
        let message = Plain { name: "x".repeat(MESSAGE / 2) };
        let refused = (0..10_000).find_map(|_| here.try_send(&message).err());
        assert!(matches!(refused, Some(LinkError::WouldBlock)));
    }

    #[test]
    fn a_closed_channel_reads_as_closed() {
        let (here, there) = connected::<Plain, Plain>();
        here.send(&Plain { name: "last".into() }).unwrap();
        drop(here);
        assert_eq!(there.receive().unwrap().name, "last");
        assert!(matches!(there.receive(), Err(LinkError::Closed)));
    }

    #[test]
    fn nothing_to_receive_is_not_an_error_of_the_link() {
        let (here, _there) = connected::<Plain, Plain>();
        here.receive_with(MsgFlags::MSG_DONTWAIT).unwrap_err();
        assert!(matches!(here.try_receive(), Err(LinkError::WouldBlock)));
    }
}
