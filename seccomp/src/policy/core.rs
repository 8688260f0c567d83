//! The tables of `vmm-core`.

use libc::{
    F_ADD_SEALS as LIBC_F_ADD_SEALS, F_DUPFD_CLOEXEC as LIBC_F_DUPFD_CLOEXEC, F_GET_SEALS as LIBC_F_GET_SEALS,
    F_GETFD as LIBC_F_GETFD, F_SETFD as LIBC_F_SETFD, F_SETFL as LIBC_F_SETFL, FD_CLOEXEC as LIBC_FD_CLOEXEC,
    O_NONBLOCK as LIBC_O_NONBLOCK, SEEK_END as LIBC_SEEK_END, SIGUSR1 as LIBC_SIGUSR1, SYS_brk, SYS_clock_gettime,
    SYS_close, SYS_eventfd2, SYS_exit_group, SYS_fcntl, SYS_fstat, SYS_ftruncate, SYS_futex, SYS_getpid, SYS_gettid,
    SYS_ioctl, SYS_lseek, SYS_memfd_create, SYS_munmap, SYS_pread64, SYS_read, SYS_recvmsg, SYS_restart_syscall,
    SYS_rt_sigreturn, SYS_sched_yield, SYS_sendmsg, SYS_shutdown, SYS_sigaltstack, SYS_statx, SYS_tgkill, SYS_write,
};

use crate::filter::{Check, Rule, allow, allow_if};
use crate::policy::CoreThread;

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
/// The type of KVM's ioctls and where it is in their numbers (ioctl(2), asm-generic/ioctl.h).
const KVMIO: u32 = 0xae00;
const IOCTL_TYPE: u32 = 0xff00;
const F_ADD_SEALS: u32 = LIBC_F_ADD_SEALS.unsigned_abs();
const SIGUSR1: u32 = LIBC_SIGUSR1.unsigned_abs();

/// Until the vCPUs start: the machine is made.
pub const LAUNCH: &[Rule] = &[
    allow_if(SYS_ioctl, &[Check::Masked(1, IOCTL_TYPE, KVMIO)], "KVM's calls that make the machine"),
    allow(SYS_memfd_create, "guest memory"),
    allow(SYS_ftruncate, "the size of guest memory"),
    allow_if(SYS_fcntl, &[Check::Equals(1, F_ADD_SEALS)], "seals on guest memory"),
    allow(SYS_eventfd2, "kicks, calls and interrupts"),
    allow(SYS_lseek, "the kernel image and the initial ramdisk are read from their start"),
    allow(SYS_pread64, "the kernel image's headers"),
    allow(SYS_statx, "the images' lengths"),
    allow(SYS_fstat, "the images' lengths, asked by the C library's older call"),
    allow(SYS_getpid, "where the signal goes that brings a vCPU out of the guest"),
    allow(SYS_gettid, "the same: each vCPU's thread tells its number"),
];

/// Every thread, from when it has its run filter. Threads never end: they rest until the process does.
pub const ALL: &[Rule] = &[
    allow(SYS_write, "log lines, eventfds of the core's own, the serial port's pipe"),
    allow(SYS_futex, "locks and queues between threads"),
    allow(SYS_restart_syscall, "a timed wait goes on after SIGSTOP and SIGCONT"),
    allow(SYS_sched_yield, "the standard library's queues back off"),
    allow(SYS_clock_gettime, "deadlines, where the clock cannot be read in user space"),
    allow(SYS_brk, "the heap grows: by this alone, nothing is mapped"),
    allow(SYS_rt_sigreturn, "return from the handler of the signal that brings a vCPU out of the guest"),
    allow(SYS_exit_group, "end of the process"),
];

/// The main thread, once the vCPUs may start.
pub const MAIN: &[Rule] = &[
    allow(SYS_sendmsg, "messages to ozone"),
    allow(SYS_recvmsg, "waits for ozone to have read the last one"),
    allow_if(SYS_tgkill, &[Check::Equals(2, SIGUSR1)], "a pause brings the vCPUs out of the guest"),
    allow(SYS_shutdown, "hangs up on a backend that does not answer"),
    allow(SYS_close, "the socket of that backend"),
    allow_if(SYS_fcntl, &[Check::Equals(1, F_GETFD)], "the standard library's check before it closes a descriptor"),
    allow(SYS_sigaltstack, "the standard library tidies its main thread up"),
    allow(SYS_munmap, "the same: that thread's signal stack"),
];

/// The thread that reads what `ozone` sends, from its start.
pub const CONTROL: &[Rule] = &[
    allow(SYS_recvmsg, "messages of ozone"),
    allow(SYS_close, "descriptors of a message that nobody takes"),
    allow_if(SYS_fcntl, &[Check::Equals(1, F_GETFD)], "the standard library's check before it closes a descriptor"),
];

/// The thread that writes the serial port's output, from its start.
pub const SERIAL: &[Rule] = &[
    allow(SYS_close, "the serial port's pipe, when nobody reads it any more"),
    allow_if(SYS_fcntl, &[Check::Equals(1, F_GETFD)], "the standard library's check before it closes a descriptor"),
];

/// A thread that talks to a backend, once it has greeted the first one.
pub const ATTENDANT: &[Rule] = &[
    allow(SYS_sendmsg, "requests to the backend"),
    allow(SYS_recvmsg, "answers of the backend"),
    allow(SYS_read, "part of a backend's answer"),
    allow(SYS_shutdown, "the conversation is over"),
    allow(SYS_close, "the socket of a backend that is gone"),
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
];

/// A thread that runs the guest, from before its first instruction.
pub const VCPU: &[Rule] = &[
    allow_if(SYS_ioctl, &[Check::Equals(1, KVM_RUN)], "the guest runs"),
    allow_if(SYS_ioctl, &[Check::Equals(1, KVM_KVMCLOCK_CTRL)], "the guest's watchdog forgives a pause"),
];

/// What a thread of this kind may do once it has its run filter.
pub fn run(thread: CoreThread) -> Vec<Rule> {
    let own = match thread {
        CoreThread::Main => MAIN,
        CoreThread::Control => CONTROL,
        CoreThread::Serial => SERIAL,
        CoreThread::Attendant => ATTENDANT,
        CoreThread::Vcpu => VCPU,
    };
    [ALL, own].concat()
}
