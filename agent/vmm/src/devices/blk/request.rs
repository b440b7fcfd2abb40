//! One request to a disk: what it asks for, and doing it.

use std::io;

use virtio_bindings::virtio_blk::*;

use super::{
    backing::{Backing, NAME_BYTES_MAX, SECTOR_BYTES},
    state::State,
};
use crate::{
    devices::{
        chain::{Buffer, Chain},
        queue::Broken,
    },
    limits::blk::{RANGE_SECTORS_MAX, RANGES_MAX, TRANSFER_BYTES_MAX},
};

const RANGE_BYTES: usize = 16;
const HEADER_BYTES: usize = 16;

/// Why a request failed, as far as the driver is told.
#[derive(Debug)]
pub(super) enum Failure {
    /// The driver asked for what this disk does not have or do, or what makes no sense.
    Refused,
    Unsupported,
    Host(io::Error),
}

impl Failure {
    pub(super) fn status(&self) -> u8 {
        match self {
            Self::Refused | Self::Host(_) => status(VIRTIO_BLK_S_IOERR),
            Self::Unsupported => status(VIRTIO_BLK_S_UNSUPP),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::Unsupported {
            Self::Unsupported
        } else {
            Self::Host(error)
        }
    }
}

pub(super) const STATUS_OK: u8 = status(VIRTIO_BLK_S_OK);

const fn status(code: u32) -> u8 {
    // The codes are 0 to 2.
    code.to_le_bytes()[0]
}

/// Bytes moved by a request that succeeded.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Moved {
    pub(super) read: usize,
    pub(super) written: usize,
}

/// How far a request came without waiting for the host's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Begun {
    Done(Moved),
    /// A read of what the host reads now. [`Request::finish`] goes on with it.
    Waits,
}

/// A request with its header read.
pub(super) struct Request<'m> {
    kind: u32,
    sector: u64,
    source: Buffer<'m>,
    target: Buffer<'m>,
    /// What a read that began wants in all.
    read_bytes: usize,
    /// The one byte of the answer's status.
    pub(super) status: Buffer<'m>,
}

impl<'m> Request<'m> {
    /// Without a header nothing is asked, and without a status byte nothing can be answered.
    pub(super) fn read(chain: Chain<'m>) -> Result<Self, Broken> {
        let Chain { mut readable, mut writable, .. } = chain;
        let readable_bytes = readable.len();
        let header: [u8; HEADER_BYTES] = readable
            .read()
            .ok_or(Broken::TooShort { what: "a disk request's header", bytes: readable_bytes })?;
        let Some(target_bytes) = writable.len().checked_sub(1) else {
            return Err(Broken::TooShort { what: "a disk request's status", bytes: 0 });
        };
        let target = writable.take(target_bytes);
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        Ok(Self {
            kind: u32::from_le_bytes([k0, k1, k2, k3]),
            sector: u64::from_le_bytes(sector),
            source: readable,
            target,
            read_bytes: 0,
            status: writable,
        })
    }

