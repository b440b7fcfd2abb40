//! Extended headers: `length key=value` records that belong to the next entry.

use crate::{
    error::ArchiveError,
    limits::SPARSE_EXTENTS_MAX,
    tree::{Time, Xattr},
};

/// What the records of one extended header say. An empty value leaves what the entry's own header
/// says, except for attributes, where it is a value like any other.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Pax {
    pub(crate) path: Option<Vec<u8>>,
    pub(crate) link: Option<Vec<u8>>,
    pub(crate) size: Option<u64>,
    pub(crate) uid: Option<u64>,
    pub(crate) gid: Option<u64>,
    pub(crate) mtime: Option<Time>,
    /// In the order of the records; the last of a name counts.
    pub(crate) xattrs: Vec<Xattr>,
    pub(crate) sparse: PaxSparse,
}

/// The three forms in which GNU tar describes a sparse file here.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct PaxSparse {
    pub(crate) major: Option<u64>,
    pub(crate) minor: Option<u64>,
    pub(crate) name: Option<Vec<u8>>,
    pub(crate) real_size: Option<u64>,
    /// Numbers, offset and length by turns (forms 0.0 and 0.1).
    pub(crate) map: Option<Vec<u64>>,
}

impl Pax {
    pub(crate) fn parse(mut records: &[u8]) -> Result<Self, ArchiveError> {
        let mut pax = Self::default();
        while let Some((record, rest)) = split_record(records)? {
            pax.take(record)?;
            records = rest;
        }
        Ok(pax)
    }

    fn take(&mut self, Record { key, value }: Record<'_>) -> Result<(), ArchiveError> {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            self.xattrs.push(Xattr { name: name.into(), value: value.into() });
            return Ok(());
        }
        let said = (!value.is_empty()).then_some(value);
        let number = |name| said.map(|value| decimal(value, name)).transpose();
        match key {
            b"path" => self.path = said.map(<[u8]>::to_vec),
            b"linkpath" => self.link = said.map(<[u8]>::to_vec),
            b"size" => self.size = number("size")?,
            b"uid" => self.uid = number("uid")?,
            b"gid" => self.gid = number("gid")?,
            b"mtime" => self.mtime = said.map(time).transpose()?,
            b"GNU.sparse.major" => self.sparse.major = number("GNU.sparse.major")?,
            b"GNU.sparse.minor" => self.sparse.minor = number("GNU.sparse.minor")?,
            b"GNU.sparse.name" => self.sparse.name = said.map(<[u8]>::to_vec),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
                self.sparse.real_size = number("GNU.sparse.size")?;
            }
            b"GNU.sparse.map" => {
                self.sparse.map = said.map(sparse_map).transpose()?;
            }
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => self.extend_map(key, value)?,
            _ => {}
        }
        Ok(())
    }

    /// Form 0.0 repeats two keys by turns.
    fn extend_map(&mut self, key: &[u8], value: &[u8]) -> Result<(), ArchiveError> {
        let map = self.sparse.map.get_or_insert_default();
        let in_turn = map.len().is_multiple_of(2) == (key == b"GNU.sparse.offset");
        if !in_turn {
            return Err(ArchiveError::SparseMap);
        }
        map.push(decimal(value, "GNU.sparse.offset")?);
        bounded(map.len())
    }
}

/// Refuses a global header that would change what entries are or how long; its other records mean
/// nothing here, as for the other OCI tools.
pub(crate) fn check_global(mut records: &[u8]) -> Result<(), ArchiveError> {
    while let Some((record, rest)) = split_record(records)? {
        match record.key {
            b"size" => return Err(ArchiveError::GlobalPax("size")),
            b"path" | b"linkpath" => return Err(ArchiveError::GlobalPax("path")),
            key if key.starts_with(b"GNU.sparse.") => {
                return Err(ArchiveError::GlobalPax("GNU.sparse"));
            }
            _ => {}
        }
        records = rest;
    }
    Ok(())
}

/// A decimal number and nothing else.
pub(crate) fn decimal(value: &[u8], name: &'static str) -> Result<u64, ArchiveError> {
    let digits = value.iter().all(u8::is_ascii_digit).then_some(value);
    digits
        .and_then(|digits| str::from_utf8(digits).ok()?.parse().ok())
        .ok_or(ArchiveError::PaxValue(name))
}

struct Record<'a> {
    key: &'a [u8],
    value: &'a [u8],
}

