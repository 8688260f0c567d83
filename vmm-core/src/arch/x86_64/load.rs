//! From a kernel image in a file to a machine that can run its first instruction, with no firmware in between.

use std::fs::File;
use std::io::Seek;
use std::os::fd::AsFd;

use linux_loader::loader::bzimage::Error as BzImageError;
use linux_loader::loader::elf::{Elf, Error as ElfError, PvhBootCapability};
use linux_loader::loader::{BzImage, Error as LoaderError, KernelLoader};
use protocol::{Boot, Descriptor, Fault};
use vm_memory::{Bytes, GuestAddress};

use super::image::{self, Image};
use super::{acpi, layout, linux_boot, pvh};
use crate::legacy::power;
use crate::memory::Memory;

/// What Linux on x86 takes; an ELF image does not say, and the kernel would cut the rest off without a word.
const LINUX_COMMAND_LINE: u64 = 2047;

/// Where the first vCPU starts, and in which mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit mode with the address of `boot_params` in RSI (Linux Documentation/arch/x86/boot.rst, 64-bit boot protocol).
    Long(u64),
    /// 32-bit protected mode with the address of `hvm_start_info` in EBX (Xen docs/misc/pvh.pandoc).
    Pvh(u64),
}

/// The initial ramdisk in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Initrd {
    /// Its guest physical address.
    pub address: u64,
    /// Its size in bytes.
    pub size: u64,
}

/// Loads the kernel, the initial ramdisk, the command line and the ACPI tables into guest memory.
///
/// # Errors
/// An input fault naming the argument that is wrong.
pub fn load(boot: &Boot, memory: &Memory) -> Result<Entry, Fault> {
    let mut kernel = file(&boot.kernel, "--kernel")?;
    let mut initrd = boot.initrd.as_ref().map(|initrd| file(initrd, "--initrd")).transpose()?;
    let low_end = boot.memory.size.min(layout::LOW_MEMORY_END);
    acpi::write(memory, boot)?;
    write_command_line(memory, &boot.command_line)?;
    write_reset_vector(memory)?;
    let refused = |error| match error {
        LoaderError::Bzimage(BzImageError::ReadBzImageCompressedKernel)
        | LoaderError::Elf(ElfError::ReadKernelImage) => Fault::input(format!(
            "--kernel: it does not fit into --memory {} bytes: give the guest more memory",
            boot.memory.size
        )),
        error => Fault::input(format!("--kernel: {error}")),
    };
    match image::identify(&kernel)? {
        Image::BzImage => {
            let start = GuestAddress(layout::EXTENDED_START);
            let loaded = BzImage::load(memory, Some(start), &mut kernel, Some(start)).map_err(refused)?;
            let header = loaded.setup_header.ok_or_else(|| Fault::internal("a bzImage without a setup header"))?;
            if u64::from(header.cmdline_size) < boot.command_line.len() as u64 {
                return Err(command_line_too_long(&boot.command_line, u64::from(header.cmdline_size)));
            }
            let kernel_end = linux_boot::memory_needed(&header).max(loaded.kernel_end);
            if kernel_end > low_end {
                return Err(Fault::input(format!(
                    "--kernel: it needs memory up to {kernel_end:#x} and --memory is {low_end:#x}: give the guest more memory"
                )));
            }
            let initrd =
                load_initrd(memory, initrd.as_mut(), kernel_end, low_end.min(u64::from(header.initrd_addr_max) + 1))?;
            linux_boot::write(memory, boot, header, initrd)?;
            Ok(Entry::Long(layout::EXTENDED_START + linux_boot::ENTRY_64_OFFSET))
        }
        Image::Elf => {
            if boot.command_line.len() as u64 > LINUX_COMMAND_LINE {
                return Err(command_line_too_long(&boot.command_line, LINUX_COMMAND_LINE));
            }
            let loaded = Elf::load(memory, None, &mut kernel, None).map_err(refused)?;
            if loaded.kernel_end > low_end {
                return Err(Fault::input(format!(
                    "--kernel: it needs memory up to {:#x} and --memory is {low_end:#x}: give the guest more memory",
                    loaded.kernel_end
                )));
            }
            let initrd = load_initrd(memory, initrd.as_mut(), loaded.kernel_end, low_end)?;
            if let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap {
                pvh::write(memory, boot, initrd)?;
                return Ok(Entry::Pvh(entry.0));
            }
            linux_boot::write(memory, boot, linux_boot::header_for_elf(), initrd)?;
            Ok(Entry::Long(loaded.kernel_load.0))
        }
    }
}

/// A file of our own at its start, sharing the open file description: nobody else reads it meanwhile.
fn file(descriptor: &Descriptor, argument: &str) -> Result<File, Fault> {
    let fail = |error: std::io::Error| Fault::host(format!("{argument}: {error}"));
    let mut file = File::from(descriptor.as_fd().try_clone_to_owned().map_err(fail)?);
    file.rewind().map_err(fail)?;
    Ok(file)
}

fn command_line_too_long(command_line: &str, most: u64) -> Fault {
    Fault::input(format!(
        "--append: the command line has {} bytes and the kernel takes at most {most}",
        command_line.len()
    ))
}

fn write_command_line(memory: &Memory, command_line: &str) -> Result<(), Fault> {
    if command_line.len() as u64 >= layout::COMMAND_LINE_SIZE {
        return Err(command_line_too_long(command_line, layout::COMMAND_LINE_SIZE - 1));
    }
    let mut bytes = command_line.as_bytes().to_vec();
    bytes.push(0);
    write(memory, layout::COMMAND_LINE, &bytes, "the command line")
}

/// The one service of a firmware that Linux insists on: on hardware-reduced platforms it resets through EFI, and where
/// there is none by a jump to the reset vector in real mode. What it finds there writes the reset register.
fn write_reset_vector(memory: &Memory) -> Result<(), Fault> {
    let [low, high, ..] = (layout::POWER.start + power::RESET).to_le_bytes();
    // mov dx, port; mov al, value; out dx, al; hlt; jmp back to hlt
    let code = [0xba, low, high, 0xb0, power::RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd];
    write(memory, layout::RESET_VECTOR, &code, "the reset vector")
}

/// Puts the initial ramdisk at the end of the memory below `limit`, where no kernel unpacks itself.
fn load_initrd(memory: &Memory, file: Option<&mut File>, kernel_end: u64, limit: u64) -> Result<Option<Initrd>, Fault> {
    const PAGE: u64 = 4096;
    let Some(file) = file else { return Ok(None) };
    let host = |step: &str, error: std::io::Error| Fault::host(format!("--initrd: {step}: {error}"));
    let size = file.metadata().map_err(|error| host("read its length", error))?.len();
    let address = limit.checked_sub(size).map(|address| address / PAGE * PAGE).filter(|address| *address >= kernel_end);
    let Some(address) = address else {
        return Err(Fault::input(format!(
            "--initrd: its {size} bytes do not fit between the kernel's end at {kernel_end:#x} and {limit:#x}: give the guest more memory"
        )));
    };
    let count = usize::try_from(size).map_err(|_| Fault::internal("initrd size"))?;
    memory
        .read_exact_volatile_from(GuestAddress(address), file, count)
        .map_err(|error| Fault::host(format!("--initrd: read it into guest memory: {error}")))?;
    Ok(Some(Initrd { address, size }))
}

/// Writes a boot structure, at an address that the layout keeps inside of guest memory.
pub fn write(memory: &Memory, address: u64, bytes: &[u8], what: &str) -> Result<(), Fault> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|error| Fault::internal(format!("write {what} at {address:#x} of guest memory: {error}")))
}
