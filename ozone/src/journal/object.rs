//! The kinds of objects that a run makes on its host. A new kind is a variant here, and a way to undo it in `undo.rs`.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::directory::FileId;
use crate::spec::limits::MOUNT;

/// Something that a run makes and that could outlive it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Object {
    /// The socket in the machine's own directory.
    Control,
    /// A socket in a directory of the user's choice.
    Socket {
        /// The directory's path, without symbolic links.
        directory: PathBuf,
        /// Which directory that was.
        id: FileId,
        /// The socket's name in it.
        name: String,
    },
    /// A file that is to get its name by a rename, under the one that it has until then.
    Unnamed {
        /// The directory's path, without symbolic links.
        directory: PathBuf,
        /// Which directory that was.
        id: FileId,
        /// The file's name in it, which nobody can have foreseen.
        name: String,
    },
    /// The control group for all machines that have no better place: removed by the last one in it.
    CommonCgroup {
        /// Its path below the root of the hierarchy.
        path: PathBuf,
    },
    /// A control group of the machine.
    Cgroup {
        /// Its path below the root of the hierarchy.
        path: PathBuf,
    },
    /// Controllers for the groups in the one that `ozone` was started in, where as long as they are on nobody can be.
    Controllers {
        /// The path of that group below the root of the hierarchy.
        path: PathBuf,
    },
    /// A tap made for the run, which goes with its descriptors.
    Tap,
    /// Uids that no other machine may have, by a lock that goes with its descriptor.
    Uids {
        /// The first.
        first: u32,
        /// How many.
        count: u32,
    },
}

/// Which one an object has become, so that another of the same name is not taken for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Identity {
    /// A file or directory.
    File(FileId),
    /// A network interface; its index is never given again (netdevice(7)).
    Interface {
        /// Its name.
        name: String,
        /// Its index.
        index: u32,
    },
}

impl Identity {
    /// Which file it is.
    pub fn file(&self) -> Option<FileId> {
        match self {
            Self::File(id) => Some(*id),
            Self::Interface { .. } => None,
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(id) => write!(formatter, "{id:?}"),
            Self::Interface { name, index } => write!(formatter, "{name} (interface {index})"),
        }
    }
}

impl Object {
    /// What it is, in words.
    pub fn describe(&self, identity: Option<&Identity>) -> String {
        let group = |path: &PathBuf| PathBuf::from(MOUNT).join(path).display().to_string();
        match (self, identity) {
            (Self::Control, _) => "its control socket".to_owned(),
            (Self::Socket { directory, name, .. }, _) => format!("socket {}", directory.join(name).display()),
            (Self::Unnamed { directory, name, .. }, _) => format!("file {}", directory.join(name).display()),
            (Self::CommonCgroup { path } | Self::Cgroup { path }, _) => format!("cgroup {}", group(path)),
            (Self::Controllers { path }, _) => format!("controllers of cgroup {}", group(path)),
            (Self::Tap, Some(Identity::Interface { name, .. })) => format!("tap {name}"),
            (Self::Tap, _) => "a tap".to_owned(),
            (Self::Uids { first, count }, _) => {
                format!("uids {first} to {}", first.saturating_add(count.saturating_sub(1)))
            }
        }
    }
}
