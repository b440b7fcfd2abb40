//! The start info of the PVH boot protocol: where the other things are, and what is RAM.

use linux_loader::loader::elf::start_info::{
    XEN_HVM_MEMMAP_TYPE_ACPI, XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_MEMMAP_TYPE_RESERVED,
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;

use super::{BootError, kernel::Module, put};
use crate::{
    layout::{
        ACPI_TABLES, ACPI_TABLES_END, BIOS_END, COMMAND_LINE, CONVENTIONAL_END, GENERATION_ID,
        MEMORY_MAP, MODULE_LIST, START_INFO,
    },
    vm::{Memory, memory},
};

/// The version that has a memory map.
const VERSION: u32 = 1;

pub(super) fn write(
    guest: &Memory,
    memory_bytes: u64,
    initramfs: Option<Module>,
    rsdp: u64,
) -> Result<(), BootError> {
    let modules: Vec<_> = initramfs
        .iter()
        .map(|module| hvm_modlist_entry {
            paddr: module.start,
            size: module.bytes,
            ..Default::default()
        })
        .collect();
    let map = memory_map(memory_bytes);
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: VERSION,
        nr_modules: count(&modules),
        modlist_paddr: if modules.is_empty() { 0 } else { MODULE_LIST },
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: rsdp,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: count(&map),
        ..Default::default()
    };
    put(guest, "start info", START_INFO, info.as_slice())?;
    put(guest, "module list", MODULE_LIST, &bytes_of(&modules))?;
    put(guest, "memory map", MEMORY_MAP, &bytes_of(&map))
}

/// What the guest may use as RAM, and where it must look but not touch.
fn memory_map(memory_bytes: u64) -> Vec<hvm_memmap_table_entry> {
    let entry = |addr, end: u64, type_| hvm_memmap_table_entry {
        addr,
        size: end - addr,
        type_,
        ..Default::default()
    };
    let mut map = vec![
        entry(0, CONVENTIONAL_END, XEN_HVM_MEMMAP_TYPE_RAM),
        entry(ACPI_TABLES, ACPI_TABLES_END, XEN_HVM_MEMMAP_TYPE_ACPI),
        entry(GENERATION_ID, BIOS_END, XEN_HVM_MEMMAP_TYPE_RESERVED),
    ];
    for part in memory::parts(memory_bytes) {
        let start = part.start.max(BIOS_END);
        map.push(entry(start, part.start + part.bytes, XEN_HVM_MEMMAP_TYPE_RAM));
    }
    map
}

fn bytes_of<T: ByteValued>(list: &[T]) -> Vec<u8> {
    list.iter().flat_map(|item| item.as_slice()).copied().collect()
}

fn count<T>(list: &[T]) -> u32 {
    // Lists of a handful.
    u32::try_from(list.len()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram_of(memory_bytes: u64) -> Vec<(u64, u64)> {
        let map = memory_map(memory_bytes);
        let ram = map.iter().filter(|entry| entry.type_ == XEN_HVM_MEMMAP_TYPE_RAM);
        ram.map(|entry| (entry.addr, entry.addr + entry.size)).collect()
    }

    #[test]
    fn the_map_tells_all_ram_but_the_range_of_the_old_bios() {
        assert_eq!(ram_of(128 << 20), [(0, 0xa_0000), (0x10_0000, 128 << 20)]);
        assert_eq!(ram_of(4 << 30), [(0, 0xa_0000), (0x10_0000, 0xc000_0000), (1 << 32, 5 << 30)]);
    }

    #[test]
    fn no_two_entries_of_the_map_overlap() {
        let map = memory_map(8 << 30);
        for (index, one) in map.iter().enumerate() {
            for other in &map[index + 1..] {
                let apart =
                    one.addr + one.size <= other.addr || other.addr + other.size <= one.addr;
                assert!(apart, "{one:?} and {other:?}");
            }
        }
    }
}
