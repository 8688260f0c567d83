//! The greeting of a backend (vhost-user specification, "Communication" and "Multiple queue support"): the same at boot
//! and after a restart.

use std::os::unix::net::UnixStream;

use protocol::DeviceKind;
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use super::incarnation::{BackendError, Incarnation, at};
use super::state::VERSION_1;

/// What a backend said of itself.
pub struct Greeting {
    /// The backend.
    pub incarnation: Incarnation,
    /// How many queues it has, at least 1.
    pub queues: usize,
    /// The configuration space.
    pub config: Vec<u8>,
}

/// Greets the backend of a device of `kind` behind `socket`.
///
/// # Errors
/// [`BackendError`] other than `Host`.
pub fn greet(socket: UnixStream, kind: DeviceKind) -> Result<Greeting, BackendError> {
    let most_queues = u64::from(kind.most_virtqueues());
    let mut frontend = Frontend::from_stream(socket, most_queues);
    frontend.set_owner().map_err(at("SET_OWNER"))?;
    let features = frontend.get_features().map_err(at("GET_FEATURES"))?;
    if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
        return Err(BackendError::Lacks(String::from("protocol features")));
    }
    if features & VERSION_1 == 0 {
        return Err(BackendError::Lacks(String::from("virtio 1")));
    }
    let needed =
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::CONFIG;
    let offered = frontend.get_protocol_features().map_err(at("GET_PROTOCOL_FEATURES"))?;
    if !offered.contains(needed) {
        return Err(BackendError::Lacks(String::from("the protocol features MQ, REPLY_ACK and CONFIG")));
    }
    let inflight = offered & VhostUserProtocolFeatures::INFLIGHT_SHMFD;
    frontend.set_protocol_features(needed | inflight).map_err(at("SET_PROTOCOL_FEATURES"))?;
    frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    let queues = frontend.get_queue_num().map_err(at("GET_QUEUE_NUM"))?;
    if queues == 0 || queues > most_queues {
        return Err(BackendError::Absurd(format!("{queues} queues")));
    }
    let features =
        features & !VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() & !VhostUserVirtioFeatures::LOG_ALL.bits();
    let mut incarnation =
        Incarnation { frontend, features, tracks: !inflight.is_empty(), given: Vec::new(), running: Vec::new() };
    let config = incarnation.config(kind)?;
    Ok(Greeting { incarnation, queues: queues as usize, config })
}
