//! The tables: one file per role, and one for what all backends share.

use std::fmt;

use crate::filter::Rule;

pub mod backend;
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
    let launch: &[&[Rule]] = match role {
        Role::Core => &[core::LAUNCH],
        Role::Blk => &[backend::LAUNCH, blk::LAUNCH],
        Role::Net => &[backend::LAUNCH],
        Role::Console => &[backend::LAUNCH, console::LAUNCH],
    };
    [start::ANSWERED.to_vec(), start::ABSENT.to_vec(), start::SETUP.to_vec(), launch.concat(), run(role)].concat()
}

/// What `role` may do once it is ready.
pub fn run(role: Role) -> Vec<Rule> {
    let run: &[&[Rule]] = match role {
        Role::Core => &[core::RUN],
        Role::Blk => &[backend::RUN, blk::RUN],
        Role::Net => &[backend::RUN, net::RUN],
        Role::Console => &[backend::RUN, console::RUN],
    };
    run.concat()
}
