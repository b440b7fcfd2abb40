//! The guest's physical addresses and ports: one list, so that nothing overlaps by accident.
//!
//! RAM is 0 to 3 GiB and, for what is larger, from 4 GiB on. Between them lie the devices' windows
//! (`vm::wiring`), the IOAPIC, the local APICs and KVM's own pages.

/// End of the first part of RAM.
pub(crate) const LOW_RAM_END: u64 = 0xc000_0000;
/// Start of the second part of RAM.
pub(crate) const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// End of conventional memory; what lies between it and [`BIOS_END`] is not told as RAM.
pub(crate) const CONVENTIONAL_END: u64 = 0xa_0000;
pub(crate) const BIOS_END: u64 = 0x10_0000;

/// `hvm_start_info`, its list of modules and its memory map share one page.
pub(crate) const START_INFO: u64 = 0x6000;
pub(crate) const MODULE_LIST: u64 = 0x6100;
pub(crate) const MEMORY_MAP: u64 = 0x6200;
/// Kernel command line with its NUL.
pub(crate) const COMMAND_LINE: u64 = 0x2_0000;
/// Bytes of a command line without its NUL: the kernel's own limit is 2048 with it.
pub(crate) const COMMAND_LINE_BYTES_MAX: usize = 2047;

/// ACPI tables, inside the range not told as RAM.
pub(crate) const ACPI_TABLES: u64 = 0xe_0000;
pub(crate) const ACPI_TABLES_END: u64 = 0xf_0000;
/// The 16 bytes of the generation id: a page of its own, since the guest maps it cached.
pub(crate) const GENERATION_ID: u64 = 0xf_0000;

pub(crate) const IOAPIC: u32 = 0xfec0_0000;
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;
/// One page and then three that KVM needs on Intel hosts without unrestricted guests.
pub(crate) const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
pub(crate) const KVM_TSS: usize = 0xfffb_d000;

/// First serial port, with the interrupt line that custom gives it.
pub(crate) const SERIAL_PORT: u16 = 0x3f8;
pub(crate) const SERIAL_PORTS: u16 = 8;
pub(crate) const SERIAL_GSI: u32 = 4;
/// Keyboard controller, of which only the reset line is there.
pub(crate) const I8042_COMMAND_PORT: u16 = 0x64;
pub(crate) const I8042_RESET: u8 = 0xfe;
/// pvpanic.
pub(crate) const PANIC_PORT: u16 = 0x505;
/// ACPI sleep control and status.
pub(crate) const SLEEP_CONTROL_PORT: u16 = 0x600;
pub(crate) const SLEEP_STATUS_PORT: u16 = 0x601;
/// Line that tells the guest of a new generation id.
pub(crate) const GENERATION_GSI: u32 = 3;
