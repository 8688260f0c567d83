//! vCPU threads: held at the gate, started together, then one loop over KVM_RUN.

use std::sync::Arc;
use std::sync::mpsc::channel;

use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};
use protocol::process;
use protocol::trace::Point;
use protocol::{Cause, Fault};
use seccomp::CoreThread;

use crate::arch;
use crate::bus::Bus;
use crate::event::{Event, Events};
use crate::gate::Gate;
use crate::signal::{Interruptible, Thread};
use crate::thread;
use crate::trace::Tracer;

/// What a vCPU's exits are answered from.
pub struct Buses {
    /// Ports.
    pub ports: Bus,
    /// Addresses without memory.
    pub mmio: Bus,
}

/// Starts the thread of vCPU `index`, which waits at `gate`, and returns it: once the gate is closed, it is to be
/// interrupted to come out of the guest.
///
/// # Errors
/// A host fault when there is no room for a thread or the kernel refuses its filter.
pub fn spawn(
    index: u8,
    vcpu: VcpuFd,
    buses: Arc<Buses>,
    gate: Arc<Gate>,
    events: Events,
    tracer: Tracer,
) -> Result<Thread, Fault> {
    let (ready, wait) = channel();
    // The receiver waits for this one message: the run filter lets no thread ask for its number.
    let prepare = move || {
        let _ = ready.send(Thread::current());
        thread::confine(CoreThread::Vcpu)
    };
    let run = move || {
        let mut vcpu = Interruptible::new(vcpu);
        gate.enter();
        if index == 0 {
            tracer.reached(|| Point::FirstInstruction);
        }
        let end = run(index, &mut vcpu, &buses, &gate);
        gate.leave();
        // A receiver that is gone means that the machine is ending already.
        let _ = events.send(end);
        // To let go of the vCPU takes calls that this thread may not make. The process ends soon.
        loop {
            std::thread::park();
        }
    };
    process::spawn_prepared(&format!("vcpu{index}"), prepare, run)?;
    wait.recv().map_err(|_| Fault::internal(format!("vCPU {index} ended before it began")))
}

/// Runs the guest until it ends. Power-off and reset are reported by their devices; this thread then runs on until the
/// process exits, as a processor does.
fn run(index: u8, vcpu: &mut Interruptible, buses: &Buses, gate: &Gate) -> Event {
    let stopped = |what: String| Event::Failed(Fault::internal(format!("vCPU {index} stopped: {what}")));
    loop {
        if gate.is_closed() {
            // KVM_RUN then finishes what the last exit began, such as a read of a register, and runs nothing.
            vcpu.set_kvm_immediate_exit(1);
        }
        match vcpu.run() {
            Ok(VcpuExit::IoIn(port, data)) => buses.ports.read(u64::from(port), data),
            Ok(VcpuExit::IoOut(port, data)) => buses.ports.write(u64::from(port), data),
            Ok(VcpuExit::MmioRead(address, data)) => buses.mmio.read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => buses.mmio.write(address, data),
            Ok(VcpuExit::IrqWindowOpen) => {}
            Ok(VcpuExit::Intr) => pause(vcpu, gate),
            Ok(VcpuExit::Shutdown) => return Event::End(Cause::TripleFault),
            Ok(VcpuExit::SystemEvent(kind, _)) => return system_event(index, kind),
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                return stopped(format!("KVM_EXIT_FAIL_ENTRY with hardware reason {reason:#x} on host CPU {cpu}"));
            }
            Ok(VcpuExit::InternalError) => return stopped(internal_error(vcpu)),
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
            // A signal, or what it left.
            Err(error) if error.errno() == nix::libc::EINTR => pause(vcpu, gate),
            // A vCPU that was started and stopped again by the guest's INIT.
            Err(error) if error.errno() == nix::libc::EAGAIN => {}
            Err(error) => return stopped(format!("KVM_RUN: {error}")),
        }
    }
}

/// Comes out of the guest for as long as the gate is closed.
fn pause(vcpu: &mut Interruptible, gate: &Gate) {
    // Before the look at the gate: a signal that comes after it sets the flag again.
    vcpu.clear();
    if gate.is_closed() {
        gate.leave();
        gate.enter();
        arch::after_pause(vcpu);
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
    // KVM_GET_REGS is not for this thread; KVM_RUN leaves the registers in its page, and here runs nothing else (Linux
    // Documentation/virt/kvm/api.rst, section 5, `kvm_valid_regs`).
    vcpu.set_sync_valid_reg(SyncReg::Register);
    vcpu.set_kvm_immediate_exit(1);
    let _ = vcpu.run();
    let instruction = vcpu.sync_regs().regs.rip;
    format!("KVM_EXIT_INTERNAL_ERROR {suberror} ({name}) at instruction {instruction:#x}")
}
