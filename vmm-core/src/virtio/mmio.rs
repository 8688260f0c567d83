//! virtio over MMIO, version 2 (virtio 1.2, section 4.2.2): the registers, and nothing of any device kind.

use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

use kvm_ioctls::{IoEventAddress, VmFd};
use protocol::Fault;
use protocol::trace::Point;

use super::device::{Activation, Device, RESET_DEADLINE};
use super::signals::QueueEvents;
use super::state::{QUEUE_SIZE, QueueState, TransportState, VERSION_1, status};
use crate::bus::BusDevice;
use crate::event::{Event, Events};
use crate::gate::Gate;
use crate::trace::Tracer;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "OZNE", little-endian.
const VENDOR: u32 = 0x454e_5a4f;

/// Offsets of the registers (virtio 1.2, table 4.1).
mod register {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x024;
    pub const QUEUE_SELECT: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACKNOWLEDGE: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESCRIPTORS: u64 = 0x080;
    pub const QUEUE_DESCRIPTORS_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHARED_MEMORY_SELECT: u64 = 0x0ac;
    pub const SHARED_MEMORY_LENGTH: u64 = 0x0b0;
    pub const SHARED_MEMORY_BASE_HIGH: u64 = 0x0bc;
    pub const QUEUE_RESET: u64 = 0x0c0;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// A used buffer notification is pending.
const INTERRUPT_USED: u32 = 1;
/// A configuration change notification is pending.
const INTERRUPT_CONFIG: u32 = 2;

/// Where a device is wired on the board.
#[derive(Clone, Copy, Debug)]
pub struct Wiring {
    /// The address of its registers.
    pub address: u64,
    /// Its interrupt.
    pub gsi: u32,
}

impl Wiring {
    /// Binds a queue's signals: its kick to the guest's notification, and its call, which is that of all queues, to the
    /// interrupt with the first. Neither passes through this process afterwards.
    ///
    /// # Errors
    /// A host fault naming the KVM call that failed.
    pub fn connect(&self, vm: &VmFd, queue: usize, events: &QueueEvents) -> Result<(), Fault> {
        let index = u32::try_from(queue).map_err(|_| Fault::internal("queue number"))?;
        let notify = IoEventAddress::Mmio(self.address + register::QUEUE_NOTIFY);
        vm.register_ioevent(&events.kick, &notify, index)
            .map_err(|error| Fault::host(format!("KVM_IOEVENTFD for queue {queue}: {error}")))?;
        if queue > 0 {
            return Ok(());
        }
        vm.register_irqfd(&events.call, self.gsi).map_err(|error| Fault::host(format!("KVM_IRQFD: {error}")))
    }
}

/// The registers of one device.
pub struct MmioTransport {
    device: Arc<Device>,
    state: Mutex<TransportState>,
    events: Events,
    tracer: Tracer,
    gate: Arc<Gate>,
    traced: Once,
    reset_deadline: Duration,
}

impl MmioTransport {
    /// A transport in front of `device`; vCPUs come through `gate`.
    pub fn new(device: Arc<Device>, events: Events, tracer: Tracer, gate: Arc<Gate>) -> Self {
        let state = Mutex::new(TransportState::new(0));
        Self { device, state, events, tracer, gate, traced: Once::new(), reset_deadline: RESET_DEADLINE }
    }

    fn state(&self) -> MutexGuard<'_, TransportState> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // The number of queues is known once the backend is attached, which is before any vCPU runs.
        if state.queues.is_empty() {
            *state = TransportState::new(self.queue_count());
        }
        state
    }

    fn queue_count(&self) -> usize {
        self.device.offer.get().map_or(0, |offer| offer.queues.len())
    }

