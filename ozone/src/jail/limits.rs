//! Resource limits per role, as plain data. Soft and hard limit are the same: nothing can be raised again.

use nix::sys::resource::{RLIM_INFINITY, Resource};
use seccomp::Role;

/// One limit, and why it is what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Which resource (setrlimit(2)).
    pub resource: Resource,
    /// Soft and hard limit, in the resource's unit.
    pub value: u64,
    /// Why.
    pub reason: &'static str,
}

const fn limit(resource: Resource, value: u64, reason: &'static str) -> Limit {
    Limit { resource, value, reason }
}

/// The most threads and processes that `role` has at a time, those that the kernel makes for it included.
pub fn tasks(role: Role) -> u64 {
    match role {
        Role::Core => 320,
        Role::Blk => 128,
        Role::Net => 64,
        Role::Console => 16,
    }
}

/// The limits of `role` in a machine with `memory` bytes.
pub fn for_role(role: Role, memory: u64) -> Vec<Limit> {
    let mut limits = vec![
        limit(Resource::RLIMIT_CORE, 0, "guest memory must not reach a disk in a core dump"),
        limit(Resource::RLIMIT_MSGQUEUE, 0, "no role uses message queues"),
        limit(Resource::RLIMIT_RTPRIO, 0, "no role asks for real-time scheduling"),
        limit(Resource::RLIMIT_NICE, 0, "no role raises its own priority"),
    ];
    limits.extend(match role {
        Role::Core => [
            limit(Resource::RLIMIT_MEMLOCK, 0, "it locks no memory"),
            limit(Resource::RLIMIT_NOFILE, 1024, "254 vCPUs and four descriptors per queue fit"),
            limit(Resource::RLIMIT_NPROC, tasks(role), "254 vCPU threads and the core's own"),
            limit(Resource::RLIMIT_FSIZE, memory, "a memory slot's memfd is the largest file it makes"),
        ],
        Role::Blk => [
            limit(
                Resource::RLIMIT_MEMLOCK,
                8 << 20,
                "the kernel counts the memory of a ring per queue (io_uring_setup(2))",
            ),
            limit(Resource::RLIMIT_NOFILE, 512, "the image, memory slots, and seven descriptors for each of 16 queues"),
            limit(Resource::RLIMIT_NPROC, tasks(role), "a thread per queue, and the kernel's io_uring workers"),
            limit(Resource::RLIMIT_FSIZE, RLIM_INFINITY, "the image may be of any size"),
        ],
        Role::Net => [
            limit(Resource::RLIMIT_MEMLOCK, 0, "it locks no memory"),
            limit(Resource::RLIMIT_NOFILE, 256, "taps, memory slots, and two descriptors per queue"),
            limit(Resource::RLIMIT_NPROC, tasks(role), "a thread per queue"),
            limit(Resource::RLIMIT_FSIZE, 4 << 20, "the memfd for requests in flight is the only file it makes"),
        ],
        Role::Console => [
            limit(Resource::RLIMIT_MEMLOCK, 0, "it locks no memory"),
            limit(Resource::RLIMIT_NOFILE, 64, "the terminal, memory slots, and two descriptors per queue"),
            limit(Resource::RLIMIT_NPROC, tasks(role), "a thread for the queues and one for the host side"),
            limit(Resource::RLIMIT_FSIZE, RLIM_INFINITY, "output may go to a file of the user's"),
        ],
    });
    limits
}
