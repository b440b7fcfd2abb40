//! Where the files of a tar archive lie. Only what archives of images use is understood: plain
//! files, links between them, long names. The outer archive is as hostile as the layers in it.

use std::{collections::BTreeMap, os::unix::fs::FileExt};

use fs_err as fs;

use super::PLACE;
use crate::Error;

/// Most entries: an archive of an image has a handful for each of its layers.
const ENTRIES_MAX: usize = 16 * 1024;
/// Longest path or link target in bytes.
const NAME_BYTES_MAX: u64 = 4096;
/// Most bytes of one extended header.
const PAX_BYTES_MAX: u64 = 64 * 1024;
/// Links followed one after the other.
const LINKS_MAX: usize = 8;
const BLOCK_BYTES: u64 = 512;

/// Place of one file's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Entry {
    File(Piece),
    /// Target, relative to the archive.
    Link(String),
}

/// The files of an archive by their path.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Index {
    entries: BTreeMap<String, Entry>,
}

/// What headers before an entry say of it.
#[derive(Default)]
struct Overrides {
    path: Option<String>,
    link: Option<String>,
    bytes: Option<u64>,
}

impl Index {
    pub(super) fn read(file: &fs::File) -> Result<Self, Error> {
        let unreadable = |source| Error::Read { what: PLACE.to_owned(), source };
        let metadata = file.metadata().map_err(unreadable)?;
        if !metadata.is_file() {
            return Err(Error::malformed(PLACE, "it is not a plain file"));
        }
        let read = |offset, bytes| {
            let mut buffer = vec![0; usize::try_from(bytes).unwrap_or_default()];
            file.file().read_exact_at(&mut buffer, offset).map(|()| buffer).map_err(unreadable)
        };
        Self::scan(metadata.len(), read)
    }

    fn scan(size: u64, read: impl Fn(u64, u64) -> Result<Vec<u8>, Error>) -> Result<Self, Error> {
        let bad = |reason: &str, offset: u64| {
            Error::malformed(PLACE, format!("{reason} at byte {offset}"))
        };
        let mut index = Self::default();
        let mut overrides = Overrides::default();
        let mut at = 0;
        for _ in 0..ENTRIES_MAX {
            // Some writers leave the two empty blocks at the end out.
            if at == size {
                return Ok(index);
            }
            if size.saturating_sub(at) < BLOCK_BYTES {
                return Err(bad("it ends in the middle of a header", at));
            }
            let block = read(at, BLOCK_BYTES)?;
            if block.iter().all(|byte| *byte == 0) {
                return Ok(index);
            }
            let header = Header::parse(&block).ok_or_else(|| bad(not_tar(&block), at))?;
            let extends = matches!(header.kind, b'x' | b'g' | b'L' | b'K');
            // The size of an extended header is its own: an override is meant for a file.
            let own = if extends { None } else { overrides.bytes };
            let content = Piece { offset: at + BLOCK_BYTES, bytes: own.unwrap_or(header.bytes) };
            let end = content.offset.checked_add(content.bytes).filter(|end| *end <= size);
            let end = end.ok_or_else(|| bad("an entry is longer than the archive", at))?;
            if extends {
                let limit =
                    if matches!(header.kind, b'L' | b'K') { NAME_BYTES_MAX } else { PAX_BYTES_MAX };
                if content.bytes > limit {
                    return Err(bad("an extended header is too long", at));
                }
                let bytes = read(content.offset, content.bytes)?;
                overrides.take(header.kind, &bytes).ok_or_else(|| bad("a broken header", at))?;
            } else {
                index.add(&header, std::mem::take(&mut overrides), content);
            }
            at = end.next_multiple_of(BLOCK_BYTES).min(size);
        }
        let limit = u64::try_from(ENTRIES_MAX).unwrap_or(u64::MAX);
        Err(Error::TooLarge { what: format!("list of files of {PLACE}"), limit })
    }