    fn offered_features(&self) -> u64 {
        self.device.offer.get().map_or(0, |offer| offer.features)
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            register::MAGIC => return MAGIC,
            register::VERSION => return VERSION,
            register::DEVICE_ID => return self.device.kind.virtio_id(),
            register::VENDOR_ID => return VENDOR,
            // Used buffers are signalled by edges from the backend, past this process: there is always one to look
            // for. A driver that finds none has lost one register access.
            register::INTERRUPT_STATUS => {
                return INTERRUPT_USED | if self.device.config_changed() { INTERRUPT_CONFIG } else { 0 };
            }
            register::CONFIG_GENERATION => return self.device.generation(),
            // No device has shared memory regions: length and base read as all ones (section 4.2.2).
            register::SHARED_MEMORY_LENGTH..=register::SHARED_MEMORY_BASE_HIGH => return u32::MAX,
            _ => {}
        }
        let state = self.state();
        let queue = state.queues.get(state.queue_select as usize);
        match offset {
            register::DEVICE_FEATURES => half(self.offered_features(), state.device_features_select),
            register::QUEUE_SIZE_MAX => queue.map_or(0, |_| u32::from(QUEUE_SIZE)),
            register::QUEUE_READY => queue.map_or(0, |queue| u32::from(queue.ready)),
            register::STATUS => state.status | if self.device.has_failed() { status::NEEDS_RESET } else { 0 },
            // VIRTIO_F_RING_RESET is not offered: a queue is never in reset.
            register::QUEUE_RESET => 0,
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        let mut state = self.state();
        if offset == register::STATUS && value == 0 {
            return self.reset(state);
        }
        match offset {
            register::DEVICE_FEATURES_SELECT => state.device_features_select = value,
            register::DRIVER_FEATURES_SELECT => state.driver_features_select = value,
            register::DRIVER_FEATURES if state.status & status::FEATURES_OK == 0 => {
                let select = state.driver_features_select;
                set_half(&mut state.driver_features, select, value);
            }
            register::QUEUE_SELECT => state.queue_select = value,
            register::QUEUE_READY => Self::set_queue_ready(&mut state, value),
            register::INTERRUPT_ACKNOWLEDGE if value & INTERRUPT_CONFIG != 0 => self.device.acknowledge_config_change(),
            register::STATUS => self.set_status(&mut state, value),
            // Bound to the kick descriptors; a value that matches no queue ends here and means nothing. The shared
            // memory selector selects among none.
            register::QUEUE_NOTIFY | register::SHARED_MEMORY_SELECT => {}
            _ => Self::configure_queue(&mut state, offset, value),
        }
    }

    /// Queue addresses and size may only change while the queue is not ready (section 4.2.2.2).
    fn configure_queue(state: &mut TransportState, offset: u64, value: u32) {
        let select = state.queue_select as usize;
        let Some(queue) = state.queues.get_mut(select).filter(|queue| !queue.ready) else { return };
        match offset {
            register::QUEUE_SIZE => {
                // A size that is no power of two or too large makes the queue impossible to get ready.
                queue.size =
                    u16::try_from(value).ok().filter(|size| size.is_power_of_two() && *size <= QUEUE_SIZE).unwrap_or(0);
            }
            register::QUEUE_DESCRIPTORS => set_half(&mut queue.descriptors, 0, value),
            register::QUEUE_DESCRIPTORS_HIGH => set_half(&mut queue.descriptors, 1, value),
            register::QUEUE_DRIVER => set_half(&mut queue.available, 0, value),
            register::QUEUE_DRIVER_HIGH => set_half(&mut queue.available, 1, value),
            register::QUEUE_DEVICE => set_half(&mut queue.used, 0, value),
            register::QUEUE_DEVICE_HIGH => set_half(&mut queue.used, 1, value),
            _ => {}
        }
    }

    fn set_queue_ready(state: &mut TransportState, value: u32) {
        // Queues are handed over before DRIVER_OK (section 3.1.1); a driver cannot add or take one afterwards.
        if state.status & status::DRIVER_OK != 0 {
            return;
        }
        let select = state.queue_select as usize;
        if let Some(queue) = state.queues.get_mut(select) {
            queue.ready = value == 1 && is_usable(queue);
        }
    }

    fn set_status(&self, state: &mut TransportState, value: u32) {
        let added = value & !state.status;
        // A driver cannot take bits back but by a reset (section 2.1.1): the queues would run on behind its back.
        let mut next = (value | state.status) & !status::NEEDS_RESET;
        if added & status::FEATURES_OK != 0 {
            let unknown = state.driver_features & !self.offered_features();
            if unknown != 0 || state.driver_features & VERSION_1 == 0 {
                // The driver reads the bit back and gives up (section 3.1.1, step 6).
                next &= !status::FEATURES_OK;
            }
        }
        let ready = status::FEATURES_OK | status::DRIVER_OK;
        let start = next & ready == ready && state.status & status::DRIVER_OK == 0;
        state.status = next;
        if start {
            // Of all that a guest may repeat, the first is told.
            self.traced.call_once(|| self.tracer.reached(|| Point::DriverOk(self.device.id.clone())));
            self.device.start(Activation { features: state.driver_features, queues: state.queues.clone() });
        }
    }

