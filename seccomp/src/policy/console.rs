//! The tables of `console`.

use libc::{
    F_GET_SEALS, F_GETFD, F_GETFL, F_SETFD, F_SETFL, MADV_DONTDUMP, MAP_NORESERVE, MAP_SHARED, PROT_READ, PROT_WRITE,
    SYS_accept4, SYS_brk, SYS_clock_gettime, SYS_close, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_wait, SYS_eventfd2,
    SYS_exit_group, SYS_fcntl, SYS_fstat, SYS_futex, SYS_ioctl, SYS_madvise, SYS_mmap, SYS_munmap, SYS_ppoll,
    SYS_preadv2, SYS_read, SYS_recvmsg, SYS_restart_syscall, SYS_sched_yield, SYS_sendmsg, SYS_sigaltstack, SYS_write,
};

use crate::filter::{Check, Rule, allow, allow_if};

const GUEST_MEMORY: &[Check] = &[
    Check::Equals(2, (PROT_READ | PROT_WRITE).unsigned_abs()),
    Check::Equals(3, (MAP_SHARED | MAP_NORESERVE).unsigned_abs()),
];

/// asm-generic/ioctls.h; TIOCSTI, which would type on the user's terminal, is none of them.
const TCGETS: u32 = 0x5401;
const TCSETS: u32 = 0x5402;
const TIOCGWINSZ: u32 = 0x5413;

/// Until it is ready.
pub const LAUNCH: &[Rule] = &[
    allow(SYS_eventfd2, "what stops a queue, and what wakes the control thread"),
    allow(SYS_epoll_create1, "what a queue waits with"),
    allow_if(SYS_ioctl, &[Check::Equals(1, TCGETS)], "how the terminal is, to restore it"),
    allow_if(SYS_ioctl, &[Check::Equals(1, TIOCGWINSZ)], "the size of the terminal"),
    allow_if(SYS_fcntl, &[Check::Equals(1, F_GETFL.unsigned_abs())], "a pseudo-terminal is made non-blocking"),
    allow_if(SYS_fcntl, &[Check::Equals(1, F_SETFL.unsigned_abs())], "a pseudo-terminal is made non-blocking"),
];

/// Once it is ready.
pub const RUN: &[Rule] = &[
    // The host side.
    allow(SYS_accept4, "the clients of a console on a socket"),
    allow_if(SYS_ioctl, &[Check::Equals(1, TCSETS)], "the terminal is restored at the end"),
    // The queues, and the host side.
    allow(SYS_epoll_wait, "a queue waits for a kick, for bytes or its stop; a pseudo-terminal is watched"),
    allow(SYS_epoll_ctl, "the kick of a queue comes with its start and goes with its stop"),
    allow(SYS_read, "console and serial input; the eventfds of our own"),
    allow(SYS_write, "console output, calls, the eventfds of our own, log lines"),
    allow(SYS_preadv2, "releases a queue that hangs in a call which the core has blocked"),
    // vhost-user and control.
    allow(SYS_recvmsg, "requests of the core, messages of ozone"),
    allow(SYS_sendmsg, "replies to the core, messages to ozone"),
    allow(SYS_ppoll, "the control thread and the host side wait"),
    allow_if(SYS_fcntl, &[Check::Equals(1, F_GET_SEALS.unsigned_abs())], "whether guest memory can shrink"),
    allow_if(SYS_fcntl, &[Check::Equals(1, F_SETFD.unsigned_abs())], "close-on-exec on received descriptors"),
    allow(SYS_fstat, "the kind of a received descriptor, the size of guest memory"),
    allow_if(SYS_mmap, GUEST_MEMORY, "guest memory, and nothing else"),
    allow_if(SYS_madvise, &[Check::Equals(2, MADV_DONTDUMP.unsigned_abs())], "guest memory kept out of core files"),
    allow(SYS_munmap, "guest memory that the core takes back"),
    allow_if(SYS_fcntl, &[Check::Equals(1, F_GETFD.unsigned_abs())], "debug builds look before they close"),
    allow(SYS_close, "received descriptors, clients that have gone"),
    // The libraries.
    allow(SYS_brk, "the heap grows"),
    allow(SYS_futex, "locks and channels between threads"),
    allow(SYS_sched_yield, "the standard library's channels, under contention"),
    allow(SYS_clock_gettime, "deadlines, where the kernel's clock page cannot answer"),
    allow(SYS_restart_syscall, "a timed wait goes on after SIGSTOP and SIGCONT"),
    allow(SYS_sigaltstack, "the standard library tidies its main thread up"),
    allow(SYS_exit_group, "end of the process"),
];
