//! What every backend may do: the shared library's calls. A role's own file has only what is its own.

use libc::{
    F_GET_SEALS, F_GETFD, F_SETFD, MADV_DONTDUMP, MAP_NORESERVE, MAP_SHARED, PROT_READ, PROT_WRITE, SYS_brk,
    SYS_clock_gettime, SYS_close, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_wait, SYS_eventfd2, SYS_exit_group,
    SYS_fcntl, SYS_fstat, SYS_futex, SYS_madvise, SYS_mmap, SYS_munmap, SYS_ppoll, SYS_preadv2, SYS_read, SYS_recvmsg,
    SYS_restart_syscall, SYS_sched_yield, SYS_sendmsg, SYS_sigaltstack, SYS_write,
};

use crate::filter::{Check, Rule, allow, allow_if};

const GUEST_MEMORY: &[Check] = &[
    Check::Equals(2, (PROT_READ | PROT_WRITE).unsigned_abs()),
    Check::Equals(3, (MAP_SHARED | MAP_NORESERVE).unsigned_abs()),
];

/// Until it is ready.
pub const LAUNCH: &[Rule] = &[
    allow(SYS_eventfd2, "what stops a queue, and what wakes the control thread"),
    allow(SYS_epoll_create1, "what a queue waits with"),
];

/// Once it is ready.
pub const RUN: &[Rule] = &[
    // The queues.
    allow(SYS_epoll_wait, "a queue waits for a kick, its stop, and what the device waits for"),
    allow(SYS_epoll_ctl, "the kick of a queue comes with its start and goes with its stop"),
    allow(SYS_read, "the eventfds of our own: stop, wake; a console's input"),
    allow(SYS_write, "calls, stop, wake, log lines; a console's output"),
    allow(SYS_preadv2, "releases a queue that hangs in a call which the core has blocked"),
    // vhost-user and control.
    allow(SYS_recvmsg, "requests of the core, messages of ozone"),
    allow(SYS_sendmsg, "replies to the core, messages to ozone"),
    allow(SYS_ppoll, "the control thread waits, and a console's host side"),
    allow_if(SYS_fcntl, &[Check::Equals(1, F_GET_SEALS.unsigned_abs())], "whether memory of the core can shrink"),
    allow_if(SYS_fcntl, &[Check::Equals(1, F_SETFD.unsigned_abs())], "close-on-exec on received descriptors"),
    allow(SYS_fstat, "the kind of a received descriptor, the size of memory"),
    allow_if(SYS_mmap, GUEST_MEMORY, "guest memory and the record of what is in flight, and nothing else"),
    allow_if(SYS_madvise, &[Check::Equals(2, MADV_DONTDUMP.unsigned_abs())], "guest memory kept out of core files"),
    allow(SYS_munmap, "memory that the core takes back"),
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
