//! The tables: one file per role, and one for what all backends share.

use std::fmt;

use crate::filter::Rule;

pub mod backend;
pub mod blk;
pub mod console;
pub mod core;
pub mod net;
pub mod ozone;
pub mod program;
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

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Core => "core",
            Self::Blk => "blk",
            Self::Net => "net",
            Self::Console => "console",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// The kinds of threads that the core has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CoreThread {
    /// The first, which answers `ozone` and watches over the others.
    Main,
    /// It reads what `ozone` sends.
    Control,
    /// It writes the serial port's output.
    Serial,
    /// It talks to a device's backend.
    Attendant,
    /// It runs the guest.
    Vcpu,
}

impl CoreThread {
    /// Every kind.
    pub const ALL: [Self; 5] = [Self::Main, Self::Control, Self::Serial, Self::Attendant, Self::Vcpu];
}

impl fmt::Display for CoreThread {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Main => "main",
            Self::Control => "control",
            Self::Serial => "serial",
            Self::Attendant => "attendant",
            Self::Vcpu => "vCPU",
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

/// What `role` may do once it is ready; of the core, what any of its threads may.
pub fn run(role: Role) -> Vec<Rule> {
    let run: &[&[Rule]] = match role {
        Role::Core => &[core::ALL, core::MAIN, core::CONTROL, core::SERIAL, core::ATTENDANT, core::VCPU],
        Role::Blk => &[backend::RUN, blk::RUN],
        Role::Net => &[backend::RUN, net::RUN],
        Role::Console => &[backend::RUN, console::RUN],
    };
    run.concat()
}
