//! The 512-byte header blocks of tar: v7, ustar, star, GNU and PAX writers' forms.
//!
//! Read here and not by the crate `tar`, which cannot keep these rules: a base-256 number that does
//! not fit is refused (it drops the upper bytes), a PAX `size` counts for the next entry's data and
//! not for a long name in between, PAX values may hold any byte (it splits at newlines), and one
//! pass both hashes and parses the same buffer.

use crate::error::ArchiveError;

pub(crate) const BLOCK: usize = 512;

/// One header as it stands, long names and extended headers not yet applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) flag: u8,
    pub(crate) mode: u16,
    pub(crate) uid: u64,
    pub(crate) gid: u64,
    pub(crate) size: u64,
    pub(crate) mtime: i64,
}

/// The fields of an old GNU sparse header (type `S`) beyond the common ones.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct GnuSparse {
    /// Offset and length of each stored piece, as far as they fit in the header.
    pub(crate) extents: Vec<(u64, u64)>,
    /// More are in the next block.
    pub(crate) continued: bool,
    pub(crate) real_size: u64,
}

#[derive(PartialEq)]
enum Dialect {
    V7,
    Ustar,
    Star,
    Gnu,
}

impl Header {
    pub(crate) fn parse(block: &[u8; BLOCK]) -> Result<Self, ArchiveError> {
        check_sum(block)?;
        let number = |range: std::ops::Range<usize>, name| {
            unsigned(&block[range]).ok_or(ArchiveError::Number(name))
        };
        let mut path = text(&block[..100]).to_vec();
        let prefix = match Dialect::of(block) {
            Dialect::Ustar => text(&block[345..500]),
            Dialect::Star => text(&block[345..476]),
            Dialect::V7 | Dialect::Gnu => b"",
        };
        if !prefix.is_empty() {
            path = [prefix, &path].join(&b'/');
        }
        let mode = number(100..108, "mode")? & 0o7777;
        Ok(Self {
            path,
            link: text(&block[157..257]).to_vec(),
            flag: block[156],
            mode: u16::try_from(mode).expect("12 bits"),
            uid: number(108..116, "uid")?,
            gid: number(116..124, "gid")?,
            size: number(124..136, "size")?,
            mtime: signed(&block[136..148]).ok_or(ArchiveError::Number("mtime"))?,
        })
    }
}

/// The device numbers of a header. Other entries may have anything in these fields.
pub(crate) fn device(block: &[u8; BLOCK]) -> Result<(u64, u64), ArchiveError> {
    let number = |field| unsigned(field).ok_or(ArchiveError::Number("device"));
    Ok((number(&block[329..337])?, number(&block[337..345])?))
}

impl GnuSparse {
    pub(crate) fn parse(block: &[u8; BLOCK]) -> Result<Self, ArchiveError> {
        if Dialect::of(block) != Dialect::Gnu {
            return Err(ArchiveError::SparseMap);
        }
        Ok(Self {
            extents: extents(&block[386..482])?,
            continued: block[482] != 0,
            real_size: unsigned(&block[483..495]).ok_or(ArchiveError::Number("real size"))?,
        })
    }

    /// Reads a block that continues the map.
    pub(crate) fn extend(&mut self, block: &[u8; BLOCK]) -> Result<(), ArchiveError> {
        self.extents.extend(extents(&block[..504])?);
        self.continued = block[504] != 0;
        Ok(())
    }
}

impl Dialect {
    fn of(block: &[u8; BLOCK]) -> Self {
        match &block[257..265] {
            b"ustar  \0" => Self::Gnu,
            magic if magic.starts_with(b"ustar\0") => {
                if &block[508..512] == b"tar\0" {
                    Self::Star
                } else {
                    Self::Ustar
                }
            }
            _ => Self::V7,
        }
    }
}

/// The sum over the header with its own field as spaces. Old writers summed signed bytes.
fn check_sum(block: &[u8; BLOCK]) -> Result<(), ArchiveError> {
    let said = signed(&block[148..156]).ok_or(ArchiveError::Checksum)?;
    let with_spaces = || {
        let field = std::iter::repeat_n(&b' ', 8);
        block[..148].iter().chain(field).chain(&block[156..])
    };
    let unsigned_sum: i64 = with_spaces().map(|&byte| i64::from(byte)).sum();
    let signed_sum: i64 = with_spaces().map(|&byte| i64::from(byte.cast_signed())).sum();
    let right = said == unsigned_sum || said == signed_sum;
    if right { Ok(()) } else { Err(ArchiveError::Checksum) }
}

/// Pairs of offset and length, up to the first that is blank.
fn extents(pairs: &[u8]) -> Result<Vec<(u64, u64)>, ArchiveError> {
    let (pairs, _) = pairs.as_chunks::<24>();
    let used = pairs.iter().take_while(|pair| pair[0] != 0);
    used.map(|pair| unsigned(&pair[..12]).zip(unsigned(&pair[12..])).ok_or(ArchiveError::SparseMap))
        .collect()
}

