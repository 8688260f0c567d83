//! The start of any role: from the jailer's last step to the end of the C library's start.

use libc::{
    CLONE_NEWCGROUP, CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWUSER, CLONE_NEWUTS,
    PR_SET_DUMPABLE, PR_SET_NAME, PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG, PROT_EXEC, SECCOMP_FILTER_FLAG_TSYNC,
    SECCOMP_SET_MODE_FILTER, SIGSYS, SYS_arch_prctl, SYS_brk, SYS_clone, SYS_clone3, SYS_execveat, SYS_exit,
    SYS_exit_group, SYS_getrandom, SYS_madvise, SYS_mmap, SYS_mprotect, SYS_munmap, SYS_openat, SYS_poll, SYS_prctl,
    SYS_prlimit64, SYS_readlink, SYS_rseq, SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_sched_getaffinity, SYS_seccomp,
    SYS_set_robust_list, SYS_set_tid_address, SYS_sigaltstack, SYS_write,
};

use crate::filter::{Check, Rule, allow, allow_if};

/// Every namespace that clone(2) makes.
pub(super) const NAMESPACES: u32 =
    (CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET)
        .unsigned_abs();
/// A filter, and no listener that could answer in a filter's place.
const FILTER: Check = Check::Equals(0, SECCOMP_SET_MODE_FILTER);
const TSYNC: u32 = SECCOMP_FILTER_FLAG_TSYNC as u32;
const NO_EXEC: u32 = PROT_EXEC.unsigned_abs();

/// Answered with EPERM: the C library and the standard library ask, and do without.
pub const ANSWERED: &[Rule] = &[
    allow(SYS_readlink, "the C library's static start looks for its origin in /proc/self/exe"),
    allow(SYS_openat, "the standard library's main thread reads its stack's bounds from /proc/self/maps"),
    allow(SYS_sched_getaffinity, "the C library's allocator and pthread_getattr_np ask for the number of processors"),
];

/// Answered with ENOSYS: clone3's flags are behind a pointer, where no filter sees them. The C library falls back to clone.
pub const ABSENT: &[Rule] = &[allow(SYS_clone3, "the C library starts threads with it where it can")];

/// Needed from the jailer's last step to the role's own `main`, and not a moment longer.
pub const EXEC: &[Rule] = &[
    allow(SYS_execveat, "the jailer's last step: the role's executable"),
    allow(SYS_arch_prctl, "thread-local storage of the first thread"),
    allow(SYS_set_tid_address, "the C library's start"),
    allow(SYS_rt_sigaction, "main has forbidden calls reported, before the set-up filter forbids to change that"),
];

/// Needed until the role is ready.
pub const SETUP: &[Rule] = &[
    allow(SYS_write, "the jailer's child reports the failure of its last step; log lines"),
    allow(SYS_brk, "the C library's first heap"),
    allow(SYS_set_robust_list, "the C library's thread start"),
    allow(SYS_rseq, "the C library's thread start"),
    allow(SYS_prlimit64, "the C library asks for the stack limit"),
    allow(SYS_getrandom, "seeds of the allocator and of hash tables"),
    allow_if(SYS_mmap, &[Check::Without(2, NO_EXEC)], "heap, thread stacks and guest memory, never executable"),
    allow_if(SYS_mprotect, &[Check::Without(2, NO_EXEC)], "relocations made read-only, guard pages; never executable"),
    allow(SYS_munmap, "heap and thread stacks"),
    allow(SYS_madvise, "heap given back; guest memory kept out of core dumps and in huge pages"),
    allow_if(
        SYS_rt_sigaction,
        &[Check::Differs(0, SIGSYS.unsigned_abs())],
        "handlers for SIGPIPE, stack overflow and the role's own signals; that of forbidden calls stays",
    ),
    allow(SYS_rt_sigprocmask, "the C library's thread start"),
    allow(SYS_sigaltstack, "the standard library's stack overflow handler"),
    allow_if(
        SYS_clone,
        &[Check::Without(0, NAMESPACES)],
        "the role's threads; in a new user namespace it would be root",
    ),
    allow_if(SYS_prctl, &[Check::Equals(0, PR_SET_NAME.unsigned_abs())], "the names of the process and its threads"),
    allow_if(
        SYS_prctl,
        &[Check::Equals(0, PR_SET_DUMPABLE.unsigned_abs())],
        "no core dumps, no ptrace by the same user",
    ),
    allow_if(SYS_prctl, &[Check::Equals(0, PR_SET_PDEATHSIG.unsigned_abs())], "the process ends with ozone"),
    allow_if(SYS_prctl, &[Check::Equals(0, PR_SET_NO_NEW_PRIVS.unsigned_abs())], "asked for anew with each filter"),
    allow_if(SYS_seccomp, &[FILTER, Check::Equals(1, 0)], "the next filter, for one thread"),
    allow_if(SYS_seccomp, &[FILTER, Check::Equals(1, TSYNC)], "the next filter, for all threads"),
    allow(SYS_poll, "the standard library's start looks whether descriptors 0 to 2 are open, and aborts on EPERM"),
    allow(SYS_exit, "end of a thread"),
    allow(SYS_exit_group, "end of the process"),
];
