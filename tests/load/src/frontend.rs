//! The front-end's half of vhost-user: what a VMM does at DRIVER_OK.

use std::os::unix::net::UnixStream;

use anyhow::{Context, Result};
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use crate::memory::Memory;
use crate::ring::{FEATURES, Ring, SIZE};

/// Connects `rings` to the backend behind `socket`; `features` are those of the device's kind that are wanted. Returns
/// the connection and the features in force.
///
/// # Errors
/// A backend that refuses or goes away.
pub fn connect(socket: UnixStream, memory: &Memory, rings: &mut [Ring<'_>], features: u64) -> Result<(Frontend, u64)> {
    let mut frontend = Frontend::from_stream(socket, rings.len() as u64);
    let features = negotiate(&mut frontend, features).context("negotiate")?;
    frontend.set_mem_table(&[memory.region()]).context("SET_MEM_TABLE")?;
    for (index, ring) in rings.iter_mut().enumerate() {
        ring.accept(features);
        enable(&mut frontend, index, ring).with_context(|| format!("enable queue {index}"))?;
    }
    Ok((frontend, features))
}

fn negotiate(frontend: &mut Frontend, wanted: u64) -> vhost::Result<u64> {
    frontend.set_owner()?;
    let always = FEATURES | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    let features = frontend.get_features()? & (wanted | always);
    let wanted = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
    let protocol = frontend.get_protocol_features()? & wanted;
    frontend.set_protocol_features(protocol)?;
    if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    frontend.set_features(features)?;
    Ok(features)
}

fn enable(frontend: &mut Frontend, index: usize, ring: &Ring<'_>) -> vhost::Result<()> {
    frontend.set_vring_num(index, SIZE)?;
    frontend.set_vring_addr(index, &ring.places())?;
    frontend.set_vring_base(index, 0)?;
    frontend.set_vring_call(index, &ring.call)?;
    frontend.set_vring_kick(index, &ring.kick)?;
    frontend.set_vring_enable(index, true)
}
