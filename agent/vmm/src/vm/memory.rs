//! Guest memory: one file the agent gave, mapped below and above the gap for devices. Either the
//! guest's own, or an image that others use too, of which the guest writes copies.

use std::{io, os::fd::OwnedFd};

use holdfast_wire::vmm::PageRun;
use log::debug;
use rustix::fs::{FallocateFlags, fallocate};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollection,
    GuestRegionMmap,
    mmap::{MmapRegionBuilder, MmapRegionError},
};

use super::Memory;
use crate::{
    layout::{HIGH_RAM_START, LOW_RAM_END},
    sys,
};

/// The unit in which memory goes back to the host.
pub(crate) const PAGE_BYTES: u64 = 4096;

#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    #[error("length of the memory file is not known")]
    Length(#[source] std::io::Error),
    #[error("memory file has {found} bytes where the configuration says {wanted}")]
    WrongLength { found: u64, wanted: u64 },
    #[error("guest memory cannot be mapped")]
    Map(#[source] MmapRegionError),
    #[error("guest memory cannot be left out of core dumps")]
    CoreDumps(#[source] std::io::Error),
    #[error("guest memory of {bytes} bytes cannot be laid out")]
    Layout { bytes: u64 },
}

/// One part of RAM: where the guest sees it, and its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) start: u64,
    pub(crate) bytes: u64,
}

/// The parts of RAM in order of address; one, or two when the gap cuts it.
pub(crate) fn parts(total_bytes: u64) -> Vec<Part> {
    let low = Part { start: 0, bytes: total_bytes.min(LOW_RAM_END) };
    let high = Part { start: HIGH_RAM_START, bytes: total_bytes - low.bytes };
    [low, high].into_iter().filter(|part| part.bytes > 0).collect()
}

/// Maps the whole of `file` as guest memory of `total_bytes`. Written to if it is not `private`;
/// else it only has to be open for reading.
pub(crate) fn map(file: OwnedFd, total_bytes: u64, private: bool) -> Result<Memory, MemoryError> {
    let whole = FileOffset::new(file.into(), 0);
    let found = whole.file().metadata().map_err(MemoryError::Length)?.len();
    if found != total_bytes {
        return Err(MemoryError::WrongLength { found, wanted: total_bytes });
    }
    let mut regions = Vec::new();
    let mut offset = 0;
    for part in parts(total_bytes) {
        let length =
            usize::try_from(part.bytes).map_err(|_| MemoryError::Layout { bytes: total_bytes })?;
        let from = FileOffset::from_arc(whole.arc().clone(), offset);
        let sharing = if private { libc::MAP_PRIVATE } else { libc::MAP_SHARED };
        let mapping = MmapRegionBuilder::new(length)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_NORESERVE | sharing)
            .with_file_offset(from)
            .build()
            .map_err(MemoryError::Map)?;
        let start = GuestAddress(part.start);
        let region = GuestRegionMmap::new(mapping, start);
        regions.push(region.ok_or(MemoryError::Layout { bytes: total_bytes })?);
        offset += part.bytes;
    }
    let memory = GuestRegionCollection::from_regions(regions)
        .map_err(|_| MemoryError::Layout { bytes: total_bytes })?;
    sys::leave_out_of_core_dumps(&memory).map_err(MemoryError::CoreDumps)?;
    Ok(memory)
}

/// The first of the pages from `start` to before `end` that is not guest memory.
pub(crate) fn first_page_outside(memory: &Memory, start: u64, end: u64) -> Option<u64> {
    let mut page = start;
    while page < end {
        let address = page.checked_mul(PAGE_BYTES).map(GuestAddress);
        let Some(region) = address.and_then(|address| memory.find_region(address)) else {
            return Some(page);
        };
        page = region.last_addr().0 / PAGE_BYTES + 1;
    }
    None
}

