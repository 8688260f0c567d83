//! x86_64: interrupt controller, boot, processor state, ACPI and the legacy devices behind ports.

mod acpi;
mod cpuid;
mod image;
pub mod layout;
mod linux_boot;
mod load;
mod pvh;
mod vcpu_state;

use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_IOAPIC_NUM_PINS, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_PIT_SPEAKER_DUMMY, KvmIrqRouting,
    kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_pit_config,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use protocol::Fault;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::Bus;
use crate::event::{Ending, Events};
use crate::legacy::i8042::I8042;
use crate::legacy::panic::PanicPort;
use crate::legacy::power::PowerPort;
use crate::legacy::serial::{SerialPort, Transmitter};
use crate::memory::Memory;

pub use load::{Entry, load};

/// What the board has beside memory, vCPUs and virtio devices.
pub struct Platform {
    /// Ports.
    pub ports: Bus,
    /// Signals the generic event device: the power button is pressed.
    pub power_button: EventFd,
}

/// Every interrupt to the pin of its number of the I/O APIC, and to nothing else.
///
/// KVM's own routes lead the first 16 to the legacy interrupt controller as well, which no guest of this board programs
/// (its MADT does not have one): an interrupt of a device there would reach the guest as an exception.
fn io_apic_routes() -> Result<KvmIrqRouting, Fault> {
    let route = |pin: u32| kvm_irq_routing_entry {
        gsi: pin,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip: KVM_IRQCHIP_IOAPIC, pin },
        },
        ..Default::default()
    };
    let routes: Vec<_> = (0..KVM_IOAPIC_NUM_PINS).map(route).collect();
    KvmIrqRouting::from_entries(&routes).map_err(|error| Fault::internal(format!("interrupt routes: {error:?}")))
}

/// Makes the in-kernel interrupt controllers and the timer. Before any vCPU.
///
/// # Errors
/// A host fault naming the KVM call that failed.
pub fn prepare_vm(vm: &VmFd) -> Result<(), Fault> {
    let failed = |step: &str, error| Fault::host(format!("{step}: {error}"));
    vm.set_identity_map_address(layout::IDENTITY_MAP).map_err(|error| failed("KVM_SET_IDENTITY_MAP_ADDR", error))?;
    vm.set_tss_address(layout::TASK_STATE).map_err(|error| failed("KVM_SET_TSS_ADDR", error))?;
    vm.create_irq_chip().map_err(|error| failed("KVM_CREATE_IRQCHIP", error))?;
    let routes = io_apic_routes()?;
    vm.set_gsi_routing(&routes).map_err(|error| failed("KVM_SET_GSI_ROUTING", error))?;
    // The speaker's port is answered by the kernel: guests poll it while they calibrate.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(|error| failed("KVM_CREATE_PIT2", error))
}

/// Puts the legacy devices on their ports.
///
/// # Errors
/// A host fault when an interrupt cannot be wired.
pub fn attach_platform(vm: &VmFd, events: &Events, transmitter: Transmitter) -> Result<Platform, Fault> {
    let mut ports = Bus::default();
    let ending = Arc::new(Ending::new(events.clone()));
    ports.insert(layout::COM1, Arc::new(SerialPort::new(interrupt(vm, layout::COM1_GSI)?, transmitter)));
    ports.insert(layout::I8042, Arc::new(I8042::new(interrupt(vm, layout::I8042_GSI)?, ending.clone())));
    ports.insert(layout::PVPANIC, Arc::new(PanicPort::new(ending.clone())));
    ports.insert(layout::POWER, Arc::new(PowerPort::new(ending)));
    Ok(Platform { ports, power_button: interrupt(vm, layout::EVENT_DEVICE_GSI)? })
}

/// An event descriptor that raises an edge on an interrupt.
fn interrupt(vm: &VmFd, gsi: u32) -> Result<EventFd, Fault> {
    let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(|error| Fault::host(format!("eventfd: {error}")))?;
    vm.register_irqfd(&event, gsi).map_err(|error| Fault::host(format!("KVM_IRQFD for interrupt {gsi}: {error}")))?;
    Ok(event)
}

/// The CPUID that every vCPU's is made of.
///
/// # Errors
/// What KVM_GET_SUPPORTED_CPUID answers.
pub fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, Fault> {
    cpuid::supported(kvm)
}

/// Gives vCPU `index` of `count` its CPUID, and the first one its entry into the kernel.
///
/// # Errors
/// A host fault naming the KVM call that failed.
pub fn configure_vcpu(
    vcpu: &VcpuFd,
    index: u8,
    count: u8,
    supported: &CpuId,
    memory: &Memory,
    entry: Entry,
) -> Result<(), Fault> {
    // Not settable on every host, and then the frequency stays unknown to the guest, as on bare metal.
    let tsc_khz = vcpu.get_tsc_khz().unwrap_or(0);
    let cpuid = cpuid::for_vcpu(supported, index, count, tsc_khz)?;
    vcpu.set_cpuid2(&cpuid).map_err(|error| Fault::host(format!("KVM_SET_CPUID2 of vCPU {index}: {error}")))?;
    vcpu_state::set_msrs(vcpu)?;
    if index == 0 {
        vcpu_state::enter_at(vcpu, memory, entry)?;
    }
    Ok(())
}

/// Tells the guest that `vcpu` stood still and not its software (KVM_KVMCLOCK_CTRL): its watchdog against soft lockups
/// forgives that time.
pub fn after_pause(vcpu: &VcpuFd) {
    // Refused when the guest does not use the paravirtual clock: then it cannot be told.
    let _ = vcpu.kvmclock_ctrl();
}
