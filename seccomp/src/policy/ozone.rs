//! The tables of `ozone` itself, from before its first child.
//!
//! A filter is inherited. So that of `ozone` lets through what it calls itself, what its children call on their way through
//! their jails, and whatever a role's own tables allow: the last part is made of those tables. Every child has its own
//! filters besides.

use libc::{
    AF_UNIX, CLONE_NEWCGROUP, CLONE_NEWNS, CLONE_NEWUSER, F_DUPFD_CLOEXEC, F_GETFD, F_GETFL, F_OFD_SETLK, F_SETFL,
    O_CREAT, O_DIRECTORY, O_TMPFILE, PR_CAP_AMBIENT, PR_CAPBSET_DROP, PR_CAPBSET_READ, PR_SET_KEEPCAPS,
    PR_SET_SECUREBITS, SIGKILL, SYS_accept4, SYS_capget, SYS_capset, SYS_chdir, SYS_clone3, SYS_close_range, SYS_dup3,
    SYS_fchdir, SYS_fcntl, SYS_flock, SYS_fsconfig, SYS_fsmount, SYS_fsopen, SYS_fstat, SYS_getdents64, SYS_geteuid,
    SYS_getpid, SYS_getrusage, SYS_getsockopt, SYS_gettid, SYS_ioctl, SYS_landlock_add_rule,
    SYS_landlock_create_ruleset, SYS_landlock_restrict_self, SYS_linkat, SYS_lseek, SYS_mount, SYS_move_mount,
    SYS_mremap, SYS_newfstatat, SYS_openat, SYS_openat2, SYS_pidfd_send_signal, SYS_pipe2, SYS_pivot_root, SYS_poll,
    SYS_prctl, SYS_readlink, SYS_renameat, SYS_sched_getaffinity, SYS_sendto, SYS_setgroups, SYS_sethostname,
    SYS_setns, SYS_setresgid, SYS_setresuid, SYS_setsid, SYS_socketpair, SYS_statx, SYS_umask, SYS_umount2,
    SYS_unlinkat, SYS_unshare, SYS_waitid,
};

use crate::filter::{Check, Rule, allow, allow_if};
use crate::policy::{self, Role, start};

/// asm-generic/ioctls.h; TIOCSTI is none of them.
const TCGETS: u32 = 0x5401;
const TCSETS: u32 = 0x5402;
const TIOCGWINSZ: u32 = 0x5413;

const fn prctl(option: i32) -> Check {
    Check::Equals(0, option.unsigned_abs())
}

const fn fcntl(command: i32) -> Check {
    Check::Equals(1, command.unsigned_abs())
}

/// What `ozone` calls itself, beyond what its children may call as well.
pub const OWN: &[Rule] = &[
    // Its children.
    allow(SYS_clone3, "a child's birth; its flags are behind a pointer, where no filter sees them"),
    allow(SYS_waitid, "how a child ended"),
    allow_if(SYS_pidfd_send_signal, &[Check::Equals(1, SIGKILL.unsigned_abs())], "a child is ended, and nothing else"),
    allow(SYS_pipe2, "logs, reports of a jail, sentinels, the serial port's output"),
    allow_if(
        SYS_socketpair,
        &[Check::Equals(0, AF_UNIX.unsigned_abs())],
        "a child's channel and its vhost-user socket",
    ),
    allow_if(SYS_fcntl, &[fcntl(F_DUPFD_CLOEXEC)], "descriptors that are handed out again and again"),
    allow(SYS_poll, "the one loop that waits"),
    // Files that it names; a Landlock domain says which it may open.
    allow_if(
        SYS_openat,
        &[Check::Without(2, (O_CREAT | (O_TMPFILE & !O_DIRECTORY)).unsigned_abs())],
        "an image for a disk's next process, what /proc says; nothing is made",
    ),
    allow(SYS_openat2, "files of the machine's control groups; its flags are behind a pointer"),
    allow(SYS_statx, "whether what it removes is its own"),
    allow(SYS_newfstatat, "the same, by the C library's older call"),
    allow(SYS_fstat, "the length of what it reads"),
    allow(SYS_lseek, "a control group's events are read again"),
    allow(SYS_flock, "an image is free when its lock is"),
    allow_if(SYS_fcntl, &[fcntl(F_OFD_SETLK)], "whether another machine still uses the file of uids"),
    allow(SYS_getdents64, "the control groups of a machine that ends"),
    allow(SYS_unlinkat, "sockets, directories and control groups, at the end, by the directory that has them"),
    allow(SYS_linkat, "the record of the end gets a name"),
    allow(SYS_renameat, "and then its own"),
    allow(SYS_getrusage, "the processor time and memory in that record"),
    // Who speaks to it, and to whom it speaks.
    allow(SYS_accept4, "clients: ozone status and its like"),
    allow(SYS_getsockopt, "a client's uid"),
    allow(SYS_geteuid, "whether a client is of the same user"),
    allow(SYS_sendto, "the service manager, and standard error if it is a socket"),
    allow_if(SYS_fcntl, &[fcntl(F_GETFL)], "standard error of another user's is made not to wait"),
    allow_if(SYS_fcntl, &[fcntl(F_SETFL)], "standard error of another user's is made not to wait"),
    allow_if(SYS_ioctl, &[Check::Equals(1, TIOCGWINSZ)], "the size of the terminal"),
    allow_if(SYS_ioctl, &[Check::Equals(1, TCGETS)], "whether a line ends as on a raw terminal"),
    allow_if(SYS_ioctl, &[Check::Equals(1, TCSETS)], "the terminal is restored"),
    allow(SYS_getpid, "it tells who it is"),
    allow(SYS_mremap, "the heap grows"),
    allow_if(SYS_fcntl, &[fcntl(F_GETFD)], "the standard library's check before it closes a descriptor"),
];