    fn add(&mut self, header: &Header, overrides: Overrides, content: Piece) {
        let path = overrides.path.unwrap_or_else(|| header.path.clone());
        let Some(path) = joined("", &path) else { return };
        let link = overrides.link.unwrap_or_else(|| header.link.clone());
        let entry = match header.kind {
            0 | b'0' | b'7' => Some(Entry::File(content)),
            b'1' => joined("", &link).map(Entry::Link),
            b'2' => joined(path.rsplit_once('/').map_or("", |(folder, _)| folder), &link)
                .map(Entry::Link),
            _ => None,
        };
        // Later entries replace earlier ones, as they would on disk.
        match entry {
            Some(entry) => self.entries.insert(path, entry),
            None => self.entries.remove(&path),
        };
    }

    pub(super) fn find(&self, path: &str) -> Option<Piece> {
        let mut path = joined("", path)?;
        for _ in 0..=LINKS_MAX {
            match self.entries.get(&path)? {
                Entry::File(piece) => return Some(*piece),
                Entry::Link(target) => path.clone_from(target),
            }
        }
        None
    }
}

impl Overrides {
    /// `None`: the header is not of its form.
    fn take(&mut self, kind: u8, bytes: &[u8]) -> Option<()> {
        match kind {
            b'L' => self.path = Some(text(bytes)),
            b'K' => self.link = Some(text(bytes)),
            b'x' => {
                let mut rest = bytes;
                while !rest.is_empty() && rest[0] != 0 {
                    let space = rest.iter().position(|byte| *byte == b' ')?;
                    let length: usize = str::from_utf8(&rest[..space]).ok()?.parse().ok()?;
                    let record = rest.get(space + 1..length)?.strip_suffix(b"\n")?;
                    let equals = record.iter().position(|byte| *byte == b'=')?;
                    let value = &record[equals + 1..];
                    match &record[..equals] {
                        b"path" => self.path = Some(text(value)),
                        b"linkpath" => self.link = Some(text(value)),
                        b"size" => self.bytes = Some(str::from_utf8(value).ok()?.parse().ok()?),
                        _ => {}
                    }
                    rest = &rest[length..];
                }
            }
            // A global header has nothing that an archive of an image needs.
            _ => {}
        }
        Some(())
    }
}

struct Header {
    path: String,
    link: String,
    bytes: u64,
    kind: u8,
}

impl Header {
    /// `None`: the checksum or the size is wrong.
    fn parse(block: &[u8]) -> Option<Self> {
        let field = |from: usize, bytes: usize| &block[from..from + bytes];
        let sum = block.iter().enumerate().map(|(at, byte)| match at {
            148..156 => u64::from(b' '),
            _ => u64::from(*byte),
        });
        if number(field(148, 8))? != sum.sum::<u64>() {
            return None;
        }
        let mut path = text(field(0, 100));
        // GNU tar uses the field of the prefix for other things.
        if field(257, 6) == b"ustar\0" && block[345] != 0 {
            path = format!("{}/{path}", text(field(345, 155)));
        }
        let bytes = number(field(124, 12))?;
        Some(Self { path, link: text(field(157, 100)), bytes, kind: block[156] })
    }
}

/// Octal digits, or a binary number marked by its first bit.
fn number(field: &[u8]) -> Option<u64> {
    if let [0x80, rest @ ..] = field {
        let (high, low) = rest.split_at_checked(rest.len().checked_sub(8)?)?;
        let low = low.try_into().ok().map(u64::from_be_bytes)?;
        return high.iter().all(|byte| *byte == 0).then_some(low);
    }
    let digits = str::from_utf8(field).ok()?.trim_matches(['\0', ' ']);
    if digits.is_empty() { Some(0) } else { u64::from_str_radix(digits, 8).ok() }
}

/// Text up to the first NUL. Names that are not text are no names of an image's archive, and
/// lead nowhere however they are written.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// A path in the archive, without `.`, `..` and double slashes. `None`: it leaves the archive, is
/// too long, or is empty.
fn joined(folder: &str, path: &str) -> Option<String> {
    if folder.len() + path.len() > usize::try_from(NAME_BYTES_MAX).unwrap_or_default() {
        return None;
    }
    let mut parts = Vec::new();
    let folder = if path.starts_with('/') { "" } else { folder };
    for part in folder.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

fn not_tar(block: &[u8]) -> &'static str {
    match crate::Compression::of_magic(block) {
        crate::Compression::Plain => "no header of a tar archive",
        _ => "it is compressed: unpack it to a plain tar archive first; no header",
    }
}

#[cfg(test)]
#[path = "index_tests.rs"]
mod tests;
