//! Devices as the backends see them: everything is already open, nothing names a path.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::link::Descriptor;

/// The name of a device within its machine: 1 to 32 characters of `a-z`, `0-9`, `-` and `_`, the first a letter.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeviceId(String);

impl DeviceId {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for DeviceId {
    type Error = String;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_';
        if name.len() <= 32 && name.starts_with(|c: char| c.is_ascii_lowercase()) && name.chars().all(allowed) {
            Ok(Self(name))
        } else {
            Err(format!(
                "device id '{}' is not 1 to 32 of a-z, 0-9, '-', '_' beginning with a letter",
                name.escape_debug()
            ))
        }
    }
}

impl From<DeviceId> for String {
    fn from(id: DeviceId) -> String {
        id.0
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// The kinds of device a backend process can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceKind {
    /// virtio-blk (virtio 1.2, section 5.2).
    Blk,
    /// virtio-net (virtio 1.2, section 5.1).
    Net,
    /// virtio-console (virtio 1.2, section 5.3).
    Console,
}

impl DeviceKind {
    /// The most that `queues` of a device of this kind may be: request queues of a disk, queue pairs of a network interface.
    pub fn most_queues(self) -> u16 {
        match self {
            Self::Blk => 16,
            Self::Net => 8,
            Self::Console => 1,
        }
    }

    /// The most virtqueues that a backend of this kind may have.
    pub fn most_virtqueues(self) -> u16 {
        match self {
            Self::Blk => self.most_queues(),
            // Pairs, and the control queue.
            Self::Net => 2 * self.most_queues() + 1,
            Self::Console => 2,
        }
    }

    /// The virtio device id (virtio 1.2, section 5).
    pub fn virtio_id(self) -> u32 {
        match self {
            Self::Net => 1,
            Self::Blk => 2,
            Self::Console => 3,
        }
    }

    /// The role name of the backend process, as in process names and messages.
    pub fn role(self) -> &'static str {
        match self {
            Self::Blk => "blk",
            Self::Net => "net",
            Self::Console => "console",
        }
    }
}

/// What one backend process serves.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceSpec {
    /// A disk.
    Blk(BlkSpec),
    /// A network interface.
    Net(NetSpec),
    /// A console.
    Console(ConsoleSpec),
}

impl DeviceSpec {
    /// The kind of the device.
    pub fn kind(&self) -> DeviceKind {
        match self {
            Self::Blk(_) => DeviceKind::Blk,
            Self::Net(_) => DeviceKind::Net,
            Self::Console(_) => DeviceKind::Console,
        }
    }
}

/// One disk.
#[derive(Debug, Serialize, Deserialize)]
pub struct BlkSpec {
    /// The raw image or block device: an open file description of this incarnation's own.
    pub image: Descriptor,
    /// The write end of a pipe that nobody ever writes: held by every ring of the process (and by the process itself), so that
    /// its read end reads as closed once no request of this incarnation is under way.
    pub sentinel: Descriptor,
    /// Whether `image` was opened with O_DIRECT, so that buffers, offsets and lengths have to be aligned for the host.
    #[serde(default)]
    pub direct: bool,
    /// Whether an earlier process of this machine may have written to the image through the page cache: what the host could not
    /// write of that has to be found out before a flush is answered.
    #[serde(default)]
    pub successor: bool,
    /// Whether writes are refused (VIRTIO_BLK_F_RO).
    pub read_only: bool,
    /// The answer to VIRTIO_BLK_T_GET_ID: at most 20 bytes of ASCII.
    pub serial: String,
    /// Number of request queues, at least 1.
    pub queues: u16,
}

/// One network interface.
#[derive(Debug, Serialize, Deserialize)]
pub struct NetSpec {
    /// The queues of the tap, one per queue pair: non-blocking, with a 12-byte virtio-net header.
    pub taps: Vec<Descriptor>,
    /// How many pairs the driver uses, from 1 to their number: 1 at first, and then what the last process said
    /// ([`FromBackend::Pairs`](crate::FromBackend::Pairs)). The driver told that one, and will not tell the next.
    pub pairs: u16,
    /// The MAC address the guest is told.
    pub mac: [u8; 6],
    /// The MTU in bytes the guest is told (VIRTIO_NET_F_MTU).
    pub mtu: u16,
}

/// One console.
#[derive(Debug, Serialize, Deserialize)]
pub struct ConsoleSpec {
    /// Where the console's bytes go on the host.
    pub host: ConsoleHost,
    /// The read end of the pipe that carries the serial port's output; `None` for every console but the first.
    pub serial: Option<Descriptor>,
}

/// The host side of a console.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConsoleHost {
    /// The user's terminal. The backend makes it raw, watches for Ctrl-A x, and restores it when it ends.
    Terminal {
        /// The terminal, open for reading and writing.
        terminal: Descriptor,
    },
    /// Plain input and output, as of a pipeline. No escape character; end of input leaves the machine running.
    Stream {
        /// Where input comes from; `None` for no input.
        input: Option<Descriptor>,
        /// Where output goes.
        output: Descriptor,
    },
    /// The master side of a pseudo-terminal, kept open by ozone.
    Pty {
        /// The master.
        master: Descriptor,
    },
    /// A listening unix stream socket; one client at a time.
    Socket {
        /// The listener.
        listener: Descriptor,
    },
}
