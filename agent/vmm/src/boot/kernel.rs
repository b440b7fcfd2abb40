//! Loads the kernel's segments and the initramfs, reading by position: the fds' file positions are
//! shared with every other VMM started from the same files.

use std::{
    io::{self, Read, Seek, SeekFrom},
    os::{fd::OwnedFd, unix::fs::FileExt},
};

use linux_loader::loader::{Elf, KernelLoader, elf::PvhBootCapability};
use vm_memory::{
    Bytes, GuestAddress, ReadVolatile, VolatileMemoryError, VolatileSlice, bitmap::BitmapSlice,
};

use super::BootError;
use crate::{layout::BIOS_END, sys, vm::Memory};

const PAGE_BYTES: u64 = 4096;

/// A loaded kernel.
pub(super) struct Kernel {
    pub(super) entry: u64,
    /// First address behind it, its zeroed data included.
    pub(super) end: u64,
}

/// Where a module lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Module {
    pub(super) start: u64,
    pub(super) bytes: u64,
}

pub(super) fn load(file: OwnedFd, memory: &Memory) -> Result<Kernel, BootError> {
    let mut image = Positioned::new(file, "kernel")?;
    let loaded = Elf::load(memory, None, &mut image, Some(GuestAddress(BIOS_END)))
        .map_err(BootError::Kernel)?;
    match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => {
            Ok(Kernel { entry: entry.0, end: loaded.kernel_end })
        }
        _ => Err(BootError::NoPvhEntry),
    }
}

/// Loads the initramfs as high as it may lie, out of the way of what the kernel unpacks. `None`:
/// the file is empty.
pub(super) fn load_initramfs(
    file: OwnedFd,
    memory: &Memory,
    floor: u64,
    ceiling: u64,
) -> Result<Option<Module>, BootError> {
    let mut image = Positioned::new(file, "initramfs")?;
    let bytes = image.length;
    if bytes == 0 {
        return Ok(None);
    }
    let start = place(bytes, floor, ceiling).ok_or(BootError::InitramfsTooLarge { bytes })?;
    let count = usize::try_from(bytes).map_err(|_| BootError::InitramfsTooLarge { bytes })?;
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut image, count)
        .map_err(|source| BootError::Write { what: "initramfs", source })?;
    Ok(Some(Module { start, bytes }))
}

/// The highest page at which `bytes` end before `ceiling`, unless that is below `floor`.
fn place(bytes: u64, floor: u64, ceiling: u64) -> Option<u64> {
    let start = ceiling.checked_sub(bytes)? & !(PAGE_BYTES - 1);
    (start >= floor).then_some(start)
}

/// A file read by position only.
struct Positioned {
    file: fs_err::File,
    position: u64,
    length: u64,
}

impl Positioned {
    fn new(fd: OwnedFd, what: &'static str) -> Result<Self, BootError> {
        let file = fs_err::File::from_parts(fd.into(), what);
        let length = file.metadata().map_err(|source| BootError::Length { what, source })?.len();
        Ok(Self { file, position: 0, length })
    }

    fn advance(&mut self, count: usize) -> usize {
        self.position = self.position.saturating_add(count as u64);
        count
    }
}

impl Read for Positioned {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.file.file().read_at(bytes, self.position)?;
        Ok(self.advance(count))
    }
}

impl ReadVolatile for Positioned {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        slice: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let count = sys::read_at_volatile(self.file.file(), self.position, slice)?;
        Ok(self.advance(count))
    }
}

impl Seek for Positioned {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let wanted = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::End(offset) => self.length.checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        self.position = wanted.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_initramfs_lies_on_the_highest_page_it_fits_and_never_in_the_kernel() {
        assert_eq!(place(1, 0, 0x10_0000), Some(0xf_f000));
        assert_eq!(place(0x1001, 0, 0x10_0000), Some(0xf_e000));
        assert_eq!(place(0x1000, 0xf_f001, 0x10_0000), None);
        assert_eq!(place(0x10_0001, 0, 0x10_0000), None);
    }
}
