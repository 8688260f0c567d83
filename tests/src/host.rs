//! The test host: an emulated machine in which KVM works for real, resumed from a snapshot.
//!
//! A snapshot is made once per kernel, agent, guest files, QEMU and memory size: boot, put the guest's files
//! there, stop, save. Every run resumes from it with the memory copy-on-write, so that nothing of a
//! run outlives it.

mod error;
mod link;
mod parcel;
mod qemu;
mod qmp;
mod snapshot;
mod terminal;

use std::fmt::Display;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use agent::layout;
use agent::wire::{Channel, Command, Exit, FromAgent, ToAgent};
use anyhow::{Context, Result, bail};

pub use error::HostError;
use link::Link;
pub use parcel::{Parcel, Put};
pub use qemu::Clock;
use qemu::Qemu;
pub use snapshot::{DEFAULT_MEMORY, Snapshot, snapshot, snapshot_of};
pub use terminal::{is_terminal, window};

/// The agent answers a request that needs no program within this, or the host hangs.
const ANSWER: Duration = Duration::from_secs(60);

/// A running test host; dropped, it is gone without a trace.
pub struct TestHost {
    link: Link,
    qemu: Qemu,
}

/// Where a command's standard input comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stdin {
    /// It is empty.
    Empty,
    /// It is this process's own.
    Ours,
}

impl TestHost {
    /// Resumes a host and unpacks `parcel` in it.
    pub fn resume(snapshot: &Snapshot, parcel: &Parcel) -> Result<Self> {
        let (qemu, link) = snapshot.resume(parcel)?;
        let mut host = Self { link, qemu };
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let mut entropy = vec![0; 64];
        random(&mut entropy)?;
        host.request(&ToAgent::Wake { unix_nanoseconds: u64::try_from(now.as_nanos())?, entropy })?;
        if parcel.bytes() > 0 {
            host.request(&ToAgent::Unpack { bytes: parcel.bytes(), directory: "/".to_owned() })?;
        }
        Ok(host)
    }

    /// Runs a command and hands its output to `sink` as it comes. At the deadline everything in the host
    /// is killed and the error is [`HostError::Deadline`].
    pub fn run(
        &mut self,
        command: Command,
        stdin: Stdin,
        deadline: Option<Duration>,
        sink: &mut dyn FnMut(Channel, &[u8]),
    ) -> Result<Exit> {
        let terminal = command.terminal;
        self.send(&ToAgent::Run(command))?;
        let _raw = terminal.map(|_| terminal::Raw::enter()).transpose()?;
        match stdin {
            Stdin::Ours => self.link.forward_stdin(),
            Stdin::Empty => self.send(&ToAgent::StdinEnd)?,
        }
        if let Some(window) = terminal {
            self.link.forward_window(window);
        }
        let start = Instant::now();
        let mut killed = false;
        loop {
            let left = match (killed, deadline) {
                (true, _) => ANSWER,
                (false, Some(deadline)) => deadline.saturating_sub(start.elapsed()),
                (false, None) => Duration::from_secs(u64::from(u32::MAX)),
            };
            match self.link.receive(left) {
                Err(link::ReceiveError::Timeout) if killed => {
                    bail!(self.infrastructure("did not answer after its run's deadline"))
                }
                Err(link::ReceiveError::Timeout) => {
                    killed = true;
                    self.send(&ToAgent::Kill)?;
                }
                Err(link::ReceiveError::Closed) => bail!(self.infrastructure("died")),
                Ok((Channel::Control, payload)) => match agent::wire::parse(&payload)? {
                    FromAgent::Exited(_) if killed => {
                        bail!(HostError::Deadline(deadline.unwrap_or_default()))
                    }
                    FromAgent::Exited(exit) => return Ok(exit),
                    other => bail!("the agent said {other:?} while a command ran"),
                },
                Ok((channel, payload)) => sink(channel, &payload),
            }
        }
    }

    /// Reads a file of the host.
    pub fn fetch(&mut self, path: &str) -> Result<Vec<u8>> {
        self.send(&ToAgent::Fetch { path: path.to_owned() })?;
        let mut left = match self.answer()? {
            FromAgent::FileBytes(bytes) => usize::try_from(bytes)?,
            FromAgent::Failed(error) => bail!("fetch from the test host: {error}"),
            other => bail!("the agent answered {other:?}"),
        };
        let mut contents = Vec::with_capacity(left);
        while left > 0 {
            match self.receive()? {
                (Channel::File, block) => {
                    left = left.checked_sub(block.len()).context("the file is longer than said")?;
                    contents.extend(block);
                }
                (channel, _) => bail!("{channel:?} where a file was expected"),
            }
        }
        Ok(contents)
    }

    fn request(&mut self, message: &ToAgent) -> Result<()> {
        self.send(message)?;
        match self.answer()? {
            FromAgent::Done => Ok(()),
            FromAgent::Failed(error) => bail!("in the test host: {error}"),
            other => bail!("the agent answered {other:?}"),
        }
    }

    fn answer(&mut self) -> Result<FromAgent> {
        match self.receive()? {
            (Channel::Control, payload) => Ok(agent::wire::parse(&payload)?),
            (channel, _) => bail!("{channel:?} where an answer was expected"),
        }
    }

    fn receive(&mut self) -> Result<(Channel, Vec<u8>)> {
        self.link.receive(ANSWER).map_err(|error| match error {
            link::ReceiveError::Timeout => self.infrastructure("did not answer").into(),
            link::ReceiveError::Closed => self.infrastructure("died").into(),
        })
    }

    fn send(&mut self, message: &ToAgent) -> Result<()> {
        self.link.send(message).map_err(|_| self.infrastructure("died").into())
    }

    fn infrastructure(&mut self, what: impl Display) -> HostError {
        self.qemu.infrastructure(what)
    }
}

/// Bytes from this machine's random generator.
fn random(bytes: &mut [u8]) -> Result<()> {
    use std::io::Read;
    std::fs::File::open("/dev/urandom")?.read_exact(bytes).context("read /dev/urandom")
}

/// Environment for commands in the host: the log filter, if one is set here.
#[must_use]
pub fn environment() -> std::collections::BTreeMap<String, String> {
    ["RUST_LOG", "RUST_BACKTRACE", "TERM"]
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), std::env::var(name).ok()?)))
        .collect()
}

/// Path in the host of an executable that was put there.
#[must_use]
pub fn executable(name: &str) -> String {
    format!("{}/{name}", layout::EXECUTABLES)
}
