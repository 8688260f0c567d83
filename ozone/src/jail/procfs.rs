//! What `/proc` says of a process and takes of it, by a descriptor of that directory: no path leads there from everywhere.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

/// How many threads this process has; 0 when `/proc` cannot say.
pub(super) fn threads(proc: BorrowedFd<'_>) -> usize {
    status(proc, "self", "Threads").and_then(|count| count.parse().ok()).unwrap_or(0)
}

/// The line `key` of a process's status (proc_pid_status(5)).
pub(super) fn status(proc: BorrowedFd<'_>, process: &str, key: &str) -> Option<String> {
    let mut bytes = [0; 4096];
    let length = open(proc, &format!("{process}/status"), OFlag::O_RDONLY).ok()?.read(&mut bytes).ok()?;
    // What is asked for stands in the first lines, whatever comes after.
    let text = String::from_utf8_lossy(bytes.get(..length)?);
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.map(|line| line.trim().to_owned())
}

/// Writes to a file of this process, with one write(2).
pub(super) fn write(proc: BorrowedFd<'_>, name: &str, text: &str) -> Result<(), Errno> {
    let written = open(proc, &format!("self/{name}"), OFlag::O_WRONLY)?.write_all(text.as_bytes());
    written.map_err(|error| error.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw))
}

fn open(proc: BorrowedFd<'_>, path: &str, access: OFlag) -> Result<File, Errno> {
    openat(proc, path, access | OFlag::O_CLOEXEC, Mode::empty()).map(File::from)
}