    /// Resets the device. The vCPU is held until its queues are stopped, without the lock: other vCPUs are not held up.
    fn reset(&self, mut state: MutexGuard<'_, TransportState>) {
        let running = state.status & status::DRIVER_OK != 0;
        *state = TransportState::new(self.queue_count());
        drop(state);
        // A pause does not wait for the backend on behalf of this vCPU.
        let stop = || self.device.stop(self.reset_deadline);
        if running && !self.gate.outside(stop) {
            // The driver frees the memory of its rings and buffers next, and a backend that is neither stopped nor gone may
            // write into it at any later time: a corruption that nobody would trace back to here. So the machine ends.
            let (id, seconds) = (&self.device.id, self.reset_deadline.as_secs());
            let fault = format!(
                "device '{id}': its driver reset it, and its backend neither stopped nor was gone within {seconds} s: guest memory is not safe from it"
            );
            let _ = self.events.send(Event::Failed(Fault::host(fault)));
            // This vCPU must not run again. The process ends soon.
            loop {
                std::thread::park();
            }
        }
        self.device.mend();
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let config = self.device.config();
        let bytes = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
        for (target, byte) in data.iter_mut().zip(bytes) {
            *target = *byte;
        }
    }
}

/// Rings have to be aligned (section 2.7), and their ends must not wrap. Whether they are in memory is checked when the
/// device starts.
fn is_usable(queue: &QueueState) -> bool {
    let size = u64::from(queue.size);
    let fits = |address: u64, alignment: u64, length: u64| {
        address.is_multiple_of(alignment) && address.checked_add(length).is_some()
    };
    size > 0
        && fits(queue.descriptors, 16, size * 16)
        && fits(queue.available, 2, size * 2 + 6)
        && fits(queue.used, 4, size * 8 + 6)
}