/// Gives the pages from `start` to before `end`, all of them guest memory, back to the host. What
/// they read as until they are written is of no use to the guest: zeros where the file is its own,
/// else what the image has there.
///
/// Of its own file by a hole, since memory that is shared through a file is not freed by any advice
/// about a mapping of it; of an image by letting go of the copies, since others use it.
pub(crate) fn give_back(memory: &Memory, start: u64, end: u64) -> io::Result<()> {
    let mut page = start;
    while page < end {
        let region = page.checked_mul(PAGE_BYTES).map(GuestAddress);
        let region = region.and_then(|address| memory.find_region(address));
        let region = region.ok_or(io::ErrorKind::InvalidInput)?;
        let file = region.file_offset().ok_or(io::ErrorKind::Unsupported)?;
        let first = region.start_addr().0 / PAGE_BYTES;
        let stop = end.min(region.last_addr().0 / PAGE_BYTES + 1);
        let (offset, bytes) = ((page - first) * PAGE_BYTES, (stop - page) * PAGE_BYTES);
        if region.flags() & libc::MAP_PRIVATE != 0 {
            sys::let_go(region, offset, bytes)?;
        } else {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(file.file(), flags, file.start() + offset, bytes)?;
        }
        page = stop;
    }
    Ok(())
}

/// Has copies of pages of an image there before the guest writes them. When it does, it leaves once
/// for each, where it would for the page of the image first and for the copy again; and copies made
/// by one call cost less than each by its own. Only a hint: what is not there in the end comes when it
/// is touched.
pub(crate) fn copy_ahead(memory: &Memory, written: &[PageRun]) {
    for run in written {
        // Counted in the file, in which the regions follow each other.
        let offset = run.page.saturating_mul(PAGE_BYTES);
        let found = memory.iter().find_map(|region| {
            let inside = offset.checked_sub(region.file_offset()?.start())?;
            (inside < region.len()).then_some((region, inside))
        });
        let Some((region, inside)) = found else { continue };
        let bytes = (u64::from(run.count) * PAGE_BYTES).min(region.len() - inside);
        if let Err(error) = sys::copy_ahead(region, inside, bytes) {
            debug!(error:%; "pages are not copied ahead");
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        os::{fd::AsRawFd, unix::fs::FileExt},
    };

    use vm_memory::Bytes;

    use super::*;

    const GIB: u64 = 1 << 30;
    const MIB: u64 = 1 << 20;

    #[test]
    fn of_an_image_the_guest_writes_copies_and_giving_them_back_shows_the_image_again() {
        let mut image = tempfile::tempfile().unwrap();
        image.write_all(&[7; 3 * 4096]).unwrap();
        image.set_len(MIB).unwrap();
        let read_only = fs_err::File::open(format!("/proc/self/fd/{}", image.as_raw_fd())).unwrap();
        let memory = map(read_only.into_parts().0.into(), MIB, true).unwrap();
        let at = |page: u64| memory.read_obj::<u8>(GuestAddress(page * PAGE_BYTES)).unwrap();
        for page in 0..3 {
            memory.write_obj(1_u8, GuestAddress(page * PAGE_BYTES)).unwrap();
        }
        give_back(&memory, 1, 2).unwrap();
        assert_eq!([at(0), at(1), at(2)], [1, 7, 1]);
        let mut kept = [0; 3 * 4096];
        image.read_exact_at(&mut kept, 0).unwrap();
        assert_eq!(kept, [7; 3 * 4096]);
    }

    #[test]
    fn pages_that_are_copied_ahead_are_the_image_s_no_more_and_the_others_are() {
        let mut image = tempfile::tempfile().unwrap();
        image.write_all(&[7; 4 * 4096]).unwrap();
        image.set_len(MIB).unwrap();
        let memory = map(image.try_clone().unwrap().into(), MIB, true).unwrap();
        let run = |page, count| PageRun { page, count };
        // What lies outside is left out, what lies across the end is cut.
        let runs = [run(0, 1), run(u64::MAX, 1), run(9999, 1), run(255, 9), run(2, 1)];
        copy_ahead(&memory, &runs);
        image.write_all_at(&[8; 4 * 4096], 0).unwrap();
        let at = |page: u64| memory.read_obj::<u8>(GuestAddress(page * PAGE_BYTES)).unwrap();
        assert_eq!([at(0), at(1), at(2), at(3), at(255)], [7, 8, 7, 8, 0]);
    }

    #[test]
    fn memory_up_to_the_gap_is_one_part_and_the_rest_lies_above_4_gib() {
        assert_eq!(parts(3 * GIB), [Part { start: 0, bytes: 3 * GIB }]);
        assert_eq!(
            parts(8 * GIB),
            [Part { start: 0, bytes: 3 * GIB }, Part { start: 4 * GIB, bytes: 5 * GIB }]
        );
    }
}
