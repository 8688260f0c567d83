//! The jailed program: says what it sees, line by line, and does what its arguments say.
//!
//! It is this test executable itself, linked static, under the name `probe`.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{SocketAddr, UnixStream};
use std::process::{Command, ExitCode};

use nix::errno::Errno;
use nix::libc;
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::{getgroups, gethostname, getpid, getppid, getresgid, getresuid, getsid};

/// What an attempt comes to: `allowed`, or the name of the error.
fn outcome<T>(result: std::io::Result<T>) -> String {
    match result {
        Ok(_) => "allowed".to_owned(),
        Err(error) => {
            error.raw_os_error().map_or_else(|| error.to_string(), |errno| format!("{:?}", Errno::from_raw(errno)))
        }
    }
}

fn call(number: i64, arguments: [i64; 4]) -> String {
    let [a, b, c, d] = arguments;
    // SAFETY: the arguments are numbers that no call takes for memory of this process: 0, small ones, or -1.
    let result = unsafe { libc::syscall(number, a, b, c, d) };
    outcome(if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) })
}

/// Carries out the words of its command line, in their order.
pub fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut next = || words.next().unwrap_or_default();
        match word.as_str() {
            "look" => look(),
            "list" => list(&next()),
            "read" => {
                let path = next();
                say(
                    &format!("read {path}"),
                    &fs::read_to_string(&path).unwrap_or_else(|error| outcome::<()>(Err(error))),
                );
            }
            "write" => {
                let path = next();
                say(
                    &format!("write {path}"),
                    &outcome(File::options().write(true).open(&path).and_then(|mut file| file.write_all(b"x"))),
                );
            }
            "create" => {
                let path = next();
                say(&format!("create {path}"), &outcome(File::create(&path)));
            }
            "chmod" => {
                let path = next();
                let mode = std::os::unix::fs::PermissionsExt::from_mode(0o777);
                say(&format!("chmod {path}"), &outcome(fs::set_permissions(&path, mode)));
            }
            "execute" => {
                let path = next();
                let ended = Command::new(&path).arg("nothing").status();
                say(
                    &format!("execute {path}"),
                    &ended.map_or_else(|error| outcome::<()>(Err(error)), |it| it.to_string()),
                );
            }
            "kind" => {
                let path = next();
                let kind = fs::metadata(&path).map(|it| it.file_type());
                let text = kind.map_or_else(
                    |error| outcome::<()>(Err(error)),
                    |kind| {
                        let (block, character) = (kind.is_block_device(), kind.is_char_device());
                        format!("block {block}, character {character}")
                    },
                );
                say(&format!("kind {path}"), &text);
            }
            "abstract" => {
                let name = next();
                let address = SocketAddr::from_abstract_name(&name).unwrap();
                say("abstract", &outcome(UnixStream::connect_addr(&address)));
            }
            "calls" => calls(),
            "personality" => {
                // SAFETY: a number only.
                let personality = unsafe { libc::personality(0xffff_ffff) };
                say("personality", &personality.to_string());
            }
            "thread" => say("thread", std::thread::spawn(|| "ran").join().unwrap_or("failed")),
            "x32" => {
                // getpid by the number that x32 gives it.
                // SAFETY: numbers only.
                unsafe { libc::syscall(libc::SYS_getpid | 0x4000_0000) };
            }
            "leave" => {
                let left = Command::new("/probe").arg("sleep").spawn();
                say("left", &outcome(left));
            }
            "sleep" => loop {
                std::thread::sleep(std::time::Duration::from_secs(60));
            },
            "wait" => {
                say("ready", "");
                let _ = std::io::stdin().read(&mut [0]);
            }
            "abort" => std::process::abort(),
            "exit" => return ExitCode::from(next().parse::<u8>().unwrap()),
            "nothing" => {}
            other => {
                say("unknown word", other);
                return ExitCode::from(99);
            }
        }
    }
    ExitCode::SUCCESS
}

fn say(key: &str, value: &str) {
    println!("{key}={}", value.replace('\n', "|"));
}

fn list(path: &str) {
    let entries = fs::read_dir(path).map(|entries| {
        let mut names: Vec<String> =
            entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names.join(" ")
    });
    say(&format!("list {path}"), &entries.unwrap_or_else(|error| outcome::<()>(Err(error))));
}

