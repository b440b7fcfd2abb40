//! Sparse files, in the four ways archives write them. Holes stay holes.

use std::os::unix::fs::MetadataExt;

use fs_err as fs;

use super::{Merged, archive::Archive, merged, refusal};
use crate::{
    store,
    tree::{FileData, Kind, Layout},
};

const REAL_SIZE: u64 = 1 << 20;

/// Stored pieces of the file that every test here writes: at its start, across a block's border,
/// and near its end.
const PIECES: [(u64, u64); 3] = [(0, 5), (8190, 4), (900_000, 10_000)];

fn stored() -> Vec<u8> {
    PIECES.iter().flat_map(|&(at, bytes)| (at..at + bytes).map(letter)).collect()
}

fn letter(at: u64) -> u8 {
    b'a' + u8::try_from(at % 26).unwrap()
}

fn whole() -> Vec<u8> {
    let has = |at: u64| PIECES.iter().any(|&(from, bytes)| (from..from + bytes).contains(&at));
    (0..REAL_SIZE).map(|at| if has(at) { letter(at) } else { 0 }).collect()
}

fn file<'a>(merged: &'a Merged, name: &[u8]) -> &'a FileData {
    let Kind::File(data) = &merged.tree.inode(merged.tree.find(&[name]).unwrap()).kind else {
        panic!("no file")
    };
    data
}

/// The file's bytes are right, and the blob has only the blocks that hold some.
fn check(tar: Vec<u8>) {
    let merged = merged(&[tar]);
    let data = file(&merged, b"s");
    assert!(matches!(data.layout, Layout::Chunked { chunk_log: 0, .. }), "{:?}", data.layout);
    assert!(merged.content(data) == whole(), "the bytes differ");
    // 1 block for the first piece, 2 for the second, 4 for the third; 1 for the file after it.
    let blob = store::data_path(merged.store.path(), &merged.layers[0]);
    assert_eq!(fs::metadata(blob).unwrap().len(), 8 * 4096);
    assert_eq!(merged.at("/after"), "file 644 0:0 \"x\"");
}

fn text(numbers: impl IntoIterator<Item = u64>, between: &str) -> String {
    numbers.into_iter().map(|n| n.to_string()).collect::<Vec<_>>().join(between)
}

#[test]
fn an_old_gnu_sparse_file_is_read_with_its_map_in_the_header() {
    let stored = stored();
    let tar = Archive::new().header(b'S', "s", stored.len() as u64, |header| {
        let gnu = header.as_gnu_mut().unwrap();
        for (slot, (at, bytes)) in gnu.sparse.iter_mut().zip(PIECES) {
            slot.set_offset(at);
            slot.set_length(bytes);
        }
        gnu.set_real_size(REAL_SIZE);
    });
    check(tar.data(&stored).file("after", "x").end());
}

#[test]
fn an_old_gnu_sparse_file_is_read_with_its_map_going_on_in_further_blocks() {
    // One piece of a byte every 3 blocks, 30 of them: 4 in the header, 21 and 5 in further blocks.
    let pieces: Vec<u64> = (0..30).map(|n| n * 3 * 4096).collect();
    let real_size = 90 * 4096;
    let mut further = [[0_u8; 512]; 2];
    for (n, at) in pieces.iter().skip(4).enumerate() {
        let entry = &mut further[n / 21][n % 21 * 24..][..24];
        entry.copy_from_slice(format!("{at:011o}\0{:011o}\0", 1).as_bytes());
    }
    further[0][504] = 1;
    let tar = Archive::new().header(b'S', "s", 30, |header| {
        let gnu = header.as_gnu_mut().unwrap();
        for (slot, at) in gnu.sparse.iter_mut().zip(&pieces) {
            slot.set_offset(*at);
            slot.set_length(1);
        }
        gnu.set_is_extended(true);
        gnu.set_real_size(real_size);
    });
    let tar = tar.raw(&further.concat()).data(&[b'x'; 30]).end();
    let merged = merged(&[tar]);
    let content = merged.content(file(&merged, b"s"));
    let there: Vec<u64> =
        (0..).zip(&content).filter(|(_, b)| **b == b'x').map(|(n, _)| n).collect();
    assert_eq!(content.len() as u64, real_size);
    assert_eq!(there, pieces);
}

#[test]
fn a_pax_sparse_file_of_form_0_0_is_read() {
    let mut records = vec![
        ("GNU.sparse.size", REAL_SIZE.to_string()),
        ("GNU.sparse.numblocks", PIECES.len().to_string()),
    ];
    for (at, bytes) in PIECES {
        records.push(("GNU.sparse.offset", at.to_string()));
        records.push(("GNU.sparse.numbytes", bytes.to_string()));
    }
    check(Archive::new().pax(&records).file("s", stored()).file("after", "x").end());
}

