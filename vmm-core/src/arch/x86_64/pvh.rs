//! The PVH boot protocol (Xen docs/misc/pvh.pandoc, public/arch-x86/hvm/start_info.h).

use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use protocol::{Boot, Fault};
use vm_memory::ByteValued;

use super::linux_boot::memory_map;
use super::load::{Initrd, write as write_memory};
use super::{acpi, layout};
use crate::memory::Memory;

const MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const VERSION: u32 = 1;

/// Writes `hvm_start_info` and what it points to.
///
/// # Errors
/// An internal fault when the layout does not hold it.
pub fn write(memory: &Memory, boot: &Boot, initrd: Option<Initrd>) -> Result<(), Fault> {
    let map = memory_map(boot.memory.size);
    let mut table = Vec::new();
    for range in &map {
        let entry = hvm_memmap_table_entry { addr: range.address, size: range.size, type_: range.kind, reserved: 0 };
        table.extend_from_slice(entry.as_slice());
    }
    write_memory(memory, layout::PVH_MEMORY_MAP, &table, "the PVH memory map")?;
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry { paddr: initrd.address, size: initrd.size, ..Default::default() };
        write_memory(memory, layout::PVH_MODULES, module.as_slice(), "the PVH module list")?;
    }
    let start_info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: layout::COMMAND_LINE,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: if initrd.is_some() { layout::PVH_MODULES } else { 0 },
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).map_err(|_| Fault::internal("memory map"))?,
        rsdp_paddr: acpi::ROOT_POINTER,
        ..Default::default()
    };
    write_memory(memory, layout::PVH_START_INFO, start_info.as_slice(), "hvm_start_info")
}
