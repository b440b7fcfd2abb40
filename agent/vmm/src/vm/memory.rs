//! Guest memory: one memfd the agent made, mapped below and above the gap for devices.

use std::os::fd::OwnedFd;

use vm_memory::{
    FileOffset, GuestAddress, GuestRegionCollection, GuestRegionMmap, mmap::FromRangesError,
};

use super::Memory;
use crate::{
    layout::{HIGH_RAM_START, LOW_RAM_END},
    sys,
};

#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    #[error("length of the memory file is not known")]
    Length(#[source] std::io::Error),
    #[error("memory file has {found} bytes where the configuration says {wanted}")]
    WrongLength { found: u64, wanted: u64 },
    #[error("guest memory cannot be mapped")]
    Map(#[source] FromRangesError),
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

/// Maps the whole of `file` as guest memory of `total_bytes`.
pub(crate) fn map(file: OwnedFd, total_bytes: u64) -> Result<Memory, MemoryError> {
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
        let region = GuestRegionMmap::from_range(GuestAddress(part.start), length, Some(from))
            .map_err(MemoryError::Map)?;
        regions.push(region);
        offset += part.bytes;
    }
    let memory = GuestRegionCollection::from_regions(regions)
        .map_err(|_| MemoryError::Layout { bytes: total_bytes })?;
    sys::leave_out_of_core_dumps(&memory).map_err(MemoryError::CoreDumps)?;
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn memory_up_to_the_gap_is_one_part_and_the_rest_lies_above_4_gib() {
        assert_eq!(parts(3 * GIB), [Part { start: 0, bytes: 3 * GIB }]);
        assert_eq!(
            parts(8 * GIB),
            [Part { start: 0, bytes: 3 * GIB }, Part { start: 4 * GIB, bytes: 5 * GIB }]
        );
    }
}
