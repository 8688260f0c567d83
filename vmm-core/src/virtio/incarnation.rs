//! One process of a device's backend as its attendant knows it: from the greeting to the end of the conversation.
//!
//! It is presumed hostile: every reply is checked, and after the first error it is not spoken to again, since the
//! conversation has no known position then.

use protocol::{DeviceKind, Fault};
use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{Error, Frontend, VhostUserFrontend};

/// Why a backend cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// A request failed, was refused or was answered with what is no answer.
    #[error("{step}: {source}")]
    Request {
        /// The request's name in the vhost-user specification.
        step: &'static str,
        /// What became of it.
        source: vhost::Error,
    },
    /// It does not offer what the core or the driver relies on.
    #[error("it does not offer {0}")]
    Lacks(String),
    /// It answered what no honest backend does.
    #[error("it answered {0}")]
    Absurd(String),
    /// The core's host is at fault, and the machine cannot go on.
    #[error("{0}")]
    Host(Fault),
    /// The core could not make or change a descriptor.
    #[error("a descriptor of the core: {0}")]
    Descriptor(#[from] std::io::Error),
}

impl BackendError {
    /// Whether a request was answered in good order, and with a no: the conversation may go on.
    pub fn is_refusal(&self) -> bool {
        let no = |source: &vhost::Error| matches!(source, vhost::Error::VhostUserProtocol(Error::BackendInternalError));
        matches!(self, Self::Request { source, .. } if no(source))
    }
}

/// Names the request that failed.
pub fn at(step: &'static str) -> impl Fn(vhost::Error) -> BackendError {
    move |source| BackendError::Request { step, source }
}

/// A backend that has been greeted.
pub struct Incarnation {
    /// The way to it.
    pub frontend: Frontend,
    /// The virtio features that it offers.
    pub features: u64,
    /// Whether it records what is in flight (VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD).
    pub tracks: bool,
    /// The queues whose signals it has been given.
    pub given: Vec<usize>,
    /// The queues that it serves.
    pub running: Vec<usize>,
}

impl Incarnation {
    /// The device's configuration space, as long as `kind` defines it.
    ///
    /// # Errors
    /// [`BackendError::Request`] for GET_CONFIG, [`BackendError::Absurd`] for another length.
    pub fn config(&mut self, kind: DeviceKind) -> Result<Vec<u8>, BackendError> {
        let size: u8 = match kind {
            // virtio 1.2, sections 5.2.4, 5.1.4 and 5.3.4.
            DeviceKind::Blk => 60,
            DeviceKind::Net => 12,
            DeviceKind::Console => 12,
        };
        let empty = vec![0; usize::from(size)];
        let (answer, config) = self
            .frontend
            .get_config(0, u32::from(size), VhostUserConfigFlags::empty(), &empty)
            .map_err(at("GET_CONFIG"))?;
        if answer.offset != 0 || config.len() != usize::from(size) {
            return Err(BackendError::Absurd(format!("{} bytes of configuration instead of {size}", config.len())));
        }
        Ok(config)
    }

    /// Stops its queues. Where it stopped reading them is of no interest: they go on from the used ring's index.
    ///
    /// # Errors
    /// [`BackendError::Request`]: queues may be running still.
    pub fn stop(&mut self) -> Result<(), BackendError> {
        for index in std::mem::take(&mut self.running) {
            self.frontend.get_vring_base(index).map_err(at("GET_VRING_BASE"))?;
        }
        Ok(())
    }
}
