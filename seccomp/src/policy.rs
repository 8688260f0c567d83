//! The tables, one file per role.

use std::fmt;

use crate::filter::Rule;

pub mod blk;
pub mod console;
pub mod core;
pub mod net;
pub mod start;

/// The roles of jailed processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// `vmm-core`.
    Core,
    /// `ozone-blk`.
    Blk,
    /// `ozone-net`.
    Net,
    /// `ozone-console`.
    Console,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 4] = [Self::Core, Self::Blk, Self::Net, Self::Console];
}

impl fmt::Display for Role {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Core => "core",
            Self::Blk => "blk",
            Self::Net => "net",
            Self::Console => "console",
        })
    }
}

/// All that `role` may do from its `main` until it is ready.
pub fn setup(role: Role) -> Vec<Rule> {
    [start::ANSWERED, start::ABSENT, start::SETUP, launch(role), run(role)].concat()
}

/// What `role` needs, beyond [`start::SETUP`] and its run table, until it is ready.
pub fn launch(role: Role) -> &'static [Rule] {
    match role {
        Role::Core => core::LAUNCH,
        Role::Blk => blk::LAUNCH,
        Role::Net => net::LAUNCH,
        Role::Console => console::LAUNCH,
    }
}

/// What `role` may do once it is ready.
pub fn run(role: Role) -> &'static [Rule] {
    match role {
        Role::Core => core::RUN,
        Role::Blk => blk::RUN,
        Role::Net => net::RUN,
        Role::Console => console::RUN,
    }
}
