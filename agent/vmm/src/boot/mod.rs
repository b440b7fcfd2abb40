//! Everything a PVH kernel finds in memory at its first instruction: itself, its initramfs, its
//! command line, the start info and the ACPI tables.

pub(crate) mod acpi;
mod kernel;
mod start_info;

use std::os::fd::OwnedFd;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::{devices::Window, layout, random, sys, vm::Memory};

#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    #[error("length of the {what} is not known")]
    Length {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("kernel is not an ELF image that fits")]
    Kernel(#[source] linux_loader::loader::Error),
    #[error("kernel has no PVH entry point")]
    NoPvhEntry,
    #[error("initramfs of {bytes} bytes does not fit behind the kernel")]
    InitramfsTooLarge { bytes: u64 },
    #[error("{what} cannot be written to guest memory")]
    Write {
        what: &'static str,
        #[source]
        source: GuestMemoryError,
    },
    #[error("ACPI tables of {bytes} bytes do not fit their place")]
    TablesTooLarge { bytes: usize },
    #[error("no random bytes for the generation id")]
    Random(#[source] std::io::Error),
}

/// What is loaded, by whom it is needed once.
pub(crate) struct Sources {
    pub(crate) kernel: OwnedFd,
    pub(crate) initramfs: OwnedFd,
    pub(crate) command_line: String,
    pub(crate) memory_bytes: u64,
    pub(crate) vcpus: u8,
}

/// Fills guest memory; returns the address of the first instruction.
pub(crate) fn load(
    sources: Sources,
    windows: &[Window],
    memory: &Memory,
) -> Result<u64, BootError> {
    sys::prefer_huge_pages(memory);
    let kernel = kernel::load(sources.kernel, memory)?;
    let initramfs = kernel::load_initramfs(
        sources.initramfs,
        memory,
        kernel.end,
        sources.memory_bytes.min(layout::LOW_RAM_END),
    )?;
    put(memory, "command line", layout::COMMAND_LINE, sources.command_line.as_bytes())?;
    let rsdp = acpi::write(memory, sources.vcpus, windows)?;
    start_info::write(memory, sources.memory_bytes, initramfs, rsdp)?;
    let mut generation = [0; 16];
    random::fill(&mut generation).map_err(BootError::Random)?;
    put(memory, "generation id", layout::GENERATION_ID, &generation)?;
    Ok(kernel.entry)
}

fn put(memory: &Memory, what: &'static str, address: u64, bytes: &[u8]) -> Result<(), BootError> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|source| BootError::Write { what, source })
}
