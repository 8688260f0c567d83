//! Where things lie on this machine.

use std::path::PathBuf;

/// The workspace's top directory.
#[must_use]
pub fn workspace() -> PathBuf {
    let tests = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    tests.parent().map_or_else(|| tests.clone(), PathBuf::from)
}

/// Cargo's target directory.
#[must_use]
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// Downloads and everything made from them; safe to remove when nothing runs.
#[must_use]
pub fn cache() -> PathBuf {
    target().join("cache")
}

/// The logs of the test hosts.
#[must_use]
pub fn logs() -> PathBuf {
    target().join("host-logs")
}

/// The release executables.
#[must_use]
pub fn release() -> PathBuf {
    target().join("x86_64-unknown-linux-gnu/release")
}
