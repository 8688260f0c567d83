//! The command's end: one request to a machine, and what it answers.

use std::fmt::Write as _;
use std::os::fd::AsRawFd;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect as connect_socket, socket};
use protocol::{Channel, DeviceId, Fault, LinkError};

use super::message::{Answer, IoUsage, Request, Status, Usage};
use super::server::socket_path;
use crate::runtime;
use crate::spec::size;

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
    if !runtime::is_name(name) {
        let name = name.escape_debug();
        return Err(Fault::input(format!("machine '{name}': no machine can have this name")));
    }
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
    let Status { name, state, pid, core_pid, .. } = status;
    format!("{name}: {}, ozone {pid}, core {core_pid}\n{}", word(state), aligned(&rows))
}

/// What a machine uses as a table for people.
pub fn usage_table(name: &str, usage: &Usage) -> String {
    let mut rows = vec![["PROCESS", "CPU", "THROTTLED", "THREADS", "READ", "WRITTEN"].map(str::to_owned)];
    let count = |number: Option<u64>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
    for process in &usage.processes {
        let sum = |bytes: fn(&IoUsage) -> u64| size::rounded(process.io.iter().map(bytes).sum());
        rows.push([
            process.process.clone(),
            seconds(process.cpu_usec),
            count(process.throttled),
            count(process.pids),
            sum(|io| io.read_bytes),
            sum(|io| io.written_bytes),
        ]);
    }
    let mut text = format!("{name}: cpu {}", seconds(usage.cpu_usec));
    if let Some(memory) = &usage.memory {
        let _ = write!(text, ", memory {}", size::rounded(memory.current));
        if let Some(peak) = memory.peak {
            let _ = write!(text, " (at most {})", size::rounded(peak));
        }
        if memory.kills > 0 {
            let _ = write!(text, ", {} killed for want of memory", memory.kills);
        }
    }
    format!("{text}, in {}\n{}", usage.cgroup, aligned(&rows))
}

fn seconds(microseconds: u64) -> String {
    format!("{}.{:03} s", microseconds / 1_000_000, microseconds / 1_000 % 1_000)
}

/// Lines of cells, each column as wide as its widest.
fn aligned<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> String {
    let mut widths = [0; COLUMNS];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.len().max(*width);
        }
    }
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        let _ = writeln!(text, "{}", cells.join("  ").trim_end());
    }
    text
}

/// The word by which a state is written in JSON.
fn word(state: &impl serde::Serialize) -> String {
    serde_json::to_value(state).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::message::{MemoryUsage, ProcessUsage};

    #[test]
    fn what_a_machine_uses_is_one_line_and_a_table() {
        let process = |name: &str, throttled, pids, io| ProcessUsage {
            process: name.to_owned(),
            cpu_usec: 1_234_567,
            throttled,
            pids,
            io,
        };
        let io = IoUsage { device: "8:0".to_owned(), read_bytes: 3 << 20, written_bytes: 0, reads: 1, writes: 0 };
        let usage = Usage {
            cgroup: "/sys/fs/cgroup/ozone/web1".to_owned(),
            cpu_usec: 2_000,
            memory: Some(MemoryUsage { current: 300 << 20, peak: Some(2 << 30), kills: 1 }),
            processes: vec![process("core", Some(7), Some(3), Vec::new()), process("blk/disk0", None, None, vec![io])],
        };
        let expected = "\
web1: cpu 0.002 s, memory 300 MiB (at most 2.0 GiB), 1 killed for want of memory, in /sys/fs/cgroup/ozone/web1
PROCESS    CPU      THROTTLED  THREADS  READ   WRITTEN
core       1.234 s  7          3        0 MiB  0 MiB
blk/disk0  1.234 s  -          -        3 MiB  0 MiB
";
        assert_eq!(usage_table("web1", &usage), expected);
    }
}
