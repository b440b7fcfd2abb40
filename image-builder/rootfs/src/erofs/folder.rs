//! A folder's content: blocks of 4 KiB, each with 12-byte heads and then the names they point to.
//! Names are in byte order over the whole folder, `.` and `..` among them, as the kernel searches
//! by halving.

use std::collections::BTreeMap;

use crate::tree::{BLOCK, BLOCK_BYTES, InodeId, Kind, Name};

const HEAD_BYTES: usize = 12;

/// How many bytes the folder's content has: the last block only as far as it is used.
pub(super) fn bytes(names: &BTreeMap<Name, InodeId>) -> u64 {
    let mut full_blocks = 0;
    let mut used = 0;
    for name in in_order(names) {
        let more = HEAD_BYTES + name.len();
        if used + more > BLOCK {
            full_blocks += 1;
            used = 0;
        }
        used += more;
    }
    full_blocks * BLOCK_BYTES + used as u64
}

/// `of` gives an entry's inode number and what it is.
pub(super) fn encode<'a>(
    names: &BTreeMap<Name, InodeId>,
    own: u64,
    parent: u64,
    of: impl Fn(InodeId) -> (u64, &'a Kind),
) -> Vec<u8> {
    const FOLDER: u8 = 2;
    let mut out = Vec::new();
    let mut block: Vec<(&[u8], u64, u8)> = Vec::new();
    let mut used = 0;
    for name in in_order(names) {
        let (number, file_type) = match name {
            b"." => (own, FOLDER),
            b".." => (parent, FOLDER),
            _ => {
                let (number, kind) = of(names[name]);
                (number, file_type(kind))
            }
        };
        let more = HEAD_BYTES + name.len();
        if used + more > BLOCK {
            put_block(&mut out, &block);
            out.resize(out.len().next_multiple_of(BLOCK), 0);
            block.clear();
            used = 0;
        }
        used += more;
        block.push((name, number, file_type));
    }
    put_block(&mut out, &block);
    out
}

fn in_order(names: &BTreeMap<Name, InodeId>) -> impl Iterator<Item = &[u8]> {
    let mut dots = [&b"."[..], b".."].into_iter().peekable();
    let mut names = names.keys().map(|name| &**name).peekable();
    std::iter::from_fn(move || match (dots.peek(), names.peek()) {
        (Some(dot), Some(name)) if name < dot => names.next(),
        (Some(_), _) => dots.next(),
        (None, _) => names.next(),
    })
}

fn put_block(out: &mut Vec<u8>, entries: &[(&[u8], u64, u8)]) {
    let mut name_at = entries.len() * HEAD_BYTES;
    for (name, number, file_type) in entries {
        out.extend(number.to_le_bytes());
        out.extend(u16::try_from(name_at).expect("inside a block").to_le_bytes());
        out.extend([*file_type, 0]);
        name_at += name.len();
    }
    for (name, ..) in entries {
        out.extend_from_slice(name);
    }
}

fn file_type(kind: &Kind) -> u8 {
    match kind {
        Kind::File(_) => 1,
        Kind::Folder(_) => 2,
        Kind::Character(_) => 3,
        Kind::Block(_) => 4,
        Kind::Fifo => 5,
        Kind::Symlink(_) => 7,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(all: impl IntoIterator<Item = Vec<u8>>) -> BTreeMap<Name, InodeId> {
        all.into_iter().map(|name| (name.into(), 1)).collect()
    }

    #[test]
    fn the_dots_stand_where_byte_order_puts_them() {
        let names = names([b"-".to_vec(), b"...".to_vec(), b".a".to_vec(), b"a".to_vec()]);
        let all: Vec<&[u8]> = in_order(&names).collect();
        let expected: [&[u8]; 6] = [b"-", b".", b"..", b"...", b".a", b"a"];
        assert_eq!(all, expected);
    }

    #[test]
    fn the_size_told_is_the_size_written_whatever_the_names() {
        for (count, length) in [(0, 1), (1, 255), (15, 255), (16, 255), (300, 2), (5000, 40)] {
            let names = names((0..count).map(|n| format!("{n:0length$}").into_bytes()));
            let encoded = encode(&names, 1, 2, |_| (3, &Kind::Fifo));
            assert_eq!(encoded.len() as u64, bytes(&names), "{count} names of {length} bytes");
        }
    }
}
