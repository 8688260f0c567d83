//! What a service manager is told (sd_notify(3)): that the machine runs, that `ozone` goes round, and that it ends.

use std::cell::Cell;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, send};
use protocol::Fault;

/// The way to the service manager, if there is one.
#[derive(Debug, Default)]
pub struct Notify {
    socket: Option<OwnedFd>,
    /// How often it wants to hear that `ozone` goes round.
    interval: Option<Duration>,
    /// When it has to hear that next, once the machine has run.
    next: Cell<Option<Instant>>,
}

impl Notify {
    /// As the environment says: `NOTIFY_SOCKET`, and `WATCHDOG_USEC` if it is meant for this process (`WATCHDOG_PID`).
    ///
    /// # Errors
    /// A host fault when the socket is named and cannot be had.
    pub fn from_environment() -> Result<Self, Fault> {
        let Some(path) = std::env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()) else {
            return Ok(Self::default());
        };
        let failed = |error: std::io::Error| {
            Fault::host(format!("NOTIFY_SOCKET {}: {}", path.display(), crate::resources::said(&error)))
        };
        let address = match path.as_bytes().split_first() {
            // An abstract name (unix(7)).
            Some((b'@', name)) => SocketAddr::from_abstract_name(name),
            _ => SocketAddr::from_pathname(&path),
        };
        let socket = UnixDatagram::unbound().map_err(failed)?;
        socket.connect_addr(&address.map_err(failed)?).map_err(failed)?;
        let text = |name: &str| {
            std::env::var_os(name).and_then(|text| String::from_utf8(text.into_vec()).ok())?.parse::<u64>().ok()
        };
        let ours = text("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let limit = text("WATCHDOG_USEC").filter(|limit| ours && *limit > 0);
        // Half of the limit is what sd_watchdog_enabled(3) recommends.
        let interval = limit.map(|limit| Duration::from_micros(limit / 2));
        Ok(Self { socket: Some(socket.into()), interval, next: Cell::default() })
    }

    /// Every backend is attached and the vCPUs run.
    pub fn ready(&self) {
        self.tell("READY=1\nSTATUS=the machine runs");
        if self.next.get().is_none() {
            self.next.set(self.interval.map(|_| Instant::now()));
        }
    }

    /// The machine has come to its end, or starts again.
    pub fn status(&self, text: &str) {
        self.tell(&format!("STATUS={}", text.replace('\n', " ")));
    }

    /// `ozone` is about to end.
    pub fn stopping(&self) {
        self.tell("STOPPING=1");
    }

    /// When the manager has to hear next that `ozone` goes round.
    pub fn deadline(&self) -> Option<Instant> {
        self.next.get()
    }

    /// Tells it so, if it is time.
    pub fn tick(&self, now: Instant) {
        if let (Some(next), Some(interval)) = (self.next.get(), self.interval)
            && next <= now
        {
            self.tell("WATCHDOG=1");
            self.next.set(Some(now + interval));
        }
    }

    /// Never waits: a manager that does not read hears less.
    fn tell(&self, text: &str) {
        if let Some(socket) = &self.socket {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            let _ = send(socket.as_raw_fd(), text.as_bytes(), flags);
        }
    }
}
