//! The frames of a tar archive: headers, the extended headers and long names that belong to them,
//! and where each entry's data ends. Where tar readers differ, this one does as Go's, which the
//! other OCI tools are built on: an archive must not mean one thing to a scanner and another here.

use std::io::Read;

use super::{
    header::{BLOCK, Header, device},
    pax::{Pax, check_global},
    sparse::SparseMap,
    stream::{Stream, StreamError},
};
use crate::{
    error::ArchiveError,
    limits::{PATH_BYTES_MAX, PAX_BYTES_MAX},
    tree::{Time, Xattr},
};

/// One entry with all that extended headers say applied. Its data comes next in the stream.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) mode: u16,
    pub(crate) uid: u64,
    pub(crate) gid: u64,
    pub(crate) mtime: Time,
    pub(crate) xattrs: Vec<Xattr>,
    pub(crate) kind: EntryKind,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum EntryKind {
    /// With `stored` bytes in the archive.
    File {
        stored: u64,
        sparse: Option<SparseMap>,
    },
    HardLink(Vec<u8>),
    Symlink(Vec<u8>),
    Character(u64, u64),
    Block(u64, u64),
    Folder,
    Fifo,
    Unknown(u8),
}

/// What the headers before an entry's own say about it.
#[derive(Default)]
struct Ahead {
    pax: Option<Pax>,
    long_path: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

/// Reads up to the next entry's data; `None` at the archive's end, with or without the two blank
/// blocks that should be there.
pub(crate) fn next_entry<R: Read>(stream: &mut Stream<R>) -> Result<Option<Entry>, StreamError> {
    let mut ahead = Ahead::default();
    loop {
        let Some(block) = stream.block()?.filter(|block| *block != [0; BLOCK]) else {
            let dangling =
                ahead.pax.is_some() || ahead.long_path.is_some() || ahead.long_link.is_some();
            if dangling {
                return Err(ArchiveError::Dangling.into());
            }
            return end(stream).map(|()| None);
        };
        let header = Header::parse(&block)?;
        match header.flag {
            b'x' => ahead.pax = Some(Pax::parse(&read_pax(&header, stream)?)?),
            b'g' => check_global(&read_pax(&header, stream)?)?,
            b'L' => ahead.long_path = Some(read_name(&header, stream)?),
            b'K' => ahead.long_link = Some(read_name(&header, stream)?),
            _ => return ahead.apply(header, &block, stream).map(Some),
        }
    }
}

/// After a blank block: another one, or nothing. A header after a single blank block would be read
/// by some tar programs and not by others.
fn end<R: Read>(stream: &mut Stream<R>) -> Result<(), StreamError> {
    match stream.block()? {
        None => Ok(()),
        Some(block) if block == [0; BLOCK] => Ok(()),
        Some(_) => Err(ArchiveError::Checksum.into()),
    }
}

/// Bytes that fill the last block of `length` bytes of data.
fn padding(length: u64) -> u64 {
    length.wrapping_neg() % BLOCK as u64
}

/// Skips what fills the last block of a file's `length` bytes. Some tools leave it away behind the
/// last file, together with the mark of the end.
pub(crate) fn skip_file_padding<R: Read>(
    stream: &mut Stream<R>,
    length: u64,
) -> Result<(), StreamError> {
    // Less than a block.
    #[expect(clippy::cast_possible_truncation, reason = "a remainder of BLOCK")]
    stream.skip_if_there(padding(length) as usize)
}

fn read_pax<R: Read>(header: &Header, stream: &mut Stream<R>) -> Result<Vec<u8>, StreamError> {
    if header.size > PAX_BYTES_MAX {
        let (bytes, max) = (header.size, PAX_BYTES_MAX);
        return Err(ArchiveError::PaxTooLarge { bytes, max }.into());
    }
    let records = stream.take(header.size)?;
    stream.skip(padding(header.size))?;
    Ok(records)
}

/// A GNU long name: up to its NUL.
fn read_name<R: Read>(header: &Header, stream: &mut Stream<R>) -> Result<Vec<u8>, StreamError> {
    if header.size > PATH_BYTES_MAX as u64 + 1 {
        let (bytes, max) = (header.size, PATH_BYTES_MAX);
        return Err(ArchiveError::NameTooLong { bytes, max }.into());
    }
    let mut name = stream.take(header.size)?;
    stream.skip(padding(header.size))?;
    let length = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
    name.truncate(length);
    Ok(name)
}

impl Ahead {
    fn apply<R: Read>(
        self,
        header: Header,
        block: &[u8; BLOCK],
        stream: &mut Stream<R>,
    ) -> Result<Entry, StreamError> {
        let pax = self.pax.unwrap_or_default();
        let mut path = self.long_path.or(pax.path).unwrap_or(header.path);
        let link = self.long_link.or(pax.link).unwrap_or(header.link);
        // Counts for the data of this entry and for nothing in between: CVE-2025-62518.
        let mut stored = pax.size.unwrap_or(header.size);
        let kind = match header.flag {
            // Before ustar a folder was a file with a slash at its end.
            0 if path.ends_with(b"/") => EntryKind::Folder,
            0 | b'0' | b'7' => {
                if let Some(name) = &pax.sparse.name {
                    path.clone_from(name);
                }
                let sparse = SparseMap::read_pax(pax.sparse, &mut stored, stream)?;
                EntryKind::File { stored, sparse }
            }
            b'S' => {
                let sparse = Some(SparseMap::read_gnu(block, stored, stream)?);
                EntryKind::File { stored, sparse }
            }
            // These have no data, whatever their size field says.
            b'1' => EntryKind::HardLink(link),
            b'2' => EntryKind::Symlink(link),
            b'3' => device(block).map(|(major, minor)| EntryKind::Character(major, minor))?,
            b'4' => device(block).map(|(major, minor)| EntryKind::Block(major, minor))?,
            b'5' => EntryKind::Folder,
            b'6' => EntryKind::Fifo,
            flag => EntryKind::Unknown(flag),
        };
        Ok(Entry {
            path,
            mode: header.mode,
            uid: pax.uid.unwrap_or(header.uid),
            gid: pax.gid.unwrap_or(header.gid),
            mtime: pax.mtime.unwrap_or(Time { seconds: header.mtime, nanos: 0 }),
            xattrs: pax.xattrs,
            kind,
        })
    }
}
