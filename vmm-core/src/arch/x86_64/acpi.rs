//! The ACPI tables of `microvm-1`: hardware-reduced (ACPI 6.5, section 4.1), so that no fixed hardware is needed.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path,
    ResourceTemplate, Scope, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use protocol::message::Slot;
use protocol::{Boot, Fault};

use super::{layout, load};
use crate::legacy::power;
use crate::memory::Memory;

/// Where the root system description pointer is.
pub const ROOT_POINTER: u64 = layout::ACPI.start;

const OEM: [u8; 6] = *b"OZONE ";
const OEM_TABLE: [u8; 8] = *b"MICROVM1";
const REVISION: u32 = 1;
/// The first revision of the DSDT whose integers have 64 bits.
const DSDT_REVISION: u8 = 2;
/// FADT IA-PC boot architecture flags (ACPI 6.5, table 5.11).
const BOOT_8042: u16 = 1 << 1;
const BOOT_NO_VGA: u16 = 1 << 2;
const BOOT_NO_CMOS_RTC: u16 = 1 << 5;

/// Writes every table.
///
/// # Errors
/// An internal fault when the reserved range does not hold them.
pub fn write(memory: &Memory, boot: &Boot) -> Result<(), Fault> {
    let mut next = ROOT_POINTER + Rsdp::len() as u64;
    let mut place = |table: &[u8]| -> Result<u64, Fault> {
        let address = next.next_multiple_of(16);
        next = address + table.len() as u64;
        if next > layout::ACPI.end {
            return Err(Fault::internal("the ACPI tables do not fit into their range"));
        }
        load::write(memory, address, table, "an ACPI table")?;
        Ok(address)
    };
    let dsdt = place(dsdt(&boot.slots)?.as_slice())?;
    let fadt = place(&bytes(&fadt(dsdt)))?;
    let madt = place(&bytes(&madt(boot.cpus.boot, boot.cpus.max)))?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(&bytes(&xsdt))?;
    load::write(memory, ROOT_POINTER, &bytes(&Rsdp::new(OEM, xsdt)), "the ACPI root pointer")
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn register(offset: u64) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, layout::POWER.start + offset)
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = (BOOT_8042 | BOOT_NO_VGA | BOOT_NO_CMOS_RTC).into();
    fadt.reset_reg = register(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = register(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = register(power::SLEEP_STATUS);
    fadt.finalize()
}

/// Sized to the maximum, so that a vCPU can be plugged in later without new tables.
fn madt(boot: u8, max: u8) -> impl Aml {
    let mut madt = MADT::new(OEM, OEM_TABLE, REVISION, LocalInterruptController::Address(layout::LOCAL_APIC));
    for id in 0..max {
        let status = if id < boot { EnabledStatus::Enabled } else { EnabledStatus::DisabledOnlineCapable };
        madt.add_structure(ProcessorLocalApic::new(id, id, status));
    }
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    madt
}

/// An edge-triggered, active-high interrupt of one device alone.
fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn dsdt(slots: &[Slot]) -> Result<Sdt, Fault> {
    let mut aml = Vec::new();
    for slot in slots {
        let (address, gsi) = layout::virtio_mmio(slot.slot)
            .ok_or_else(|| Fault::internal(format!("device '{}' has no slot on this board", slot.device)))?;
        let address = u32::try_from(address).map_err(|_| Fault::internal("a device slot above 4 GiB"))?;
        let name = format!("VR{:02X}", slot.slot);
        let size = u32::try_from(layout::VIRTIO_MMIO_SIZE).map_err(|_| Fault::internal("slot size"))?;
        Scope::new(
            "_SB_".into(),
            vec![&Device::new(
                Path::new(&name),
                vec![
                    &Name::new("_HID".into(), &"LNRO0005"),
                    &Name::new("_UID".into(), &slot.slot),
                    &Name::new("_CCA".into(), &1u8),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![&Memory32Fixed::new(true, address, size), &edge(gsi)]),
                    ),
                ],
            )],
        )
        .to_aml_bytes(&mut aml);
    }
    legacy_devices(&mut aml)?;
    power_button(&mut aml);
    // Soft off: the value for the sleep type field of the sleep control register.
    Name::new("_S5_".into(), &Package::new(vec![&power::SLEEP_TYPE_OFF, &ZERO])).to_aml_bytes(&mut aml);
    let mut dsdt = Sdt::new(*b"DSDT", 36, DSDT_REVISION, OEM, OEM_TABLE, REVISION);
    dsdt.append_slice(&aml);
    Ok(dsdt)
}

fn legacy_devices(aml: &mut Vec<u8>) -> Result<(), Fault> {
    let port = |port: u64| u16::try_from(port).map_err(|_| Fault::internal("a port above 64 KiB"));
    let com1 = port(layout::COM1.start)?;
    let keyboard_data = port(layout::I8042.start)?;
    let keyboard_command = port(layout::I8042.end - 1)?;
    let pvpanic = port(layout::PVPANIC.start)?;
    Scope::new(
        "_SB_".into(),
        vec![
            &Device::new(
                "COM1".into(),
                vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                    &Name::new("_UID".into(), &ZERO),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![&IO::new(com1, com1, 1, 8), &edge(layout::COM1_GSI)]),
                    ),
                ],
            ),
            &Device::new(
                "KBD_".into(),
                vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0303")),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![
                            &IO::new(keyboard_data, keyboard_data, 1, 1),
                            &IO::new(keyboard_command, keyboard_command, 1, 1),
                            &edge(layout::I8042_GSI),
                        ]),
                    ),
                ],
            ),
            &Device::new(
                "PEVT".into(),
                vec![
                    &Name::new("_HID".into(), &"QEMU0001"),
                    &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&IO::new(pvpanic, pvpanic, 1, 1)])),
                ],
            ),
        ],
    )
    .to_aml_bytes(aml);
    Ok(())
}

/// The generic event device (ACPI 6.5, section 5.6.9): its interrupt is the power button.
fn power_button(aml: &mut Vec<u8>) {
    const PRESSED: u8 = 0x80;
    let event = Arg(0);
    let button = Path::new("\\_SB_.PWRB");
    Scope::new(
        "_SB_".into(),
        vec![
            &Device::new("PWRB".into(), vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C"))]),
            &Device::new(
                "GED_".into(),
                vec![
                    &Name::new("_HID".into(), &"ACPI0013"),
                    &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&edge(layout::EVENT_DEVICE_GSI)])),
                    &Method::new(
                        "_EVT".into(),
                        1,
                        true,
                        vec![&If::new(
                            &Equal::new(&event, &layout::EVENT_DEVICE_GSI),
                            vec![&Notify::new(&button, &PRESSED)],
                        )],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(aml);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(table: &[u8]) -> u8 {
        table.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn tables_have_valid_checksums_and_lengths() {
        let slots: Vec<Slot> = (0..15)
            .map(|slot| Slot {
                device: String::from("disk").try_into().unwrap(),
                kind: protocol::DeviceKind::Blk,
                slot,
            })
            .collect();
        for table in [dsdt(&slots).unwrap().as_slice().to_vec(), bytes(&fadt(0xe1000)), bytes(&madt(2, 254))] {
            assert_eq!(sum(&table), 0);
            assert_eq!(u32::from_le_bytes(table[4..8].try_into().unwrap()) as usize, table.len());
        }
    }

    #[test]
    fn the_apic_table_has_room_for_every_cpu() {
        let table = bytes(&madt(2, 4));
        let flags: Vec<u8> = (0..4).map(|cpu| table[44 + cpu * 8 + 4]).collect();
        assert_eq!(flags, [1, 1, 2, 2]);
    }
}
