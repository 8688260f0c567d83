//! Memory for what is in flight (vhost-user specification, "Inflight I/O tracking"), and what is passed off as such.
//!
//! An honest disk of one thread answers a request before it takes the next one: nothing is ever in flight between two
//! processes, and the memory stays as nobody has used it.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::play;

/// What is answered to VHOST_USER_GET_INFLIGHT_FD.
#[derive(Debug)]
pub struct Region {
    /// How long it is said to be.
    pub size: u64,
    /// Where in the descriptor it is said to begin.
    pub offset: u64,
    /// The descriptors that go along.
    pub numbers: Vec<RawFd>,
    /// Those of them that were made for it.
    made: Option<File>,
}

/// Other descriptors that a play may hand over.
#[derive(Debug)]
pub struct Others<'a> {
    /// The image.
    pub image: BorrowedFd<'a>,
    /// The pipe that shows when nothing is under way any more.
    pub sentinel: BorrowedFd<'a>,
    /// The control channel.
    pub control: BorrowedFd<'a>,
}

/// Bytes of the memory for so many queues of so many descriptors.
fn bytes(queues: u16, size: u16) -> usize {
    usize::from(queues) * (16 + 16 * usize::from(size)).next_multiple_of(64)
}

/// Makes what `play` wants the core to get.
pub fn make(play: Option<play::Inflight>, queues: u16, size: u16, others: &Others<'_>) -> Result<Region, String> {
    use play::Inflight::{
        Cut, Full, Huge, Image, None as Nothing, Odd, Offset, Pipe, Small, Socket, Two, Unsealed, Zero,
    };
    let needed = bytes(queues, size);
    let other = |descriptor: BorrowedFd<'_>| Region {
        size: needed as u64,
        offset: 0,
        numbers: vec![descriptor.as_raw_fd()],
        made: None,
    };
    match play {
        Some(Image) => return Ok(other(others.image)),
        Some(Pipe) => return Ok(other(others.sentinel)),
        Some(Socket) => return Ok(other(others.control)),
        _ => {}
    }
    let length = match play {
        Some(Small) => 64,
        Some(Zero) => 0,
        Some(Huge) => 4096,
        Some(Odd) => needed - 1,
        _ => needed,
    };
    let seal = !matches!(play, Some(Unsealed | Cut));
    let file = memory(length, play == Some(Full), seal)?;
    let number = file.as_raw_fd();
    let numbers = match play {
        Some(Nothing) => Vec::new(),
        Some(Two) => vec![number, number],
        _ => vec![number],
    };
    let size = if play == Some(Huge) { 4 << 30 } else { length as u64 };
    Ok(Region { size, offset: if play == Some(Offset) { 1 } else { 0 }, numbers, made: Some(file) })
}

fn memory(length: usize, full: bool, seal: bool) -> Result<File, String> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let make = || -> std::io::Result<File> {
        let mut file = File::from(memfd_create(c"inflight", flags)?);
        // Its own filter does not let it set a length. All ones: every descriptor in flight, every number out of range.
        file.write_all(&vec![if full { 0xff } else { 0 }; length])?;
        if seal {
            let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
            fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(seals))?;
        }
        Ok(file)
    };
    make().map_err(|error| format!("memory for what is in flight: {error}"))
}

impl Region {
    /// Cuts the memory off, after the core has it.
    pub fn cut(&self) {
        if let Some(file) = &self.made {
            let _ = file.set_len(0);
        }
    }
}
