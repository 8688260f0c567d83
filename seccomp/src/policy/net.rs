//! The tables of `net`.

use libc::{
    F_GET_SEALS, F_GETFD, F_SETFD, MADV_DONTDUMP, MAP_NORESERVE, MAP_SHARED, PROT_READ, PROT_WRITE, SYS_brk,
    SYS_clock_gettime, SYS_close, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_wait, SYS_eventfd2, SYS_exit_group,
    SYS_fcntl, SYS_fstat, SYS_futex, SYS_ioctl, SYS_madvise, SYS_mmap, SYS_munmap, SYS_ppoll, SYS_preadv2, SYS_read,
    SYS_readv, SYS_recvmsg, SYS_restart_syscall, SYS_sched_yield, SYS_sendmsg, SYS_sigaltstack, SYS_write, SYS_writev,
};

use crate::filter::{Check, Rule, allow, allow_if};

const GUEST_MEMORY: &[Check] = &[
    Check::Equals(2, (PROT_READ | PROT_WRITE).unsigned_abs()),
    Check::Equals(3, (MAP_SHARED | MAP_NORESERVE).unsigned_abs()),
];

/// linux/if_tun.h: `_IOW('T', 208, unsigned int)` and `_IOW('T', 217, int)`.
const TUNSETOFFLOAD: u32 = 0x4004_54d0;
const TUNSETQUEUE: u32 = 0x4004_54d9;

/// Until it is ready.
pub const LAUNCH: &[Rule] = &[
    allow(SYS_eventfd2, "what stops a queue, and what wakes the control thread"),
    allow(SYS_epoll_create1, "what a queue waits with"),
];

/// Once it is ready.
pub const RUN: &[Rule] = &[
    // The tap.
    allow(SYS_readv, "frames from the tap into guest memory"),
    allow(SYS_writev, "frames from guest memory to the tap"),
    allow_if(SYS_ioctl, &[Check::Equals(1, TUNSETOFFLOAD)], "the offloads that the driver accepted"),
    allow_if(SYS_ioctl, &[Check::Equals(1, TUNSETQUEUE)], "queues of the tap that the driver takes into use or leaves"),
    // The queues.
    allow(SYS_epoll_wait, "a queue waits for a kick, a frame or its stop"),
    allow(SYS_epoll_ctl, "the kick of a queue comes with its start and goes with its stop"),
    allow(SYS_read, "the eventfds of our own: stop, wake"),
    allow(SYS_write, "calls, stop, wake, log lines"),
    allow(SYS_preadv2, "releases a queue that hangs in a call which the core has blocked"),
    // vhost-user and control.
    allow(SYS_recvmsg, "requests of the core, messages of ozone"),
    allow(SYS_sendmsg, "replies to the core, messages to ozone"),
    allow(SYS_ppoll, "the control thread waits"),
    allow_if(SYS_fcntl, &[Check::Equals(1, F_GET_SEALS.unsigned_abs())], "whether guest memory can shrink"),
    allow_if(SYS_fcntl, &[Check::Equals(1, F_SETFD.unsigned_abs())], "close-on-exec on received descriptors"),
    allow(SYS_fstat, "the kind of a received descriptor, the size of guest memory"),
    allow_if(SYS_mmap, GUEST_MEMORY, "guest memory, and nothing else"),
    allow_if(SYS_madvise, &[Check::Equals(2, MADV_DONTDUMP.unsigned_abs())], "guest memory kept out of core files"),
    allow(SYS_munmap, "guest memory that the core takes back"),
    allow_if(SYS_fcntl, &[Check::Equals(1, F_GETFD.unsigned_abs())], "debug builds look before they close"),
    allow(SYS_close, "received descriptors"),
    // The libraries.
    allow(SYS_brk, "the heap grows"),
    allow(SYS_futex, "locks and channels between threads"),
    allow(SYS_sched_yield, "the standard library's channels, under contention"),
    allow(SYS_clock_gettime, "deadlines, where the kernel's clock page cannot answer"),
    allow(SYS_restart_syscall, "a timed wait goes on after SIGSTOP and SIGCONT"),
    allow(SYS_sigaltstack, "the standard library tidies its main thread up"),
    allow(SYS_exit_group, "end of the process"),
];