/// A text field: up to its first NUL.
fn text(field: &[u8]) -> &[u8] {
    field.split(|&byte| byte == 0).next().unwrap_or_default()
}

fn unsigned(field: &[u8]) -> Option<u64> {
    u64::try_from(signed(field)?).ok()
}

/// A number field: octal between blanks, or base 256 where the first bit is set.
fn signed(field: &[u8]) -> Option<i64> {
    match field.first() {
        Some(first) if first & 0x80 != 0 => base_256(field),
        _ => octal(field),
    }
}

/// Two's complement, most significant byte first, its first bit not counted.
fn base_256(field: &[u8]) -> Option<i64> {
    let mut value: i128 = if field[0] & 0x40 != 0 { -1 } else { 0 };
    let masked = (field[0] & 0x7f) | if value < 0 { 0x80 } else { 0 };
    for byte in std::iter::once(masked).chain(field[1..].iter().copied()) {
        value = value << 8 | i128::from(byte);
    }
    i64::try_from(value).ok()
}

fn octal(field: &[u8]) -> Option<i64> {
    let blank = |byte: &u8| matches!(byte, b' ' | 0);
    let start = field.iter().position(|byte| !blank(byte)).unwrap_or(field.len());
    let digits = field[start..].split(blank).next().unwrap_or_default();
    digits.iter().try_fold(0_i64, |value, digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(digit - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(make: impl FnOnce(&mut tar::Header)) -> [u8; BLOCK] {
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(0);
        header.set_mtime(0);
        header.set_entry_type(tar::EntryType::Regular);
        make(&mut header);
        header.set_cksum();
        *header.as_bytes()
    }

    #[test]
    fn a_header_written_by_another_implementation_is_read() {
        let header = Header::parse(&block(|header| {
            header.set_path("folder/file").unwrap();
            header.set_mode(0o104_755);
            header.set_uid(1000);
            header.set_gid(100);
            header.set_size(0o777_7777_7777);
            header.set_mtime(1_700_000_000);
        }));
        let expected = Header {
            path: b"folder/file".to_vec(),
            link: Vec::new(),
            flag: b'0',
            mode: 0o4755,
            uid: 1000,
            gid: 100,
            size: 0o777_7777_7777,
            mtime: 1_700_000_000,
        };
        assert_eq!(header, Ok(expected));
    }

    #[test]
    fn a_prefix_counts_in_ustar_and_not_in_gnu() {
        let long = format!("{}/{}", "p".repeat(120), "n".repeat(90));
        let parsed = Header::parse(&block(|header| header.set_path(&long).unwrap()));
        assert_eq!(parsed.map(|header| header.path), Ok(long.into_bytes()));
        let parsed = Header::parse(&block(|header| {
            header.as_mut_bytes()[257..265].copy_from_slice(b"ustar  \0");
            header.as_mut_bytes()[0] = b'n';
            header.as_mut_bytes()[345] = b'p';
        }));
        assert_eq!(parsed.map(|header| header.path), Ok(b"n".to_vec()));
    }

    #[test]
    fn base_256_numbers_are_read_whole_or_refused() {
        let with = |at: usize, bytes: &[u8]| {
            Header::parse(&block(|h| h.as_mut_bytes()[at..at + bytes.len()].copy_from_slice(bytes)))
        };
        let uid = [0x80, 0, 0, 0, 0xb2, 0xd0, 0x5e, 0x00];
        assert_eq!(with(108, &uid).map(|header| header.uid), Ok(3_000_000_000));
        let mtime = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe];
        assert_eq!(with(136, &mtime).map(|header| header.mtime), Ok(-2));
        // Its last eight bytes alone would be 512: an entry of another length.
        let size = [0x80, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 0];
        assert_eq!(with(124, &size), Err(ArchiveError::Number("size")));
        assert_eq!(with(124, &mtime), Err(ArchiveError::Number("size")));
    }

    #[test]
    fn blanks_around_octal_digits_mean_nothing_and_other_bytes_are_refused() {
        assert_eq!(octal(b"  17 \0\0"), Some(0o17));
        assert_eq!(octal(b"\0\0\0\0"), Some(0));
        assert_eq!(octal(b"18\0"), None);
        assert_eq!(octal(b"-1\0"), None);
    }

    #[test]
    fn a_wrong_checksum_is_refused_and_a_signed_one_taken() {
        let mut bytes = block(|header| header.as_mut_bytes()[0] = 0xff);
        assert!(Header::parse(&bytes).is_ok());
        let unsigned_sum = signed(&bytes[148..156]).unwrap();
        bytes[148..156].copy_from_slice(format!("{:06o}\0 ", unsigned_sum - 256).as_bytes());
        assert!(Header::parse(&bytes).is_ok());
        bytes[0] ^= 1;
        assert_eq!(Header::parse(&bytes), Err(ArchiveError::Checksum));
    }
}
