//! Tests of the outer archive's reading: forms of names and sizes, and hostile ones.

use proptest::prelude::*;

use super::*;

/// One entry with a right checksum.
fn entry(path: &str, kind: u8, link: &str, content: &[u8]) -> Vec<u8> {
    let mut block = vec![0; 512];
    block[..path.len()].copy_from_slice(path.as_bytes());
    block[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
    block[156] = kind;
    block[157..157 + link.len()].copy_from_slice(link.as_bytes());
    block[257..263].copy_from_slice(b"ustar\0");
    sign(&mut block);
    block.extend_from_slice(content);
    block.resize(block.len().next_multiple_of(512), 0);
    block
}

fn sign(block: &mut [u8]) {
    block[148..156].fill(b' ');
    let sum: u32 = block[..512].iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

fn scan(bytes: &[u8]) -> Result<Index, Error> {
    let size = u64::try_from(bytes.len()).unwrap();
    Index::scan(size, |offset, count| {
        let offset = usize::try_from(offset).unwrap();
        Ok(bytes[offset..offset + usize::try_from(count).unwrap()].to_vec())
    })
}

fn content<'a>(archive: &'a [u8], path: &str) -> Option<&'a [u8]> {
    let piece = scan(archive).unwrap().find(path)?;
    let offset = usize::try_from(piece.offset).unwrap();
    Some(&archive[offset..offset + usize::try_from(piece.bytes).unwrap()])
}

#[test]
fn files_are_found_by_any_writing_of_their_path_and_the_last_one_counts() {
    let parts = [entry("./a/b", b'0', "", b"old"), entry("a/b", b'0', "", b"new")];
    let archive = parts.concat();
    for path in ["a/b", "./a/b", "/a//b", "a/x/../b"] {
        assert_eq!(content(&archive, path), Some(&b"new"[..]), "{path}");
    }
    assert_eq!(content(&archive, "a"), None);
}

#[test]
fn links_are_followed_inside_the_archive_and_not_for_ever() {
    let archive = [
        entry("one/layer.tar", b'0', "", b"layer"),
        entry("two/layer.tar", b'2', "../one/layer.tar", b""),
        entry("hard", b'1', "one/layer.tar", b""),
        entry("loop", b'2', "loop", b""),
        entry("out", b'2', "../../etc/passwd", b""),
    ]
    .concat();
    assert_eq!(content(&archive, "two/layer.tar"), Some(&b"layer"[..]));
    assert_eq!(content(&archive, "hard"), Some(&b"layer"[..]));
    assert_eq!(content(&archive, "loop"), None);
    assert_eq!(content(&archive, "out"), None);
}

#[test]
fn long_names_are_read_in_both_forms() {
    let long = "x/".repeat(100) + "end";
    let pax = format!("path={long}\n");
    let pax = format!("{} {pax}", pax.len() + 4);
    let gnu = [entry("././@LongLink", b'L', "", long.as_bytes()), entry("short", b'0', "", b"1")];
    let pax = [entry("pax", b'x', "", pax.as_bytes()), entry("short", b'0', "", b"1")];
    for archive in [gnu.concat(), pax.concat()] {
        assert_eq!(content(&archive, &long), Some(&b"1"[..]));
        assert_eq!(content(&archive, "short"), None);
    }
}

#[test]
fn a_size_in_an_extended_header_is_that_of_the_next_file_only() {
    let mut file = entry("real", b'0', "", b"12345");
    file[124..135].copy_from_slice(b"00000000000");
    sign(&mut file);
    let archive = [
        entry("pax", b'x', "", b"10 size=5\n"),
        entry("././@LongLink", b'L', "", b"renamed"),
        file,
        entry("next", b'0', "", b"n"),
    ]
    .concat();
    assert_eq!(content(&archive, "renamed"), Some(&b"12345"[..]));
    assert_eq!(content(&archive, "next"), Some(&b"n"[..]));
}

#[test]
fn what_breaks_the_form_or_a_limit_is_refused() {
    let good = entry("a", b'0', "", b"content");
    let mut wrong_sum = good.clone();
    wrong_sum[0] = b'b';
    let mut too_long = good.clone();
    too_long[124..135].copy_from_slice(b"77777777777");
    sign(&mut too_long);
    let mut huge = good.clone();
    huge[124..136]
        .copy_from_slice(&[0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    sign(&mut huge);
    let pax = entry("pax", b'x', "", &vec![b'1'; 70_000]);
    let cases = [
        (wrong_sum, "no header of a tar archive"),
        (too_long, "longer than the archive"),
        (huge, "longer than the archive"),
        (good[..300].to_vec(), "in the middle of a header"),
        (pax, "too long"),
        (vec![0x1f, 0x8b].into_iter().chain([7; 600]).collect(), "it is compressed"),
        (entry("", b'0', "", b"").repeat(ENTRIES_MAX + 1), "over the limit"),
    ];
    for (archive, reason) in cases {
        let text = scan(&archive).unwrap_err().to_string();
        assert!(text.contains(reason), "{text}");
    }
}

proptest! {
    #[test]
    fn any_block_is_a_header_or_none(block in proptest::collection::vec(any::<u8>(), 512)) {
        let _ = Header::parse(&block);
        let mut signed = block;
        sign(&mut signed);
        let _ = scan(&signed);
    }

    #[test]
    fn any_extended_header_is_read_or_refused(bytes in "[0-9 a-z=\n]{0,80}") {
        let _ = Overrides::default().take(b'x', bytes.as_bytes());
    }

    #[test]
    fn a_joined_path_never_leaves_the_archive(folder in "[a./]{0,20}", path in "[a./]{0,20}") {
        if let Some(path) = joined(&folder, &path) {
            prop_assert!(path.split('/').all(|part| !matches!(part, "" | "." | "..")));
        }
    }
}
