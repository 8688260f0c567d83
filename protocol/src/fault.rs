//! Why a process cannot go on, in the one form that reaches the person who started the machine.

use serde::{Deserialize, Serialize};

/// Whose doing a [`Fault`] is. It decides the exit code of `ozone`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultKind {
    /// What the user asked for cannot be: a wrong option, a missing or malformed file.
    Input,
    /// The host lacks something or refused it: no KVM, no rights, no memory.
    Host,
    /// A defect of ozone, or a child process that broke the protocol.
    Internal,
}

/// One reason to stop: what failed, on which thing, why, and where it helps what to do. One line of text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    /// Whose doing it is.
    pub kind: FaultKind,
    /// The line shown to the user, without a trailing full stop or line break.
    pub message: String,
}

impl Fault {
    /// A fault in what the user gave.
    pub fn input(message: impl Into<String>) -> Self {
        Self { kind: FaultKind::Input, message: message.into() }
    }

    /// A fault of the host.
    pub fn host(message: impl Into<String>) -> Self {
        Self { kind: FaultKind::Host, message: message.into() }
    }

    /// A defect of ozone itself.
    pub fn internal(message: impl Into<String>) -> Self {
        Self { kind: FaultKind::Internal, message: message.into() }
    }
}
