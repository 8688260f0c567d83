//! What kind of kernel an image is, and whether all of it is there.
//!
//! The image is the tenant's: nothing in it is believed before it is checked against the file's length.

use std::fs::File;
use std::os::unix::fs::FileExt;

use protocol::Fault;

use super::layout;

/// A kernel image whose length fits what its headers promise.
#[derive(Debug, PartialEq, Eq)]
pub enum Image {
    /// A compressed kernel with a setup header (Linux Documentation/arch/x86/boot.rst).
    BzImage,
    /// A 64-bit ELF executable, such as `vmlinux`.
    Elf,
}

const NOT_A_KERNEL: &str = "is neither a bzImage nor a 64-bit x86 ELF kernel";

/// Looks at the headers of `file`.
///
/// # Errors
/// An input fault naming what is wrong with the image.
pub fn identify(file: &File) -> Result<Image, Fault> {
    let length = file.metadata().map_err(|error| Fault::host(format!("--kernel: read its length: {error}")))?.len();
    let reader = Reader { file, length };
    if reader.bytes::<4>(0)? == *b"\x7fELF" {
        check_elf(&reader)?;
        return Ok(Image::Elf);
    }
    if length > 0x206 && reader.bytes::<4>(0x202)? == *b"HdrS" {
        check_bzimage(&reader)?;
        return Ok(Image::BzImage);
    }
    Err(input(NOT_A_KERNEL))
}

fn input(what: &str) -> Fault {
    Fault::input(format!("--kernel: the file {what}"))
}

fn truncated(length: u64, needed: u64) -> Fault {
    input(&format!("is truncated: it has {length} bytes and its headers speak of {needed}; copy it again"))
}

struct Reader<'a> {
    file: &'a File,
    length: u64,
}

impl Reader<'_> {
    fn bytes<const N: usize>(&self, offset: u64) -> Result<[u8; N], Fault> {
        let end = offset.checked_add(N as u64).ok_or_else(|| input(NOT_A_KERNEL))?;
        if end > self.length {
            return Err(if self.length < 64 { input(NOT_A_KERNEL) } else { truncated(self.length, end) });
        }
        let mut bytes = [0; N];
        self.file
            .read_exact_at(&mut bytes, offset)
            .map_err(|error| Fault::host(format!("--kernel: read at offset {offset}: {error}")))?;
        Ok(bytes)
    }

    fn u16(&self, offset: u64) -> Result<u16, Fault> {
        Ok(u16::from_le_bytes(self.bytes(offset)?))
    }

    fn u32(&self, offset: u64) -> Result<u32, Fault> {
        Ok(u32::from_le_bytes(self.bytes(offset)?))
    }

    fn u64(&self, offset: u64) -> Result<u64, Fault> {
        Ok(u64::from_le_bytes(self.bytes(offset)?))
    }

    /// That `size` bytes at `offset` are in the file.
    fn holds(&self, offset: u64, size: u64) -> Result<(), Fault> {
        match offset.checked_add(size) {
            Some(end) if end <= self.length => Ok(()),
            end => Err(truncated(self.length, end.unwrap_or(u64::MAX))),
        }
    }
}

/// The setup header's `syssize` counts the protected-mode kernel in units of 16 bytes.
fn check_bzimage(reader: &Reader<'_>) -> Result<(), Fault> {
    const LOADED_HIGH: u8 = 1;
    const KERNEL_64: u16 = 1;
    let [sectors] = reader.bytes::<1>(0x1f1)?;
    let sectors = if sectors == 0 { 4 } else { u64::from(sectors) };
    let setup = (sectors + 1) * 512;
    reader.holds(setup, u64::from(reader.u32(0x1f4)?) * 16)?;
    if reader.u16(0x206)? < 0x020c {
        return Err(input("has a boot protocol older than 2.12, without a 64-bit entry point: use Linux 3.8 or later"));
    }
    if reader.bytes::<1>(0x211)?[0] & LOADED_HIGH == 0 || reader.u16(0x236)? & KERNEL_64 == 0 {
        return Err(input("has no 64-bit entry point: use a 64-bit kernel"));
    }
    Ok(())
}

