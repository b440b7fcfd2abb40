//! Hard links, within a layer and to lower ones.

use super::{archive::Archive, chain, merged, refusal, try_merged};

#[test]
fn a_hard_link_is_a_second_name_of_the_same_file() {
    let tar = Archive::new().file("a", "x").hard_link("d/b", "/a").hard_link("c", "./d/b").end();
    let merged = merged(&[tar]);
    for path in ["/a", "/d/b", "/c"] {
        assert_eq!(merged.at(path), "file 644 0:0 \"x\" #0", "{path}");
    }
}

#[test]
fn a_hard_link_keeps_the_file_when_its_first_name_is_replaced() {
    let tar = Archive::new().file("a", "old").hard_link("b", "a").file("a", "new").end();
    assert_eq!(merged(&[tar]).lines(), ["/a file 644 0:0 \"new\"", "/b file 644 0:0 \"old\""]);
}

#[test]
fn a_hard_link_may_point_to_a_symlink_a_device_or_a_fifo() {
    let tar = Archive::new().symlink("s", "to").hard_link("t", "s").device(b'3', "n", 1, 3);
    let tar = tar.hard_link("m", "n").header(b'6', "p", 0, |_| {}).hard_link("q", "p").end();
    let merged = merged(&[tar]);
    assert_eq!(merged.at("/t").split(" #").next(), Some("symlink 777 0:0 -> to"));
    assert_eq!(merged.at("/m").split(" #").next(), Some("char 644 0:0 1:3"));
    assert_eq!(merged.at("/q").split(" #").next(), Some("fifo 644 0:0"));
}

#[test]
fn a_hard_link_to_a_lower_layer_joins_the_file_there() {
    let lower = Archive::new().file("d/a", "low").end();
    let upper = Archive::new().hard_link("b", "d/a").hard_link("c", "b").end();
    let merged = merged(&[lower, upper]);
    for path in ["/d/a", "/b", "/c"] {
        assert_eq!(merged.at(path), "file 644 0:0 \"low\" #0", "{path}");
    }
}

#[test]
fn a_hard_link_to_a_lower_layer_can_be_replaced_and_can_replace() {
    let lower = Archive::new().file("a", "low").file("b", "low b").end();
    let upper = Archive::new().hard_link("b", "a").hard_link("c", "a").file("c", "new").end();
    let expected =
        ["/a file 644 0:0 \"low\" #0", "/b file 644 0:0 \"low\" #0", "/c file 644 0:0 \"new\""];
    assert_eq!(merged(&[lower, upper]).lines(), expected);
}

#[test]
fn a_hard_link_to_itself_or_to_a_folder_is_refused() {
    let itself = refusal(&Archive::new().file("a", "x").hard_link("a", "./a").end());
    assert!(itself.ends_with("an entry \"a\" that cannot be taken: it is a hard link to itself"));
    let folder = refusal(&Archive::new().folder("d").hard_link("a", "d").end());
    assert!(folder.ends_with("it is a hard link to the folder \"d\""), "{folder}");
    let root = refusal(&Archive::new().hard_link("a", "/").end());
    assert!(root.ends_with("it is a hard link to the folder \"/\""), "{root}");
}

#[test]
fn a_hard_link_to_a_lower_folder_or_to_nothing_is_refused_naming_layer_and_entry() {
    let lower = Archive::new().folder("d").file("gone", "").end();
    let cases = [
        (Archive::new().hard_link("e/a", "d"), "it is a hard link to the folder \"d\""),
        (
            Archive::new().hard_link("e/a", "nothing"),
            "it is a hard link to \"nothing\", which is neither in this layer nor in a lower one",
        ),
        (
            Archive::new().file(".wh.gone", "").hard_link("e/a", "gone"),
            "it is a hard link to \"gone\", which is neither in this layer nor in a lower one",
        ),
    ];
    for (upper, reason) in cases {
        let upper = upper.end();
        let error = chain(&try_merged(&[lower.clone(), upper.clone()]).err().unwrap());
        let layer = super::sha256(&upper);
        let expected = format!("layer {layer} has an entry \"e/a\" that cannot be taken: {reason}");
        assert_eq!(error, expected);
    }
}

#[test]
fn a_hard_link_does_not_go_through_a_symlink() {
    let lower = Archive::new().file("etc/passwd", "x").symlink("d", "etc").end();
    let upper = Archive::new().hard_link("a", "d/passwd").end();
    let error = chain(&try_merged(&[lower, upper]).err().unwrap());
    assert!(error.contains("neither in this layer nor in a lower one"), "{error}");
}

#[test]
fn a_link_without_a_target_or_that_climbs_is_refused() {
    let none = refusal(&Archive::new().hard_link("a", "").end());
    assert!(none.ends_with("the link has no target, or one of more than 4095 bytes"), "{none}");
    let climbs = refusal(&Archive::new().hard_link("a", "../../etc/shadow").end());
    assert!(climbs.ends_with("the path climbs with '..'"), "{climbs}");
    // A symlink's target is only text to us: the guest follows it within its own root.
    let symlink = Archive::new().symlink("a", "../../etc/shadow").end();
    assert_eq!(merged(&[symlink]).at("/a"), "symlink 777 0:0 -> ../../etc/shadow");
}
