//! The files behind a disk: segments laid end to end, each access split where they meet.

use std::{
    cell::Cell,
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::fs::{FallocateFlags, FileType, OFlags, fallocate, fcntl_getfl, fdatasync, fstat};

use crate::devices::{chain::Buffer, sys};

pub(super) const SECTOR_BYTES: u64 = 512;
/// Segments are whole blocks, so that no block of a file system spans two files.
const BLOCK_BYTES: u64 = 4096;
/// The device's serial number field.
pub(super) const NAME_BYTES_MAX: usize = 20;

#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    #[error("its name is not 1 to {NAME_BYTES_MAX} bytes of printable ASCII")]
    Name,
    #[error("it has no segment")]
    NoSegments,
    #[error("it is writable and has {segments} segments instead of one")]
    WritableParts { segments: usize },
    #[error("segment {index} has {bytes} bytes, which is not a positive multiple of {BLOCK_BYTES}")]
    Length { index: usize, bytes: u64 },
    #[error("segment {index} shall show {bytes} bytes of a file of {file_bytes}")]
    FileTooShort { index: usize, bytes: u64, file_bytes: u64 },
    #[error("segment {index} is not a regular file open for what the disk does")]
    Unfit { index: usize },
    #[error("segment {index} cannot be examined")]
    Unknown {
        index: usize,
        #[source]
        source: io::Error,
    },
    #[error("its segments together are too long")]
    TooLong,
}

#[derive(Debug)]
struct Part {
    file: OwnedFd,
    /// Whether its file system can say what it has in memory. Taken for true until it refuses.
    tells_what_is_cached: Cell<bool>,
    start: u64,
    bytes: u64,
}

/// The part of one access that lies in one file.
#[derive(Debug)]
struct Piece<'a> {
    part: &'a Part,
    offset: u64,
    bytes: u64,
}

/// Segments end to end.
pub(super) struct Backing {
    parts: Vec<Part>,
    bytes: u64,
    read_only: bool,
}

impl Backing {
    pub(super) fn new(
        name: &str,
        segments: Vec<(OwnedFd, u64)>,
        read_only: bool,
    ) -> Result<Self, DiskError> {
        let printable = name.bytes().all(|byte| byte.is_ascii_graphic());
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !printable {
            return Err(DiskError::Name);
        }
        if segments.is_empty() {
            return Err(DiskError::NoSegments);
        }
        if !read_only && segments.len() != 1 {
            return Err(DiskError::WritableParts { segments: segments.len() });
        }
        let mut backing = Self { parts: Vec::with_capacity(segments.len()), bytes: 0, read_only };
        for (index, (file, bytes)) in segments.into_iter().enumerate() {
            examine(index, &file, bytes, read_only)?;
            let start = backing.bytes;
            // Offsets go to the kernel as signed numbers.
            let end = start.checked_add(bytes).filter(|end| i64::try_from(*end).is_ok());
            backing.bytes = end.ok_or(DiskError::TooLong)?;
            backing.parts.push(Part { file, tells_what_is_cached: Cell::new(true), start, bytes });
        }
        Ok(backing)
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn read_only(&self) -> bool {
        self.read_only
    }

    /// Whether `bytes` from `offset` on lie on the disk.
    pub(super) fn contains(&self, offset: u64, bytes: u64) -> bool {
        offset.checked_add(bytes).is_some_and(|end| end <= self.bytes)
    }

    /// Fills `target` from `offset` on.
    pub(super) fn read(&self, offset: u64, mut target: Buffer<'_>) -> io::Result<()> {
        self.transfer(offset, &mut target, |part, rest, at| {
            sys::read_at(part.file.as_fd(), rest, at)
        })
    }

    /// Fills the front of `target` from `offset` on, as far as the host has it in memory, and cuts
    /// off what was filled. True: that was all. False: the host now reads what is missing. Where the
    /// file system cannot tell, this reads all of it.
    pub(super) fn read_cached(&self, offset: u64, target: &mut Buffer<'_>) -> io::Result<bool> {
        let read = self.transfer(offset, target, |part, rest, at| {
            if part.tells_what_is_cached.get() {
                match sys::read_cached_at(part.file.as_fd(), rest, at) {
                    Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                        part.tells_what_is_cached.set(false);
                    }
                    read => return read,
                }
            }
            sys::read_at(part.file.as_fd(), rest, at)
        });
        match read {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Stores `source` from `offset` on.
    pub(super) fn write(&self, offset: u64, mut source: Buffer<'_>) -> io::Result<()> {
        self.transfer(offset, &mut source, |part, rest, at| {
            sys::write_at(part.file.as_fd(), rest, at)
        })
    }

    /// What was written survives a power cut after this.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.parts.iter().try_for_each(|part| Ok(fdatasync(&part.file)?))
    }

    /// Gives the space back to the host; the range reads as zeros.
    pub(super) fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.allocate(offset, bytes, FallocateFlags::PUNCH_HOLE)
    }

