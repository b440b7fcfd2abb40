//! ACPI, hardware-reduced: no PM timer, no SCI, no legacy interrupts; sleep and reset by registers
//! of our own. Without these tables a kernel calibrates its clocks for 200 ms and finds no device.

mod dsdt;

use acpi_tables::{
    Aml,
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace, GAS},
    madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic},
    rsdp::Rsdp,
    xsdt::XSDT,
};

use super::{BootError, put};
use crate::{
    devices::Window,
    layout::{
        ACPI_TABLES, ACPI_TABLES_END, I8042_COMMAND_PORT, I8042_RESET, IOAPIC, LOCAL_APIC,
        SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT,
    },
    vm::Memory,
};

const OEM_ID: [u8; 6] = *b"HOLDFA";
const OEM_TABLE_ID: [u8; 8] = *b"HOLDFAST";
const OEM_REVISION: u32 = 1;

/// FADT boot flags: no VGA to probe, no ASPM control, no CMOS clock to wait for.
const NO_VGA: u16 = 1 << 2;
const NO_ASPM: u16 = 1 << 4;
const NO_CMOS_CLOCK: u16 = 1 << 5;

/// Tables start at multiples of this.
const ALIGNMENT: usize = 16;

/// Writes all tables; returns the address of the RSDP.
pub(super) fn write(memory: &Memory, vcpus: u8, windows: &[Window]) -> Result<u64, BootError> {
    let mut tables = Tables::default();
    let dsdt = tables.add(dsdt::table(windows).as_slice());
    let fadt = tables.add(&bytes_of(&fadt(dsdt)));
    let madt = tables.add(&bytes_of(&madt(vcpus)));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = tables.add(&bytes_of(&xsdt));
    let rsdp = tables.add(&bytes_of(&Rsdp::new(OEM_ID, xsdt)));
    let bytes = tables.bytes.len();
    if ACPI_TABLES + bytes as u64 > ACPI_TABLES_END {
        return Err(BootError::TablesTooLarge { bytes });
    }
    put(memory, "ACPI tables", ACPI_TABLES, &tables.bytes)?;
    Ok(rsdp)
}

/// Tables one behind the other, as they will lie in guest memory.
#[derive(Default)]
struct Tables {
    bytes: Vec<u8>,
}

impl Tables {
    /// Appends a table; returns its address in the guest.
    fn add(&mut self, table: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let address = ACPI_TABLES + self.bytes.len() as u64;
        self.bytes.extend_from_slice(table);
        address
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> impl Aml {
    let port =
        |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // Neither button is fixed hardware, so the kernel does not look for them.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_ASPM | NO_CMOS_CLOCK).into();
    fadt.reset_reg = port(I8042_COMMAND_PORT);
    fadt.reset_value = I8042_RESET;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let local = LocalInterruptController::Address(LOCAL_APIC);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local);
    madt.add_structure(IoApic::new(0, IOAPIC, 0));
    for index in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(index, index, EnabledStatus::Enabled));
    }
    madt
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// Reads a table with its length from its header.
    fn table(memory: &Memory, address: u64) -> Vec<u8> {
        let length: u32 = memory.read_obj(GuestAddress(address + 4)).unwrap();
        let mut bytes = vec![0; length as usize];
        memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn number(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    #[test]
    fn every_table_is_found_from_the_rsdp_and_sums_to_zero() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let windows = [Window { base: 0xd000_0000, len: 0x1000, gsi: 5 }];
        let address = write(&memory, 2, &windows).unwrap();
        let mut rsdp = [0; 36];
        memory.read_slice(&mut rsdp, GuestAddress(address)).unwrap();
        assert_eq!((&rsdp[..8], sum(&rsdp[..20]), sum(&rsdp)), (&b"RSD PTR "[..], 0, 0));
        let xsdt = table(&memory, number(&rsdp, 24));
        let fadt = table(&memory, number(&xsdt, 36));
        let madt = table(&memory, number(&xsdt, 44));
        let dsdt = table(&memory, number(&fadt, 140));
        for (name, table) in [(b"XSDT", xsdt), (b"FACP", fadt), (b"APIC", madt), (b"DSDT", dsdt)] {
            assert_eq!((&table[..4], sum(&table)), (&name[..], 0));
        }
    }
}
