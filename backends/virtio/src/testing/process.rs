//! A backend process, started as `ozone` starts it: with its filters, though without namespaces.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protocol::{Channel, DeviceSpec, FromBackend, Start, ToBackend, link};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};

use super::DEADLINE;
use super::driver::{Guest, Queue};
use crate::descriptor::wait;

pub use vhost::vhost_user::Frontend;

/// VIRTIO_F_VERSION_1.
pub const VERSION_1: u64 = 1 << 32;

/// The end of what the jailer does, as far as a process without privilege can: both filters of the launch, then the
/// executable by its descriptor.
struct LastStep {
    executable: OwnedFd,
    name: CString,
    filters: Vec<seccompiler::BpfProgram>,
}

impl LastStep {
    fn new(executable: &str, role: &str, denied: &[i64]) -> Self {
        let known = seccomp::Role::ALL.into_iter().find(|known| known.to_string() == role).unwrap();
        let mut filters = seccomp::launch_filters(known).unwrap();
        if !denied.is_empty() {
            filters.insert(0, deny(denied));
        }
        // Not under the number that the control channel is given.
        let executable = fcntl(File::open(executable).unwrap(), FcntlArg::F_DUPFD_CLOEXEC(ABOVE)).unwrap();
        // SAFETY: the number was made on the line before, and nothing else knows it.
        let executable = unsafe { OwnedFd::from_raw_fd(executable) };
        Self { executable, name: CString::new(role).unwrap(), filters }
    }

    /// In the child, between fork and exec; it does not return if all goes well.
    fn run(&self, control: RawFd) -> io::Result<()> {
        // SAFETY: system calls on descriptors and memory of this process; the program's arguments end with a null.
        unsafe {
            Errno::result(libc::dup2(control, link::CONTROL))?;
            // Other tests of this process make descriptors without close-on-exec.
            let last = libc::c_uint::MAX;
            Errno::result(libc::syscall(libc::SYS_close_range, 4, last, libc::CLOSE_RANGE_CLOEXEC))?;
            Errno::result(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
            for filter in &self.filters {
                seccompiler::apply_filter(filter).map_err(io::Error::other)?;
            }
            let arguments = [self.name.as_ptr(), std::ptr::null()];
            let environment = [std::ptr::null::<libc::c_char>()];
            let (file, flags) = (self.executable.as_raw_fd(), libc::AT_EMPTY_PATH);
            let path = c"".as_ptr();
            libc::syscall(libc::SYS_execveat, file, path, arguments.as_ptr(), environment.as_ptr(), flags);
        }
        Err(io::Error::last_os_error())
    }
}

/// The lowest number for descriptors that the child's last step needs.
const ABOVE: RawFd = 64;

/// Takes the number that the child's control channel gets, for good, if nobody has it now: what the standard library opens
/// for a child of its own would be replaced under it.
fn reserve() {
    let null = File::open("/dev/null").unwrap();
    let number = fcntl(&null, FcntlArg::F_DUPFD_CLOEXEC(link::CONTROL)).unwrap();
    if number != link::CONTROL {
        nix::unistd::close(number).unwrap();
    }
}

/// A filter of a host that answers some calls with EPERM.
fn deny(calls: &[i64]) -> seccompiler::BpfProgram {
    let rules = calls.iter().map(|&call| (call, Vec::new())).collect();
    let (allow, refuse) =
        (seccompiler::SeccompAction::Allow, seccompiler::SeccompAction::Errno(libc::EPERM.unsigned_abs()));
    let arch = std::env::consts::ARCH.try_into().unwrap();
    seccompiler::SeccompFilter::new(rules, allow, refuse, arch).unwrap().try_into().unwrap()
}

/// Starts `executable` as a process of `role` under that role's launch filters, with `control` as its control channel.
pub fn spawn(executable: &str, role: &str, control: impl AsFd) -> Child {
    spawn_denied(executable, role, control, &[])
}

/// The same on a host that answers the system calls `denied` with EPERM.
fn spawn_denied(executable: &str, role: &str, control: impl AsFd, denied: &[i64]) -> Child {
    reserve();
    // A number that dup2 above cannot find to be its target already, which would leave close-on-exec set.
    let control = fcntl(control, FcntlArg::F_DUPFD_CLOEXEC(ABOVE)).unwrap();
    let mut command = Command::new(executable);
    let last_step = LastStep::new(executable, role, denied);
    // SAFETY: what it does is system calls alone, on memory made before the fork.
    unsafe { command.pre_exec(move || last_step.run(control)) };
    let child = command.spawn().unwrap();
    nix::unistd::close(control).unwrap();
    child
}

/// Builds the executable of `package` with its feature `crash-points`, where it cannot be taken for that which is
/// shipped, and returns its path.
pub fn crash_points(package: &str) -> String {
    // target/TRIPLE/PROFILE/deps/test
    let test = std::env::current_exe().unwrap();
    let target = test.ancestors().nth(4).unwrap().join("crash-points");
    let triple = test.ancestors().nth(3).unwrap().file_name().unwrap();
    let status = Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".into()))
        .args(["build", "--quiet", "--package", package, "--features", "crash-points", "--target-dir"])
        .arg(&target)
        .arg("--target")
        .arg(triple)
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
        .status()
        .unwrap();
    assert!(status.success(), "{package} with crash points could not be built");
    target.join(triple).join("debug").join(package).display().to_string()
}

/// A running backend.
pub struct Backend {
    child: Child,
    /// The way to and from it.
    pub control: Channel<ToBackend, FromBackend>,
    alive: Option<Sender<()>>,
}

impl Backend {
    /// Starts `executable` and has it serve `spec`; returns it and the front-end's end of the vhost-user socket.
    pub fn start(executable: &str, spec: DeviceSpec) -> (Self, UnixStream) {
        Self::start_denied(executable, spec, &[])
    }

