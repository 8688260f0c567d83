//! A tap in a network namespace of its own, and the kernel's end of it: a packet socket.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};

use crate::frame::{ETHERTYPE, Frame, HEADER};

const NAME: &str = "tap0";

/// linux/if_tun.h.
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
/// TUN_F_CSUM and TUN_F_TSO4.
const OFFLOADS: libc::c_ulong = 3;

/// The most frames that go with one system call.
pub const BATCH: usize = 32;

/// The tap.
#[derive(Debug)]
pub struct Wire {
    /// Its queue, which does not block.
    pub tap: OwnedFd,
}

/// What the kernel has counted on the tap. Receiving is what comes from the tap's owner.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Frames that came out of the tap.
    pub received: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Frames for which the tap's queue had no room.
    pub dropped: u64,
}

/// An ioctl on a `struct ifreq` with the tap's name and these flags.
fn interface(fd: &impl AsRawFd, request: libc::Ioctl, flags: i32) -> Result<()> {
    // SAFETY: all zeroes are a valid `struct ifreq`.
    let mut ifreq: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in ifreq.ifr_name.iter_mut().zip(NAME.bytes()) {
        *place = byte.cast_signed();
    }
    ifreq.ifr_ifru.ifru_flags = flags.try_into()?;
    // SAFETY: the requests used here take a `struct ifreq`.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut ifreq) })?;
    Ok(())
}

/// A socket of this kind, closed on exec.
fn socket(family: i32, kind: i32, protocol: i32) -> Result<OwnedFd> {
    // SAFETY: socket(2) makes a descriptor, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(Errno::result(libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol))?) })
}

fn set_option(socket: &OwnedFd, level: i32, option: i32, value: i32) -> Result<()> {
    let size = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the kernel reads one int.
    Errno::result(unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), size) })?;
    Ok(())
}

impl Wire {
    /// Moves this process, which has one thread, into a network namespace of its own, and makes a tap there that is up.
    ///
    /// # Errors
    /// No root, or no /dev/net/tun.
    pub fn new() -> Result<Self> {
        unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace: it takes root")?;
        // The kernel greets new links over IPv6, which would be counted.
        let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
        let mut options = File::options();
        let tun = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun");
        let tap = OwnedFd::from(tun.context("open /dev/net/tun")?);
        interface(&tap, TUNSETIFF, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR).context("make a tap")?;
        let size = HEADER as libc::c_int;
        // SAFETY: the request reads one int.
        Errno::result(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) })?;
        interface(&socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?, libc::SIOCSIFFLAGS, libc::IFF_UP)?;
        Ok(Self { tap })
    }

    /// Has the kernel leave checksums and segmentation to the tap's owner.
    ///
    /// # Errors
    /// What ioctl(2) answers.
    pub fn offload(&self) -> Result<()> {
        // SAFETY: the request takes a number.
        Errno::result(unsafe { libc::ioctl(self.tap.as_raw_fd(), TUNSETOFFLOAD, OFFLOADS) })?;
        Ok(())
    }

    /// A packet socket on the tap that gets the frames of [`ETHERTYPE`] as they come in if `receives`. `large` is for frames
    /// that are to be divided.
    ///
    /// # Errors
    /// No privilege.
    pub fn socket(&self, receives: bool, large: bool) -> Result<OwnedFd> {
        let socket = socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, 0)?;
        if large {
            set_option(&socket, libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1).context("send large frames")?;
        }
        set_option(&socket, libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, 1).context("send past the queueing")?;
        set_option(&socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, 8 << 20).context("set the send buffer")?;
        let name = std::ffi::CString::new(NAME)?;
        // SAFETY: all zeroes are a valid `struct sockaddr_ll`, bind(2) reads one, and the name ends with a null.
        unsafe {
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = if receives { u16::from_ne_bytes(ETHERTYPE) } else { 0 };
            address.sll_ifindex = libc::if_nametoindex(name.as_ptr()).cast_signed();
            let size = size_of_val(&address) as libc::socklen_t;
            Errno::result(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size)).context("bind")?;
        }
        Ok(socket)
    }

    /// What the kernel has counted so far.
    ///
    /// # Errors
    /// No /proc.
    pub fn counters(&self) -> Result<Counters> {
        let text = fs::read_to_string("/proc/self/net/dev")?;
        let line = text.lines().find_map(|line| line.trim().strip_prefix(NAME)?.strip_prefix(':'));
        let fields = line.context("the tap is not in /proc/self/net/dev")?.split_whitespace();
        let fields: Vec<u64> = fields.map(str::parse).collect::<Result<_, _>>()?;
        Ok(Counters { received_bytes: fields[0], received: fields[1], dropped: fields[11] })
    }
}

