//! The tables of `vmm-core`.

use libc::{
    F_DUPFD_CLOEXEC as LIBC_F_DUPFD_CLOEXEC, F_GET_SEALS as LIBC_F_GET_SEALS, F_GETFD as LIBC_F_GETFD,
    F_SETFD as LIBC_F_SETFD, F_SETFL as LIBC_F_SETFL, FD_CLOEXEC as LIBC_FD_CLOEXEC, O_NONBLOCK as LIBC_O_NONBLOCK,
    PROT_EXEC, SEEK_END as LIBC_SEEK_END, SIGUSR1 as LIBC_SIGUSR1, SYS_brk, SYS_clock_gettime, SYS_close, SYS_eventfd2,
    SYS_exit, SYS_exit_group, SYS_fcntl, SYS_fstat, SYS_ftruncate, SYS_futex, SYS_getpid, SYS_gettid, SYS_ioctl,
    SYS_lseek, SYS_madvise, SYS_memfd_create, SYS_mmap, SYS_mprotect, SYS_munmap, SYS_pread64, SYS_read, SYS_recvmsg,
    SYS_restart_syscall, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_sched_yield, SYS_sendmsg, SYS_shutdown,
    SYS_sigaltstack, SYS_statx, SYS_tgkill, SYS_write,
};

use crate::filter::{Check, Rule, allow, allow_if};

const NO_EXEC: u32 = PROT_EXEC.unsigned_abs();
const F_GETFD: u32 = LIBC_F_GETFD.unsigned_abs();
const F_DUPFD_CLOEXEC: u32 = LIBC_F_DUPFD_CLOEXEC.unsigned_abs();
const F_GET_SEALS: u32 = LIBC_F_GET_SEALS.unsigned_abs();
const F_SETFD: u32 = LIBC_F_SETFD.unsigned_abs();
const FD_CLOEXEC: u32 = LIBC_FD_CLOEXEC.unsigned_abs();
const SEEK_END: u32 = LIBC_SEEK_END.unsigned_abs();
const F_SETFL: u32 = LIBC_F_SETFL.unsigned_abs();
const O_NONBLOCK: u32 = LIBC_O_NONBLOCK.unsigned_abs();
/// `_IO(KVMIO, 0x80)`, Linux `include/uapi/linux/kvm.h`.
const KVM_RUN: u32 = 0xae80;
/// `_IO(KVMIO, 0xad)`, ibid.
const KVM_KVMCLOCK_CTRL: u32 = 0xaead;
const SIGUSR1: u32 = LIBC_SIGUSR1.unsigned_abs();

/// Until the vCPUs start: the machine is made.
pub const LAUNCH: &[Rule] = &[
    allow(SYS_ioctl, "KVM's calls that make the machine"),
    allow(SYS_memfd_create, "guest memory"),
    allow(SYS_ftruncate, "the size of guest memory"),
    allow(SYS_fcntl, "seals on guest memory; duplicates of the image descriptors"),
    allow(SYS_eventfd2, "kicks, calls and interrupts"),
    allow(SYS_lseek, "the kernel image and the initial ramdisk are read from their start"),
    allow(SYS_pread64, "the kernel image's headers"),
    allow(SYS_statx, "the images' lengths"),
    allow(SYS_fstat, "the images' lengths, asked by the C library's older call"),
    allow(SYS_getpid, "where the signal goes that brings a vCPU out of the guest"),
    allow(SYS_gettid, "the same: each vCPU's thread tells its number"),
];

/// Once the vCPUs run.
pub const RUN: &[Rule] = &[
    allow_if(SYS_ioctl, &[Check::Equals(1, KVM_RUN)], "the vCPUs run"),
    allow_if(SYS_ioctl, &[Check::Equals(1, KVM_KVMCLOCK_CTRL)], "the guest's watchdog forgives a pause"),
    allow_if(SYS_tgkill, &[Check::Equals(2, SIGUSR1)], "a pause brings the vCPUs out of the guest"),
    allow(SYS_read, "part of a backend's answer"),
    allow(SYS_write, "the serial port's pipe, interrupts of the core's own devices, log lines"),
    allow(SYS_sendmsg, "messages to ozone, requests to backends"),
    allow(SYS_recvmsg, "messages of ozone, answers of backends"),
    allow(SYS_shutdown, "hangs up on a backend that does not answer"),
    allow(SYS_futex, "locks and queues between threads"),
    allow(SYS_restart_syscall, "a timed wait goes on after SIGSTOP and SIGCONT"),
    allow(SYS_sched_yield, "the standard library's queues back off"),
    allow(SYS_clock_gettime, "deadlines, where the clock cannot be read in user space"),
    allow_if(SYS_fcntl, &[Check::Equals(1, F_GETFD)], "the standard library's check before it closes a descriptor"),
    allow_if(
        SYS_fcntl,
        &[Check::Equals(1, F_DUPFD_CLOEXEC)],
        "the socket of a backend that came back, a second time: the main thread hangs up by it",
    ),
    allow_if(
        SYS_fcntl,
        &[Check::Equals(1, F_SETFD), Check::Equals(2, FD_CLOEXEC)],
        "the region of what is in flight, which a backend handed over",
    ),
    allow_if(SYS_fcntl, &[Check::Equals(1, F_GET_SEALS)], "whether that region is memory, and stays"),
    allow_if(SYS_lseek, &[Check::Equals(2, SEEK_END)], "whether that region is as long as it is said to be"),
    allow_if(
        SYS_fcntl,
        &[Check::Equals(1, F_SETFL), Check::Equals(2, O_NONBLOCK)],
        "kicks and calls that a dead backend may have made blocking",
    ),
    allow(SYS_close, "the socket of a backend that is gone"),
    allow(SYS_brk, "the heap grows"),
    allow_if(SYS_mmap, &[Check::Without(2, NO_EXEC)], "the heap grows by mappings"),
    allow_if(SYS_mprotect, &[Check::Without(2, NO_EXEC)], "heap of a thread grows"),
    allow(SYS_munmap, "heap given back, stacks of ended threads"),
    allow(SYS_madvise, "heap given back, stacks of ended threads"),
    allow(SYS_rt_sigprocmask, "end of a thread"),
    allow(SYS_rt_sigreturn, "return from that signal's handler, and the standard library's for stack overflow"),
    allow(SYS_sigaltstack, "end of a thread"),
    allow(SYS_exit, "end of a thread"),
    allow(SYS_exit_group, "end of the process"),
];