fn look() {
    say("pid", &format!("{} of {} in session {}", getpid(), getppid(), getsid(None).unwrap()));
    let (uid, gid) = (getresuid().unwrap(), getresgid().unwrap());
    say("uid", &format!("{} {} {}", uid.real, uid.effective, uid.saved));
    say("gid", &format!("{} {} {}", gid.real, gid.effective, gid.saved));
    say("groups", &format!("{}", getgroups().unwrap().len()));
    say("arguments", &std::env::args().next().unwrap_or_default());
    let environment: Vec<String> =
        std::env::vars_os().map(|(key, value)| format!("{}={}", key.display(), value.display())).collect();
    say("environment", &environment.join(" "));
    // SAFETY: numbers only.
    let open = (0..4096).filter(|fd| unsafe { libc::fcntl(*fd, libc::F_GETFD) } >= 0);
    say("descriptors", &open.map(|fd| fd.to_string()).collect::<Vec<_>>().join(" "));
    list("/");
    list("/..");
    say("umask", &format!("{:o}", nix::sys::stat::umask(nix::sys::stat::Mode::empty()).bits()));
    say("host", &gethostname().unwrap_or_default().to_string_lossy());
    // SAFETY: numbers only.
    say("securebits", &format!("{:#x}", unsafe { libc::prctl(libc::PR_GET_SECUREBITS, 0, 0, 0, 0) }));
    for (name, resource) in [
        ("core", Resource::RLIMIT_CORE),
        ("nofile", Resource::RLIMIT_NOFILE),
        ("fsize", Resource::RLIMIT_FSIZE),
        ("as", Resource::RLIMIT_AS),
    ] {
        let (soft, hard) = getrlimit(resource).unwrap();
        say(name, &format!("{soft}:{hard}"));
    }
    let root = fs::metadata("/").unwrap();
    say("root", &format!("{:o}", root.mode() & 0o7777));
    let here =
        std::env::current_dir().map_or_else(|error| outcome::<()>(Err(error)), |path| path.display().to_string());
    say("directory", &here);
    say("terminal", &outcome(File::open("/dev/tty")));
}

/// Everything that the default filter refuses, in a form that does nothing even where it is allowed.
fn calls() {
    let bad = -1;
    let path = CString::new("/probe").unwrap();
    let address = path.as_ptr() as i64;
    for (name, number, arguments) in [
        ("mount", libc::SYS_mount, [0, 0, 0, 0]),
        ("umount2", libc::SYS_umount2, [address, 0x100, 0, 0]),
        ("pivot_root", libc::SYS_pivot_root, [0, 0, 0, 0]),
        ("chroot", libc::SYS_chroot, [0, 0, 0, 0]),
        ("open_tree", libc::SYS_open_tree, [bad, 0, 0, 0]),
        ("move_mount", libc::SYS_move_mount, [bad, 0, bad, 0]),
        ("fsopen", libc::SYS_fsopen, [0, 0, 0, 0]),
        ("fsconfig", libc::SYS_fsconfig, [bad, 0, 0, 0]),
        ("fsmount", libc::SYS_fsmount, [bad, 0, 0, 0]),
        ("fspick", libc::SYS_fspick, [bad, 0, 0, 0]),
        ("mount_setattr", libc::SYS_mount_setattr, [bad, 0, 0, 0]),
        ("open_by_handle_at", libc::SYS_open_by_handle_at, [bad, 0, 0, 0]),
        ("setns", libc::SYS_setns, [bad, 0, 0, 0]),
        ("unshare user", libc::SYS_unshare, [libc::CLONE_NEWUSER.into(), 0, 0, 0]),
        ("clone user", libc::SYS_clone, [(libc::CLONE_NEWUSER | libc::CLONE_THREAD).into(), 0, 0, 0]),
        ("ptrace", libc::SYS_ptrace, [libc::PTRACE_ATTACH.into(), 1, 0, 0]),
        ("process_vm_readv", libc::SYS_process_vm_readv, [1, 0, 0, 0]),
        ("pidfd_getfd", libc::SYS_pidfd_getfd, [bad, 0, 0, 0]),
        ("io_uring_setup", libc::SYS_io_uring_setup, [1, 0, 0, 0]),
        ("bpf", libc::SYS_bpf, [0, 0, 0, 0]),
        ("perf_event_open", libc::SYS_perf_event_open, [0, 0, 0, 0]),
        ("userfaultfd", libc::SYS_userfaultfd, [1, 0, 0, 0]),
        ("add_key", libc::SYS_add_key, [0, 0, 0, 0]),
        ("keyctl", libc::SYS_keyctl, [0, -3, 0, 0]),
        ("kexec_load", libc::SYS_kexec_load, [0, 0, 0, 0]),
        ("init_module", libc::SYS_init_module, [0, 0, 0, 0]),
        ("socket vsock", libc::SYS_socket, [libc::AF_VSOCK.into(), libc::SOCK_STREAM.into(), 0, 0]),
        ("socket alg", libc::SYS_socket, [libc::AF_ALG.into(), libc::SOCK_SEQPACKET.into(), 0, 0]),
        ("TIOCSTI", libc::SYS_ioctl, [0, 0x5412, 0, 0]),
        ("TIOCLINUX", libc::SYS_ioctl, [0, 0x541c, 0, 0]),
        ("personality set", libc::SYS_personality, [0x0040_0000, 0, 0, 0]),
        ("syslog", libc::SYS_syslog, [10, 0, 0, 0]),
        ("clone3", libc::SYS_clone3, [0, 0, 0, 0]),
        ("socket unix", libc::SYS_socket, [libc::AF_UNIX.into(), libc::SOCK_STREAM.into(), 0, 0]),
    ] {
        say(&format!("call {name}"), &call(number, arguments));
    }
}
