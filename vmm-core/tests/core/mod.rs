//! The real `vmm-core` process, on whatever KVM this machine has. No namespaces; the filters are on, as always.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Child;
use std::sync::OnceLock;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{Shutdown, shutdown};
use protocol::{Attach, Boot, Channel, CpuModel, Cpus, DeviceKind, FromCore, LinkError, Machine, Memory, Slot, ToCore};

/// The longest that anything in a test may take.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// A core and its control channel.
pub struct Core {
    /// The way to and from it.
    pub control: Channel<ToCore, FromCore>,
    /// What its serial port says.
    pub serial: File,
    /// The process.
    pub process: Child,
}

impl Drop for Core {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Takes descriptor 3 for good, which a child gets its channel as: nothing that it needs until then may have that number
/// here. Before a test makes its first descriptor.
pub fn reserve() {
    static THIRD: OnceLock<File> = OnceLock::new();
    THIRD.get_or_init(|| File::open("/dev/null").unwrap());
}

fn memfd(bytes: &[u8]) -> OwnedFd {
    let mut file = File::from(memfd_create("image", MFdFlags::MFD_CLOEXEC).unwrap());
    file.write_all(bytes).unwrap();
    file.into()
}

impl Core {
    /// Boots a machine without devices, and has it run.
    pub fn boot(kernel: &[u8], initrd: Option<&[u8]>, command_line: &str, memory: u64, cpus: u8) -> Self {
        let core = Self::build(kernel, initrd, command_line, memory, cpus, 0);
        // A core that refuses its kernel may be gone by now.
        let _ = core.control.send(&ToCore::Run);
        core
    }

    /// A machine with so many disks, called `disk0` and so on, that waits for their backends.
    pub fn build(kernel: &[u8], initrd: Option<&[u8]>, command_line: &str, memory: u64, cpus: u8, disks: u8) -> Self {
        reserve();
        let kvm = File::options().read(true).write(true).open("/dev/kvm");
        let kvm = kvm.expect("these tests need /dev/kvm: run them as root on a host with KVM, or in the test host");
        let (control, theirs) = Channel::pair().unwrap();
        let process = virtio_backend::testing::spawn(env!("CARGO_BIN_EXE_vmm-core"), "core", &theirs);
        drop(theirs);
        let (serial, writer) = nix::unistd::pipe().unwrap();
        let slot = |slot| Slot { device: format!("disk{slot}").try_into().unwrap(), kind: DeviceKind::Blk, slot };
        let boot = Boot {
            machine: Machine::Microvm1,
            kvm: OwnedFd::from(kvm).into(),
            kernel: memfd(kernel).into(),
            initrd: initrd.map(|bytes| memfd(bytes).into()),
            command_line: command_line.into(),
            cpus: Cpus { boot: cpus, max: cpus },
            cpu: CpuModel::Host,
            memory: Memory { size: memory, max: memory, slots: 0 },
            slots: (0..disks).map(slot).collect(),
            serial: writer.into(),
            trace: false,
        };
        let core = Self { control, serial: serial.into(), process };
        core.control.send(&ToCore::Boot(boot)).unwrap();
        core
    }

    /// Attaches a disk to the backend behind `socket`.
    pub fn attach(&self, disk: u8, socket: OwnedFd) {
        let device = format!("disk{disk}").try_into().unwrap();
        let attach = Attach { device, kind: DeviceKind::Blk, slot: disk, socket: socket.into() };
        self.control.send(&ToCore::Attach(attach)).unwrap();
    }

    /// Its next message.
    pub fn next(&self) -> Result<FromCore, LinkError> {
        assert!(readable(&self.control, DEADLINE), "no message from the core within {DEADLINE:?}");
        self.control.receive()
    }

    /// Its next message, which is to be one that `expected` knows.
    pub fn expect(&self, awaited: &str, expected: impl Fn(&FromCore) -> bool) -> FromCore {
        let message = self.next().unwrap_or_else(|error| panic!("{awaited} was awaited from the core: {error}"));
        assert!(expected(&message), "{awaited} was awaited: {message:?}");
        message
    }

    /// Whether it says something within `wait`.
    pub fn speaks(&self, wait: Duration) -> bool {
        readable(&self.control, wait)
    }

    /// Its descriptors that are open.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.process.id())).unwrap().count()
    }

    /// Reads the serial port's output until it says `text`.
    pub fn hear(&mut self, text: &str) {
        let mut heard = Vec::new();
        while !heard.ends_with(text.as_bytes()) {
            assert!(readable(&self.serial, DEADLINE), "'{text}' on the serial port; it said {heard:?}");
            let mut byte = [0];
            assert_eq!(self.serial.read(&mut byte).unwrap(), 1, "'{text}' on the serial port; it ended with {heard:?}");
            heard.extend(byte);
        }
    }

    /// Reads the serial port's output until nothing comes for `quiet`.
    pub fn drain(&mut self, quiet: Duration) {
        let mut buffer = vec![0; 1 << 16];
        let deadline = std::time::Instant::now() + DEADLINE;
        while readable(&self.serial, quiet) {
            assert!(std::time::Instant::now() < deadline, "the serial port is not quiet for {quiet:?}");
            let _ = self.serial.read(&mut buffer).unwrap();
        }
    }

    /// Whether the serial port says anything within `wait`.
    pub fn prints(&self, wait: Duration) -> bool {
        readable(&self.serial, wait)
    }

    /// Runs to the end and answers how it ended and what the serial port said.
    pub fn end(mut self) -> (FromCore, String) {
        let last = loop {
            match self.next() {
                Ok(FromCore::Running) => {}
                Ok(message) => break message,
                Err(error) => panic!("the core ended without a last word: {error}; {:?}", self.process.wait()),
            }
        };
        // It stays until its last word was read.
        shutdown(self.control.as_fd().as_raw_fd(), Shutdown::Both).unwrap();
        assert!(self.process.wait().unwrap().success());
        let mut text = Vec::new();
        self.serial.read_to_end(&mut text).unwrap();
        (last, String::from_utf8_lossy(&text).into_owned())
    }
}

fn readable(fd: &impl AsFd, wait: Duration) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::try_from(wait).unwrap()).unwrap() > 0
}
