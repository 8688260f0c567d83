//! The ioctls of the host's devices that have no safe wrapper elsewhere: taps, interfaces, terminals, KVM.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd};

use kvm_ioctls::Kvm;
use nix::errno::Errno;
use nix::libc::{self, c_int, c_short, c_ulong};

/// `struct ifreq` (netdevice(7)): a name, and 24 bytes whose meaning the request decides.
#[repr(C, align(8))]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    value: [u8; 24],
}

impl InterfaceRequest {
    /// `name` has at most 15 bytes; longer ones are cut.
    fn new(name: &str, value: &[u8]) -> Self {
        let mut request = Self { name: [0; libc::IFNAMSIZ], value: [0; 24] };
        for (to, from) in request.name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
            *to = from;
        }
        for (to, from) in request.value.iter_mut().zip(value) {
            *to = *from;
        }
        request
    }

    fn issue(&mut self, fd: BorrowedFd<'_>, request: c_ulong) -> Result<(), Errno> {
        // SAFETY: every request of this module takes a `struct ifreq`, which `self` has the layout and size of (40 bytes),
        // and writes nothing beyond it.
        Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request as libc::Ioctl, std::ptr::from_mut(self)) })?;
        Ok(())
    }
}

/// An IPv4 `struct sockaddr_in` without a port.
fn address(ip: Ipv4Addr) -> [u8; 8] {
    let [a, b, c, d] = ip.octets();
    let [low, high] = (libc::AF_INET as u16).to_ne_bytes();
    [low, high, 0, 0, a, b, c, d]
}

/// Ties `/dev/net/tun` to an interface, perhaps a new one; a `%d` in `name` becomes a free number. Answers the name.
///
/// # Errors
/// What TUNSETIFF answers.
pub fn tun_set_interface(tun: BorrowedFd<'_>, name: &str, flags: c_int) -> Result<String, Errno> {
    // The flags are 16 bits wide here; the cast keeps exactly those.
    let mut request = InterfaceRequest::new(name, &(flags as c_short).to_ne_bytes());
    request.issue(tun, libc::TUNSETIFF as c_ulong)?;
    Ok(request.name.iter().take_while(|byte| **byte != 0).map(|byte| char::from(*byte)).collect())
}

/// Sets the length of the virtio-net header of a tap.
///
/// # Errors
/// What TUNSETVNETHDRSZ answers.
pub fn tun_set_header_size(tun: BorrowedFd<'_>, size: c_int) -> Result<(), Errno> {
    // SAFETY: the request reads one int.
    Errno::result(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) })?;
    Ok(())
}

/// The MTU of an interface; `socket` is any.
///
/// # Errors
/// What SIOCGIFMTU answers.
pub fn interface_mtu(socket: BorrowedFd<'_>, name: &str) -> Result<u32, Errno> {
    let mut request = InterfaceRequest::new(name, &[]);
    request.issue(socket, libc::SIOCGIFMTU as c_ulong)?;
    let [a, b, c, d, ..] = request.value;
    Ok(u32::from_ne_bytes([a, b, c, d]))
}

/// Sets the MTU of an interface.
///
/// # Errors
/// What SIOCSIFMTU answers.
pub fn set_interface_mtu(socket: BorrowedFd<'_>, name: &str, mtu: u16) -> Result<(), Errno> {
    InterfaceRequest::new(name, &c_int::from(mtu).to_ne_bytes()).issue(socket, libc::SIOCSIFMTU as c_ulong)
}

/// Gives an interface an address and a prefix length of 1 to 32.
///
/// # Errors
/// What SIOCSIFADDR and SIOCSIFNETMASK answer.
pub fn set_interface_address(socket: BorrowedFd<'_>, name: &str, ip: Ipv4Addr, prefix: u8) -> Result<(), Errno> {
    let mask = u32::MAX.checked_shl(32_u32.saturating_sub(prefix.into())).unwrap_or(0);
    InterfaceRequest::new(name, &address(ip)).issue(socket, libc::SIOCSIFADDR as c_ulong)?;
    InterfaceRequest::new(name, &address(Ipv4Addr::from(mask))).issue(socket, libc::SIOCSIFNETMASK as c_ulong)
}

/// Brings an interface up.
///
/// # Errors
/// What SIOCGIFFLAGS and SIOCSIFFLAGS answer.
pub fn bring_interface_up(socket: BorrowedFd<'_>, name: &str) -> Result<(), Errno> {
    let mut request = InterfaceRequest::new(name, &[]);
    request.issue(socket, libc::SIOCGIFFLAGS as c_ulong)?;
    let [low, high, ..] = request.value;
    let flags = c_short::from_ne_bytes([low, high]) | libc::IFF_UP as c_short;
    InterfaceRequest::new(name, &flags.to_ne_bytes()).issue(socket, libc::SIOCSIFFLAGS as c_ulong)
}

/// The size of a terminal: columns and rows.
///
/// # Errors
/// What TIOCGWINSZ answers.
pub fn window_size(terminal: BorrowedFd<'_>) -> Result<(u16, u16), Errno> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the request writes one `struct winsize`.
    Errno::result(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) })?;
    Ok((size.ws_col, size.ws_row))
}

/// KVM behind an open `/dev/kvm`, to ask it what it can do.
///
/// # Errors
/// When the descriptor cannot be duplicated.
pub fn kvm(file: &File) -> io::Result<Kvm> {
    let fd = file.try_clone()?.into_raw_fd();
    // SAFETY: the descriptor has just been duplicated and is given away here. Whether it is KVM decides only what the
    // requests answer.
    Ok(unsafe { Kvm::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_kernels_layout() {
        assert_eq!(size_of::<InterfaceRequest>(), 40);
        assert_eq!(address(Ipv4Addr::new(10, 0, 0, 1)), [2, 0, 0, 0, 10, 0, 0, 1]);
        let long = InterfaceRequest::new("a-name-that-is-too-long", &[1; 99]);
        assert_eq!(long.name.last(), Some(&0), "the name is terminated");
    }
}
