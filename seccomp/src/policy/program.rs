//! The tables of a program that `ozone jail` runs: of unknown nature, so that what it may not is listed.
//!
//! Nothing here is needed to compute, to read and write files, to talk over sockets or to run a virtual machine. Most of it asks
//! for capabilities that the program does not have; refused here, a mistake in the kernel's own check is of no use to it.

use libc::{
    AF_ALG, AF_VSOCK, SYS__sysctl, SYS_acct, SYS_add_key, SYS_bpf, SYS_chroot, SYS_clock_settime, SYS_clone,
    SYS_clone3, SYS_delete_module, SYS_exit_group, SYS_fanotify_init, SYS_finit_module, SYS_fsconfig, SYS_fsmount,
    SYS_fsopen, SYS_fspick, SYS_init_module, SYS_io_uring_enter, SYS_io_uring_register, SYS_io_uring_setup, SYS_ioctl,
    SYS_ioperm, SYS_iopl, SYS_kcmp, SYS_kexec_file_load, SYS_kexec_load, SYS_keyctl, SYS_kill, SYS_lookup_dcookie,
    SYS_migrate_pages, SYS_modify_ldt, SYS_mount, SYS_mount_setattr, SYS_move_mount, SYS_move_pages, SYS_nfsservctl,
    SYS_open_by_handle_at, SYS_open_tree, SYS_perf_event_open, SYS_personality, SYS_pidfd_getfd, SYS_pivot_root,
    SYS_process_madvise, SYS_process_vm_readv, SYS_process_vm_writev, SYS_ptrace, SYS_quotactl, SYS_quotactl_fd,
    SYS_reboot, SYS_request_key, SYS_restart_syscall, SYS_rt_sigtimedwait, SYS_setns, SYS_settimeofday, SYS_socket,
    SYS_swapoff, SYS_swapon, SYS_syslog, SYS_umount2, SYS_unshare, SYS_uselib, SYS_userfaultfd, SYS_vhangup, SYS_wait4,
    SYS_write,
};

use super::start::NAMESPACES;
use crate::filter::{Check, Rule, allow, allow_if};

/// asm-generic/ioctls.h. The libc crate has them with another type on each C library.
const TIOCSTI: u32 = 0x5412;
const TIOCLINUX: u32 = 0x541c;

/// personality(2): asks and changes nothing.
const ASK: u32 = 0xffff_ffff;

/// clone(2) has CLONE_NEWTIME where fork's exit signal is, so it is for unshare and clone3 alone: both are refused.
const ANY_NAMESPACE: [Check; 7] = [
    Check::Masked(0, 0x0002_0000, 0x0002_0000),
    Check::Masked(0, 0x0200_0000, 0x0200_0000),
    Check::Masked(0, 0x0400_0000, 0x0400_0000),
    Check::Masked(0, 0x0800_0000, 0x0800_0000),
    Check::Masked(0, 0x1000_0000, 0x1000_0000),
    Check::Masked(0, 0x2000_0000, 0x2000_0000),
    Check::Masked(0, 0x4000_0000, 0x4000_0000),
];

// The seven bits are every namespace of clone(2).
const _: () = assert!(NAMESPACES == 0x7e02_0000);

const fn namespace(check: &'static [Check]) -> Rule {
    allow_if(SYS_clone, check, "in a user namespace of its own it would have every capability")
}

const fn terminal(check: &'static [Check], reason: &'static str) -> Rule {
    allow_if(SYS_ioctl, check, reason)
}

const fn socket(check: &'static [Check], reason: &'static str) -> Rule {
    allow_if(SYS_socket, check, reason)
}

