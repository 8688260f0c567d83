//! Frames on the virtio-serial port.
//!
//! A frame is one byte of [`Channel`], four bytes of length (little endian) and the payload. Control
//! frames hold one JSON message; the other channels hold plain bytes, so that output needs no quoting.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// No frame is longer than this; a longer one means that the stream is out of step.
pub const MAX_FRAME: usize = 1 << 20;

/// What a frame's payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Channel {
    /// One JSON message: [`ToAgent`] or [`FromAgent`].
    Control = 0,
    /// Bytes for the command's standard input.
    Stdin = 1,
    /// Bytes of the command's standard output, or of its terminal.
    Stdout = 2,
    /// Bytes of the command's standard error.
    Stderr = 3,
    /// Bytes of a file that was asked for.
    File = 4,
}

impl TryFrom<u8> for Channel {
    type Error = io::Error;

    fn try_from(byte: u8) -> io::Result<Self> {
        [Self::Control, Self::Stdin, Self::Stdout, Self::Stderr, Self::File]
            .into_iter()
            .find(|channel| *channel as u8 == byte)
            .ok_or_else(|| io::Error::other(format!("unknown channel {byte}")))
    }
}

/// A message into the host.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToAgent {
    /// The first message after a resume: what a saved machine cannot know.
    Wake {
        /// Nanoseconds since 1970.
        unix_nanoseconds: u64,
        /// Random bytes from outside, so that two resumed hosts differ.
        entropy: Vec<u8>,
    },
    /// Unpack the tar archive on the parcel disk; answered by `Done` or `Failed`.
    Unpack {
        /// Length of the archive in bytes.
        bytes: u64,
        /// Directory to unpack in.
        directory: String,
    },
    /// Run a command; answered by output and one `Exited`.
    Run(Command),
    /// The command's standard input ends here.
    StdinEnd,
    /// The window of the command's terminal changed.
    Resize(Window),
    /// Kill everything that runs but the agent; the command's `Exited` follows.
    Kill,
    /// Send a file: `FileBytes`, then that many bytes on [`Channel::File`].
    Fetch {
        /// Path in the host.
        path: String,
    },
}

/// A command to run in the host.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Command {
    /// Program, looked up in PATH, and its arguments.
    pub argv: Vec<String>,
    /// Variables beside the host's own PATH, HOME and TERM.
    pub env: BTreeMap<String, String>,
    /// With a window the command gets a terminal of that size, else pipes.
    pub terminal: Option<Window>,
}

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// A message out of the host.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromAgent {
    /// The host is set up and may be saved.
    Ready,
    /// The last request was carried out.
    Done,
    /// The last request was not carried out.
    Failed(String),
    /// The command ended, and all its output was sent.
    Exited(Exit),
    /// Length of the file that follows.
    FileBytes(u64),
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// Its exit status.
    Code(i32),
    /// The signal that ended it.
    Signal(i32),
}

impl Exit {
    /// The status as a shell reports it.
    #[must_use]
    pub fn shell_code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
        }
    }
}

/// Writes one frame.
pub fn write_frame(to: &mut impl Write, channel: Channel, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len()).map_err(io::Error::other)?;
    let mut frame = Vec::with_capacity(5 + payload.len());
    frame.push(channel as u8);
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(payload);
    to.write_all(&frame)?;
    to.flush()
}

/// Writes one control message.
pub fn write_message(to: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    write_frame(to, Channel::Control, &serde_json::to_vec(message)?)
}

/// Reads one frame.
pub fn read_frame(from: &mut impl Read) -> io::Result<(Channel, Vec<u8>)> {
    let mut header = [0; 5];
    from.read_exact(&mut header)?;
    let [channel, length @ ..] = header;
    let channel = Channel::try_from(channel)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_FRAME {
        return Err(io::Error::other(format!("frame of {length} bytes")));
    }
    let mut payload = vec![0; length];
    from.read_exact(&mut payload)?;
    Ok((channel, payload))
}

/// Parses a control frame's payload.
pub fn parse<T: DeserializeOwned>(payload: &[u8]) -> io::Result<T> {
    serde_json::from_slice(payload).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_survives_the_way() {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, Channel::Stdout, b"text").unwrap();
        write_message(&mut bytes, &ToAgent::Kill).unwrap();
        let mut from = bytes.as_slice();
        assert_eq!(read_frame(&mut from).unwrap(), (Channel::Stdout, b"text".to_vec()));
        let (channel, payload) = read_frame(&mut from).unwrap();
        assert_eq!(channel, Channel::Control);
        assert!(matches!(parse(&payload).unwrap(), ToAgent::Kill));
    }

    #[test]
    fn a_stream_out_of_step_is_refused() {
        assert!(read_frame(&mut [9, 0, 0, 0, 0].as_slice()).is_err());
        assert!(read_frame(&mut [0, 255, 255, 255, 255].as_slice()).is_err());
    }
}
