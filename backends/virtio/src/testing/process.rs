//! A backend process, started as `ozone` starts it but without a jail.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protocol::{Channel, DeviceSpec, FromBackend, Start, ToBackend, link};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures};

use super::DEADLINE;
use super::driver::{Guest, Queue};
use crate::descriptor::wait;

pub use vhost::vhost_user::Frontend;

/// VIRTIO_F_VERSION_1.
pub const VERSION_1: u64 = 1 << 32;

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
        let (control, theirs) = Channel::pair().unwrap();
        // A number that dup2 below cannot find to be its target already, which would leave close-on-exec set.
        let theirs = nix::fcntl::fcntl(theirs.as_fd(), nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(64)).unwrap();
        let mut command = Command::new(executable);
        // SAFETY: dup2(2) is async-signal-safe, and the number it replaces belongs to nobody in the child.
        unsafe {
            command.pre_exec(move || {
                nix::errno::Errno::result(libc::dup2(theirs, link::CONTROL))?;
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        nix::unistd::close(theirs).unwrap();
        let (alive, ended) = channel::<()>();
        let pid = Pid::from_raw(child.id().try_into().unwrap());
        std::thread::spawn(move || {
            if ended.recv_timeout(DEADLINE).is_err_and(|error| error == std::sync::mpsc::RecvTimeoutError::Timeout) {
                kill(pid, Signal::SIGKILL).unwrap();
            }
        });
        let (ours, socket) = UnixStream::pair().unwrap();
        let start = Start { socket: std::os::fd::OwnedFd::from(socket).into(), spec };
        control.send(&ToBackend::Start(start)).unwrap();
        (Self { child, control, alive: Some(alive) }, ours)
    }

    /// Starts it and waits until it is ready.
    pub fn ready(executable: &str, spec: DeviceSpec, queues: u64) -> (Self, Frontend) {
        let (backend, socket) = Self::start(executable, spec);
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
    frontend.set_owner().unwrap();
    let features = frontend.get_features().unwrap() & !leave_out;
    let protocol = frontend.get_protocol_features().unwrap();
    let wanted = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
    assert!(protocol.contains(wanted), "{protocol:?}");
    frontend.set_protocol_features(wanted).unwrap();
    frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    frontend.set_features(features).unwrap();
    frontend.set_mem_table(&[guest.region()]).unwrap();
    for queue in queues {
        enable(frontend, queue);
    }
    features & !VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
}

/// Describes and enables one queue.
pub fn enable(frontend: &mut Frontend, queue: &Queue) {
    let index = queue.index;
    frontend.set_vring_num(index, queue.size).unwrap();
    frontend.set_vring_addr(index, &queue.places()).unwrap();
    frontend.set_vring_base(index, queue.next_available).unwrap();
    frontend.set_vring_call(index, &queue.call).unwrap();
    frontend.set_vring_kick(index, &queue.kick).unwrap();
    frontend.set_vring_enable(index, true).unwrap();
}

/// The configuration space, as far as the core reads it.
pub fn config(frontend: &mut Frontend, length: u32) -> Vec<u8> {
    let flags = vhost::vhost_user::message::VhostUserConfigFlags::WRITABLE;
    let (_, payload) = frontend.get_config(0, length, flags, &vec![0; length.try_into().unwrap()]).unwrap();
    payload
}