/// Refused with EPERM. A line says which calls it is about as in the tables of the roles, where they are allowed.
pub const DENIED: &[Rule] = &[
    // Mounts: the root is what the jail says.
    allow(SYS_mount, "mounts are the jail's, which has made them all"),
    allow(SYS_umount2, "what is under a mount is not for the program"),
    allow(SYS_pivot_root, "the root is the jail's"),
    allow(SYS_chroot, "with a directory kept open it is a way out of a root"),
    allow(SYS_open_tree, "a copy of a mount without what is mounted on it"),
    allow(SYS_move_mount, "mounts are the jail's, which has made them all"),
    allow(SYS_fsopen, "a new file system"),
    allow(SYS_fsconfig, "its parameters: parsers of the kernel's"),
    allow(SYS_fsmount, "a new mount"),
    allow(SYS_fspick, "a file system's parameters changed"),
    allow(SYS_mount_setattr, "a mount that is read-only would be made writable"),
    allow(SYS_swapon, "swap is the host's"),
    allow(SYS_swapoff, "swap is the host's"),
    allow(SYS_quotactl, "quotas are the host's"),
    allow(SYS_quotactl_fd, "quotas are the host's"),
    allow(SYS_open_by_handle_at, "opens any file of a file system that it has one file of, past its root"),
    allow(SYS_fanotify_init, "watches file systems as a whole"),
    // Namespaces.
    allow(SYS_setns, "namespaces are the jail's"),
    allow(SYS_unshare, "in a user namespace of its own it would have every capability"),
    namespace(&[ANY_NAMESPACE[0]]),
    namespace(&[ANY_NAMESPACE[1]]),
    namespace(&[ANY_NAMESPACE[2]]),
    namespace(&[ANY_NAMESPACE[3]]),
    namespace(&[ANY_NAMESPACE[4]]),
    namespace(&[ANY_NAMESPACE[5]]),
    namespace(&[ANY_NAMESPACE[6]]),
    // Other processes.
    allow(SYS_ptrace, "another process's memory and registers"),
    allow(SYS_process_vm_readv, "another process's memory"),
    allow(SYS_process_vm_writev, "another process's memory"),
    allow(SYS_process_madvise, "another process's memory"),
    allow(SYS_pidfd_getfd, "another process's descriptors"),
    allow(SYS_kcmp, "where the kernel keeps what two processes share"),
    allow(SYS_migrate_pages, "where another process's memory is"),
    allow(SYS_move_pages, "where another process's memory is"),
    // Parts of the kernel where many mistakes were found, and which filters do not see into.
    allow(SYS_io_uring_setup, "its requests are carried out without a filter's look at them"),
    allow(SYS_io_uring_enter, "its requests are carried out without a filter's look at them"),
    allow(SYS_io_uring_register, "its requests are carried out without a filter's look at them"),
    allow(SYS_bpf, "programs that run in the kernel"),
    allow(SYS_perf_event_open, "the kernel's and other processes' doings, measured"),
    allow(SYS_userfaultfd, "stops the kernel in the middle of a copy, for as long as it pleases"),
    allow(SYS_add_key, "keys are in no namespace"),
    allow(SYS_request_key, "keys are in no namespace, and the kernel starts a program of the host for them"),
    allow(SYS_keyctl, "keys are in no namespace"),
    allow(SYS_modify_ldt, "segments for 16-bit code"),
    allow(SYS_lookup_dcookie, "a profiler of long ago"),
    allow(SYS_uselib, "libraries of long ago"),
    allow(SYS_nfsservctl, "a file server of long ago"),
    allow(SYS__sysctl, "the host's settings, in the way of long ago"),
    socket(&[Check::Equals(0, AF_VSOCK.unsigned_abs())], "guests and their host, past any network namespace"),
    socket(&[Check::Equals(0, AF_ALG.unsigned_abs())], "the kernel's own cryptography, for itself"),
    // The host as such.
    allow(SYS_kexec_load, "another kernel"),
    allow(SYS_kexec_file_load, "another kernel"),
    allow(SYS_init_module, "code in the kernel"),
    allow(SYS_finit_module, "code in the kernel"),
    allow(SYS_delete_module, "code out of the kernel"),
    allow(SYS_reboot, "the host's end, or the pid namespace's"),
    allow(SYS_acct, "accounting is the host's"),
    allow(SYS_syslog, "the kernel's log tells of other tenants"),
    allow(SYS_settimeofday, "the host's clock"),
    allow(SYS_clock_settime, "the host's clock"),
    allow(SYS_iopl, "the host's devices"),
    allow(SYS_ioperm, "the host's devices"),
    allow(SYS_vhangup, "the terminal is the caller's"),
    terminal(&[Check::Equals(1, TIOCSTI)], "types into the terminal of whoever started it"),
    terminal(&[Check::Equals(1, TIOCLINUX)], "copies and pastes on the host's text console"),
    allow_if(
        SYS_personality,
        &[Check::Differs(0, 0), Check::Differs(0, ASK)],
        "addresses that are not random, memory that is executable when it is read",
    ),
];

/// Answered with ENOSYS: clone3's flags are behind a pointer, where no filter sees them. C libraries fall back to clone.
pub const ABSENT: &[Rule] = &[allow(SYS_clone3, "C libraries start threads with it where they can")];

/// All that the first process of the jail may do: it waits for the program, and passes signals and its end on.
pub const INIT: &[Rule] = &[
    allow(SYS_rt_sigtimedwait, "waits for a signal"),
    allow(SYS_wait4, "takes notice of the end of the program, and of every process that has lost its parent"),
    allow(SYS_kill, "passes a signal on to the program"),
    allow(SYS_write, "tells ozone how the program ended"),
    allow(SYS_restart_syscall, "a wait goes on after SIGSTOP and SIGCONT"),
    allow(SYS_exit_group, "its end, which is that of everything in the jail"),
];