/// A child's way through its jail, up to its own filters.
pub const STEPS: &[Rule] = &[
    allow_if(SYS_unshare, &[Check::Equals(0, CLONE_NEWCGROUP.unsigned_abs())], "the cgroup namespace"),
    allow_if(SYS_unshare, &[Check::Equals(0, CLONE_NEWNS.unsigned_abs())], "a copy of the empty mount namespace"),
    allow_if(SYS_unshare, &[Check::Equals(0, CLONE_NEWUSER.unsigned_abs())], "the user namespace"),
    allow_if(SYS_setns, &[Check::Equals(1, CLONE_NEWNS.unsigned_abs())], "the empty mount namespace"),
    allow(SYS_setsid, "a session without a terminal"),
    allow(SYS_dup3, "the declared descriptors on their numbers"),
    allow(SYS_close_range, "every other descriptor is closed"),
    allow(SYS_umask, "the mask for files"),
    allow(SYS_sethostname, "the name of the UTS namespace"),
    allow_if(SYS_prctl, &[prctl(PR_SET_KEEPCAPS)], "capabilities are not kept"),
    allow_if(SYS_prctl, &[prctl(PR_SET_SECUREBITS)], "securebits are locked"),
    allow_if(SYS_prctl, &[prctl(PR_CAPBSET_READ)], "the bounding set is emptied"),
    allow_if(SYS_prctl, &[prctl(PR_CAPBSET_DROP)], "the bounding set is emptied"),
    allow_if(SYS_prctl, &[prctl(PR_CAP_AMBIENT)], "the ambient set is emptied"),
    allow(SYS_setgroups, "no supplementary group"),
    allow(SYS_setresgid, "the child's gid"),
    allow(SYS_setresuid, "the child's uid"),
    allow(SYS_capget, "the other capability sets are emptied"),
    allow(SYS_capset, "the other capability sets are emptied"),
    allow(SYS_gettid, "whose capabilities those are"),
    allow(SYS_landlock_create_ruleset, "the child's Landlock domain"),
    allow(SYS_landlock_add_rule, "its executable is the only exception"),
    allow(SYS_landlock_restrict_self, "it is entered"),
];

/// Where an ordinary user's children make their roots themselves.
pub const MOUNTS: &[Rule] = &[
    allow(SYS_mount, "mounts are made private"),
    allow(SYS_fsopen, "an empty tmpfs"),
    allow(SYS_fsconfig, "an empty tmpfs"),
    allow(SYS_fsmount, "an empty tmpfs"),
    allow(SYS_move_mount, "it is put over the root"),
    allow(SYS_fchdir, "it is entered"),
    allow(SYS_pivot_root, "it becomes the root"),
    allow(SYS_umount2, "the old root is let go"),
    allow(SYS_chdir, "the new root is the working directory"),
];

/// What a child's own filters answer with an errno, which takes that nobody forbids it.
pub const ANSWERED: &[Rule] = &[
    allow(SYS_readlink, "a child's start asks for its origin, and its own filter says no"),
    allow(SYS_sched_getaffinity, "a child's start asks for the number of processors, and its own filter says no"),
];

/// All that `ozone` and its children may do; `mounts` where the children make their roots themselves.
pub fn allowed(mounts: bool) -> Vec<Rule> {
    // What is answered rather than allowed is in the tables above, of openat no more than is needed.
    let is_answered = |rule: &Rule| [start::ANSWERED, start::ABSENT].concat().contains(rule);
    let mut roles: Vec<Rule> = start::EXEC.to_vec();
    for role in Role::ALL {
        roles.extend(policy::setup(role).into_iter().filter(|rule| !is_answered(rule)));
    }
    let mounts = if mounts { MOUNTS } else { &[] };
    let mut all: Vec<Rule> = Vec::new();
    // Those of the roles first: of several lines for one call theirs are looked at most often.
    for rule in roles.iter().chain(OWN).chain(STEPS).chain(mounts).chain(ANSWERED) {
        if !all.iter().any(|known| known.syscall == rule.syscall && known.checks == rule.checks) {
            all.push(*rule);
        }
    }
    all
}
