//! Where entries begin and end, which names and sizes count, and what an archive may cost.

use super::{
    archive::{Archive, set_link},
    merged, refusal, refusal_within,
};
use crate::Limits;

/// 800 bytes, in names of 100.
fn long_path() -> String {
    (0..8).map(|n| format!("{n}{}", "n".repeat(98))).collect::<Vec<_>>().join("/") + "x"
}

#[test]
fn a_pax_path_and_a_gnu_long_name_of_800_bytes_are_kept() {
    let path = long_path();
    let target = format!("../{path}");
    let tar = Archive::new()
        .pax(&[("path", format!("pax/{path}")), ("linkpath", target.clone())])
        .symlink("short", "short")
        .gnu_long(b'K', &target)
        .gnu_long(b'L', format!("gnu/{path}"))
        .symlink("short", "short")
        .end();
    let merged = merged(&[tar]);
    for folder in ["pax", "gnu"] {
        let expected = format!("symlink 777 0:0 -> {target}");
        assert_eq!(merged.at(&format!("/{folder}/{path}")), expected);
    }
}

#[test]
fn a_gnu_long_name_counts_more_than_a_pax_path() {
    let tar = Archive::new().pax(&[("path", "pax")]).gnu_long(b'L', "gnu").file("short", "x").end();
    assert_eq!(merged(&[tar]).lines(), ["/gnu file 644 0:0 \"x\""]);
}

#[test]
fn what_is_said_of_one_entry_does_not_reach_the_next() {
    let tar = Archive::new()
        .pax(&[("path", "a"), ("uid", "7"), ("mtime", "1"), ("SCHILY.xattr.user.x", "y")])
        .file("short", "x")
        .file("b", "x")
        .end();
    let merged = merged(&[tar]);
    assert_eq!(merged.lines(), ["/a file 644 7:0 \"x\"", "/b file 644 0:0 \"x\""]);
    let b = merged.tree.inode(merged.tree.find(&[b"b"]).unwrap());
    assert!(b.meta.xattrs.is_empty());
}

#[test]
fn a_pax_size_counts_for_the_entrys_data_and_not_for_a_long_name_in_between() {
    // A reader that takes the size for the long name's misses its end, and reads as an entry what
    // is data here.
    let smuggled = Archive::new().file("smuggled", "").cut();
    let tar = Archive::new()
        .pax(&[("size", smuggled.len().to_string())])
        .gnu_long(b'L', "honest")
        .header(b'0', "short", 0, |_| {})
        .data(&smuggled)
        .file("after", "x")
        .end();
    let list = merged(&[tar]).list();
    assert_eq!(list.keys().collect::<Vec<_>>(), ["/after", "/honest"]);
}

#[test]
fn entries_that_have_no_data_are_followed_by_none_whatever_size_they_say() {
    let tar = Archive::new()
        .header(b'5', "d", 512, |_| {})
        .header(b'2', "s", 512, |header| set_link(header, b"to"))
        .pax(&[("size", "512")])
        .header(b'6', "p", 0, |_| {})
        .file("a", "x")
        .hard_link("h", "a")
        .header(b'1', "i", 512, |header| set_link(header, b"a"))
        .file("z", "x")
        .end();
    let list = merged(&[tar]).list();
    assert_eq!(list.keys().collect::<Vec<_>>(), ["/a", "/d", "/h", "/i", "/p", "/s", "/z"]);
}

#[test]
fn before_ustar_a_folder_was_a_file_with_a_slash() {
    let tar = Archive::new().header(0, "d/", 0, |_| {}).header(0, "f", 0, |_| {}).end();
    assert_eq!(merged(&[tar]).lines(), ["/d folder 644 0:0", "/f file 644 0:0 \"\""]);
}

#[test]
fn an_archive_may_end_with_or_without_its_mark_and_what_follows_the_mark_is_nothing() {
    let marked = Archive::new().file("a", "x").end();
    let unmarked = Archive::new().file("a", "x").cut();
    let half = [&unmarked[..], &[0; 512]].concat();
    let more = [marked.clone(), Archive::new().file("b", "x").end()].concat();
    for tar in [marked, unmarked, half, more] {
        assert_eq!(merged(&[tar]).lines(), ["/a file 644 0:0 \"x\""]);
    }
    assert_eq!(merged(&[Vec::new()]).lines(), Vec::<String>::new());
}