/// The 32 bits of a 64-bit register that a selector names; further halves are zero.
fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(target: &mut u64, select: u32, value: u32) {
    match select {
        0 => *target = (*target & !0xffff_ffff) | u64::from(value),
        1 => *target = (*target & 0xffff_ffff) | (u64::from(value) << 32),
        _ => {}
    }
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(config) = offset.checked_sub(register::CONFIG) {
            return self.read_config(config, data);
        }
        // Registers are 32 bits wide and aligned (section 4.2.2.1.1): other accesses read as zero.
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(word) if offset.is_multiple_of(4) => *word = self.read_register(offset).to_le_bytes(),
            _ => data.fill(0),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // No device of ours has configuration that a driver may write.
        if offset < register::CONFIG
            && offset.is_multiple_of(4)
            && let Ok(word) = <[u8; 4]>::try_from(data)
        {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::attendant::Command;
    use crate::virtio::device::Offer;
    use protocol::DeviceKind;
    use std::sync::mpsc::{Receiver, channel};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    struct Driver {
        transport: MmioTransport,
        device: Arc<Device>,
        commands: Receiver<Command>,
        events: Receiver<Event>,
    }

    const FEATURES: u64 = VERSION_1 | 1 << 29 | 1 << 5;

    impl Driver {
        fn new() -> Self {
            let event = || EventFd::new(EFD_NONBLOCK).unwrap();
            let (events, received) = channel();
            let (device, commands) = {
                let id = String::from("disk").try_into().unwrap();
                Device::new(id, DeviceKind::Blk, event(), events.clone())
            };
            let queues = (0..2).map(|_| QueueEvents { kick: event(), call: event() }).collect();
            device.offer.set(Offer { features: FEATURES, queues }).unwrap();
            device.change_config(vec![1, 2, 3, 4, 5]);
            device.acknowledge_config_change();
            device.config_interrupt_for_test().read().unwrap();
            let device = Arc::new(device);
            Self {
                transport: MmioTransport::new(
                    device.clone(),
                    events.clone(),
                    Tracer::new(false, &events),
                    Arc::new(Gate::new(events)),
                ),
                device,
                commands,
                events: received,
            }
        }

        fn read(&self, offset: u64) -> u32 {
            let mut data = [0xff; 4];
            self.transport.read(offset, &mut data);
            u32::from_le_bytes(data)
        }

        fn write(&self, offset: u64, value: u32) {
            self.transport.write(offset, &value.to_le_bytes());
        }

        fn accept(&self, features: u64) {
            for (select, value) in [(0, features as u32), (1, (features >> 32) as u32)] {
                self.write(register::DRIVER_FEATURES_SELECT, select);
                self.write(register::DRIVER_FEATURES, value);
            }
            self.write(register::STATUS, 3 | status::FEATURES_OK);
        }

        fn set_up_queue(&self, index: u32) {
            self.write(register::QUEUE_SELECT, index);
            self.write(register::QUEUE_SIZE, 128);
            self.write(register::QUEUE_DESCRIPTORS, 0x1000);
            self.write(register::QUEUE_DRIVER, 0x2000);
            self.write(register::QUEUE_DEVICE, 0x3000);
            self.write(register::QUEUE_DEVICE_HIGH, 1);
            self.write(register::QUEUE_READY, 1);
        }
    }

    #[test]
    fn identification_registers_are_those_of_the_specification() {
        let driver = Driver::new();
        assert_eq!(driver.read(0), 0x7472_6976);
        assert_eq!(driver.read(4), 2);
        assert_eq!(driver.read(8), 2);
        assert_eq!(driver.read(register::DEVICE_FEATURES), FEATURES as u32);
        driver.write(register::DEVICE_FEATURES_SELECT, 1);
        assert_eq!(driver.read(register::DEVICE_FEATURES), 1);
        driver.write(register::DEVICE_FEATURES_SELECT, 2);
        assert_eq!(driver.read(register::DEVICE_FEATURES), 0);
        assert_eq!(driver.read(0xb0), u32::MAX);
        assert_eq!(driver.read(0xbc), u32::MAX);
        assert_eq!(driver.read(register::QUEUE_SIZE_MAX), 256);
        driver.write(register::QUEUE_SELECT, 2);
        assert_eq!(driver.read(register::QUEUE_SIZE_MAX), 0, "there is no third queue");
    }

    #[test]
    fn a_driver_that_follows_the_steps_starts_the_queues() {
        let driver = Driver::new();
        driver.write(register::STATUS, 1);
        driver.write(register::STATUS, 3);
        driver.accept(FEATURES);
        assert_eq!(driver.read(register::STATUS), 3 | status::FEATURES_OK);
        driver.set_up_queue(0);
        assert_eq!(driver.read(register::QUEUE_READY), 1);
        driver.write(register::STATUS, 3 | status::FEATURES_OK | status::DRIVER_OK);
        let Ok(Command::Start(activation)) = driver.commands.try_recv() else { panic!("no start") };
        assert_eq!(activation.features, FEATURES);
        assert_eq!(
            activation.queues[0],
            QueueState { size: 128, ready: true, descriptors: 0x1000, available: 0x2000, used: 0x1_0000_3000 }
        );
        assert!(!activation.queues[1].ready);
        driver.write(register::STATUS, 3 | status::FEATURES_OK | status::DRIVER_OK);
        assert!(driver.commands.try_recv().is_err(), "started once");
    }

    #[test]
    fn features_that_were_not_offered_are_refused() {
        let driver = Driver::new();
        driver.accept(FEATURES | 1 << 40);
        assert_eq!(driver.read(register::STATUS) & status::FEATURES_OK, 0);
        let legacy = Driver::new();
        legacy.accept(FEATURES & !VERSION_1);
        assert_eq!(legacy.read(register::STATUS) & status::FEATURES_OK, 0);
        legacy.write(register::STATUS, 3 | status::DRIVER_OK);
        assert!(legacy.commands.try_recv().is_err(), "no start without agreed features");
    }

    #[test]
    fn features_are_fixed_once_agreed() {
        let driver = Driver::new();
        driver.accept(FEATURES);
        driver.write(register::DRIVER_FEATURES_SELECT, 0);
        driver.write(register::DRIVER_FEATURES, 0);
        driver.write(register::STATUS, 3 | status::FEATURES_OK | status::DRIVER_OK);
        let Ok(Command::Start(activation)) = driver.commands.try_recv() else { panic!("no start") };
        assert_eq!(activation.features, FEATURES);
    }

    #[test]
    fn a_reset_waits_for_the_queues_and_forgets_everything() {
        let driver = Driver::new();
        driver.accept(FEATURES);
        driver.set_up_queue(0);
        driver.write(register::STATUS, 3 | status::FEATURES_OK | status::DRIVER_OK);
        std::thread::scope(|scope| {
            let commands = &driver.commands;
            let reset = scope.spawn(|| {
                driver.transport.write(register::STATUS, &0u32.to_le_bytes());
            });
            let wait = std::time::Duration::from_secs(5);
            assert!(matches!(commands.recv_timeout(wait), Ok(Command::Start(_))));
            let Ok(Command::Stop(stopped)) = commands.recv_timeout(wait) else { panic!("no stop") };
            assert!(!reset.is_finished(), "the vCPU is held until the queues have stopped");
            assert_eq!(driver.read(register::DEVICE_ID), 2);
            assert_eq!(driver.read(register::QUEUE_SIZE_MAX), 256, "other vCPUs are not held up");
            stopped.send(()).unwrap();
        });
        assert_eq!(driver.read(register::STATUS), 0);
        assert_eq!(driver.read(register::QUEUE_READY), 0);
    }

    #[test]
    fn a_reset_that_is_not_answered_ends_the_machine_and_holds_its_vcpu() {
        let mut driver = Driver::new();
        driver.transport.reset_deadline = Duration::from_millis(1);
        driver.accept(FEATURES);
        driver.write(register::STATUS, 3 | status::FEATURES_OK | status::DRIVER_OK);
        let Driver { transport, events, commands, .. } = driver;
        let vcpu = std::thread::spawn(move || transport.write(register::STATUS, &0u32.to_le_bytes()));
        let fault = loop {
            match events.recv_timeout(Duration::from_secs(5)) {
                Ok(Event::Conversation | Event::VcpusHeld) => {}
                Ok(Event::Failed(fault)) => break fault,
                other => panic!("the failure of a reset was awaited: {other:?}"),
            }
        };
        assert_eq!(fault.kind, protocol::FaultKind::Host);
        assert!(fault.message.starts_with("device 'disk': "), "{fault}");
        // It is too late for an answer.
        for command in commands.try_iter() {
            drop(command);
        }
        assert!(!vcpu.is_finished(), "the guest would reuse its memory");
    }

    #[test]
    fn a_driver_cannot_take_status_bits_back() {
        let driver = Driver::new();
        driver.accept(FEATURES);
        driver.set_up_queue(0);
        driver.write(register::STATUS, 3 | status::FEATURES_OK | status::DRIVER_OK);
        assert!(matches!(driver.commands.try_recv(), Ok(Command::Start(_))));
        driver.write(register::STATUS, 3 | status::FEATURES_OK);
        assert_eq!(driver.read(register::STATUS), 3 | status::FEATURES_OK | status::DRIVER_OK);
        driver.write(register::STATUS, 3 | status::FEATURES_OK | status::DRIVER_OK);
        assert!(driver.commands.try_recv().is_err(), "started once");
        std::thread::scope(|scope| {
            let commands = &driver.commands;
            scope.spawn(|| driver.transport.write(register::STATUS, &0u32.to_le_bytes()));
            let stop = commands.recv_timeout(std::time::Duration::from_secs(5));
            assert!(matches!(stop, Ok(Command::Stop(_))), "the reset stops the queues: {stop:?}");
        });
    }

    #[test]
    fn a_changed_configuration_is_told() {
        let driver = Driver::new();
        let generation = driver.read(register::CONFIG_GENERATION);
        driver.device.change_config(vec![1, 2, 3, 4, 5]);
        assert_eq!(driver.read(register::CONFIG_GENERATION), generation, "the same is no change");
        driver.device.change_config(vec![5, 4, 3, 2, 1]);
        assert_ne!(driver.read(register::CONFIG_GENERATION), generation);
        assert_eq!(driver.read(register::INTERRUPT_STATUS), INTERRUPT_USED | INTERRUPT_CONFIG);
        assert_eq!(driver.read(register::CONFIG), u32::from_le_bytes([5, 4, 3, 2]));
    }

    #[test]
    fn impossible_queues_never_get_ready() {
        for (offset, value) in [
            (register::QUEUE_SIZE, 0),
            (register::QUEUE_SIZE, 100),
            (register::QUEUE_SIZE, 512),
            (register::QUEUE_SIZE, 0x1_0080),
            (register::QUEUE_DESCRIPTORS, 0x1008),
            (register::QUEUE_DEVICE, 2),
        ] {
            let driver = Driver::new();
            driver.set_up_queue(0);
            driver.write(register::QUEUE_READY, 0);
            driver.write(offset, value);
            driver.write(register::QUEUE_READY, 1);
            assert_eq!(driver.read(register::QUEUE_READY), 0, "{offset:#x} = {value:#x}");
        }
        let driver = Driver::new();
        driver.set_up_queue(0);
        driver.write(register::QUEUE_READY, 0);
        driver.write(register::QUEUE_DEVICE, 0xffff_fffc);
        driver.write(register::QUEUE_DEVICE_HIGH, u32::MAX);
        driver.write(register::QUEUE_READY, 1);
        assert_eq!(driver.read(register::QUEUE_READY), 0, "wraps around");
    }

    #[test]
    fn a_ready_queue_cannot_be_moved() {
        let driver = Driver::new();
        driver.accept(FEATURES);
        driver.set_up_queue(0);
        driver.write(register::QUEUE_DESCRIPTORS, 0x9000);
        driver.write(register::STATUS, 3 | status::FEATURES_OK | status::DRIVER_OK);
        let Ok(Command::Start(activation)) = driver.commands.try_recv() else { panic!("no start") };
        assert_eq!(activation.queues[0].descriptors, 0x1000);
    }

    #[test]
    fn a_failed_device_says_so_until_it_is_reset() {
        let driver = Driver::new();
        let generation = driver.read(register::CONFIG_GENERATION);
        driver.device.fail();
        assert_eq!(driver.read(register::STATUS), status::NEEDS_RESET);
        assert_eq!(driver.read(register::INTERRUPT_STATUS), INTERRUPT_USED | INTERRUPT_CONFIG);
        assert_ne!(driver.read(register::CONFIG_GENERATION), generation);
        driver.write(register::INTERRUPT_ACKNOWLEDGE, INTERRUPT_CONFIG);
        assert_eq!(driver.read(register::INTERRUPT_STATUS), INTERRUPT_USED);
        assert_eq!(driver.device.config_interrupt_for_test().read().unwrap(), 1);
        driver.write(register::STATUS, 0);
        assert_eq!(driver.read(register::STATUS), 0);
    }

    #[test]
    fn configuration_is_readable_in_any_width_and_ends() {
        let driver = Driver::new();
        let mut bytes = [0xff; 8];
        driver.transport.read(register::CONFIG, &mut bytes);
        assert_eq!(bytes, [1, 2, 3, 4, 5, 0, 0, 0]);
        let mut byte = [0xff];
        driver.transport.read(register::CONFIG + 4, &mut byte);
        assert_eq!(byte, [5]);
        driver.transport.read(register::CONFIG + 0xeff, &mut byte);
        assert_eq!(byte, [0]);
        driver.transport.write(register::CONFIG, &[9]);
        driver.transport.read(register::CONFIG, &mut byte);
        assert_eq!(byte, [1], "nothing in it is the driver's to write");
    }

    #[test]
    fn odd_accesses_to_registers_are_harmless() {
        let driver = Driver::new();
        for width in [1, 2, 3, 8] {
            let mut data = vec![0xff; width];
            driver.transport.read(register::STATUS, &mut data);
            assert!(data.iter().all(|byte| *byte == 0));
            driver.transport.write(register::STATUS, &data);
        }
        driver.transport.write(register::STATUS + 1, &[1, 0, 0, 0]);
        assert_eq!(driver.read(register::STATUS), 0);
    }
}
