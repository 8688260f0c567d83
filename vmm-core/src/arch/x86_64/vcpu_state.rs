//! The registers of a vCPU before its first instruction.
//!
//! Only the first vCPU is given an entry: the others wait for the guest's startup IPI in KVM's local APIC.

use kvm_bindings::{Msrs, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use protocol::Fault;

use super::layout;
use super::load::{Entry, write};
use crate::memory::Memory;

const CR0_PROTECTION: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE_ENABLE: u64 = 1 << 8;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 2;

const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_FAST_STRING: u64 = 1;

/// Selectors that the 64-bit boot protocol names `__BOOT_CS` and `__BOOT_DS`; PVH does not care.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

fn failed(step: &str, error: kvm_ioctls::Error) -> Fault {
    Fault::host(format!("{step}: {error}"))
}

/// Sets the state in which the first vCPU enters the kernel.
///
/// # Errors
/// A host fault naming the KVM call that failed.
pub fn enter_at(vcpu: &VcpuFd, memory: &Memory, entry: Entry) -> Result<(), Fault> {
    set_segments(vcpu, memory, entry)?;
    let mut registers = kvm_regs { rflags: RFLAGS_RESERVED, ..Default::default() };
    match entry {
        Entry::Long(address) => {
            registers.rip = address;
            registers.rsi = layout::BOOT_PARAMS;
            registers.rsp = layout::BOOT_STACK;
            registers.rbp = layout::BOOT_STACK;
        }
        Entry::Pvh(address) => {
            registers.rip = address;
            registers.rbx = layout::PVH_START_INFO;
        }
    }
    vcpu.set_regs(&registers).map_err(|error| failed("KVM_SET_REGS", error))?;
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(|error| failed("KVM_SET_FPU", error))?;
    wire_local_apic(vcpu)
}

/// Sets what firmware would leave in the model-specific registers of every processor.
///
/// # Errors
/// A host fault naming the KVM call that failed.
pub fn set_msrs(vcpu: &VcpuFd) -> Result<(), Fault> {
    let entries = [
        // All memory write-back, as firmware would leave it: the type after reset is uncacheable.
        kvm_msr_entry { index: MSR_MTRR_DEFAULT_TYPE, data: MTRR_ENABLE | MTRR_WRITE_BACK, ..Default::default() },
        kvm_msr_entry { index: MSR_MISC_ENABLE, data: MISC_FAST_STRING, ..Default::default() },
    ];
    for entry in entries {
        let msrs = Msrs::from_entries(&[entry]).map_err(|_| Fault::internal("MSR list"))?;
        let set = vcpu.set_msrs(&msrs).map_err(|error| failed("KVM_SET_MSRS", error))?;
        if set == 0 {
            log::info!("MSR {:#x} is not settable on this host and stays as it is", entry.index);
        }
    }
    Ok(())
}

/// LINT0 as the 8259's output and LINT1 as NMI (Intel MultiProcessor Specification 1.4, section 3.6.2.1).
fn wire_local_apic(vcpu: &VcpuFd) -> Result<(), Fault> {
    const LINT0: usize = 0x350;
    const LINT1: usize = 0x360;
    const EXTERNAL: u32 = 0x700;
    const NMI: u32 = 0x400;
    let mut lapic = vcpu.get_lapic().map_err(|error| failed("KVM_GET_LAPIC", error))?;
    set_lapic_mode(&mut lapic, LINT0, EXTERNAL);
    set_lapic_mode(&mut lapic, LINT1, NMI);
    vcpu.set_lapic(&lapic).map_err(|error| failed("KVM_SET_LAPIC", error))
}

fn set_lapic_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    if let Some(bytes) = lapic.regs.get_mut(register..register + 4) {
        for (target, byte) in bytes.iter_mut().zip(mode.to_le_bytes()) {
            *target = byte.cast_signed();
        }
    }
}

/// A flat segment: all of memory from address 0.
fn flat(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// The descriptor that a flat segment has in the table: a guest that reloads a selector gets the same segment.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = 0xf_ffff_u64;
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    (limit & 0xffff) | access << 40 | (limit >> 16) << 48 | flags << 52
}

fn set_segments(vcpu: &VcpuFd, memory: &Memory, entry: Entry) -> Result<(), Fault> {
    const CODE: u8 = 0xb;
    const DATA: u8 = 0x3;
    const BUSY_TASK: u8 = 0xb;
    let long = matches!(entry, Entry::Long(_));
    let code = flat(CODE_SELECTOR, CODE, long);
    let data = flat(DATA_SELECTOR, DATA, false);
    let table: [u64; 4] = [0, 0, descriptor(&code), descriptor(&data)];
    let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    write(memory, layout::GDT, &bytes, "the descriptor table")?;

    let mut special = vcpu.get_sregs().map_err(|error| failed("KVM_GET_SREGS", error))?;
    special.cs = code;
    (special.ds, special.es, special.ss) = (data, data, data);
    (special.fs, special.gs) = (data, data);
    special.tr =
        kvm_segment { limit: 0x67, selector: TASK_SELECTOR, type_: BUSY_TASK, present: 1, ..Default::default() };
    special.gdt.base = layout::GDT;
    special.gdt.limit = 31;
    // No interrupt table: an exception before the kernel has one is a triple fault.
    special.idt.base = 0;
    special.idt.limit = 0;
    special.cr0 = CR0_PROTECTION | CR0_EXTENSION_TYPE;
    if long {
        write_identity_map(memory)?;
        special.cr3 = layout::PAGE_TABLES;
        special.cr4 |= CR4_PAE;
        special.cr0 |= CR0_PAGING;
        special.efer |= EFER_LONG_MODE_ENABLE | EFER_LONG_MODE_ACTIVE;
    }
    vcpu.set_sregs(&special).map_err(|error| failed("KVM_SET_SREGS", error))
}

/// The first 4 GiB mapped to themselves in pages of 2 MiB.
fn write_identity_map(memory: &Memory) -> Result<(), Fault> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    const TABLE: u64 = 0x1000;
    let level_3 = layout::PAGE_TABLES + TABLE;
    let level_2 = level_3 + TABLE;
    write(memory, layout::PAGE_TABLES, &(level_3 | PRESENT_WRITABLE).to_le_bytes(), "the page tables")?;
    for gib in 0..4 {
        let entry = (level_2 + gib * TABLE) | PRESENT_WRITABLE;
        write(memory, level_3 + gib * 8, &entry.to_le_bytes(), "the page tables")?;
    }
    let pages: Vec<u8> =
        (0..4 * 512_u64).flat_map(|page| ((page << 21) | PRESENT_WRITABLE | LARGE).to_le_bytes()).collect();
    write(memory, level_2, &pages, "the page tables")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_boot_protocol() {
        assert_eq!(descriptor(&flat(CODE_SELECTOR, 0xb, true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&flat(DATA_SELECTOR, 0x3, false)), 0x00cf_9300_0000_ffff);
    }
}
