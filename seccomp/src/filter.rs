//! From tables to BPF programs.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};

use crate::policy::{self, CoreThread, Role};

/// What an argument of an allowed call has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// The lower 32 bits of argument `.0` equal `.1`.
    Equals(u8, u32),
    /// The lower 32 bits of argument `.0` are anything but `.1`.
    Differs(u8, u32),
    /// Of the lower 32 bits of argument `.0`, those in `.1` equal `.2`.
    Masked(u8, u32, u32),
    /// None of the bits `.1` is set in argument `.0` (at most 32 of them, in the lower half).
    Without(u8, u32),
}

/// One line of a table: a call, what its arguments have to be, and why the role needs it.
///
/// Several lines for one call are alternatives; the checks of one line have all to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    #[error("compile the seccomp filter of {process}: {source}")]
    Compile {
        /// Whose filter.
        process: &'static str,
        /// What seccompiler says.
        source: seccompiler::BackendError,
    },
    /// The kernel refused the filter.
    #[error("install the seccomp filter of {process}: {source}")]
    Install {
        /// Whose filter.
        process: &'static str,
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
    let answer = |rules, errno: i32| {
        compile(role.name(), rules, SeccompAction::Allow, SeccompAction::Errno(errno.unsigned_abs()))
    };
    // The filters that answer go first: with them in force the next may still be installed, since none needs the calls
    // that they answer. Of several verdicts the kernel takes the strictest: an errno before an allowance.
    Ok(vec![
        answer(policy::start::ANSWERED, libc::EPERM)?,
        answer(policy::start::ABSENT, libc::ENOSYS)?,
        confining(role.name(), &allowed)?,
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

/// Installs the run filter of a backend in every thread of its process: nothing of setting up is possible afterwards.
///
/// # Errors
/// [`FilterError`].
pub fn install_run(role: Role) -> Result<(), FilterError> {
    install(role, &policy::run(role))
}

/// Installs the run filter of one of the core's threads, in the calling thread: nothing of setting up is possible for it
/// afterwards.
///
/// # Errors
/// [`FilterError`].
pub fn install_core_thread(thread: CoreThread) -> Result<(), FilterError> {
    let process = Role::Core.name();
    let program = confining(process, &policy::core::run(thread))?;
    seccompiler::apply_filter(&program).map_err(|source| FilterError::Install { process, source })
}

/// Installs the filter of `ozone`, which all of its children inherit; `mounts` where they make their roots themselves.
///
/// # Errors
/// [`FilterError`].
pub fn install_ozone(mounts: bool) -> Result<(), FilterError> {
    let process = "ozone";
    let program = confining(process, &policy::ozone::allowed(mounts))?;
    seccompiler::apply_filter(&program).map_err(|source| FilterError::Install { process, source })
}

fn install(role: Role, rules: &[Rule]) -> Result<(), FilterError> {
    let process = role.name();
    let program = confining(process, rules)?;
    seccompiler::apply_filter_all_threads(&program).map_err(|source| FilterError::Install { process, source })
}

/// The filters of a program that `ozone jail` runs and knows nothing of, in the order of their installation: what no such
/// program needs is refused, and everything else is let through.
///
/// # Errors
/// [`FilterError::Compile`].
pub fn program_filters() -> Result<Vec<BpfProgram>, FilterError> {
    let process = "a jailed program";
    let refuse =
        |rules, errno: i32| compile(process, rules, SeccompAction::Allow, SeccompAction::Errno(errno.unsigned_abs()));
    let mut denied = refuse(policy::program::DENIED, libc::EPERM)?;
    refuse_x32(&mut denied);
    Ok(vec![denied, refuse(policy::program::ABSENT, libc::ENOSYS)?])
}

/// The filter of the first process in the jail of such a program, which waits for it and does nothing else.
///
/// # Errors
/// [`FilterError::Compile`].
pub fn init_filter() -> Result<BpfProgram, FilterError> {
    confining("the first process of a jail", policy::program::INIT)
}

/// How many instructions at the start of a program look at the architecture (seccompiler,
/// `build_arch_validation_sequence`).
const ARCHITECTURE: usize = 3;

/// The bit that x32 has in its call numbers, on the architecture number of x86_64 (Linux `arch/x86/include/uapi/asm/unistd.h`).
const X32: u32 = 0x4000_0000;

/// A program that has every call trapped but those of `rules`, and ends the process at one of a foreign architecture.
fn confining(process: &'static str, rules: &[Rule]) -> Result<BpfProgram, FilterError> {
    let mut program = compile(process, rules, SeccompAction::Trap, SeccompAction::Allow)?;
    refuse_x32(&mut program);
    Ok(program)
}

/// Has a program of seccompiler's end the process at a call of x32, as it does at one of another architecture.
pub fn refuse_x32(program: &mut BpfProgram) {
    // x32 shares its architecture number with x86_64: what would be trapped ends here like any other foreign call. Jumps
    // are relative and go forward, and none goes past this place.
    let instruction = |code: u32, jt, jf, k| sock_filter { code: code as u16, jt, jf, k };
    let foreign = [
        // seccomp_data.nr
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 0, 1, X32),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
    ];
    let at = ARCHITECTURE.min(program.len());
    program.splice(at..at, foreign);
}

fn compile(
    process: &'static str,
    rules: &[Rule],
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, FilterError> {
    let error = |source| FilterError::Compile { process, source };
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
            Check::Differs(argument, value) => {
                SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, u64::from(value))
            }
            Check::Masked(argument, bits, value) => SeccompCondition::new(
                argument,
                SeccompCmpArgLen::Dword,
                SeccompCmpOp::MaskedEq(u64::from(bits)),
                u64::from(value),
            ),
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
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_role_has_filters_that_compile() {
        for role in Role::ALL {
            assert_eq!(launch_filters(role).unwrap().len(), 3, "{role}");
            confining(role.name(), &policy::setup(role)).unwrap();
            confining(role.name(), &policy::run(role)).unwrap();
        }
        for thread in CoreThread::ALL {
            confining("core", &policy::core::run(thread)).unwrap();
        }
        for mounts in [false, true] {
            confining("ozone", &policy::ozone::allowed(mounts)).unwrap();
        }
    }

    #[test]
    fn a_program_begins_with_the_architecture_and_x32() {
        let program = confining("blk", &policy::run(Role::Blk)).unwrap();
        let kill = |at: usize| program[at].k == libc::SECCOMP_RET_KILL_PROCESS;
        assert!(kill(ARCHITECTURE - 1) && kill(ARCHITECTURE + 2));
        // Past the first of the two refusals and no further.
        assert_eq!((program[1].jt, program[1].jf), (1, 0));
        assert_eq!(program.last().unwrap().k, libc::SECCOMP_RET_TRAP);
    }

    #[test]
    fn a_program_of_unknown_nature_is_refused_what_it_does_not_need() {
        let [denied, absent] = &program_filters().unwrap()[..] else { panic!("two filters") };
        assert_eq!(denied[ARCHITECTURE + 2].k, libc::SECCOMP_RET_KILL_PROCESS, "x32");
        for program in [denied, absent] {
            assert_eq!(program.last().unwrap().k, libc::SECCOMP_RET_ALLOW);
        }
        init_filter().unwrap();
        let rules = [policy::program::DENIED, policy::program::ABSENT, policy::program::INIT].concat();
        assert!(rules.iter().all(|rule| rule.reason.len() > 8));
    }

    #[test]
    fn the_last_call_of_a_report_is_in_no_table() {
        for role in Role::ALL {
            let tables = [policy::setup(role), policy::start::EXEC.to_vec()].concat();
            assert!(tables.iter().all(|rule| rule.syscall != crate::forbidden::LAST), "{role}");
        }
        assert!(policy::ozone::allowed(true).iter().all(|rule| rule.syscall != crate::forbidden::LAST));
    }

    #[test]
    fn no_table_of_a_process_gives_up_the_handler_of_reports() {
        for role in Role::ALL {
            for rule in policy::setup(role).iter().filter(|rule| rule.syscall == libc::SYS_rt_sigaction) {
                let checked = rule
                    .checks
                    .iter()
                    .any(|check| matches!(check, Check::Differs(0, signal) if *signal == libc::SIGSYS.unsigned_abs()));
                assert!(checked, "{role}: {}", rule.reason);
            }
        }
    }

    #[test]
    fn what_takes_any_number_of_things_is_checked() {
        let checked = [
            libc::SYS_ioctl,
            libc::SYS_fcntl,
            libc::SYS_prctl,
            libc::SYS_clone,
            libc::SYS_mmap,
            libc::SYS_mprotect,
            libc::SYS_seccomp,
            libc::SYS_tgkill,
        ];
        for role in Role::ALL {
            for rule in policy::setup(role) {
                assert!(!checked.contains(&rule.syscall) || !rule.checks.is_empty(), "{role}: {}", rule.reason);
            }
        }
        let of_ozone = [libc::SYS_openat, libc::SYS_socketpair, libc::SYS_unshare, libc::SYS_setns];
        for rule in policy::ozone::allowed(true) {
            let is_checked = checked.iter().chain(&of_ozone).any(|call| *call == rule.syscall);
            // The handler of forbidden calls is a role's start's, and ozone's last.
            assert!(!is_checked || !rule.checks.is_empty(), "ozone: {}", rule.reason);
        }
    }

    #[test]
    fn ozone_stands_in_no_childs_way() {
        for mounts in [false, true] {
            let allowed = policy::ozone::allowed(mounts);
            let knows = |rule: &Rule| allowed.iter().any(|it| it.syscall == rule.syscall && it.checks == rule.checks);
            for role in Role::ALL {
                let answered = [policy::start::ANSWERED, policy::start::ABSENT].concat();
                // Answered calls have to get as far as the filter that answers them.
                assert!(answered.iter().all(|rule| allowed.iter().any(|it| it.syscall == rule.syscall)), "{role}");
                let own = policy::setup(role).into_iter().filter(|rule| !answered.contains(rule));
                assert!(own.chain(policy::start::EXEC.iter().copied()).all(|rule| knows(&rule)), "{role}");
            }
        }
    }

    #[test]
    fn ozone_can_neither_mount_nor_connect_nor_trace() {
        let forbidden = [
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_listen,
            libc::SYS_execve,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_kill,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_pidfd_getfd,
            libc::SYS_pidfd_open,
            libc::SYS_bpf,
            libc::SYS_keyctl,
            libc::SYS_perf_event_open,
            libc::SYS_userfaultfd,
            libc::SYS_init_module,
            libc::SYS_kexec_load,
            libc::SYS_chroot,
            libc::SYS_mknodat,
            libc::SYS_mkdir,
            libc::SYS_chmod,
            libc::SYS_chown,
            libc::SYS_rename,
            libc::SYS_symlink,
            libc::SYS_link,
        ];
        let mounts = policy::ozone::MOUNTS.iter().map(|rule| rule.syscall);
        let forbidden: BTreeSet<i64> = forbidden.into_iter().chain(mounts).collect();
        for rule in policy::ozone::allowed(false) {
            assert!(!forbidden.contains(&rule.syscall), "ozone allows call {}: {}", rule.syscall, rule.reason);
        }
    }

    #[test]
    fn run_tables_are_small() {
        let calls = |rules: Vec<Rule>| rules.iter().map(|rule| rule.syscall).collect::<BTreeSet<_>>().len();
        for role in Role::ALL {
            assert!(calls(policy::run(role)) < 40, "{role}");
        }
        assert!(calls(policy::core::run(CoreThread::Vcpu)) < 20);
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
        assert!(policy::ozone::allowed(true).iter().all(|rule| rule.reason.len() > 8));
    }
}
