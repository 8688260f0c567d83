//! What the guest's CPUID instruction answers: what the host supports, with the guest's own topology.
//!
//! Sources: Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E; Linux Documentation/virt/kvm/x86/cpuid.rst.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use protocol::Fault;

/// The frequency of KVM's local APIC timer, in kHz (KVM_CAP_X86_APIC_BUS_CYCLES_NS defaults to 1 ns).
const APIC_TIMER_KHZ: u32 = 1_000_000;
/// Hypervisor leaf that tells the TSC and APIC timer frequencies.
const TIMING_LEAF: u32 = 0x4000_0010;
const HYPERVISOR_LEAF: u32 = 0x4000_0000;

/// The host's supported CPUID, to be specialised with [`for_vcpu`].
///
/// # Errors
/// What KVM_GET_SUPPORTED_CPUID answers.
pub fn supported(kvm: &Kvm) -> Result<CpuId, Fault> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|error| Fault::host(format!("KVM_GET_SUPPORTED_CPUID: {error}")))
}

/// The CPUID of vCPU `index` of `count`, all cores of one package without hyper-threads.
///
/// # Errors
/// An internal fault when the table has no room.
pub fn for_vcpu(supported: &CpuId, index: u8, count: u8, tsc_khz: u32) -> Result<CpuId, Fault> {
    let mut entries = supported.as_slice().to_vec();
    entries.retain(|entry| entry.function != TIMING_LEAF && !matches!(entry.function, 0xb | 0x1f));
    let amd = entries.iter().any(|entry| entry.function == 0 && entry.ebx == u32::from_le_bytes(*b"Auth"));
    for entry in &mut entries {
        specialise(entry, index, count);
    }
    let basic = entries.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    if basic >= 0xb {
        entries.extend(topology(0xb, index, count));
    }
    if basic >= 0x1f && !amd {
        entries.extend(topology(0x1f, index, count));
    }
    if let Some(entry) = entries.iter_mut().find(|entry| entry.function == HYPERVISOR_LEAF) {
        entry.eax = entry.eax.max(TIMING_LEAF);
    }
    if tsc_khz > 0 {
        entries.push(kvm_cpuid_entry2 {
            function: TIMING_LEAF,
            eax: tsc_khz,
            ebx: APIC_TIMER_KHZ,
            ..Default::default()
        });
    }
    CpuId::from_entries(&entries).map_err(|_| Fault::internal("the CPUID table has no room for the topology leaves"))
}

/// Bits of an APIC id that number the cores of the package.
fn core_bits(count: u8) -> u32 {
    u32::from(count).next_power_of_two().trailing_zeros()
}

fn specialise(entry: &mut kvm_cpuid_entry2, index: u8, count: u8) {
    let id = u32::from(index);
    let cores = u32::from(count);
    match entry.function {
        1 => {
            entry.ebx = (entry.ebx & 0x0000_ffff) | (cores << 16) | (id << 24);
            // TSC deadline timer: the in-kernel local APIC has it, but it is not in KVM's supported set.
            entry.ecx |= 1 << 24;
            // Hypervisor present.
            entry.ecx |= 1 << 31;
            // More than one logical processor.
            entry.edx = if count > 1 { entry.edx | (1 << 28) } else { entry.edx & !(1 << 28) };
        }
        // Deterministic cache parameters: levels 1 and 2 belong to a core, level 3 to the package.
        4 if entry.eax & 0x1f != 0 => {
            let sharing = if (entry.eax >> 5) & 7 >= 3 { (1 << core_bits(count)) - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | (((1 << core_bits(count)) - 1) << 26);
        }
        // No performance counters: they would measure the host.
        0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        // Legacy multi-core: cores, not hyper-threads.
        0x8000_0001 => {
            entry.ecx = if count > 1 { entry.ecx | (1 << 1) } else { entry.ecx & !(1 << 1) };
        }
        0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | (core_bits(count) << 12) | (cores - 1),
        // Cache properties: as leaf 4.
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let sharing = if (entry.eax >> 5) & 7 >= 3 { cores - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | (sharing << 14);
        }
        // Extended APIC id, core id with one thread per core, node 0 of 1.
        0x8000_001e => {
            entry.eax = id;
            entry.ebx = id & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// The two levels of a topology leaf: one thread per core, `count` cores, and the end of the list.
fn topology(function: u32, index: u8, count: u8) -> [kvm_cpuid_entry2; 3] {
    const SIGNIFICANT: u32 = kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
    let level = |subleaf: u32, shift: u32, processors: u32, kind: u32| kvm_cpuid_entry2 {
        function,
        index: subleaf,
        flags: SIGNIFICANT,
        eax: shift,
        ebx: processors,
        ecx: (kind << 8) | subleaf,
        edx: u32::from(index),
        ..Default::default()
    };
    [level(0, 0, 1, 1), level(1, core_bits(count), u32::from(count), 2), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|entry| entry.function == function && entry.index == index).unwrap()
    }

    #[test]
    fn each_vcpu_is_a_core_of_its_own() {
        let entries = [
            kvm_cpuid_entry2 { function: 0, eax: 0x1f, ..Default::default() },
            kvm_cpuid_entry2 { function: 1, ..Default::default() },
            kvm_cpuid_entry2 { function: 0x8000_0008, ecx: 0xffff, ..Default::default() },
            kvm_cpuid_entry2 { function: 0x8000_001e, ..Default::default() },
            kvm_cpuid_entry2 { function: HYPERVISOR_LEAF, eax: 0x4000_0001, ..Default::default() },
        ];
        let supported = CpuId::from_entries(&entries).unwrap();
        let cpuid = for_vcpu(&supported, 2, 3, 2_000_000).unwrap();
        assert_eq!(leaf(&cpuid, 1, 0).ebx >> 24, 2);
        assert_eq!((leaf(&cpuid, 1, 0).ebx >> 16) & 0xff, 3);
        assert_eq!(leaf(&cpuid, 0xb, 1).eax, 2, "two bits number three cores");
        assert_eq!(leaf(&cpuid, 0xb, 1).edx, 2);
        assert_eq!(leaf(&cpuid, 0x1f, 1).ebx, 3);
        assert_eq!(leaf(&cpuid, 0x8000_0008, 0).ecx & 0xff, 2);
        assert_eq!(leaf(&cpuid, 0x8000_001e, 0).eax, 2);
        assert_eq!(leaf(&cpuid, TIMING_LEAF, 0).eax, 2_000_000);
        assert_eq!(leaf(&cpuid, HYPERVISOR_LEAF, 0).eax, TIMING_LEAF);
    }

    #[test]
    fn a_single_vcpu_is_no_multi_core() {
        let supported =
            CpuId::from_entries(&[kvm_cpuid_entry2 { function: 1, edx: 1 << 28, ..Default::default() }]).unwrap();
        assert_eq!(leaf(&for_vcpu(&supported, 0, 1, 0).unwrap(), 1, 0).edx & (1 << 28), 0);
    }
}
