//! Whether a disk keeps its word: writes that tell who they are, a journal of those that were acknowledged, and a judge.
//!
//! [`run`] is what a guest runs while its disk's backend is killed; [`check`] looks at the image afterwards, from outside.
#![allow(clippy::print_stdout)]

pub mod block;
pub mod check;
pub mod journal;
pub mod late;
pub mod layout;
pub mod room;
pub mod run;
pub mod stalls;
pub mod stamp;
pub mod verdict;

pub use check::Checked;
pub use run::Found;
