//! The saved machine that every run starts from.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use agent::layout;
use agent::wire::{Channel, FromAgent, ToAgent};
use anyhow::{Context, Result, bail};
use serde_json::json;

use super::link::{Link, ReceiveError};
use super::parcel::{Parcel, Put};
use super::qemu::{self, Clock, Memory, Qemu, Stopped};
use crate::artifacts::store::{self, Stored};
use crate::artifacts::{self, FILES, HostFiles};

/// Enough for a guest of 5 GiB. The file is sparse, so that only touched memory counts.
pub const DEFAULT_MEMORY: u64 = 8 << 30;

/// From power-on to the ready point, and for each answer there.
const BOOT: Duration = Duration::from_secs(180);

/// A host at its ready point, with the guest's files in [`layout::GUEST`].
pub struct Snapshot {
    files: HostFiles,
    stored: Stored,
    memory_bytes: u64,
    clock: Clock,
}

/// The snapshot for a host of that much memory, made if it is not there yet.
pub fn snapshot(memory_bytes: u64) -> Result<Snapshot> {
    snapshot_of(memory_bytes, Clock::Wall)
}

/// The snapshot for a host of that much memory and that clock, made if it is not there yet.
pub fn snapshot_of(memory_bytes: u64, clock: Clock) -> Result<Snapshot> {
    let files = artifacts::host()?;
    let guest = artifacts::guest()?;
    let qemu = qemu::key(clock)?;
    let key = store::key([
        files.key().as_bytes(),
        guest.path().as_os_str().as_encoded_bytes(),
        qemu.as_bytes(),
        include_bytes!("snapshot.rs"),
        &memory_bytes.to_le_bytes(),
    ]);
    let stored =
        store::directory("snapshot", &key, |directory| save(&files, guest.path(), memory_bytes, clock, directory))?;
    Ok(Snapshot { files, stored, memory_bytes, clock })
}

fn save(files: &HostFiles, guest: &Path, memory_bytes: u64, clock: Clock, directory: &Path) -> Result<()> {
    let puts: Vec<_> =
        FILES.iter().map(|name| Put { from: guest.join(name), to: format!("{}/{name}", layout::GUEST) }).collect();
    let parcel = Parcel::pack(&puts)?;
    let memory = directory.join("memory");
    File::create(&memory)?.set_len(memory_bytes)?;
    let Stopped { mut qemu, mut qmp, link, .. } =
        Qemu::start(files, &memory, memory_bytes, Memory::Save, clock, &parcel, None)?;
    qmp.execute("cont", json!({}))?;
    let unpack = ToAgent::Unpack { bytes: parcel.bytes(), directory: "/".to_owned() };
    let booted = expect(&link, |it| matches!(it, FromAgent::Ready))
        .and_then(|()| Ok(link.send(&unpack)?))
        .and_then(|()| expect(&link, |it| matches!(it, FromAgent::Done)));
    if let Err(error) = booted {
        bail!(qemu.infrastructure(format!("did not reach its ready point: {error:#}")));
    }
    qmp.execute("stop", json!({}))?;
    // QEMU 7.2 saves to no inherited descriptor, so a shell writes the file.
    let state = directory.join("state").display().to_string().replace('\'', r"'\''");
    qmp.migrate("migrate", &format!("exec:cat > '{state}'"))
}

fn expect(link: &Link, wanted: impl Fn(&FromAgent) -> bool) -> Result<()> {
    match link.receive(BOOT) {
        Ok((Channel::Control, payload)) => {
            let message = agent::wire::parse(&payload)?;
            if wanted(&message) { Ok(()) } else { bail!("the agent said {message:?}") }
        }
        Ok((channel, _)) => bail!("the agent sent {channel:?}"),
        Err(ReceiveError::Timeout) => bail!("nothing for {BOOT:?}"),
        Err(ReceiveError::Closed) => bail!("it died"),
    }
}

impl Snapshot {
    /// Starts a machine from here.
    pub(super) fn resume(&self, parcel: &Parcel) -> Result<(Qemu, Link)> {
        let directory = self.stored.path();
        let state = File::open(directory.join("state")).context("open the saved state")?;
        let Stopped { mut qemu, mut qmp, link, state_uri } = Qemu::start(
            &self.files,
            &directory.join("memory"),
            self.memory_bytes,
            Memory::Resume,
            self.clock,
            parcel,
            Some(state.into()),
        )?;
        qmp.migrate("migrate-incoming", &state_uri)
            .and_then(|()| qmp.execute("cont", json!({})))
            .map_err(|error| qemu.infrastructure(format!("did not resume: {error:#}")))?;
        Ok((qemu, link))
    }
}