#[test]
fn a_pax_sparse_file_of_form_0_1_is_read() {
    let records = [
        ("GNU.sparse.size", REAL_SIZE.to_string()),
        ("GNU.sparse.numblocks", PIECES.len().to_string()),
        ("GNU.sparse.map", text(PIECES.iter().flat_map(|&(at, bytes)| [at, bytes]), ",")),
        ("GNU.sparse.name", "s".to_owned()),
    ];
    let tar = Archive::new().pax(&records).file("GNUSparseFile.0/s", stored());
    check(tar.file("after", "x").end());
}

#[test]
fn a_pax_sparse_file_of_form_1_0_is_read() {
    let records = [
        ("GNU.sparse.major", "1".to_owned()),
        ("GNU.sparse.minor", "0".to_owned()),
        ("GNU.sparse.name", "s".to_owned()),
        ("GNU.sparse.realsize", REAL_SIZE.to_string()),
    ];
    let numbers = [PIECES.len() as u64].into_iter();
    let map = text(numbers.chain(PIECES.iter().flat_map(|&(at, bytes)| [at, bytes])), "\n") + "\n";
    let mut data = map.into_bytes();
    data.resize(data.len().next_multiple_of(512), 0);
    data.extend(stored());
    check(Archive::new().pax(&records).file("GNUSparseFile.0/s", data).file("after", "x").end());
}

#[test]
fn a_file_that_is_one_hole_takes_no_block() {
    let records = [("GNU.sparse.size", "1099511627776"), ("GNU.sparse.map", "1099511627776,0")];
    let merged = merged(&[Archive::new().pax(&records).file("s", "").end()]);
    let data = file(&merged, b"s");
    assert_eq!(data.bytes, 1 << 40);
    let Layout::Chunked { chunk_log, chunks } = &data.layout else { panic!("not in chunks") };
    assert_eq!((*chunk_log, chunks.len()), (12, 65_536));
    let blob = store::data_path(merged.store.path(), &merged.layers[0]);
    assert_eq!(fs::metadata(blob).unwrap().len(), 0);
}

#[test]
fn the_rest_of_a_large_files_chunk_is_a_hole_in_the_blob() {
    // 1 GiB makes chunks of 16 KiB.
    let records = [("GNU.sparse.size", "1073741824"), ("GNU.sparse.map", "20000,3,1073741823,1")];
    let merged = merged(&[Archive::new().pax(&records).file("s", "abcd").end()]);
    let content = merged.content(file(&merged, b"s"));
    assert_eq!(&content[19_999..20_004], b"\0abc\0");
    assert_eq!(content.last(), Some(&b'd'));
    assert_eq!(content.iter().filter(|byte| **byte != 0).count(), 4);
    let blob = fs::metadata(store::data_path(merged.store.path(), &merged.layers[0])).unwrap();
    assert_eq!(blob.len(), 2 * 16_384);
    assert!(blob.blocks() * 512 < blob.len(), "the blob has no hole");
}

#[test]
fn a_sparse_file_without_a_hole_lies_in_one_piece() {
    let records = [("GNU.sparse.size", "5"), ("GNU.sparse.map", "0,5")];
    let merged = merged(&[Archive::new().pax(&records).file("s", "abcde").end()]);
    assert_eq!(file(&merged, b"s").layout, Layout::Plain(0));
    assert_eq!(merged.at("/s"), "file 644 0:0 \"abcde\"");
}

#[test]
fn sparse_maps_that_make_no_sense_are_refused() {
    let with =
        |records: &[(&str, &str)]| refusal(&Archive::new().pax(records).file("s", "abc").end());
    let map = "a sparse file's map is not in order, overlaps or leaves the file";
    let meaning = "of an extended header has no meaning as it is";
    let size = ("GNU.sparse.size", "100");
    let cases: [(&[(&str, &str)], &str); 8] = [
        (&[size, ("GNU.sparse.map", "0,2")], map),
        (&[size, ("GNU.sparse.map", "0,2,1,1")], map),
        (&[size, ("GNU.sparse.map", "98,3")], map),
        (&[size, ("GNU.sparse.map", "0,3,9")], map),
        (&[size, ("GNU.sparse.numbytes", "3")], map),
        (&[("GNU.sparse.map", "0,3")], meaning),
        (&[size, ("GNU.sparse.major", "2"), ("GNU.sparse.minor", "0")], meaning),
        (&[size, ("GNU.sparse.map", "0,-3")], meaning),
    ];
    for (records, reason) in cases {
        let refused = with(records);
        assert!(refused.ends_with(reason), "{records:?}: {refused}");
    }
    let many = text(std::iter::repeat_n(0, 2 * 131_073), ",");
    let refused = with(&[size, ("GNU.sparse.map", &many)]);
    assert!(refused.ends_with("a sparse file has more than 131072 extents"), "{refused}");
}
