//! vCPU threads: parked at a barrier, started together, then one loop over KVM_RUN.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use kvm_ioctls::{VcpuExit, VcpuFd};
use protocol::process;
use protocol::trace::Point;
use protocol::{Cause, Fault};

use crate::bus::Bus;
use crate::event::{Event, Events};
use crate::trace::Tracer;

/// The barrier that vCPU threads wait at. Unlike [`std::sync::Barrier`] the one that opens it does not wait.
#[derive(Default)]
pub struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    /// Lets everyone through, now and later.
    pub fn open(&self) {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.opened.notify_all();
    }

    fn pass(&self) {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.opened.wait_while(open, |open| !*open));
    }
}

/// What a vCPU's exits are answered from.
pub struct Buses {
    /// Ports.
    pub ports: Bus,
    /// Addresses without memory.
    pub mmio: Bus,
}

/// Starts the thread of vCPU `index`, which waits at `gate`.
///
/// # Errors
/// A host fault when there is no room for a thread.
pub fn spawn(
    index: u8,
    vcpu: VcpuFd,
    buses: Arc<Buses>,
    gate: Arc<Gate>,
    events: Events,
    tracer: Tracer,
) -> Result<(), Fault> {
    let run = move || {
        gate.pass();
        if index == 0 {
            tracer.reached(|| Point::FirstInstruction);
        }
        let end = run(index, vcpu, &buses);
        // A receiver that is gone means that the machine is ending already.
        let _ = events.send(end);
    };
    process::spawn(&format!("vcpu{index}"), run)
}

/// Runs the guest until it ends. Power-off and reset are reported by their devices; this thread then runs on until the
/// process exits, as a processor does.
fn run(index: u8, mut vcpu: VcpuFd, buses: &Buses) -> Event {
    let stopped = |what: String| Event::Failed(Fault::internal(format!("vCPU {index} stopped: {what}")));
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoIn(port, data)) => buses.ports.read(u64::from(port), data),
            Ok(VcpuExit::IoOut(port, data)) => buses.ports.write(u64::from(port), data),
            Ok(VcpuExit::MmioRead(address, data)) => buses.mmio.read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => buses.mmio.write(address, data),
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {}
            Ok(VcpuExit::Shutdown) => return Event::End(Cause::TripleFault),
            Ok(VcpuExit::SystemEvent(kind, _)) => return system_event(index, kind),
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                return stopped(format!("KVM_EXIT_FAIL_ENTRY with hardware reason {reason:#x} on host CPU {cpu}"));
            }
            Ok(VcpuExit::InternalError) => return stopped(internal_error(&mut vcpu)),
            Ok(VcpuExit::Hlt) => return stopped(String::from("KVM_EXIT_HLT, which the in-kernel APIC never gives")),
            Ok(VcpuExit::MemoryFault { flags, gpa, size }) => {
                return stopped(format!("KVM_EXIT_MEMORY_FAULT at {gpa:#x}, {size} bytes, flags {flags:#x}"));
            }
            Ok(VcpuExit::Unsupported(reason)) => return stopped(format!("KVM exit reason {reason}, which is unknown")),
            Ok(other) => {
                let name = format!("{other:?}");
                let name = name.split(['(', ' ', '{']).next().unwrap_or_default();
                return stopped(format!("KVM exit {name}, which nothing asked for"));
            }
            // EINTR: a signal. EAGAIN: a vCPU that was started and stopped again by the guest's INIT.
            Err(error) if [nix::libc::EINTR, nix::libc::EAGAIN].contains(&error.errno()) => {}
            Err(error) => return stopped(format!("KVM_RUN: {error}")),
        }
    }
}

/// KVM_EXIT_SYSTEM_EVENT (Linux Documentation/virt/kvm/api.rst, section 5).
fn system_event(index: u8, kind: u32) -> Event {
    match kind {
        kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => Event::End(Cause::PowerOff),
        kvm_bindings::KVM_SYSTEM_EVENT_RESET => Event::End(Cause::Reset),
        kvm_bindings::KVM_SYSTEM_EVENT_CRASH => Event::End(Cause::Panic),
        other => {
            Event::Failed(Fault::internal(format!("vCPU {index} stopped: KVM system event {other}, which is unknown")))
        }
    }
}

/// The suberror, and where the guest was.
fn internal_error(vcpu: &mut VcpuFd) -> String {
    let suberror = crate::kvm::internal_suberror(vcpu);
    let name = match suberror {
        1 => "emulation failure",
        2 => "simultaneous exceptions",
        3 => "delivery of an event",
        4 => "unexpected exit reason",
        _ => "unknown",
    };
    let at =
        vcpu.get_regs().map_or_else(|_| String::new(), |registers| format!(" at instruction {:#x}", registers.rip));
    format!("KVM_EXIT_INTERNAL_ERROR {suberror} ({name}){at}")
}