    /// The same on a host that answers the system calls `denied` with EPERM.
    pub fn start_denied(executable: &str, spec: DeviceSpec, denied: &[i64]) -> (Self, UnixStream) {
        let (control, theirs) = Channel::pair().unwrap();
        let child = spawn_denied(executable, spec.kind().role(), &theirs, denied);
        drop(theirs);
        let (alive, ended) = channel::<()>();
        let pid = Pid::from_raw(child.id().try_into().unwrap());
        std::thread::spawn(move || {
            if ended.recv_timeout(DEADLINE).is_err_and(|error| error == std::sync::mpsc::RecvTimeoutError::Timeout) {
                kill(pid, Signal::SIGKILL).unwrap();
            }
        });
        let (ours, socket) = UnixStream::pair().unwrap();
        let start = Start { socket: std::os::fd::OwnedFd::from(socket).into(), spec, trace: false };
        control.send(&ToBackend::Start(start)).unwrap();
        (Self { child, control, alive: Some(alive) }, ours)
    }

    /// Starts it and waits until it is ready.
    pub fn ready(executable: &str, spec: DeviceSpec, queues: u64) -> (Self, Frontend) {
        Self::ready_denied(executable, spec, queues, &[])
    }

    /// The same on a host that answers the system calls `denied` with EPERM.
    pub fn ready_denied(executable: &str, spec: DeviceSpec, queues: u64, denied: &[i64]) -> (Self, Frontend) {
        let (backend, socket) = Self::start_denied(executable, spec, denied);
        assert!(matches!(backend.message(), FromBackend::Ready));
        (backend, Frontend::from_stream(socket, queues))
    }

    /// Its next message.
    pub fn message(&self) -> FromBackend {
        self.readable(DEADLINE.as_millis().try_into().unwrap());
        self.control.receive().unwrap()
    }

    /// Whether it says something, or ends, within so many milliseconds.
    pub fn readable(&self, milliseconds: u16) -> bool {
        let mut control = [PollFd::new(self.control.as_fd(), PollFlags::POLLIN)];
        wait(&mut control, Some(Duration::from_millis(milliseconds.into()))).unwrap() > 0
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Ends it as nothing can be kept from doing.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
    }

    /// Waits for its end.
    pub fn exit(&mut self) -> ExitStatus {
        let deadline = Instant::now() + DEADLINE;
        let status = self.child.wait().unwrap();
        self.alive = None;
        assert!(Instant::now() < deadline, "it did not end of itself");
        status
    }

    /// Processor time that it has used so far, in clock ticks.
    pub fn ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }

    /// Its descriptors that are open.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Does what the core does at DRIVER_OK: features, memory and every queue of `queues`; returns the features in force.
///
/// `leave_out` are features that the driver does not accept.
pub fn connect(frontend: &mut Frontend, guest: &Guest, queues: &[&Queue], leave_out: u64) -> u64 {
    let features = negotiate(frontend, guest, leave_out);
    for queue in queues {
        enable(frontend, queue);
    }
    features
}

/// The part of [`connect`] before the queues.
pub fn negotiate(frontend: &mut Frontend, guest: &Guest, leave_out: u64) -> u64 {
    frontend.set_owner().unwrap();
    let features = frontend.get_features().unwrap() & !leave_out;
    let protocol = frontend.get_protocol_features().unwrap();
    let wanted = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
    assert!(protocol.contains(wanted), "{protocol:?}");
    let tracking = protocol & VhostUserProtocolFeatures::INFLIGHT_SHMFD;
    frontend.set_protocol_features(wanted | tracking).unwrap();
    frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    frontend.set_features(features).unwrap();
    frontend.set_mem_table(&[guest.region()]).unwrap();
    features & !VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
}

/// Describes and enables one queue.
pub fn enable(frontend: &mut Frontend, queue: &Queue) {
    enable_from(frontend, queue, queue.next_available).unwrap();
}

/// The same for a queue that goes on from another place than where its driver is.
///
/// # Errors
/// What the back-end refuses of its start.
pub fn enable_from(frontend: &mut Frontend, queue: &Queue, base: u16) -> vhost::Result<()> {
    let index = queue.index;
    frontend.set_vring_num(index, queue.size)?;
    frontend.set_vring_addr(index, &queue.places())?;
    frontend.set_vring_base(index, base)?;
    frontend.set_vring_call(index, &queue.call)?;
    frontend.set_vring_kick(index, &queue.kick)?;
    frontend.set_vring_enable(index, true)
}

/// The memory in which a back-end records what is in flight, as the core keeps it.
pub struct Record {
    /// Size, offset, and the queues it is for.
    pub about: VhostUserInflight,
    /// The memory itself.
    pub file: File,
}

impl Record {
    /// Has the back-end make it.
    pub fn get(frontend: &mut Frontend, queues: u16, size: u16) -> Self {
        let (about, file) = frontend.get_inflight_fd(&VhostUserInflight::new(0, 0, queues, size)).unwrap();
        Self { about, file }
    }

    /// Sends it to a back-end.
    ///
    /// # Errors
    /// What the back-end refuses.
    pub fn set(&self, frontend: &mut Frontend) -> vhost::Result<()> {
        frontend.set_inflight_fd(&self.about, self.file.as_raw_fd())
    }
}

/// The configuration space, as far as the core reads it.
pub fn config(frontend: &mut Frontend, length: u32) -> Vec<u8> {
    let flags = vhost::vhost_user::message::VhostUserConfigFlags::WRITABLE;
    let (_, payload) = frontend.get_config(0, length, flags, &vec![0; length.try_into().unwrap()]).unwrap();
    payload
}