/// ELF-64: every segment and the section headers, which linkers write last, are in the file.
fn check_elf(reader: &Reader<'_>) -> Result<(), Fault> {
    const ELF_HEADER: u64 = 64;
    const PROGRAM_HEADER: u64 = 56;
    const SECTION_HEADER: u64 = 64;
    const MACHINE_X86_64: u16 = 62;
    const LOAD: u32 = 1;
    const NOTE: u32 = 4;
    if reader.bytes::<2>(4)? != [2, 1] || reader.u16(18)? != MACHINE_X86_64 {
        return Err(input("is an ELF file, but not of 64-bit x86"));
    }
    if u64::from(reader.u16(54)?) != PROGRAM_HEADER || reader.u64(32)? < ELF_HEADER {
        return Err(input("is an ELF file whose program headers have no valid size or place"));
    }
    let (programs, sections) = (reader.u64(32)?, reader.u64(40)?);
    let (program_count, section_count) = (u64::from(reader.u16(56)?), u64::from(reader.u16(60)?));
    reader.holds(sections, section_count * SECTION_HEADER)?;
    reader.holds(programs, program_count * PROGRAM_HEADER)?;
    let mut loads = false;
    for index in 0..program_count {
        let header = programs + index * PROGRAM_HEADER;
        let kind = reader.u32(header)?;
        if kind != LOAD && kind != NOTE {
            continue;
        }
        let (offset, address) = (reader.u64(header + 8)?, reader.u64(header + 24)?);
        let (in_file, in_memory) = (reader.u64(header + 32)?, reader.u64(header + 40)?);
        reader.holds(offset, in_file)?;
        if kind == LOAD && in_memory > 0 {
            loads = true;
            if address < layout::EXTENDED_START || address.checked_add(in_memory.max(in_file)).is_none() {
                return Err(input(&format!(
                    "has a segment at {address:#x}, and kernels are loaded from 1 MiB upwards"
                )));
            }
        }
    }
    if !loads {
        return Err(input("is an ELF file without anything to load"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::FaultKind;
    use std::io::Write;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile();
        file.write_all(bytes).unwrap();
        file
    }

    fn tempfile() -> File {
        File::from(nix::sys::memfd::memfd_create("image", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap())
    }

    fn bzimage() -> Vec<u8> {
        let mut bytes = vec![0; 512 * 2 + 4096];
        bytes[0x1f1] = 1;
        bytes[0x1f4..0x1f8].copy_from_slice(&(4096u32 / 16).to_le_bytes());
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        bytes[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
        bytes[0x211] = 1;
        bytes[0x236] = 1;
        bytes
    }

    fn elf() -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[18] = 62;
        bytes[32] = 64;
        bytes[40..48].copy_from_slice(&(4096u64 - 64).to_le_bytes());
        bytes[54] = 56;
        bytes[56] = 1;
        bytes[60] = 1;
        bytes[64] = 1;
        bytes[64 + 24..64 + 32].copy_from_slice(&0x10_0000u64.to_le_bytes());
        bytes[64 + 32..64 + 40].copy_from_slice(&256u64.to_le_bytes());
        bytes[64 + 40..64 + 48].copy_from_slice(&256u64.to_le_bytes());
        bytes
    }

    #[test]
    fn whole_images_are_recognised() {
        assert_eq!(identify(&file(&bzimage())), Ok(Image::BzImage));
        assert_eq!(identify(&file(&elf())), Ok(Image::Elf));
    }

    #[test]
    fn an_image_truncated_anywhere_is_the_users_fault() {
        for whole in [bzimage(), elf()] {
            for length in 0..whole.len() {
                let fault = identify(&file(&whole[..length])).unwrap_err();
                assert_eq!(fault.kind, FaultKind::Input, "{length}: {fault}");
            }
        }
    }

    #[test]
    fn hostile_headers_are_refused() {
        let mut overflowing = elf();
        overflowing[64 + 8..64 + 16].copy_from_slice(&u64::MAX.to_le_bytes());
        let mut low = elf();
        low[64 + 24..64 + 32].copy_from_slice(&0x7000u64.to_le_bytes());
        let mut wrapping = elf();
        wrapping[64 + 24..64 + 32].copy_from_slice(&(u64::MAX - 8).to_le_bytes());
        let mut nothing = elf();
        nothing[64] = 6;
        let mut far = elf();
        far[32..40].copy_from_slice(&(u64::MAX - 4).to_le_bytes());
        let mut odd = elf();
        odd[54] = 57;
        for bytes in [odd, overflowing, low, wrapping, nothing, far, vec![b'x'; 8192]] {
            assert_eq!(identify(&file(&bytes)).unwrap_err().kind, FaultKind::Input);
        }
    }
}
