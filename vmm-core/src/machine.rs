//! The machine: everything that exists before the first instruction runs.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_ioctls::VmFd;
use protocol::process;
use protocol::trace::{Laps, Point};
use protocol::{Boot, DeviceId, Fault};
use seccomp::CoreThread;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::arch::{self, layout};
use crate::bus::Bus;
use crate::event::Events;
use crate::gate::Gate;
use crate::legacy::serial::Transmitter;
use crate::memory::{self, Memory};
use crate::signal::{self, Thread};
use crate::thread;
use crate::trace::Tracer;
use crate::vcpu::{self, Buses};
use crate::virtio::attendant::{Attendant, Command};
use crate::virtio::device::Device;
use crate::virtio::mmio::{MmioTransport, Wiring};

/// A machine whose vCPUs have not started.
pub struct Machine {
    devices: HashMap<DeviceId, Arc<Device>>,
    /// Devices that have not been attached for the first time.
    waiting: HashSet<DeviceId>,
    gate: Arc<Gate>,
    vcpus: Vec<Thread>,
    power_button: EventFd,
    transmitter: Transmitter,
    /// KVM reads guest memory through this process's mapping: it has to live as long as the vCPUs.
    _memory: Memory,
    /// Releasing the last descriptor of a machine ends its interrupts, though its vCPUs run on.
    _vm: Arc<VmFd>,
}

impl Machine {
    /// Makes memory, VM, devices and parked vCPUs, and loads the kernel.
    ///
    /// # Errors
    /// An input fault when the kernel or the initial ramdisk is at fault, else a host fault.
    pub fn build(boot: Boot, events: &Events, laps: &mut Laps) -> Result<Self, Fault> {
        let tracer = Tracer::new(boot.trace, events);
        let memory = memory::create(boot.memory.size)?;
        laps.done(Point::Memory);
        let entry = arch::load(&boot, &memory)?;
        laps.done(Point::Kernel);

        let kvm = crate::kvm::from_descriptor(boot.kvm.into_fd());
        let supported = arch::supported_cpuid(&kvm)?;
        let vm = kvm.create_vm().map_err(|error| Fault::host(format!("KVM_CREATE_VM: {error}")))?;
        let vm = Arc::new(vm);
        arch::prepare_vm(&vm)?;
        memory::give_to(&vm, &memory)?;
        laps.done(Point::Machine);

        let transmitter = Transmitter::default();
        let draining = transmitter.clone();
        let pipe = File::from(boot.serial.into_fd());
        thread::spawn(CoreThread::Serial, "serial", move || draining.drain(pipe))?;
        let platform = arch::attach_platform(&vm, events, transmitter.clone())?;

        let gate = Arc::new(Gate::new(events.clone()));
        let mut mmio = Bus::default();
        let mut devices = HashMap::new();
        for slot in &boot.slots {
            let (address, gsi) = layout::virtio_mmio(slot.slot)
                .ok_or_else(|| Fault::internal(format!("device '{}' has no slot on this board", slot.device)))?;
            let wiring = Wiring { address, gsi };
            let config_interrupt =
                EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(|error| Fault::host(format!("eventfd: {error}")))?;
            vm.register_irqfd(&config_interrupt, gsi)
                .map_err(|error| Fault::host(format!("KVM_IRQFD of device '{}': {error}", slot.device)))?;
            let (device, commands) = Device::new(slot.device.clone(), slot.kind, config_interrupt, events.clone());
            let device = Arc::new(device);
            let wired = vm.clone();
            let wire = Box::new(move |queue, signals: &_| wiring.connect(&wired, queue, signals));
            let confine = Box::new(|| thread::confine(CoreThread::Attendant));
            let attendant =
                Attendant::new(device.clone(), memory.clone(), wire, confine, events.clone(), tracer.clone());
            process::spawn(&format!("{}/{}", slot.kind.role(), slot.device), move || attendant.serve(&commands))?;
            let transport = MmioTransport::new(device.clone(), events.clone(), tracer.clone(), gate.clone());
            mmio.insert(address..address + layout::VIRTIO_MMIO_SIZE, Arc::new(transport));
            devices.insert(slot.device.clone(), device);
        }

        laps.done(Point::Devices);

        signal::install()?;
        let mut vcpus = Vec::new();
        let buses = Arc::new(Buses { ports: platform.ports, mmio });
        for index in 0..boot.cpus.boot {
            let vcpu = create_vcpu(&vm, index, boot.cpus.boot, &supported, &memory, entry)?;
            let thread = vcpu::spawn(index, vcpu, buses.clone(), gate.clone(), events.clone(), tracer.clone())?;
            vcpus.push(thread);
        }
        laps.done(Point::Processors);
        let waiting = devices.keys().cloned().collect();
        Ok(Self {
            devices,
            waiting,
            gate,
            vcpus,
            power_button: platform.power_button,
            transmitter,
            _memory: memory,
            _vm: vm,
        })
    }

