//! Kernel images out of a package: the bzImage, and the ELF `vmlinux` inside it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// The bzImage of an unpacked kernel package.
pub fn bzimage(package: &Path) -> Result<PathBuf> {
    let boot = package.join("boot");
    fs::read_dir(&boot)
        .with_context(|| format!("read {}", boot.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.file_name().is_some_and(|it| it.to_string_lossy().starts_with("vmlinuz-")))
        .with_context(|| format!("no kernel in {}", boot.display()))
}

/// The ELF kernel in a bzImage whose payload is lz4-compressed, as Debian's 6.1 cloud kernel's is.
/// Field offsets: Linux Documentation/arch/x86/boot.rst, `setup_sects`, `payload_offset`, `payload_length`.
pub fn vmlinux(bzimage: &[u8]) -> Result<Vec<u8>> {
    let setup_sectors = match *bzimage.get(0x1f1).context("no setup header")? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (setup_sectors + 1) * 512 + word(bzimage, 0x248)?;
    let payload = bzimage.get(start..start + word(bzimage, 0x24c)?).context("payload past the end")?;
    let elf = lz4_legacy(payload)?;
    ensure!(elf.starts_with(b"\x7fELF"), "the payload is no ELF file");
    Ok(elf)
}

/// Decodes the legacy frame that kernels use. Its blocks are followed by the uncompressed size, which
/// is why a decoder of ordinary frames refuses it.
fn lz4_legacy(payload: &[u8]) -> Result<Vec<u8>> {
    const MAGIC: usize = 0x184c_2102;
    const BLOCK: usize = 8 << 20;
    ensure!(word(payload, 0)? == MAGIC, "the payload is not lz4-compressed");
    let (blocks, size) = payload.split_at_checked(payload.len() - 4).context("payload too short")?;
    let size = word(size, 0)?;
    let mut contents = Vec::with_capacity(size);
    let mut position = 4;
    while position < blocks.len() {
        let length = word(blocks, position)?;
        let block = blocks.get(position + 4..position + 4 + length).context("block past the end")?;
        contents.extend(lz4_flex::block::decompress(block, BLOCK).context("decompress a block")?);
        position += 4 + length;
    }
    ensure!(contents.len() == size, "{} bytes instead of {size}", contents.len());
    Ok(contents)
}

fn word(bytes: &[u8], offset: usize) -> Result<usize> {
    let field = bytes.get(offset..offset + 4).context("image too short")?;
    Ok(u32::from_le_bytes(field.try_into()?) as usize)
}
