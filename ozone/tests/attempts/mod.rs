//! What a role that was taken over might try.
#![allow(unsafe_code)]

use std::ffi::CStr;

use nix::libc::{self, c_int, c_long};

/// One forbidden call.
pub struct Attempt {
    /// What it is for, in words.
    pub name: &'static str,
    /// Its number.
    pub call: c_long,
    arguments: [Argument; 6],
}

/// One argument of a call.
#[derive(Clone, Copy)]
enum Argument {
    Number(i64),
    Text(&'static CStr),
    Bytes(&'static [u8]),
}

use Argument::{Bytes, Number, Text};

const NONE: Argument = Number(0);

const fn attempt<const N: usize>(name: &'static str, call: c_long, given: [Argument; N]) -> Attempt {
    let mut arguments = [NONE; 6];
    let mut index = 0;
    while index < N {
        arguments[index] = given[index];
        index += 1;
    }
    Attempt { name, call, arguments }
}

const fn number(value: c_int) -> Argument {
    Number(value as i64)
}

const HERE: Argument = number(libc::AT_FDCWD);
const CONTROL: Argument = Number(3);
const LOG: Argument = Number(2);
const PARENT: Argument = Number(1);
const ROOT: Argument = Text(c"/");
const FILE: Argument = Text(c"/etc/passwd");
const NEW: Argument = Text(c"/new");

/// `struct sockaddr_un` with the abstract name "host" (unix(7)).
const ABSTRACT: Argument = Bytes(b"\x01\x00\0host");
/// `struct sockaddr_in` of 127.0.0.1, port 22 (ip(7)).
const LOOPBACK: Argument = Bytes(b"\x02\x00\x00\x16\x7f\x00\x00\x01\0\0\0\0\0\0\0\0");
/// Zeroes for whatever structure a call reads; no call gets as far as to write to it.
const ZEROES: Argument = Bytes(&[0; 256]);
/// A null-terminated list of arguments with nothing in it.
const NOTHING: Argument = NONE;

/// linux/if_tun.h: `_IOW('T', 203, int)`, `_IOW('T', 202, int)`, `_IOW('T', 204, int)`.
const TUNSETPERSIST: i64 = 0x4004_54cb;
const TUNSETIFF: i64 = 0x4004_54ca;
const TUNSETOWNER: i64 = 0x4004_54cc;
/// asm-generic/ioctls.h.
const TIOCSTI: i64 = 0x5412;
const TIOCLINUX: i64 = 0x541c;
const TIOCSCTTY: i64 = 0x540e;
/// linux/fs.h: `_IOW('f', 2, long)`, `_IOW(0x94, 9, int)`.
const FS_IOC_SETFLAGS: i64 = 0x4008_6602;
const FICLONE: i64 = 0x4004_9409;
/// linux/kvm.h: `_IO(KVMIO, 0x01)` and `_IOW(KVMIO, 0x46, struct kvm_userspace_memory_region)`.
const KVM_CREATE_VM: i64 = 0xae01;
const KVM_SET_USER_MEMORY_REGION: i64 = 0x4020_ae46;
/// linux/io_uring.h: IORING_REGISTER_FILES.
const REGISTER_FILES: Argument = Number(2);
/// Executable memory.
const WRITE_EXECUTE: Argument = number(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC);
const PRIVATE: Argument = number(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);

/// Every attempt. Where a role may make the call with some arguments, these are others.
pub const ATTEMPTS: &[Attempt] = &[
    // Paths.
    attempt("a file of the host", libc::SYS_openat, [HERE, FILE, number(libc::O_RDONLY)]),
    attempt("the same by the older call", libc::SYS_open, [FILE, number(libc::O_RDONLY)]),
    attempt("the same by the newer call", libc::SYS_openat2, [HERE, FILE, ZEROES, Number(24)]),
    attempt("its own descriptors by /proc", libc::SYS_openat, [HERE, Text(c"/proc/self/fd/3")]),
    attempt("a file by its handle", libc::SYS_open_by_handle_at, [CONTROL, ZEROES]),
    attempt("a handle of a file", libc::SYS_name_to_handle_at, [HERE, ROOT, ZEROES, ZEROES]),
    attempt("a file made", libc::SYS_creat, [NEW, Number(0o600)]),
    attempt("a directory made", libc::SYS_mkdirat, [HERE, NEW, Number(0o700)]),
    attempt("a device node made", libc::SYS_mknodat, [HERE, NEW, Number(0o020_600), Number(0x0501)]),
    attempt("a link made", libc::SYS_linkat, [HERE, FILE, HERE, NEW]),
    attempt("a symbolic link made", libc::SYS_symlinkat, [FILE, HERE, NEW]),
    attempt("a file renamed", libc::SYS_renameat2, [HERE, FILE, HERE, NEW]),
    attempt("a file removed", libc::SYS_unlinkat, [HERE, FILE]),
    attempt("a file's owner changed", libc::SYS_fchownat, [HERE, FILE]),
    attempt("its log's owner changed", libc::SYS_fchown, [LOG]),
    attempt("a file's mode changed", libc::SYS_fchmodat, [HERE, FILE, Number(0o777)]),
    attempt("its log's mode changed", libc::SYS_fchmod, [LOG, Number(0o777)]),
    attempt("a directory listed", libc::SYS_getdents64, [CONTROL, ZEROES, Number(256)]),
    attempt("another directory entered", libc::SYS_chdir, [ROOT]),
    attempt("another root", libc::SYS_chroot, [ROOT]),
    attempt("events of files", libc::SYS_inotify_init1, [NONE]),
    attempt("events of all files", libc::SYS_fanotify_init, [NONE]),
    attempt("flags of a file", libc::SYS_ioctl, [CONTROL, Number(FS_IOC_SETFLAGS), ZEROES]),
    attempt("a file cloned", libc::SYS_ioctl, [CONTROL, Number(FICLONE), LOG]),
    // Sockets.
    attempt("a socket of the Internet", libc::SYS_socket, [number(libc::AF_INET), number(libc::SOCK_STREAM)]),
    attempt("a unix socket", libc::SYS_socket, [number(libc::AF_UNIX), number(libc::SOCK_DGRAM)]),
    attempt("a netlink socket", libc::SYS_socket, [number(libc::AF_NETLINK), number(libc::SOCK_RAW)]),
    attempt("a packet socket", libc::SYS_socket, [number(libc::AF_PACKET), number(libc::SOCK_RAW)]),
    attempt("a socket to the hypervisor", libc::SYS_socket, [number(libc::AF_VSOCK), number(libc::SOCK_STREAM)]),
    attempt("a pair of sockets", libc::SYS_socketpair, [number(libc::AF_UNIX), number(libc::SOCK_DGRAM), NONE, ZEROES]),
    attempt("a connection to an abstract name", libc::SYS_connect, [CONTROL, ABSTRACT, Number(7)]),
    attempt("a connection to a port", libc::SYS_connect, [CONTROL, LOOPBACK, Number(16)]),
    attempt("an abstract name taken", libc::SYS_bind, [CONTROL, ABSTRACT, Number(7)]),
    attempt("a message to an abstract name", libc::SYS_sendto, [CONTROL, ZEROES, Number(1), NONE, ABSTRACT, Number(7)]),
    attempt("many messages at once", libc::SYS_sendmmsg, [CONTROL, ZEROES, Number(1)]),
    attempt("connections awaited", libc::SYS_listen, [CONTROL, Number(1)]),
    attempt("a socket's options", libc::SYS_setsockopt, [CONTROL, number(libc::SOL_SOCKET), number(libc::SO_PASSCRED)]),
    // Other processes.
    attempt("a process traced", libc::SYS_ptrace, [number(libc::PTRACE_ATTACH as c_int), PARENT]),
    attempt("another's memory read", libc::SYS_process_vm_readv, [PARENT, ZEROES, Number(1), ZEROES, Number(1)]),
    attempt("another's memory written", libc::SYS_process_vm_writev, [PARENT, ZEROES, Number(1), ZEROES, Number(1)]),
    attempt("another's memory given back", libc::SYS_process_madvise, [CONTROL, ZEROES, Number(1)]),
    attempt("a signal to all", libc::SYS_kill, [Number(-1), number(libc::SIGTERM)]),
    attempt("a signal to a thread", libc::SYS_tkill, [PARENT, number(libc::SIGTERM)]),
    attempt("another signal to a thread", libc::SYS_tgkill, [PARENT, PARENT, number(libc::SIGKILL)]),
    attempt("a signal with a value", libc::SYS_rt_sigqueueinfo, [PARENT, number(libc::SIGTERM), ZEROES]),
    attempt("a process by a descriptor", libc::SYS_pidfd_open, [PARENT]),
    attempt("another's descriptor", libc::SYS_pidfd_getfd, [CONTROL, NONE]),
    attempt("a signal by a descriptor", libc::SYS_pidfd_send_signal, [CONTROL, number(libc::SIGTERM)]),
    attempt("two processes compared", libc::SYS_kcmp, [PARENT, PARENT]),
    attempt("a child", libc::SYS_fork, []),
    attempt("a child that shares memory", libc::SYS_vfork, []),
    attempt("a child in a new user namespace", libc::SYS_clone, [number(libc::CLONE_NEWUSER | libc::SIGCHLD)]),
    attempt("a child by the newer call", libc::SYS_clone3, [ZEROES, Number(88)]),
    attempt("another executable", libc::SYS_execve, [Text(c"/bin/sh"), NOTHING, NOTHING]),
    attempt("another executable by a descriptor", libc::SYS_execveat, [CONTROL, Text(c""), NOTHING, NOTHING]),
    attempt("the memory limit of another", libc::SYS_prlimit64, [PARENT, number(libc::RLIMIT_AS as c_int), ZEROES]),
    attempt("real-time scheduling", libc::SYS_sched_setscheduler, [NONE, number(libc::SCHED_FIFO), ZEROES]),
    attempt("a higher priority", libc::SYS_setpriority, [NONE, NONE, Number(-20)]),
    // Namespaces and mounts.
    attempt("another's namespace", libc::SYS_setns, [CONTROL, NONE]),
    attempt("a namespace of users", libc::SYS_unshare, [number(libc::CLONE_NEWUSER)]),
    attempt("a mount", libc::SYS_mount, [NONE, ROOT, Text(c"proc")]),
    attempt("a mount undone", libc::SYS_umount2, [ROOT, number(libc::MNT_DETACH)]),
    attempt("a mount by the newer calls", libc::SYS_fsopen, [Text(c"proc")]),
    attempt("a copy of a mount", libc::SYS_open_tree, [HERE, ROOT]),
    attempt("a mount moved", libc::SYS_move_mount, [CONTROL, Text(c""), HERE, ROOT]),
    attempt("a mount changed", libc::SYS_mount_setattr, [HERE, ROOT, NONE, ZEROES, Number(32)]),
    attempt("another root mount", libc::SYS_pivot_root, [ROOT, ROOT]),
    attempt("the host's name", libc::SYS_sethostname, [Text(c"taken"), Number(5)]),
    // Privilege.
    attempt("uid 0", libc::SYS_setresuid, [NONE, NONE, NONE]),
    attempt("gid 0", libc::SYS_setresgid, [NONE, NONE, NONE]),
    attempt("other groups", libc::SYS_setgroups, [NONE, NONE]),
    attempt("capabilities", libc::SYS_capset, [ZEROES, ZEROES]),
    attempt("to be dumpable", libc::SYS_prctl, [number(libc::PR_SET_DUMPABLE), Number(1)]),
    attempt(
        "a filter that has the last word",
        libc::SYS_seccomp,
        [number(libc::SECCOMP_SET_MODE_FILTER as c_int), Number(8), ZEROES],
    ),
    attempt("its own reports silenced", libc::SYS_rt_sigaction, [number(libc::SIGSYS), ZEROES, NONE, Number(8)]),
    attempt("another personality", libc::SYS_personality, [number(libc::ADDR_NO_RANDOMIZE)]),
    attempt("a system call table of its own", libc::SYS_modify_ldt, [Number(1), ZEROES, Number(16)]),
    attempt("all ports", libc::SYS_iopl, [Number(3)]),
    attempt("some ports", libc::SYS_ioperm, [Number(0x60), Number(1), Number(1)]),
    // The kernel's larger surfaces.
    attempt("a ring", libc::SYS_io_uring_setup, [Number(8), ZEROES]),
    attempt("more files for a ring", libc::SYS_io_uring_register, [CONTROL, REGISTER_FILES, ZEROES, Number(1)]),
    attempt("a key", libc::SYS_keyctl, [NONE]),
    attempt("a key added", libc::SYS_add_key, [Text(c"user"), Text(c"new"), ZEROES, Number(1), Number(-3)]),
    attempt("a key asked for", libc::SYS_request_key, [Text(c"user"), Text(c"new"), NONE, Number(-3)]),
    attempt("a program for the kernel", libc::SYS_bpf, [NONE, ZEROES, Number(128)]),
    attempt("page faults of its own", libc::SYS_userfaultfd, [NONE]),
    attempt("counters of the processor", libc::SYS_perf_event_open, [ZEROES, NONE, Number(-1), Number(-1)]),
    attempt("executable memory", libc::SYS_mmap, [NONE, Number(4096), WRITE_EXECUTE, PRIVATE, Number(-1)]),
    attempt("memory made executable", libc::SYS_mprotect, [NONE, Number(4096), WRITE_EXECUTE]),
    attempt("the same with a key", libc::SYS_pkey_mprotect, [NONE, Number(4096), WRITE_EXECUTE, Number(-1)]),
    attempt(
        "its control channel mapped",
        libc::SYS_mmap,
        [NONE, Number(4096), number(libc::PROT_READ), number(libc::MAP_SHARED), CONTROL],
    ),
    attempt("memory moved", libc::SYS_mremap, [NONE, Number(4096), Number(8192)]),
    attempt("memory that may be executed from", libc::SYS_memfd_create, [Text(c"new"), NONE]),
    attempt("memory that nobody sees", libc::SYS_memfd_secret, [NONE]),
    attempt("memory locked", libc::SYS_mlockall, [Number(1)]),
    attempt("memory of the whole system", libc::SYS_shmget, [Number(1), Number(4096), Number(0o1600)]),
    attempt("a message queue", libc::SYS_msgget, [Number(1), Number(0o1600)]),
    attempt("a semaphore", libc::SYS_semget, [Number(1), Number(1), Number(0o1600)]),
    attempt("a queue with a name", libc::SYS_mq_open, [Text(c"new"), Number(0o102), Number(0o600)]),
    attempt("pages out of a pipe", libc::SYS_vmsplice, [LOG, ZEROES, Number(1)]),
    attempt("pages between descriptors", libc::SYS_splice, [CONTROL, NONE, LOG, NONE, Number(1)]),
    attempt("a file's lock", libc::SYS_flock, [CONTROL, number(libc::LOCK_UN)]),
    attempt("a lock of its description", libc::SYS_fcntl, [CONTROL, number(libc::F_OFD_SETLK), ZEROES]),
    attempt("signals of a descriptor to others", libc::SYS_fcntl, [CONTROL, number(libc::F_SETOWN), PARENT]),
    // Devices.
    attempt("a character typed on the terminal", libc::SYS_ioctl, [LOG, Number(TIOCSTI), ZEROES]),
    attempt("text pasted on the terminal", libc::SYS_ioctl, [LOG, Number(TIOCLINUX), ZEROES]),
    attempt("a controlling terminal", libc::SYS_ioctl, [LOG, Number(TIOCSCTTY), Number(1)]),
    attempt("a tap that stays", libc::SYS_ioctl, [CONTROL, Number(TUNSETPERSIST), Number(1)]),
    attempt("another tap", libc::SYS_ioctl, [CONTROL, Number(TUNSETIFF), ZEROES]),
    attempt("another owner of a tap", libc::SYS_ioctl, [CONTROL, Number(TUNSETOWNER), NONE]),
    attempt("another machine", libc::SYS_ioctl, [CONTROL, Number(KVM_CREATE_VM), NONE]),
    attempt("other memory for the guest", libc::SYS_ioctl, [CONTROL, Number(KVM_SET_USER_MEMORY_REGION), ZEROES]),
    // The host as a whole.
    attempt("a kernel module", libc::SYS_finit_module, [CONTROL, Text(c""), NONE]),
    attempt("another kernel", libc::SYS_kexec_load, [NONE]),
    attempt("the host's end", libc::SYS_reboot, [Number(0xfee1_dead), Number(0x2812_1969), Number(0x0123_4567)]),
    attempt("the host's clock", libc::SYS_clock_settime, [NONE, ZEROES]),
    attempt("swap space", libc::SYS_swapon, [FILE]),
    attempt("process accounting", libc::SYS_acct, [FILE]),
    attempt("quotas", libc::SYS_quotactl, [NONE]),
    attempt("the kernel's log", libc::SYS_syslog, [Number(3), ZEROES, Number(256)]),
];

/// socket(2) by the number that x32 gives it (Linux `arch/x86/include/uapi/asm/unistd.h`).
pub const X32: Attempt =
    attempt("a socket by x32", libc::SYS_socket | 0x4000_0000, [number(libc::AF_INET), number(libc::SOCK_STREAM)]);

/// Reads where nothing is: no call, but what a defect does.
pub const FAULT: Attempt = attempt("memory that is not there", -2, []);

/// getpid(2) of i386, by its software interrupt.
pub const I386: Attempt = attempt("a call of i386", -1, []);

impl Attempt {
    /// The attempt of that name.
    pub fn named(name: &str) -> Option<&'static Self> {
        ATTEMPTS.iter().chain([&X32, &I386, &FAULT]).find(|attempt| attempt.name == name)
    }

    /// Makes the call.
    pub fn make(&self) {
        if self.call == FAULT.call {
            // SAFETY: it is meant to fault: the first page of an address space is never mapped, and the program ends here.
            unsafe { std::arch::asm!("mov {0}, qword ptr [{1}]", out(reg) _, in(reg) 8_u64) };
        }
        if self.call == I386.call {
            // SAFETY: getpid (20) of i386 takes no argument and touches no memory. The kernel's entry may change the
            // registers that i386 does not have.
            unsafe {
                std::arch::asm!(
                    "int 0x80",
                    inlateout("rax") 20_i64 => _,
                    lateout("r8") _, lateout("r9") _, lateout("r10") _, lateout("r11") _,
                );
            }
            return;
        }
        let [a, b, c, d, e, f] = self.arguments.map(|argument| match argument {
            Number(value) => value,
            Text(text) => text.as_ptr() as i64,
            Bytes(bytes) => bytes.as_ptr() as i64,
        });
        // SAFETY: pointers lead to constants of this program that are long enough for what the call reads. The calls that
        // write to memory would fault on a constant, which the kernel answers with EFAULT.
        unsafe { libc::syscall(self.call, a, b, c, d, e, f) };
    }
}
