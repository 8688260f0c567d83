//! The names of the processes of one machine.

use std::fmt;

use protocol::{DeviceId, DeviceKind};
use seccomp::Role;

/// One child process of `ozone`, as named in log lines, errors and its own first argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Process {
    /// `vmm-core`.
    Core,
    /// The backend of a device.
    Backend {
        /// What it serves.
        kind: DeviceKind,
        /// The device's name.
        device: DeviceId,
    },
}

impl Process {
    /// Whose seccomp tables and resource limits it gets.
    pub fn role(&self) -> Role {
        match self {
            Self::Core => Role::Core,
            Self::Backend { kind: DeviceKind::Blk, .. } => Role::Blk,
            Self::Backend { kind: DeviceKind::Net, .. } => Role::Net,
            Self::Backend { kind: DeviceKind::Console, .. } => Role::Console,
        }
    }
}

impl fmt::Display for Process {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Core => formatter.write_str("core"),
            Self::Backend { kind, device } => write!(formatter, "{}/{device}", kind.role()),
        }
    }
}
