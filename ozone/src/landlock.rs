//! Landlock (landlock(7)): what a process may do with files, ports and other processes, whatever its uid and capabilities.
//!
//! A domain takes away all that the running kernel knows how to take away, and gives back what its rules name. It is
//! inherited, and never left.

use std::os::fd::{AsFd, BorrowedFd};

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, RulesetError, Scope,
};
use nix::errno::Errno;

pub use landlock::{AccessFs as Right, BitFlags};

/// The newest kernel interface whose rights are known here; of an older kernel's those that it has are used. The sixth has
/// files, device ioctls, TCP ports, abstract unix sockets and signals.
const KNOWN: ABI = ABI::V6;

/// Whether the kernel has it and was told to use it.
pub fn is_available() -> bool {
    Ruleset::default().set_compatibility(CompatLevel::HardRequirement).handle_access(AccessFs::Execute).is_ok()
}

/// A domain that has not been entered.
#[derive(Debug)]
pub struct Domain(RulesetCreated);

impl Domain {
    /// One in which nothing can be opened, changed, bound, connected or signalled; only its own processes can be signalled.
    ///
    /// # Errors
    /// What landlock_create_ruleset(2) answers.
    pub fn new() -> Result<Self, Errno> {
        let ruleset = Ruleset::default()
            .handle_access(AccessFs::from_all(KNOWN))
            .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(KNOWN)))
            .and_then(|ruleset| ruleset.scope(Scope::from_all(KNOWN)));
        ruleset.and_then(Ruleset::create).map(Self).map_err(errno)
    }

    /// Gives rights back: on a file, or on all that is beneath a directory.
    ///
    /// # Errors
    /// What landlock_add_rule(2) answers.
    pub fn allow(&mut self, place: impl AsFd, rights: impl Into<BitFlags<AccessFs>>) -> Result<(), Errno> {
        (&mut self.0).add_rule(PathBeneath::new(place, rights)).map(drop).map_err(errno)
    }

    /// Enters it, for good.
    ///
    /// # Errors
    /// What landlock_restrict_self(2) answers.
    pub fn enter(self) -> Result<(), Errno> {
        self.0.restrict_self().map(drop).map_err(errno)
    }
}

/// The rights that it takes to execute a file: the kernel opens it for reading.
pub fn execution() -> BitFlags<Right> {
    Right::Execute | Right::ReadFile
}

/// Leaves this process nothing but to execute one file.
///
/// # Errors
/// What the kernel answers.
pub fn execute_alone(executable: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut domain = Domain::new()?;
    domain.allow(executable, execution())?;
    domain.enter()
}

fn errno(error: RulesetError) -> Errno {
    Errno::from_raw(*landlock::Errno::from(error))
}