#[test]
fn an_entry_after_a_single_blank_block_is_refused() {
    let tar = Archive::new().file("a", "x").raw(&[0; 512]).file("b", "x").end();
    let reason = refusal(&tar);
    assert!(reason.contains("no good tar archive after entry \"a\""), "{reason}");
}

#[test]
fn an_archive_cut_anywhere_within_an_entry_is_refused() {
    let whole = Archive::new().pax(&[("path", "b")]).file("a", [b'x'; 700]).cut();
    // Behind the last file's bytes its padding may be missing, whole or in part: umoci does that.
    let padding = 2 * 512 - 700;
    let (entry, padded) = (whole.len() - padding, whole.len());
    for cut in (1..entry).step_by(37).chain([entry - 1]) {
        let reason = refusal(&whole[..cut]);
        assert!(reason.ends_with("it ends in the middle of an entry"), "cut at {cut}: {reason}");
    }
    for cut in [entry, entry + 1, padded - 1, padded] {
        let merged = merged(&[whole[..cut].to_vec()]);
        assert_eq!(merged.lines().len(), 1, "cut at {cut}");
    }
}

#[test]
fn an_extended_header_without_an_entry_is_refused() {
    let end = refusal(&Archive::new().pax(&[("path", "b")]).end());
    assert!(end.ends_with("an extended header is followed by no entry"), "{end}");
    let cut = refusal(&Archive::new().gnu_long(b'L', "b").cut());
    assert!(cut.ends_with("an extended header is followed by no entry"), "{cut}");
}

#[test]
fn a_global_header_may_comment_and_nothing_more() {
    let tar = Archive::new().global_pax(&[("comment", "0a1b"), ("uid", "7")]).file("a", "x").end();
    assert_eq!(merged(&[tar]).lines(), ["/a file 644 0:0 \"x\""]);
    let reason = refusal(&Archive::new().global_pax(&[("size", "0")]).file("a", "x").end());
    assert!(reason.contains("a global header sets size"), "{reason}");
}

#[test]
fn headers_and_names_that_are_too_long_are_refused_before_they_are_read() {
    let pax = refusal(&Archive::new().header(b'x', "h", (1 << 20) + 1, |_| {}).cut());
    assert!(pax.ends_with("has 1048577 bytes (at most 1048576)"), "{pax}");
    let name = refusal(&Archive::new().header(b'L', "h", 1 << 40, |_| {}).cut());
    assert!(name.ends_with("has 1099511627776 bytes (at most 4095)"), "{name}");
    let path = refusal(&Archive::new().pax(&[("path", "p/".repeat(3000))]).file("a", "").end());
    assert!(path.ends_with("the path has 6000 bytes (at most 4095)"), "{path}");
    let part = refusal(&Archive::new().pax(&[("path", "p".repeat(256))]).file("a", "").end());
    assert!(part.ends_with("a name in the path has 256 bytes (at most 255)"), "{part}");
    let deep = refusal(&Archive::new().pax(&[("path", "p/".repeat(513))]).folder("a").end());
    assert!(deep.ends_with("the path is deeper than 512 folders"), "{deep}");
}

#[test]
fn a_layer_that_costs_more_than_its_limits_is_refused() {
    let limits = |change: fn(&mut Limits)| {
        let mut limits = Limits::default();
        change(&mut limits);
        limits
    };
    let many = Archive::new().file("a/b/c", "").file("d", "").end();
    let reason = refusal_within(&many, &limits(|limits| limits.entries = 3));
    assert!(reason.ends_with("it has more than 3 entries"), "{reason}");
    let long = Archive::new().symlink("a", [b'x'; 90]).end();
    let reason = refusal_within(&long, &limits(|limits| limits.tree_bytes = 90));
    assert!(reason.ends_with("names, link targets and attributes take more than 90 bytes"));
    let large = Archive::new().file("a", vec![b'x'; 4096]).end();
    let reason = refusal_within(&large, &limits(|limits| limits.bytes = 4096));
    assert!(reason.ends_with("has more than 4096 bytes uncompressed"), "{reason}");
}

#[test]
fn a_long_name_is_cut_in_a_message_and_what_is_not_text_escaped() {
    let path = format!("\x1b[2J{}", "n".repeat(90));
    let reason = refusal(&Archive::new().file(format!("../{path}"), "").end());
    assert!(reason.contains(r"../\x1b[2Jnnn"), "{reason}");
    assert!(!reason.contains('\x1b'));
    let reason = refusal(&Archive::new().pax(&[("path", "n".repeat(4000))]).file("a", "").end());
    assert!(reason.len() < 500, "{reason}");
}
