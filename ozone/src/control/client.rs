//! The command's end: one request to a machine, and what it answers.

use std::fmt::Write as _;
use std::os::fd::AsRawFd;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect as connect_socket, socket};
use protocol::{Channel, DeviceId, Fault, LinkError};

use super::message::{Answer, Request, Status};
use super::server::socket_path;
use crate::runtime;

/// Asks the machine `name` of this user and waits for the answer, however long that takes.
///
/// # Errors
/// An input fault for a machine that is not there or refuses.
pub fn ask(name: &str, request: &Request) -> Result<Answer, Fault> {
    let Some(directory) = runtime::directory() else {
        return Err(Fault::input(format!("machine '{name}': XDG_RUNTIME_DIR is not set, so no machine can be found")));
    };
    let channel = connect(&directory, name)?;
    let failed = |error: LinkError| match error {
        LinkError::Closed => Fault::host(format!("machine '{name}' ended before it answered")),
        other => Fault::host(format!("machine '{name}': {other}")),
    };
    channel.send(request).map_err(failed)?;
    match channel.receive().map_err(failed)? {
        Answer::Refused(reason) => Err(Fault::input(format!("machine '{name}': {reason}"))),
        answer => Ok(answer),
    }
}

/// Connects to the machine `name` below `directory`.
///
/// # Errors
/// An input fault if there is none.
pub fn connect(directory: &Path, name: &str) -> Result<Channel<Request, Answer>, Fault> {
    let path = socket_path(directory, name);
    let connected = || -> Result<_, Errno> {
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        connect_socket(socket.as_raw_fd(), &UnixAddr::new(path.as_path())?)?;
        Ok(socket)
    };
    let socket = connected().map_err(|errno| match errno {
        Errno::ENOENT | Errno::ECONNREFUSED | Errno::ENOTDIR => {
            let name = name.escape_debug();
            Fault::input(format!("machine '{name}': not running, or started without '--name {name}'"))
        }
        errno => Fault::host(format!("{}: {}", path.display(), errno.desc())),
    })?;
    Channel::connected(socket).map_err(|error| Fault::host(format!("machine '{name}': {error}")))
}

/// The devices that words of a command line name.
///
/// # Errors
/// An input fault for a word that no device can have as its name.
pub fn devices(words: &[String]) -> Result<Vec<DeviceId>, Fault> {
    words.iter().map(|word| DeviceId::try_from(word.clone()).map_err(Fault::input)).collect()
}

/// A status as a table for people.
pub fn table(status: &Status) -> String {
    let mut rows = vec![["DEVICE", "STATE", "PID", "RESTARTS", "AWAY", "RE-EXECUTED", "LAST LOST"].map(str::to_owned)];
    for device in &status.devices {
        rows.push([
            format!("{}/{}", device.kind.role(), device.id),
            word(&device.state),
            device.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            device.restarts.to_string(),
            format!("{} ms", device.away_total_ms),
            device.reexecuted.to_string(),
            device.cause.clone().unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    let widths: Vec<usize> =
        (0..rows[0].len()).map(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0)).collect();
    let Status { name, state, pid, core_pid, .. } = status;
    let mut text = format!("{name}: {}, ozone {pid}, core {core_pid}\n", word(state));
    for row in rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        let _ = writeln!(text, "{}", cells.join("  ").trim_end());
    }
    text
}

/// The word by which a state is written in JSON.
fn word(state: &impl serde::Serialize) -> String {
    serde_json::to_value(state).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}