/// Sends numbered frames from the kernel's side, several with one call.
pub struct Sender {
    socket: OwnedFd,
    frame: Frame,
    buffers: Vec<Vec<u8>>,
    /// The number of the next frame.
    pub next: u64,
}

impl Sender {
    /// A sender on `wire`.
    ///
    /// # Errors
    /// As for [`Wire::socket`].
    pub fn new(wire: &Wire, frame: Frame) -> Result<Self> {
        let socket = wire.socket(false, frame.is_large())?;
        // The header of a packet socket has no number of buffers (packet(7)).
        let header = if frame.is_large() { frame.header()[..HEADER - 2].to_vec() } else { Vec::new() };
        let buffers = (0..BATCH).map(|_| [header.clone(), frame.bytes(0)].concat()).collect();
        Ok(Self { socket, frame, buffers, next: 0 })
    }

    /// Sends up to `count` frames, and at most [`BATCH`]; returns how many went.
    ///
    /// # Errors
    /// What sendmmsg(2) answers, unless it has no room.
    pub fn send(&mut self, count: usize) -> Result<usize> {
        let count = count.min(BATCH);
        let header = if self.frame.is_large() { HEADER - 2 } else { 0 };
        // SAFETY: all zeroes are valid for both kinds.
        let (mut parts, mut messages): ([libc::iovec; BATCH], [libc::mmsghdr; BATCH]) = unsafe { std::mem::zeroed() };
        for (index, buffer) in self.buffers.iter_mut().take(count).enumerate() {
            self.frame.set_number(&mut buffer[header..], self.next + index as u64);
            parts[index] = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
            messages[index].msg_hdr.msg_iov = &raw mut parts[index];
            messages[index].msg_hdr.msg_iovlen = 1;
        }
        // SAFETY: `count` messages of one part each, and each part is a buffer of `self`.
        let sent = unsafe { libc::sendmmsg(self.socket.as_raw_fd(), messages.as_mut_ptr(), count as u32, 0) };
        let sent = match Errno::result(sent) {
            Ok(sent) => sent as usize,
            Err(Errno::EAGAIN | Errno::ENOBUFS) => 0,
            Err(errno) => return Err(errno).context("send frames"),
        };
        self.next += sent as u64;
        Ok(sent)
    }
}

/// Reads or writes `bytes` of one frame on a tap or packet socket; `None` if there is nothing, or no room.
///
/// # Errors
/// What the system call answers.
pub fn now(outcome: nix::Result<usize>) -> io::Result<Option<usize>> {
    match outcome {
        Ok(count) => Ok(Some(count)),
        Err(Errno::EAGAIN | Errno::ENOBUFS) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Waits until `fd` is readable, for so many milliseconds.
///
/// # Errors
/// What poll(2) answers.
pub fn readable(fd: &OwnedFd, milliseconds: u16) -> io::Result<bool> {
    let mut fds = [nix::poll::PollFd::new(fd.as_fd(), nix::poll::PollFlags::POLLIN)];
    Ok(nix::poll::poll(&mut fds, milliseconds)? > 0)
}
