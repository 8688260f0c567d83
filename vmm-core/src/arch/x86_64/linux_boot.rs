//! Linux's own boot protocol (Documentation/arch/x86/boot.rst, zero-page.rst): the `boot_params` page.

use linux_loader::bootparam::{boot_params, setup_header};
use protocol::{Boot, Fault};
use vm_memory::ByteValued;

use super::load::{Initrd, write as write_memory};
use super::{acpi, layout};
use crate::memory::Memory;

/// The 64-bit entry point, from where the protected-mode kernel is loaded.
pub const ENTRY_64_OFFSET: u64 = 0x200;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const E820_ACPI: u32 = 3;
/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// The kernel may use the heap after the setup code: irrelevant to the 64-bit entry, told for completeness.
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;

/// One range of the guest's memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// The first address.
    pub address: u64,
    /// The length in bytes.
    pub size: u64,
    /// E820 type, which is PVH's too.
    pub kind: u32,
}

/// The memory map that any boot protocol tells the guest.
pub fn memory_map(size: u64) -> Vec<MapEntry> {
    let between = |start: u64, end: u64, kind| MapEntry { address: start, size: end.saturating_sub(start), kind };
    let mut map = vec![
        between(0, layout::CONVENTIONAL_END, E820_RAM),
        between(layout::CONVENTIONAL_END, layout::ACPI.start, E820_RESERVED),
        between(layout::ACPI.start, layout::ACPI.end, E820_ACPI),
        between(layout::ACPI.end, layout::EXTENDED_START, E820_RESERVED),
    ];
    for range in layout::memory_ranges(size) {
        map.push(between(range.start.max(layout::EXTENDED_START), range.end, E820_RAM));
    }
    map
}

/// The highest address that the kernel overwrites while it unpacks itself.
pub fn memory_needed(header: &setup_header) -> u64 {
    let runs_at = { header.pref_address }.max(layout::EXTENDED_START);
    runs_at.saturating_add(u64::from(header.init_size))
}

/// The setup header of a kernel that has none of its own.
pub fn header_for_elf() -> setup_header {
    setup_header { boot_flag: BOOT_FLAG, header: HEADER_MAGIC, kernel_alignment: 0x100_0000, ..Default::default() }
}

/// Writes `boot_params`.
///
/// # Errors
/// An internal fault when the layout does not hold it.
pub fn write(memory: &Memory, boot: &Boot, header: setup_header, initrd: Option<Initrd>) -> Result<(), Fault> {
    let below_4_gib = |value: u64| u32::try_from(value).map_err(|_| Fault::internal("a boot address above 4 GiB"));
    let mut params = boot_params { hdr: header, ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = below_4_gib(layout::COMMAND_LINE)?;
    params.hdr.cmdline_size = u32::try_from(boot.command_line.len()).map_err(|_| Fault::internal("command line"))?;
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = below_4_gib(initrd.address)?;
        params.hdr.ramdisk_size = below_4_gib(initrd.size)?;
    }
    params.acpi_rsdp_addr = acpi::ROOT_POINTER;
    let map = memory_map(boot.memory.size);
    let mut table = params.e820_table;
    for (entry, range) in table.iter_mut().zip(&map) {
        entry.addr = range.address;
        entry.size = range.size;
        entry.r#type = range.kind;
    }
    params.e820_table = table;
    params.e820_entries = u8::try_from(map.len()).map_err(|_| Fault::internal("memory map"))?;
    write_memory(memory, layout::BOOT_PARAMS, params.as_slice(), "boot_params")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_covers_all_memory_but_the_legacy_hole() {
        let map = memory_map(5 << 30);
        let ram: u64 = map.iter().filter(|entry| entry.kind == E820_RAM).map(|entry| entry.size).sum();
        assert_eq!(ram, (5 << 30) - (layout::EXTENDED_START - layout::CONVENTIONAL_END));
        assert!(map.windows(2).all(|pair| pair[0].address + pair[0].size <= pair[1].address));
    }
}
