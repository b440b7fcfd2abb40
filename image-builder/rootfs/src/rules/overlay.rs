//! Layers over layers: what replaces, what merges, what whiteouts take away.

use super::{archive::Archive, merged};

#[test]
fn of_two_entries_with_one_name_the_last_counts() {
    let tar = Archive::new().file("a", "first").symlink("b", "x").file("./a", "last").file("b", "");
    assert_eq!(merged(&[tar.end()]).lines(), ["/a file 644 0:0 \"last\"", "/b file 644 0:0 \"\""]);
}

#[test]
fn parents_that_an_archive_leaves_out_are_folders_of_root() {
    let tar = Archive::new().file("a/b/c", "x").end();
    let expected = ["/a folder 755 0:0", "/a/b folder 755 0:0", "/a/b/c file 644 0:0 \"x\""];
    assert_eq!(merged(&[tar]).lines(), expected);
}

#[test]
fn a_parent_left_out_above_keeps_what_the_lower_layer_says_of_it() {
    let lower = Archive::new().header(b'5', "a", 0, |header| header.set_mode(0o700)).end();
    let upper = Archive::new().file("a/b", "x").end();
    let expected = ["/a folder 700 0:0", "/a/b file 644 0:0 \"x\""];
    assert_eq!(merged(&[lower, upper]).lines(), expected);
}

#[test]
fn a_folder_over_a_folder_describes_it_anew_and_keeps_its_content() {
    let lower = Archive::new().folder("a").file("a/b", "low").end();
    let upper = Archive::new().header(b'5', "a", 0, |header| header.set_mode(0o1777)).end();
    let expected = ["/a folder 1777 0:0", "/a/b file 644 0:0 \"low\""];
    assert_eq!(merged(&[lower, upper]).lines(), expected);
}

#[test]
fn a_file_over_a_folder_takes_its_content_away_and_the_other_way_round() {
    let lower = Archive::new().folder("a").file("a/b", "x").file("c", "x").end();
    let upper = Archive::new().file("a", "now").folder("c").end();
    let expected = ["/a file 644 0:0 \"now\"", "/c folder 755 0:0"];
    assert_eq!(merged(&[lower.clone(), upper]).lines(), expected);
    let between = Archive::new().file("a", "not for long").folder("a").end();
    let expected = ["/a folder 755 0:0", "/c file 644 0:0 \"x\""];
    assert_eq!(merged(&[lower, between]).lines(), expected);
}

#[test]
fn a_write_through_a_symlink_replaces_the_symlink() {
    let same = Archive::new().folder("etc").symlink("d", "etc").file("d/f", "x").end();
    let expected = ["/d folder 755 0:0", "/d/f file 644 0:0 \"x\"", "/etc folder 755 0:0"];
    assert_eq!(merged(&[same]).lines(), expected);
    let lower = Archive::new().symlink("d", "/etc").end();
    let upper = Archive::new().file("d/f", "x").end();
    let expected = ["/d folder 755 0:0", "/d/f file 644 0:0 \"x\""];
    assert_eq!(merged(&[lower, upper]).lines(), expected);
}

#[test]
fn a_whiteout_takes_away_what_lower_layers_have() {
    let lower = Archive::new().file("d/a", "x").file("d/b", "x").file("e/f/g", "x").end();
    let upper = Archive::new().file("d/.wh.a", "").file(".wh.e", "").end();
    let merged = merged(&[lower, upper]);
    assert_eq!(merged.lines(), ["/d folder 755 0:0", "/d/b file 644 0:0 \"x\""]);
}

#[test]
fn a_whiteout_may_be_a_hard_link_or_have_data_and_its_target_means_nothing() {
    let lower = Archive::new().file("a", "x").file("b", "x").file("c", "x").end();
    let upper = Archive::new()
        .hard_link(".wh.a", ".wh..wh.plnk/1.2")
        .file(".wh.b", "some data")
        .file("d", "after it")
        .end();
    let expected = ["/c file 644 0:0 \"x\"", "/d file 644 0:0 \"after it\""];
    assert_eq!(merged(&[lower, upper]).lines(), expected);
}

#[test]
fn a_whiteout_comes_before_its_own_layers_entries_wherever_it_stands() {
    let lower = Archive::new().file("d/old", "x").file("f", "old").end();
    for first in [true, false] {
        let whiteouts = |tar: Archive| tar.file(".wh.d", "").file(".wh.f", "");
        let entries = |tar: Archive| tar.file("d/new", "x").file("f", "new");
        let upper = Archive::new();
        let upper = if first { entries(whiteouts(upper)) } else { whiteouts(entries(upper)) };
        assert_eq!(
            merged(&[lower.clone(), upper.end()]).lines(),
            ["/d folder 755 0:0", "/d/new file 644 0:0 \"x\"", "/f file 644 0:0 \"new\""],
            "whiteouts first: {first}"
        );
    }
}

#[test]
fn an_opaque_folder_hides_all_that_lower_layers_have_in_it() {
    let lowest = Archive::new().file("d/a/x", "x").file("d/b", "x").file("e", "x").end();
    let lower = Archive::new().file("d/c", "x").end();
    let upper = Archive::new().file("d/a/new", "x").file("d/.wh..wh..opq", "").end();
    let expected = [
        "/d folder 755 0:0",
        "/d/a folder 755 0:0",
        "/d/a/new file 644 0:0 \"x\"",
        "/e file 644 0:0 \"x\"",
    ];
    assert_eq!(merged(&[lowest, lower, upper]).lines(), expected);
}

#[test]
fn whiteouts_below_what_is_no_folder_here_leave_it_alone() {
    // umoci writes a folder that became a file so.
    let lower = Archive::new().file("a/b", "x").file("a/c", "x").file("d/e", "x").end();
    let upper = Archive::new().file("a", "now").file("a/.wh.b", "").file("a/.wh.c", "");
    let upper = upper.symlink("d", "a").file("d/.wh..wh..opq", "").file("new/.wh.x", "").end();
    let expected = ["/a file 644 0:0 \"now\"", "/d symlink 777 0:0 -> a"];
    assert_eq!(merged(&[lower, upper]).lines(), expected);
}

#[test]
fn an_opaque_root_leaves_the_layer_alone() {
    let lower = Archive::new().file("a", "x").file("d/b", "x").end();
    let upper = Archive::new().file(".wh..wh..opq", "").file("c", "x").end();
    assert_eq!(merged(&[lower, upper]).lines(), ["/c file 644 0:0 \"x\""]);
}

#[test]
fn a_whiteout_of_what_is_not_there_does_nothing_and_is_gone_above() {
    let lower = Archive::new().file(".wh.a", "").end();
    let upper = Archive::new().file("a", "x").end();
    assert_eq!(merged(&[lower, upper]).lines(), ["/a file 644 0:0 \"x\""]);
}

#[test]
fn a_layer_met_twice_is_laid_twice() {
    let one = Archive::new().file("a", "one").end();
    let two = Archive::new().file(".wh.a", "").file("b", "two").end();
    let expected = ["/a file 644 0:0 \"one\"", "/b file 644 0:0 \"two\""];
    assert_eq!(merged(&[one.clone(), two, one]).lines(), expected);
}

#[test]
fn notes_of_aufs_are_no_part_of_the_image() {
    let tar = Archive::new().folder(".wh..wh.plnk").file(".wh..wh.plnk/1.2", "x").file("a", "x");
    assert_eq!(merged(&[tar.end()]).lines(), ["/a file 644 0:0 \"x\""]);
}
