//! The messages between `ozone` and its children: one enum per direction.
//!
//! A message that is not expected in the present state ends the sender.

use serde::{Deserialize, Serialize};

use crate::device::{DeviceId, DeviceKind, DeviceSpec};
use crate::fault::Fault;
use crate::link::Descriptor;
use crate::trace::Mark;

/// `ozone` to `vmm-core`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToCore {
    /// Make the machine and load the kernel. Sent once, first.
    Boot(Boot),
    /// Connect a device to its backend: at boot and after a backend's restart alike.
    Attach(Attach),
    /// Let go of a device's backend in good order: its queues are stopped, all requests ended and answered, and nothing new is
    /// taken until the next [`ToCore::Attach`]. Answered by [`FromCore::Detached`], or by [`FromCore::Lost`] if the backend does
    /// not play its part.
    Detach {
        /// The device.
        device: DeviceId,
    },
    /// The device's backend has ended; what it began may still be under way. The core lets go of its end of the conversation,
    /// and of whatever the backend had sent over it unread: a descriptor there could keep that from ever ending.
    Dead {
        /// The device.
        device: DeviceId,
    },
    /// The device's backend has ended, and nothing that it began is under way any more: no late read can reach guest memory.
    /// Resets that wait for that are answered. Answered by [`FromCore::Gone`].
    Gone {
        /// The device.
        device: DeviceId,
    },
    /// Tell the driver that the device is broken until it is reset (virtio 1.2, section 2.1.2). What was in flight is not
    /// carried out again.
    NeedsReset {
        /// The device.
        device: DeviceId,
    },
    /// Stop the vCPUs, then every queue. Answered by [`FromCore::Paused`]. A device attached meanwhile stays stopped.
    Pause,
    /// Start the queues again, then the vCPUs. Answered by [`FromCore::Resumed`].
    Resume,
    /// Every device has been sent: start the vCPUs once all of them are attached.
    Run,
    /// Press the guest's power button (ACPI, through the generic event device).
    PowerButton,
    /// The device's configuration space is another now: ask its backend, and tell the guest.
    ConfigChanged {
        /// The device.
        device: DeviceId,
    },
}

/// `vmm-core` to `ozone`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FromCore {
    /// The device's backend answered and offers what the guest is shown; if its driver is ready and the machine not paused, its
    /// queues have been started.
    Attached {
        /// The device.
        device: DeviceId,
    },
    /// The device's queues are stopped and its backend is not spoken to any more, as [`ToCore::Detach`] asked.
    Detached {
        /// The device.
        device: DeviceId,
    },
    /// What [`ToCore::Gone`] said is noted: whatever is told of the device after this is about the next backend.
    Gone {
        /// The device.
        device: DeviceId,
    },
    /// No vCPU runs and no queue is served. Devices whose backend is away are stopped as soon as one is attached.
    Paused,
    /// The queues have been told to run again and the vCPUs run.
    Resumed,
    /// The vCPUs have been started.
    Running,
    /// A backend broke the protocol or went away.
    Lost {
        /// The device.
        device: DeviceId,
        /// What happened, for the log.
        reason: String,
    },
    /// The machine ended. The core exits after this.
    Exited(Cause),
    /// The core cannot go on. The core exits after this.
    Failed(Fault),
    /// What was done of the launch, and when; only when [`Boot::trace`] asks for it.
    Trace(Vec<Mark>),
}

/// How a machine ended of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's kernel reported a panic through the pvpanic device.
    Panic,
    /// A vCPU shut down on a triple fault.
    TripleFault,
}

/// `ozone` to a backend.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToBackend {
    /// Serve a device. Sent once, first.
    Start(Start),
    /// The user's terminal changed its size (console only).
    Resize {
        /// Columns.
        columns: u16,
        /// Rows.
        rows: u16,
    },
    /// Answer with [`FromBackend::Alive`] as soon as every queue's thread has been seen to go round. One that waits for the
    /// host's storage counts as seen: slow storage is no hang.
    Ping {
        /// Returned in the answer.
        number: u64,
    },
}

