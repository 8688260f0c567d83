//! What is done when a device's process is lost.

use std::fmt;

use serde::{Deserialize, Serialize};

/// When a lost process is started again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// However it ended.
    #[default]
    Always,
    /// Not when it ended in good order.
    OnFailure,
    /// When it is asked for, by `ozone restart`.
    Never,
}

/// What a loss means for the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFail {
    /// Its requests wait for the next process.
    #[default]
    Wait,
    /// The device tells its driver that it has to be reset (virtio 1.2, section 2.1.2).
    NeedsReset,
    /// The machine ends.
    StopVm,
}

/// Both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// When a lost process is started again.
    pub restart: Restart,
    /// What a loss means for the guest.
    pub on_fail: OnFail,
}

/// A value that an option can have, by its word.
pub trait Word: Copy + fmt::Debug + 'static {
    /// Every word and its value.
    const WORDS: &'static [(&'static str, Self)];
}

impl Word for Restart {
    const WORDS: &'static [(&'static str, Self)] =
        &[("always", Self::Always), ("on-failure", Self::OnFailure), ("never", Self::Never)];
}

impl Word for OnFail {
    const WORDS: &'static [(&'static str, Self)] =
        &[("wait", Self::Wait), ("needs-reset", Self::NeedsReset), ("stop-vm", Self::StopVm)];
}

/// The value of a word.
///
/// # Errors
/// The words that there are.
pub fn word<T: Word>(text: &str) -> Result<T, String> {
    let found = T::WORDS.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
    found.ok_or_else(|| T::WORDS.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(" or "))
}