    /// Connects a device to its backend; the outcome is an event.
    ///
    /// # Errors
    /// An internal fault when the machine has no such device.
    pub fn attach(&self, device: &DeviceId, socket: OwnedFd) -> Result<(), Fault> {
        self.device(device)?.command(Command::Attach(socket));
        Ok(())
    }

    /// A device's configuration space is another now.
    ///
    /// # Errors
    /// An internal fault when the machine has no such device.
    pub fn config_changed(&self, device: &DeviceId) -> Result<(), Fault> {
        self.device(device)?.command(Command::ReadConfig);
        Ok(())
    }

    fn device(&self, device: &DeviceId) -> Result<&Arc<Device>, Fault> {
        self.devices.get(device).ok_or_else(|| Fault::internal(format!("the machine has no device '{device}'")))
    }

    /// Hangs up on backends whose time is over, and answers when the next one's is.
    pub fn hang_up_overdue(&self) -> Option<Instant> {
        let now = Instant::now();
        let hang_up = |device: &Arc<Device>| {
            let mut conversation = device.conversation();
            conversation.hang_up_if_overdue(now);
            conversation.deadline()
        };
        self.devices.values().filter_map(hang_up).min()
    }

    /// Lets go of a device's backend in good order; the outcome is an event.
    ///
    /// # Errors
    /// An internal fault when the machine has no such device.
    pub fn detach(&self, device: &DeviceId) -> Result<(), Fault> {
        self.device(device)?.command(Command::Detach);
        Ok(())
    }

    /// Tells a device's driver that it is broken until it is reset.
    ///
    /// # Errors
    /// An internal fault when the machine has no such device.
    pub fn needs_reset(&self, device: &DeviceId) -> Result<(), Fault> {
        self.device(device)?.command(Command::Break);
        Ok(())
    }

    /// A device's backend has ended: nothing of the conversation with it is kept open.
    ///
    /// # Errors
    /// An internal fault when the machine has no such device.
    pub fn dead(&self, device: &DeviceId) -> Result<(), Fault> {
        let device = self.device(device)?;
        // Should anyone hold the backend's end open, the attendant would wait for its answer before it hears of this.
        device.conversation().close();
        device.command(Command::Dead);
        Ok(())
    }

    /// A device's backend has ended, and nothing of it is under way any more.
    ///
    /// # Errors
    /// An internal fault when the machine has no such device.
    pub fn gone(&self, device: &DeviceId) -> Result<(), Fault> {
        self.device(device)?.command(Command::Gone);
        Ok(())
    }

    /// Notes that a device was attached.
    pub fn attached(&mut self, device: &DeviceId) {
        self.waiting.remove(device);
    }

    /// Whether every device has been attached at least once.
    pub fn is_complete(&self) -> bool {
        self.waiting.is_empty()
    }

    /// How many devices it has.
    pub fn devices(&self) -> usize {
        self.devices.len()
    }

    /// Starts the vCPUs, for the first time or after a pause.
    pub fn start(&self) {
        self.gate.open();
    }

    /// Has every vCPU come out of the guest; [`Event::VcpusHeld`](crate::event::Event::VcpusHeld) tells when to look.
    pub fn hold(&self) {
        self.gate.close();
        self.vcpus.iter().for_each(|vcpu| vcpu.interrupt());
    }

    /// Whether no vCPU is in the guest, or will be before they are started again.
    pub fn is_held(&self) -> bool {
        self.gate.is_empty()
    }

    /// Has every device's queues stopped; each tells [`Event::QueuesDone`](crate::event::Event::QueuesDone).
    pub fn stop_queues(&self) {
        self.devices.values().for_each(|device| device.command(Command::Pause));
    }

    /// Has every device's queues started again, likewise.
    pub fn start_queues(&self) {
        self.devices.values().for_each(|device| device.command(Command::Resume));
    }

    /// Presses the guest's power button.
    pub fn press_power_button(&self) {
        // EAGAIN: it is being pressed already.
        let _ = self.power_button.write(1);
    }

    /// Waits, but not for long, until the serial port's last output is on its way.
    pub fn flush_serial(&self) {
        self.transmitter.flush(Duration::from_secs(1));
    }
}

fn create_vcpu(
    vm: &VmFd,
    index: u8,
    count: u8,
    supported: &kvm_bindings::CpuId,
    memory: &Memory,
    entry: arch::Entry,
) -> Result<kvm_ioctls::VcpuFd, Fault> {
    let vcpu =
        vm.create_vcpu(u64::from(index)).map_err(|error| Fault::host(format!("KVM_CREATE_VCPU {index}: {error}")))?;
    arch::configure_vcpu(&vcpu, index, count, supported, memory, entry)?;
    Ok(vcpu)
}
