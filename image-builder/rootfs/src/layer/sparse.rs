//! Maps of sparse files: which bytes of the file the archive has. The rest is holes.

use std::io::Read;

use super::{
    header::{BLOCK, GnuSparse},
    pax::{PaxSparse, decimal},
    stream::{Stream, StreamError},
};
use crate::{error::ArchiveError, limits::SPARSE_EXTENTS_MAX};

/// Largest size a sparse file may claim: as large as a file can be on ext4, and far from where
/// arithmetic ends.
const REAL_SIZE_MAX: u64 = 1 << 44;

/// Stored pieces of a file: in order, apart, inside its size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SparseMap {
    pub(crate) real_size: u64,
    pub(crate) extents: Vec<Extent>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

impl SparseMap {
    fn new(pairs: Vec<(u64, u64)>, real_size: u64, stored: u64) -> Result<Self, ArchiveError> {
        if pairs.len() > SPARSE_EXTENTS_MAX {
            return Err(ArchiveError::SparseTooMany { max: SPARSE_EXTENTS_MAX });
        }
        let mut at = 0;
        let mut sum = 0;
        let mut extents = Vec::with_capacity(pairs.len());
        for (offset, bytes) in pairs {
            let end = offset.checked_add(bytes).filter(|&end| offset >= at && end <= real_size);
            at = end.ok_or(ArchiveError::SparseMap)?;
            sum += bytes;
            // Writers mark the file's end by an empty piece.
            if bytes > 0 {
                extents.push(Extent { offset, bytes });
            }
        }
        let sound = sum == stored && real_size <= REAL_SIZE_MAX;
        if sound { Ok(Self { real_size, extents }) } else { Err(ArchiveError::SparseMap) }
    }

    /// Type `S`: the map is in the header and in blocks right after it.
    pub(crate) fn read_gnu<R: Read>(
        header: &[u8; BLOCK],
        stored: u64,
        stream: &mut Stream<R>,
    ) -> Result<Self, StreamError> {
        let mut sparse = GnuSparse::parse(header)?;
        while sparse.continued {
            let block = stream.block()?.ok_or(ArchiveError::Truncated)?;
            sparse.extend(&block)?;
            if sparse.extents.len() > SPARSE_EXTENTS_MAX {
                return Err(ArchiveError::SparseTooMany { max: SPARSE_EXTENTS_MAX }.into());
            }
        }
        Ok(Self::new(sparse.extents, sparse.real_size, stored)?)
    }

    /// PAX forms 0.0, 0.1 and 1.0. `None`: the file is not sparse. In form 1.0 the map is the
    /// start of the data, so `stored` becomes less.
    pub(crate) fn read_pax<R: Read>(
        pax: PaxSparse,
        stored: &mut u64,
        stream: &mut Stream<R>,
    ) -> Result<Option<Self>, StreamError> {
        let PaxSparse { major, minor, real_size, map, .. } = pax;
        let real_size = real_size.ok_or(ArchiveError::PaxValue("GNU.sparse.size"));
        match (major, minor, map) {
            (None, None, None) => Ok(None),
            (None | Some(0), None | Some(0 | 1), Some(map)) => {
                let (pairs, odd) = map.as_chunks::<2>();
                if !odd.is_empty() {
                    return Err(ArchiveError::SparseMap.into());
                }
                let pairs = pairs.iter().map(|&[offset, bytes]| (offset, bytes)).collect();
                Ok(Some(Self::new(pairs, real_size?, *stored)?))
            }
            (Some(1), Some(0), None) => {
                let pairs = read_leading_map(stored, stream)?;
                Ok(Some(Self::new(pairs, real_size?, *stored)?))
            }
            _ => Err(ArchiveError::PaxValue("GNU.sparse.major").into()),
        }
    }
}

/// Form 1.0: decimal lines, how many pairs and then the pairs, filled up to whole blocks.
fn read_leading_map<R: Read>(
    stored: &mut u64,
    stream: &mut Stream<R>,
) -> Result<Vec<(u64, u64)>, StreamError> {
    let mut lines = Lines { stored, stream, block: [0; BLOCK], at: BLOCK };
    let count = usize::try_from(lines.number()?).unwrap_or(usize::MAX);
    if count > SPARSE_EXTENTS_MAX {
        return Err(ArchiveError::SparseTooMany { max: SPARSE_EXTENTS_MAX }.into());
    }
    let mut pairs = Vec::new();
    for _ in 0..count {
        pairs.push((lines.number()?, lines.number()?));
    }
    Ok(pairs)
}

struct Lines<'a, R> {
    stored: &'a mut u64,
    stream: &'a mut Stream<R>,
    block: [u8; BLOCK],
    at: usize,
}

impl<R: Read> Lines<'_, R> {
    fn number(&mut self) -> Result<u64, StreamError> {
        // The longest u64.
        const DIGITS_MAX: usize = 20;
        let mut digits = Vec::new();
        loop {
            if self.at == BLOCK {
                *self.stored =
                    self.stored.checked_sub(BLOCK as u64).ok_or(ArchiveError::SparseMap)?;
                self.block = self.stream.block()?.ok_or(ArchiveError::Truncated)?;
                self.at = 0;
            }
            let byte = self.block[self.at];
            self.at += 1;
            if byte == b'\n' {
                return Ok(decimal(&digits, "sparse map")?);
            }
            digits.push(byte);
            if digits.len() > DIGITS_MAX {
                return Err(ArchiveError::SparseMap.into());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(u64, u64)], real_size: u64, stored: u64) -> Result<SparseMap, ArchiveError> {
        SparseMap::new(pairs.to_vec(), real_size, stored)
    }

    #[test]
    fn pieces_in_order_and_inside_the_file_are_a_map() {
        let extents = vec![Extent { offset: 0, bytes: 10 }, Extent { offset: 4096, bytes: 4 }];
        let expected = SparseMap { real_size: 8192, extents };
        assert_eq!(map(&[(0, 10), (4096, 4), (8192, 0)], 8192, 14), Ok(expected));
    }

    #[test]
    fn pieces_that_overlap_or_leave_the_file_or_do_not_add_up_are_refused() {
        let refused = [
            map(&[(0, 10), (9, 1)], 100, 11),
            map(&[(50, 10), (0, 1)], 100, 11),
            map(&[(0, 101)], 100, 101),
            map(&[(u64::MAX, 2)], u64::MAX, 2),
            map(&[(0, 10)], 100, 11),
            map(&[], REAL_SIZE_MAX + 1, 0),
        ];
        for (case, map) in refused.into_iter().enumerate() {
            assert_eq!(map, Err(ArchiveError::SparseMap), "case {case}");
        }
    }
}