/// A backend to `ozone`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FromBackend {
    /// The device is open, the run filter is installed and the vhost-user socket is being served.
    Ready,
    /// The backend cannot go on. It exits after this.
    Failed(Fault),
    /// The user typed the escape that leaves the machine (console only).
    Leave,
    /// The size of [`ToBackend::Resize`] is in the configuration space now.
    Resized,
    /// Every queue's thread goes round.
    Alive {
        /// The number of the [`ToBackend::Ping`].
        number: u64,
    },
    /// A queue was started in which an earlier process had left requests: they are carried out once more.
    Resubmitted {
        /// How many.
        requests: u32,
    },
    /// The driver broke the rules of a queue, which is not served any more until the device is reset.
    Violated {
        /// The number of the queue.
        queue: u16,
    },
    /// The driver uses so many queue pairs from now on (net only).
    Pairs {
        /// From 1 to the number of [`NetSpec::taps`](crate::NetSpec::taps).
        pairs: u16,
    },
    /// What was done of the launch, and when; only when [`Start::trace`] asks for it.
    Trace(Vec<Mark>),
}

/// What a backend serves, and where.
#[derive(Debug, Serialize, Deserialize)]
pub struct Start {
    /// The vhost-user socket (`SOCK_STREAM`), connected to the core.
    pub socket: Descriptor,
    /// The device.
    pub spec: DeviceSpec,
    /// Whether [`FromBackend::Trace`] is wanted.
    #[serde(default)]
    pub trace: bool,
}

/// A device of the machine and the socket of its backend.
#[derive(Debug, Serialize, Deserialize)]
pub struct Attach {
    /// The device's name.
    pub device: DeviceId,
    /// What it is.
    pub kind: DeviceKind,
    /// Its place on the machine's board, from 0: it fixes the device's addresses and interrupt.
    pub slot: u8,
    /// The vhost-user socket (`SOCK_STREAM`), connected to the backend.
    pub socket: Descriptor,
}

/// What a machine is made of.
#[derive(Debug, Serialize, Deserialize)]
pub struct Boot {
    /// The board: which devices are where.
    pub machine: Machine,
    /// `/dev/kvm`.
    pub kvm: Descriptor,
    /// The kernel image, at any offset: it is read with explicit offsets.
    pub kernel: Descriptor,
    /// The initial ramdisk, likewise.
    pub initrd: Option<Descriptor>,
    /// The kernel's command line, without a terminating NUL.
    pub command_line: String,
    /// The vCPUs.
    pub cpus: Cpus,
    /// What the vCPUs are.
    pub cpu: CpuModel,
    /// The guest's memory.
    pub memory: Memory,
    /// The device slots that will be attached, with their kinds: the ACPI tables name them.
    pub slots: Vec<Slot>,
    /// The write end of the pipe that carries the serial port's output.
    pub serial: Descriptor,
    /// Whether [`FromCore::Trace`] is wanted.
    #[serde(default)]
    pub trace: bool,
}

/// One occupied device slot.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Slot {
    /// The device's name.
    pub device: DeviceId,
    /// What it is.
    pub kind: DeviceKind,
    /// Its place on the board, from 0.
    pub slot: u8,
}

/// The machine types. Their address maps never change; a new map is a new version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Machine {
    /// virtio-mmio devices, no PCI, ACPI hardware-reduced, version 1.
    #[default]
    #[serde(rename = "microvm-1")]
    Microvm1,
}

impl Machine {
    /// How many device slots the board has.
    pub fn slots(self) -> usize {
        match self {
            Self::Microvm1 => 15,
        }
    }
}

/// Numbers of vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpus {
    /// Started with the machine, at least 1.
    pub boot: u8,
    /// That the firmware tables have room for, at least `boot`.
    pub max: u8,
}

/// Sizes of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Bytes at boot, a multiple of 4096.
    pub size: u64,
    /// Bytes with all that may be plugged in, at least `size`.
    pub max: u64,
    /// Slots for memory to be plugged in.
    pub slots: u8,
}

/// Which processor the guest sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CpuModel {
    /// All that the host's KVM supports.
    #[default]
    Host,
}