    /// Does what is asked, but does not wait for what is read.
    pub(super) fn begin(&mut self, disk: &Backing, state: &State) -> Result<Begun, Failure> {
        let source = std::mem::take(&mut self.source);
        let mut target = std::mem::take(&mut self.target);
        let writes = match self.kind {
            VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => true,
            VIRTIO_BLK_T_IN | VIRTIO_BLK_T_FLUSH | VIRTIO_BLK_T_GET_ID => false,
            _ => return Err(Failure::Unsupported),
        };
        // What a request does not use points to a mix-up of directions.
        let wrong_way = if writes { !target.is_empty() } else { !source.is_empty() };
        if wrong_way || writes && disk.read_only() {
            return Err(Failure::Refused);
        }
        match self.kind {
            VIRTIO_BLK_T_IN => {
                let (offset, read) = self.span(disk, target.len())?;
                self.read_bytes = read;
                if disk.read_cached(offset, &mut target)? {
                    return Ok(Begun::Done(Moved { read, written: 0 }));
                }
                self.target = target;
                Ok(Begun::Waits)
            }
            VIRTIO_BLK_T_OUT => {
                let (offset, written) = self.span(disk, source.len())?;
                disk.write(offset, source)?;
                Ok(Begun::Done(Moved { read: 0, written }))
            }
            VIRTIO_BLK_T_GET_ID => {
                let mut id = [0; NAME_BYTES_MAX];
                id[..state.name.len()].copy_from_slice(state.name.as_bytes());
                Ok(Begun::Done(Moved { read: target.write(&id), written: 0 }))
            }
            VIRTIO_BLK_T_FLUSH => {
                if !disk.read_only() {
                    disk.flush()?;
                }
                Ok(Begun::Done(Moved::default()))
            }
            kind => {
                for range in Range::read_all(source, disk)? {
                    range.carry_out(kind, disk)?;
                }
                Ok(Begun::Done(Moved::default()))
            }
        }
    }

    /// Of a read that waits.
    pub(super) fn bytes_left(&self) -> usize {
        self.target.len()
    }

    /// Reads what a read has not yet, and waits for it.
    pub(super) fn finish(&mut self, disk: &Backing) -> Result<Moved, Failure> {
        let rest = std::mem::take(&mut self.target);
        let (offset, read) = self.span(disk, self.read_bytes)?;
        disk.read(offset + (read - rest.len()) as u64, rest)?;
        Ok(Moved { read, written: 0 })
    }

    /// Where on the disk `bytes` bytes of data go.
    fn span(&self, disk: &Backing, bytes: usize) -> Result<(u64, usize), Failure> {
        let whole = (bytes as u64).is_multiple_of(SECTOR_BYTES) && bytes <= TRANSFER_BYTES_MAX;
        let offset = self.sector.checked_mul(SECTOR_BYTES).ok_or(Failure::Refused)?;
        if whole && disk.contains(offset, bytes as u64) {
            Ok((offset, bytes))
        } else {
            Err(Failure::Refused)
        }
    }
}

/// One range of a discard or write-zeroes request, checked.
struct Range {
    offset: u64,
    bytes: u64,
    unmap: bool,
}

impl Range {
    /// Reads and checks all ranges before the first is acted on.
    fn read_all(mut source: Buffer<'_>, disk: &Backing) -> Result<Vec<Self>, Failure> {
        let count = source.len() / RANGE_BYTES;
        let whole = source.len().is_multiple_of(RANGE_BYTES);
        if !whole || count == 0 || count as u64 > u64::from(RANGES_MAX) {
            return Err(Failure::Refused);
        }
        let mut ranges = Vec::with_capacity(count);
        while let Some(bytes) = source.read() {
            ranges.push(Self::read(bytes, disk)?);
        }
        Ok(ranges)
    }

    fn read(bytes: [u8; RANGE_BYTES], disk: &Backing) -> Result<Self, Failure> {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = bytes;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes(flags);
        if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
            return Err(Failure::Unsupported);
        }
        let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Failure::Refused)?;
        let bytes = u64::from(sectors) * SECTOR_BYTES;
        if sectors > RANGE_SECTORS_MAX || !disk.contains(offset, bytes) {
            return Err(Failure::Refused);
        }
        Ok(Self { offset, bytes, unmap: flags != 0 })
    }

    fn carry_out(&self, kind: u32, disk: &Backing) -> Result<(), Failure> {
        match (kind, self.unmap) {
            // The kernel takes no range of zero bytes; there is nothing to do.
            _ if self.bytes == 0 => Ok(()),
            // The flag is not defined for a discard.
            (VIRTIO_BLK_T_DISCARD, true) => Err(Failure::Unsupported),
            (VIRTIO_BLK_T_DISCARD, false) | (_, true) => Ok(disk.discard(self.offset, self.bytes)?),
            (_, false) => Ok(disk.zero(self.offset, self.bytes)?),
        }
    }
}
