//! Taps: an existing one by name, or one made for the run that ends with its last descriptor.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use nix::libc::{self, c_int};
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::{ResourceError, said};
use crate::ioctl;
use crate::journal::{Identity, Journal, Object, Vanishing};
use crate::spec::{Net, Tap};

/// The length of the header before every frame: `struct virtio_net_hdr_v1` (virtio 1.2, section 5.1.6).
const HEADER: c_int = 12;

/// The name of a tap made for a run; the kernel puts the first free number.
const MADE: &str = "ozone%d";

/// The MTU of a tap made for a run when none is asked for.
const MTU: u16 = 1500;

/// The queues of one tap.
#[derive(Debug)]
pub struct Taps {
    /// One descriptor per queue pair: attached, non-blocking, with a header of 12 bytes.
    pub queues: Vec<OwnedFd>,
    /// The interface's name on the host.
    pub name: String,
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// The MTU in bytes the guest is told.
    pub mtu: u16,
    /// What the journal says of one made for the run; struck out once the queues before it are closed.
    _noted: Option<Vanishing>,
}

/// Opens or makes the tap of a network interface.
///
/// # Errors
/// [`ResourceError`] naming the argument.
pub fn open(net: &Net, argument: &str, journal: &Journal) -> Result<Taps, ResourceError> {
    let host = |operation: &str, errno: Errno| ResourceError::host(argument, format!("{operation}: {}", errno.desc()));
    let control = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None);
    let control = control.map_err(|errno| host("socket", errno))?;
    let control = control.as_fd();
    match &net.tap {
        Tap::Named(name) => {
            // Without this look TUNSETIFF would make one.
            if if_nametoindex(name.as_str()).is_err() {
                let problem = format!(
                    "missing tap: this host has no interface '{name}'; make it with 'ip tuntap add {name} mode tap', or leave tap= out"
                );
                return Err(ResourceError::input(argument, problem));
            }
            let queues = attach_named(name, net.queues, argument)?;
            let own = ioctl::interface_mtu(control, name).map_err(|errno| host("read the MTU", errno))?;
            let own = u16::try_from(own).unwrap_or(u16::MAX);
            Ok(Taps { queues, name: name.clone(), mac: net.mac, mtu: net.mtu.unwrap_or(own), _noted: None })
        }
        Tap::Made(address) => {
            let multi = if net.queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
            let ((first, name), noted) = journal.make(Object::Tap, || {
                let (first, name) = attach(MADE, multi).map_err(|error| error.explain(argument, MADE))?;
                let index = if_nametoindex(name.as_str()).map_err(|errno| host("look at the tap", errno))?;
                let identity = Identity::Interface { name: name.clone(), index };
                Ok::<_, ResourceError>(((first, name), Some(identity)))
            })?;
            let noted = Some(noted.vanishing());
            let mut queues = vec![first];
            for _ in 1..net.queues {
                queues.push(attach(&name, multi).map_err(|error| error.explain(argument, &name))?.0);
            }
            let mtu = net.mtu.unwrap_or(MTU);
            ioctl::set_interface_mtu(control, &name, mtu).map_err(|errno| host("set the MTU", errno))?;
            if let Some((ip, prefix)) = address {
                ioctl::set_interface_address(control, &name, *ip, *prefix)
                    .map_err(|errno| host("set host-ip", errno))?;
            }
            ioctl::bring_interface_up(control, &name).map_err(|errno| host("bring the tap up", errno))?;
            Ok(Taps { queues, name, mac: net.mac, mtu, _noted: noted })
        }
    }
}

/// Attaches `queues` queues of an existing tap. Any further queues it could have stay unattached, so that the kernel steers
/// no frame to them.
fn attach_named(name: &str, queues: u16, argument: &str) -> Result<Vec<OwnedFd>, ResourceError> {
    let explain = |error: AttachError| error.explain(argument, name);
    // A tap says neither how it was made nor why it refuses: one of either kind answers EINVAL to the other kind's flags,
    // and what is no tap does so to both. A single queue works on both kinds.
    let (first, multi) = match attach(name, libc::IFF_MULTI_QUEUE) {
        Ok((queue, _)) => (queue, libc::IFF_MULTI_QUEUE),
        Err(AttachError::Interface(Errno::EINVAL)) => match attach(name, 0) {
            Err(AttachError::Interface(Errno::EINVAL)) => return Err(explain(AttachError::NoTap)),
            _ if queues > 1 => return Err(explain(AttachError::OneQueue)),
            attached => (attached.map_err(explain)?.0, 0),
        },
        Err(error) => return Err(explain(error)),
    };
    let mut attached = vec![first];
    for _ in 1..queues {
        attached.push(attach(name, multi).map_err(explain)?.0);
    }
    Ok(attached)
}

/// Why a queue could not be attached.
#[derive(Debug)]
enum AttachError {
    /// open(2) of /dev/net/tun.
    Open(std::io::Error),
    /// TUNSETIFF.
    Interface(Errno),
    /// TUNSETVNETHDRSZ.
    Header(Errno),
    /// The interface is of another kind.
    NoTap,
    /// The tap was made for one queue, and several are asked for.
    OneQueue,
}

impl AttachError {
    fn explain(self, argument: &str, name: &str) -> ResourceError {
        let rights = || {
            format!(
                "no rights on taps: run as root, or name one that is yours, made by root with 'ip tuntap add NAME mode tap user {}'",
                nix::unistd::geteuid()
            )
        };
        let problem = match self {
            Self::Open(error) => match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::ENOENT | Errno::ENODEV) => "/dev/net/tun is missing: load the module tun".to_owned(),
                Some(Errno::EACCES | Errno::EPERM) => rights(),
                _ => format!("/dev/net/tun: {}", said(&error)),
            },
            Self::Interface(Errno::EPERM) => rights(),
            Self::Interface(Errno::EBUSY) => format!("the tap '{name}' is in use by another program"),
            Self::Interface(Errno::E2BIG) => format!("the tap '{name}' has no queue left"),
            Self::Interface(errno) => format!("attach to the tap '{name}': {}", errno.desc()),
            Self::Header(errno) => format!("set the header of the tap '{name}': {}", errno.desc()),
            Self::NoTap => {
                let problem = format!(
                    "the interface '{name}' is not a tap; make one with 'ip tuntap add NAME mode tap', or leave tap= out"
                );
                return ResourceError::input(argument, problem);
            }
            Self::OneQueue => {
                let problem = format!(
                    "the tap '{name}' has one queue; leave queues= out, or make it with 'ip tuntap add {name} mode tap multi_queue'"
                );
                return ResourceError::input(argument, problem);
            }
        };
        ResourceError::host(argument, problem)
    }
}

fn attach(name: &str, multi: c_int) -> Result<(OwnedFd, String), AttachError> {
    let tun = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun");
    let tun = OwnedFd::from(tun.map_err(AttachError::Open)?);
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | multi;
    let name = ioctl::tun_set_interface(tun.as_fd(), name, flags).map_err(AttachError::Interface)?;
    ioctl::tun_set_header_size(tun.as_fd(), HEADER).map_err(AttachError::Header)?;
    Ok((tun, name))
}
