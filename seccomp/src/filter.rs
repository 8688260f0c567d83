//! From tables to BPF programs.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use crate::policy::{self, Role};

/// What an argument of an allowed call has to be.
#[derive(Clone, Copy, Debug)]
pub enum Check {
    /// The lower 32 bits of argument `.0` equal `.1`.
    Equals(u8, u32),
    /// None of the bits `.1` is set in argument `.0` (at most 32 of them, in the lower half).
    Without(u8, u32),
}

/// One line of a table: a call, what its arguments have to be, and why the role needs it.
///
/// Several lines for one call are alternatives; the checks of one line have all to hold.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// The call's number, as `libc::SYS_read`.
    pub syscall: i64,
    /// What the arguments have to be.
    pub checks: &'static [Check],
    /// Why the role needs the call.
    pub reason: &'static str,
}

/// Allows a call with any arguments.
pub const fn allow(syscall: i64, reason: &'static str) -> Rule {
    Rule { syscall, checks: &[], reason }
}

/// Allows a call whose arguments pass every check.
pub const fn allow_if(syscall: i64, checks: &'static [Check], reason: &'static str) -> Rule {
    Rule { syscall, checks, reason }
}

/// Why a filter could not be made or installed.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// seccompiler refused the table.
    #[error("compile the seccomp filter of {role}: {source}")]
    Compile {
        /// Whose filter.
        role: Role,
        /// What seccompiler says.
        source: seccompiler::BackendError,
    },
    /// The kernel refused the filter.
    #[error("install the seccomp filter of {role}: {source}")]
    Install {
        /// Whose filter.
        role: Role,
        /// What seccompiler says.
        source: seccompiler::Error,
    },
}

/// The filters that `ozone` installs in a child between fork and exec, in this order.
///
/// # Errors
/// [`FilterError::Compile`].
pub fn launch_filters(role: Role) -> Result<Vec<BpfProgram>, FilterError> {
    let mut allowed = policy::setup(role);
    allowed.extend_from_slice(policy::start::EXEC);
    let answer =
        |rules, errno: i32| compile(role, rules, SeccompAction::Allow, SeccompAction::Errno(errno.unsigned_abs()));
    // The filters that answer go first: with them in force the next may still be installed, since none needs the calls
    // that they answer. Of several verdicts the kernel takes the strictest: an errno before an allowance.
    Ok(vec![
        answer(policy::start::ANSWERED, libc::EPERM)?,
        answer(policy::start::ABSENT, libc::ENOSYS)?,
        compile(role, &allowed, SeccompAction::KillProcess, SeccompAction::Allow)?,
    ])
}

/// Installs the set-up filter of `role`, first thing in its `main`: what only the start of an executable needs is gone
/// before anything of a tenant's is looked at, execveat above all.
///
/// # Errors
/// [`FilterError`].
pub fn install_setup(role: Role) -> Result<(), FilterError> {
    install(role, &policy::setup(role))
}

/// Installs the run filter of `role` in every thread of this process: nothing of setting up is possible afterwards.
///
/// # Errors
/// [`FilterError`].
pub fn install_run(role: Role) -> Result<(), FilterError> {
    install(role, &policy::run(role))
}

fn install(role: Role, rules: &[Rule]) -> Result<(), FilterError> {
    let program = compile(role, rules, SeccompAction::KillProcess, SeccompAction::Allow)?;
    seccompiler::apply_filter_all_threads(&program).map_err(|source| FilterError::Install { role, source })
}

fn compile(
    role: Role,
    rules: &[Rule],
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, FilterError> {
    let error = |source| FilterError::Compile { role, source };
    let mut table: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut unconditional = Vec::new();
    for rule in rules {
        let alternatives = table.entry(rule.syscall).or_default();
        if rule.checks.is_empty() {
            unconditional.push(rule.syscall);
            continue;
        }
        let conditions = rule.checks.iter().map(|check| match *check {
            Check::Equals(argument, value) => {
                SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, u64::from(value))
            }
            Check::Without(argument, bits) => {
                SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(u64::from(bits)), 0)
            }
        });
        let conditions = conditions.collect::<Result<Vec<_>, _>>().map_err(error)?;
        alternatives.push(SeccompRule::new(conditions).map_err(error)?);
    }
    // A line without checks makes the other lines of its call moot; seccompiler says so with an empty list.
    for syscall in unconditional {
        table.insert(syscall, Vec::new());
    }
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(error)?;
    let filter = SeccompFilter::new(table, otherwise, matched, arch).map_err(error)?;
    filter.try_into().map_err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_role_has_filters_that_compile() {
        for role in Role::ALL {
            assert_eq!(launch_filters(role).unwrap().len(), 3, "{role}");
            compile(role, &policy::setup(role), SeccompAction::KillProcess, SeccompAction::Allow).unwrap();
            compile(role, &policy::run(role), SeccompAction::KillProcess, SeccompAction::Allow).unwrap();
        }
    }

    #[test]
    fn no_run_table_can_open_connect_or_start_anything() {
        let forbidden = [
            libc::SYS_open,
            libc::SYS_openat,
            libc::SYS_openat2,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_ptrace,
            libc::SYS_mount,
            libc::SYS_setns,
            libc::SYS_unshare,
            libc::SYS_io_uring_setup,
            libc::SYS_io_uring_register,
            libc::SYS_prctl,
            libc::SYS_seccomp,
            libc::SYS_flock,
            libc::SYS_kill,
            libc::SYS_bpf,
            libc::SYS_keyctl,
        ];
        for role in Role::ALL {
            for rule in policy::run(role) {
                assert!(!forbidden.contains(&rule.syscall), "{role} allows call {}: {}", rule.syscall, rule.reason);
            }
        }
    }

    #[test]
    fn no_set_up_table_can_execute_or_make_a_namespace() {
        for role in Role::ALL {
            for rule in policy::setup(role) {
                assert!(
                    ![libc::SYS_execve, libc::SYS_execveat, libc::SYS_unshare, libc::SYS_setns].contains(&rule.syscall)
                );
                assert!(rule.syscall != libc::SYS_clone || !rule.checks.is_empty(), "{role} clones with any flags");
            }
        }
    }

    #[test]
    fn every_rule_gives_a_reason() {
        for role in Role::ALL {
            let lists = [policy::setup(role), policy::start::EXEC.to_vec()];
            assert!(lists.iter().flatten().all(|rule| rule.reason.len() > 8), "{role}");
        }
    }
}
