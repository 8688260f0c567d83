//! The address map of `microvm-1`. It never changes: another map is another machine version.
//!
//! | guest physical address | what |
//! |---|---|
//! | 0 – 0x9fc00 | memory; boot structures below 0x40000 |
//! | 0xe0000 – 0xff000 | ACPI tables |
//! | 0xffff0 – 0x100000 | the reset vector |
//! | 0x100000 – 3 GiB | memory, as much as there is; the kernel from 1 MiB, the initial ramdisk at the end |
//! | 0xc000_0000 – 0xd000_0000 | reserved for 32-bit PCI windows |
//! | 0xd000_0000 – 0xd001_0000 | virtio-mmio devices, one page per slot |
//! | 0xe000_0000 – 0xf000_0000 | reserved for PCI configuration (ECAM) |
//! | 0xfec0_0000 | I/O APIC |
//! | 0xfee0_0000 | local APICs |
//! | 0xfffb_c000 – 0xfffc_0000 | KVM's identity map page and task state |
//! | 4 GiB – | the rest of memory, then room for hot-plugged memory |

use std::ops::Range;

/// Where the low range of memory ends at the latest.
pub const LOW_MEMORY_END: u64 = 0xc000_0000;
/// Where the rest of memory starts.
pub const HIGH_MEMORY_START: u64 = 1 << 32;
/// The end of conventional memory as told to the guest.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
/// Where extended memory, and the kernel, start.
pub const EXTENDED_START: u64 = 0x10_0000;

/// The global descriptor table of the first instruction.
pub const GDT: u64 = 0x500;
/// PVH's `hvm_start_info`.
pub const PVH_START_INFO: u64 = 0x6000;
/// PVH's list of modules.
pub const PVH_MODULES: u64 = 0x6040;
/// PVH's memory map.
pub const PVH_MEMORY_MAP: u64 = 0x6080;
/// Linux's `boot_params`, the "zero page".
pub const BOOT_PARAMS: u64 = 0x7000;
/// The first stack, growing down.
pub const BOOT_STACK: u64 = 0x8ff0;
/// The identity map: one page of level 4, one of level 3, four of level 2.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// The room for the command line, its terminating NUL included.
pub const COMMAND_LINE_SIZE: u64 = 0x1_0000;
/// The ACPI tables; the root pointer comes first, where a kernel without boot parameters looks for it.
pub const ACPI: Range<u64> = 0xe_0000..0xf_f000;
/// Where a processor in real mode starts again, at F000:FFF0.
pub const RESET_VECTOR: u64 = 0xf_fff0;

/// The first virtio-mmio slot.
const VIRTIO_MMIO: u64 = 0xd000_0000;
/// The size of a slot.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// The interrupts of the slots, in order: those of the I/O APIC that no legacy device of the board uses.
const VIRTIO_MMIO_GSI: [u32; 15] = [16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 10, 11, 14, 15];

/// The I/O APIC's registers.
pub const IO_APIC: u32 = 0xfec0_0000;
/// The local APICs' registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// KVM's one-page identity map for real mode on some processors.
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
/// KVM's three-page task state segment.
pub const TASK_STATE: usize = 0xfffb_d000;

/// COM1's ports.
pub const COM1: Range<u64> = 0x3f8..0x400;
/// COM1's interrupt.
pub const COM1_GSI: u32 = 4;
/// The keyboard controller's ports: data at the first, command and status at the last.
pub const I8042: Range<u64> = 0x60..0x65;
/// The keyboard's interrupt.
pub const I8042_GSI: u32 = 1;
/// The pvpanic device's port.
pub const PVPANIC: Range<u64> = 0x505..0x506;
/// The sleep control, sleep status and reset registers of hardware-reduced ACPI.
pub const POWER: Range<u64> = 0x600..0x603;
/// The generic event device's interrupt.
pub const EVENT_DEVICE_GSI: u32 = 9;

/// Where a device slot is: its address and its interrupt. `None` beyond the last slot.
pub fn virtio_mmio(slot: u8) -> Option<(u64, u32)> {
    let gsi = VIRTIO_MMIO_GSI.get(usize::from(slot))?;
    Some((VIRTIO_MMIO + u64::from(slot) * VIRTIO_MMIO_SIZE, *gsi))
}

/// The ranges of guest memory of `size` bytes.
pub fn memory_ranges(size: u64) -> Vec<Range<u64>> {
    if size <= LOW_MEMORY_END {
        return std::iter::once(0..size).collect();
    }
    vec![0..LOW_MEMORY_END, HIGH_MEMORY_START..HIGH_MEMORY_START.saturating_add(size - LOW_MEMORY_END)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_leaves_the_hole_below_4_gib() {
        assert_eq!(memory_ranges(1 << 30), vec![0..1 << 30]);
        assert_eq!(memory_ranges(3 << 30), vec![0..3 << 30]);
        assert_eq!(memory_ranges(5 << 30), vec![0..3 << 30, 4 << 30..6 << 30]);
    }

    #[test]
    fn every_slot_has_an_interrupt_of_its_own() {
        let slots: Vec<_> =
            (0..protocol::Machine::Microvm1.slots() as u8).map(|slot| virtio_mmio(slot).unwrap()).collect();
        let mut gsis: Vec<u32> = slots.iter().map(|slot| slot.1).collect();
        gsis.extend([COM1_GSI, I8042_GSI, EVENT_DEVICE_GSI]);
        gsis.sort_unstable();
        let count = gsis.len();
        gsis.dedup();
        assert_eq!(gsis.len(), count);
        assert!(slots.iter().all(|slot| slot.0 >= LOW_MEMORY_END && slot.0 < u64::from(IO_APIC)));
        assert_eq!(virtio_mmio(slots.len() as u8), None);
    }
}