/// Splits the first record off. Its length counts itself, and is what ends it: a value may hold
/// newlines.
fn split_record(bytes: &[u8]) -> Result<Option<(Record<'_>, &[u8])>, ArchiveError> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let bad = ArchiveError::PaxForm;
    let Some(space) = bytes.iter().take(20).position(|&byte| byte == b' ') else { return Err(bad) };
    let Ok(length) = decimal(&bytes[..space], "length") else { return Err(bad) };
    let split = usize::try_from(length).ok().and_then(|length| bytes.split_at_checked(length));
    let Some((record, rest)) = split else { return Err(bad) };
    let Some(body) = record.get(space + 1..).and_then(|body| body.strip_suffix(b"\n")) else {
        return Err(bad);
    };
    let Some(equals) = body.iter().position(|&byte| byte == b'=') else { return Err(bad) };
    let (key, value) = (&body[..equals], &body[equals + 1..]);
    if key.is_empty() || key.contains(&0) {
        Err(bad)
    } else {
        Ok(Some((Record { key, value }, rest)))
    }
}

/// Seconds, perhaps negative, perhaps with a fraction, of which nanoseconds are kept.
fn time(value: &[u8]) -> Result<Time, ArchiveError> {
    const NANOS: u32 = 1_000_000_000;
    let bad = || ArchiveError::PaxValue("mtime");
    let (negative, value) = match value.strip_prefix(b"-") {
        Some(value) => (true, value),
        None => (false, value),
    };
    let dot = value.iter().position(|&byte| byte == b'.').unwrap_or(value.len());
    let whole = i64::try_from(decimal(&value[..dot], "mtime")?).map_err(|_| bad())?;
    let fraction = value.get(dot + 1..).unwrap_or_default();
    if value.is_empty() || dot == 0 || !fraction.iter().all(u8::is_ascii_digit) {
        return Err(bad());
    }
    let digits = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nanos = digits.fold(0, |nanos: u32, digit| nanos * 10 + u32::from(digit - b'0'));
    Ok(match (negative, nanos) {
        (false, nanos) => Time { seconds: whole, nanos },
        (true, 0) => Time { seconds: -whole, nanos: 0 },
        (true, nanos) => Time { seconds: -whole - 1, nanos: NANOS - nanos },
    })
}

fn sparse_map(value: &[u8]) -> Result<Vec<u64>, ArchiveError> {
    let mut map = Vec::new();
    for number in value.split(|&byte| byte == b',') {
        map.push(decimal(number, "GNU.sparse.map")?);
        bounded(map.len())?;
    }
    Ok(map)
}

fn bounded(numbers: usize) -> Result<(), ArchiveError> {
    if numbers > 2 * SPARSE_EXTENTS_MAX {
        return Err(ArchiveError::SparseTooMany { max: SPARSE_EXTENTS_MAX });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A record with its length, which counts its own digits.
    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let body = key.len() + value.len() + 3;
        let length = (body..).find(|length| body + length.to_string().len() == *length).unwrap();
        [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
    }

    #[test]
    fn a_value_may_hold_any_byte() {
        let value = b"a=b\n7 x=y\n\0\xff";
        let pax = Pax::parse(&record("SCHILY.xattr.user.any", value)).unwrap();
        let expected = Xattr { name: (*b"user.any").into(), value: (*value).into() };
        assert_eq!(pax.xattrs, [expected]);
    }

    #[test]
    fn the_last_record_of_a_key_counts_and_an_empty_one_takes_it_back() {
        let both = [record("path", b"a"), record("path", b"b")].concat();
        assert_eq!(Pax::parse(&both).unwrap().path, Some(b"b".to_vec()));
        let back = [record("path", b"a"), record("path", b"")].concat();
        assert_eq!(Pax::parse(&back).unwrap().path, None);
    }

    #[test]
    fn times_keep_their_fraction_on_both_sides_of_1970() {
        let cases = [
            ("0", 0, 0),
            ("1700000000.5", 1_700_000_000, 500_000_000),
            ("1.0000000019", 1, 1),
            ("-1", -1, 0),
            ("-1.25", -2, 750_000_000),
        ];
        for (text, seconds, nanos) in cases {
            assert_eq!(time(text.as_bytes()), Ok(Time { seconds, nanos }), "{text}");
        }
        for text in ["", "-", ".5", "1.x", "1e3", "--1", "99999999999999999999"] {
            assert!(time(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn records_of_another_form_are_refused() {
        let cases =
            ["x", "5 a=b", "6 a=b\nx", "0 a=b\n", "99 a=b\n", "5 ab\n", "5 =b\n", "+6 a=b\n"];
        for text in cases {
            assert_eq!(Pax::parse(text.as_bytes()), Err(ArchiveError::PaxForm), "{text:?}");
        }
    }

    #[test]
    fn a_record_cut_anywhere_is_an_error_and_never_a_panic() {
        let whole = record("SCHILY.xattr.user.any", b"value");
        for cut in 1..whole.len() {
            assert!(Pax::parse(&whole[..cut]).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn a_global_header_may_comment_but_not_resize_or_rename() {
        assert_eq!(check_global(&record("comment", b"5c1a")), Ok(()));
        for key in ["size", "path", "linkpath", "GNU.sparse.realsize"] {
            let checked = check_global(&record(key, b"1"));
            assert!(matches!(checked, Err(ArchiveError::GlobalPax(_))), "{key}");
        }
    }
}
