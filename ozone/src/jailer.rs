//! `ozone jail`: any program in the jail that a machine's processes have, as far as a program of unknown nature can bear it.
//!
//! options → spec → open host paths → record → control group → clone → steps → the program → remove everything
//!
//! docs/jail.md says what the jail is, and what each option of other jailers is called here.

pub mod host;
mod init;
pub mod options;
pub mod record;
pub mod rlimit;
mod root;
mod run;
pub mod source;
pub mod spec;
mod steps;
mod sys;

pub use options::Options;
pub use run::{Outcome, run};
