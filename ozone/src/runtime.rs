//! Where ozone keeps what a run needs to be found by: directories that nobody else can change.

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;

/// Why a directory or what is in it cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The system says no.
    #[error("{}: {}", .path.display(), crate::resources::said(.error))]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// Others could change it.
    #[error("{}: not a directory of this user alone (mode 0700); remove it", .0.display())]
    Shared(PathBuf),
}

/// The directory of this user's machines: `/run/ozone` for root, else below `$XDG_RUNTIME_DIR`; nothing without that.
pub fn directory() -> Option<PathBuf> {
    if geteuid().is_root() {
        return Some(PathBuf::from("/run/ozone"));
    }
    let base = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|base| base.is_absolute())?;
    Some(base.join("ozone"))
}

/// Makes a directory for this user alone, if it is not there.
///
/// # Errors
/// [`RuntimeError`]: one that is there and open to others is refused.
pub fn make(directory: &Path) -> Result<(), RuntimeError> {
    let failed = |error| RuntimeError::File { path: directory.to_owned(), error };
    match DirBuilder::new().mode(0o700).create(directory) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            let metadata = match fs::symlink_metadata(directory) {
                Ok(metadata) => metadata,
                // Its last user has just removed it; what comes next finds that out.
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                Err(error) => return Err(failed(error)),
            };
            let private = metadata.is_dir() && metadata.uid() == geteuid().as_raw() && metadata.mode() & 0o077 == 0;
            if private { Ok(()) } else { Err(RuntimeError::Shared(directory.to_owned())) }
        }
        Err(error) => Err(failed(error)),
    }
}

/// Whether both are one file.
pub fn is_same(one: &File, other: &File) -> bool {
    match (one.metadata(), other.metadata()) {
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}

/// Whether `path` still names the open file.
pub fn is_current(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(held), Ok(named)) => (held.dev(), held.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}
