//! What an entry may be, who may own it, and what may be attached to it.

use super::{archive::Archive, merged, refusal};
use crate::tree::{ROOT, Time};

#[test]
fn devices_and_fifos_are_kept() {
    let tar = Archive::new()
        .device(b'3', "c", 5, 1)
        .device(b'4', "b", 259, 1_048_575)
        .header(b'6', "p", 0, |header| header.set_mode(0o600))
        .end();
    let expected = ["/b block 644 0:0 259:1048575", "/c char 644 0:0 5:1", "/p fifo 600 0:0"];
    assert_eq!(merged(&[tar]).lines(), expected);
}

#[test]
fn a_character_device_0_0_is_refused_as_overlayfs_takes_it_for_a_deletion() {
    let reason = refusal(&Archive::new().device(b'3', "d/x", 0, 0).end());
    let expected = "character device 0:0, which overlayfs takes for a deleted file";
    assert!(reason.ends_with(expected), "{reason}");
}

#[test]
fn device_numbers_that_linux_cannot_keep_are_refused() {
    for (major, minor) in [(4096, 0), (1, 1 << 20)] {
        let reason = refusal(&Archive::new().device(b'4', "x", major, minor).end());
        assert!(reason.ends_with("a device number that no device can have"), "{reason}");
    }
}

#[test]
fn any_owner_is_kept_and_one_that_cannot_be_is_refused() {
    let pax = Archive::new().pax(&[("uid", "3000000000"), ("gid", "4294967294")]).file("a", "");
    let base_256 = pax.header(b'0', "b", 0, |header| header.set_uid(3_000_000_000)).end();
    assert_eq!(
        merged(&[base_256]).lines(),
        ["/a file 644 3000000000:4294967294 \"\"", "/b file 644 3000000000:0 \"\""]
    );
    for id in ["4294967295", "4294967296"] {
        let reason = refusal(&Archive::new().pax(&[("gid", id)]).file("a", "").end());
        assert!(reason.ends_with("a user or group id that no file can have"), "{reason}");
    }
}

#[test]
fn set_id_and_sticky_bits_are_kept_and_type_bits_of_the_mode_mean_nothing() {
    let tar = Archive::new().header(b'0', "a", 0, |header| header.set_mode(0o146_755)).end();
    assert_eq!(merged(&[tar]).at("/a"), "file 6755 0:0 \"\"");
}

#[test]
fn times_are_kept_to_the_nanosecond_and_before_1970() {
    let tar = Archive::new()
        .pax(&[("mtime", "1700000000.123456789")])
        .file("a", "")
        .pax(&[("mtime", "-1.5")])
        .file("b", "")
        .end();
    let merged = merged(&[tar]);
    let time = |name: &[u8]| merged.tree.inode(merged.tree.find(&[name]).unwrap()).meta.mtime;
    assert_eq!(time(b"a"), Time { seconds: 1_700_000_000, nanos: 123_456_789 });
    assert_eq!(time(b"b"), Time { seconds: -2, nanos: 500_000_000 });
}

#[test]
fn the_root_is_described_by_its_entry_and_can_only_be_a_folder() {
    let tar = Archive::new().header(b'5', "./", 0, |header| header.set_mode(0o700)).end();
    assert_eq!(merged(&[tar]).tree.inode(ROOT).meta.mode, 0o700);
    assert_eq!(merged(&[Archive::new().end()]).tree.inode(ROOT).meta.mode, 0o755);
    let reason = refusal(&Archive::new().symlink("/", "elsewhere").end());
    assert!(reason.ends_with("the root of the image can only be a folder"), "{reason}");
}

#[test]
fn attributes_that_linux_knows_are_kept_whatever_bytes_they_hold() {
    let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\n\0\0\0";
    let tar = Archive::new()
        .pax(&[
            ("SCHILY.xattr.user.b", &b"b=1\n"[..]),
            ("SCHILY.xattr.security.capability", capability),
            ("SCHILY.xattr.user.a", b"first"),
            ("SCHILY.xattr.user.a", b"last"),
            ("SCHILY.xattr.user.empty", b""),
            ("SCHILY.xattr.security.selinux", b"build_host_t"),
            ("SCHILY.xattr.com.apple.quarantine", b"0"),
        ])
        .file("a", "")
        .end();
    let merged = merged(&[tar]);
    let xattrs = &merged.tree.inode(merged.tree.find(&[b"a"]).unwrap()).meta.xattrs;
    let kept: Vec<(&[u8], &[u8])> = xattrs.iter().map(|x| (&*x.name, &*x.value)).collect();
    let expected: [(&[u8], &[u8]); 4] = [
        (b"security.capability", capability),
        (b"user.a", b"last"),
        (b"user.b", b"b=1\n"),
        (b"user.empty", b""),
    ];
    assert_eq!(kept, expected);
}

#[test]
fn attributes_that_overlayfs_obeys_are_refused() {
    for name in ["trusted.overlay.opaque", "user.overlay.redirect", "trusted.overlay.metacopy"] {
        let key = format!("SCHILY.xattr.{name}");
        let reason = refusal(&Archive::new().pax(&[(&key, "y")]).folder("d").end());
        let expected = format!("the attribute \"{name}\", which overlayfs would obey");
        assert!(reason.ends_with(&expected), "{reason}");
    }
}

#[test]
fn attributes_without_a_name_or_too_long_are_refused() {
    let long_name = format!("SCHILY.xattr.user.{}", "n".repeat(251));
    for key in ["SCHILY.xattr.user.", "SCHILY.xattr.system.posix_acl_accessx", &long_name] {
        let reason = refusal(&Archive::new().pax(&[(key, "y")]).file("a", "").end());
        assert!(reason.contains("has no name, or a name or value that is too long"), "{reason}");
    }
    let long = [b'v'; 65_536];
    let reason = refusal(&Archive::new().pax(&[("SCHILY.xattr.user.a", long)]).file("a", "").end());
    assert!(reason.contains("has no name, or a name or value that is too long"), "{reason}");
    let keys = ["SCHILY.xattr.user.a", "SCHILY.xattr.user.b", "SCHILY.xattr.user.c"];
    let records = keys.map(|key| (key, &long[1..]));
    let reason = refusal(&Archive::new().pax(&records).file("a", "").end());
    assert!(reason.ends_with("its attributes take more than 131072 bytes"), "{reason}");
}

#[test]
fn a_type_that_is_not_known_is_refused() {
    for flag in *b"DMNVXZ8\x80" {
        let reason = refusal(&Archive::new().header(flag, "a", 0, |_| {}).end());
        assert!(reason.contains("its type"), "{flag}: {reason}");
    }
}

#[test]
fn names_that_climb_are_refused_and_absolute_ones_stay_inside() {
    for path in ["../../etc/pwn", "a/../../b", "/.."] {
        let reason = refusal(&Archive::new().file(path, "x").end());
        assert!(reason.ends_with("the path climbs with '..'"), "{reason}");
        assert!(reason.contains(&format!("an entry {path:?}")), "{reason}");
    }
    let tar = Archive::new().file("//etc/x", "").end();
    assert_eq!(merged(&[tar]).at("/etc/x"), "file 644 0:0 \"\"");
}

#[test]
fn names_need_not_be_text() {
    let tar = Archive::new().file(b"\xff\xfe\n", "x").end();
    assert_eq!(merged(&[tar]).at("/\\xff\\xfe\\n"), "file 644 0:0 \"x\"");
}