    /// Makes the range read as zeros without giving its space back, where the file system can.
    pub(super) fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        match self.allocate(offset, bytes, FallocateFlags::ZERO_RANGE) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => self.discard(offset, bytes),
            done => done,
        }
    }

    fn allocate(&self, offset: u64, bytes: u64, mode: FallocateFlags) -> io::Result<()> {
        self.pieces(offset, bytes).try_for_each(|piece| {
            Ok(fallocate(
                &piece.part.file,
                mode | FallocateFlags::KEEP_SIZE,
                piece.offset,
                piece.bytes,
            )?)
        })
    }

    /// Goes through `buffer` by steps, each of which says how far it came, and cuts off what is done.
    fn transfer(
        &self,
        offset: u64,
        buffer: &mut Buffer<'_>,
        step: impl Fn(&Part, &Buffer<'_>, u64) -> io::Result<usize>,
    ) -> io::Result<()> {
        for piece in self.pieces(offset, buffer.len() as u64) {
            let mut rest = buffer.take(usize::try_from(piece.bytes).unwrap_or(usize::MAX));
            let mut at = piece.offset;
            while !rest.is_empty() {
                match step(piece.part, &rest, at) {
                    // The file is shorter than it was when we started.
                    Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok(count) => {
                        at += count as u64;
                        rest.take(count);
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => {
                        buffer.put_back(rest);
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Splits a range that lies on the disk where segments meet. Empty pieces do not occur.
    fn pieces(&self, offset: u64, bytes: u64) -> impl Iterator<Item = Piece<'_>> {
        let first = self.parts.partition_point(|part| part.start + part.bytes <= offset);
        let end = offset + bytes;
        self.parts[first..].iter().take_while(move |part| part.start < end).map(move |part| {
            let from = offset.max(part.start);
            let to = end.min(part.start + part.bytes);
            Piece { part, offset: from - part.start, bytes: to - from }
        })
    }
}

fn examine(index: usize, file: &OwnedFd, bytes: u64, read_only: bool) -> Result<(), DiskError> {
    if bytes == 0 || !bytes.is_multiple_of(BLOCK_BYTES) {
        return Err(DiskError::Length { index, bytes });
    }
    let unknown = |error: rustix::io::Errno| DiskError::Unknown { index, source: error.into() };
    let facts = fstat(file).map_err(unknown)?;
    let access = fcntl_getfl(file).map_err(unknown)? & OFlags::RWMODE;
    let fit = if read_only { access != OFlags::WRONLY } else { access == OFlags::RDWR };
    if !fit || FileType::from_raw_mode(facts.st_mode) != FileType::RegularFile {
        return Err(DiskError::Unfit { index });
    }
    let file_bytes = u64::try_from(facts.st_size).unwrap_or(0);
    if file_bytes < bytes {
        return Err(DiskError::FileTooShort { index, bytes, file_bytes });
    }
    Ok(())
}
