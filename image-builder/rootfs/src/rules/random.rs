//! Bytes nobody thought of: any archive gives a layer or a typed error, never a panic, and equal
//! archives give equal bytes.

use std::process::Command;

use fs_err as fs;
use proptest::prelude::*;

use super::{archive::Archive, convert_within, files_in, fresh_store, sha256};
use crate::{Limits, Segment, Settings, assemble, tree::StoredLayer};

/// One thing an archive may hold, often with names that collide.
fn step() -> impl Strategy<Value = Step> {
    let name = prop_oneof![
        "[ab]{1}(/[ab]){0,3}",
        "[ab]/\\.wh\\.[ab]",
        "[ab]/\\.wh\\.\\.wh\\.\\.opq",
        "[./ab]{0,6}",
    ];
    let flag = prop::sample::select(b"0123456\0S7x".to_vec());
    let key = prop::sample::select(vec![
        "path",
        "linkpath",
        "size",
        "uid",
        "mtime",
        "GNU.sparse.map",
        "GNU.sparse.size",
        "GNU.sparse.major",
        "GNU.sparse.minor",
        "GNU.sparse.offset",
        "SCHILY.xattr.user.a",
    ]);
    let value = prop_oneof!["[0-9]{1,4}", "[ab/]{0,5}", "[0-9,.\\-]{1,8}"];
    prop_oneof![
        4 => (flag, name, "[ab/]{0,4}", prop::collection::vec(any::<u8>(), 0..600))
            .prop_map(|(flag, name, link, data)| Step::Entry { flag, name, link, data }),
        1 => (key, value).prop_map(|(key, value)| Step::Pax(key, value)),
        1 => prop::collection::vec(any::<u8>(), 0..64).prop_map(Step::LongName),
    ]
}

#[derive(Debug, Clone)]
enum Step {
    Entry { flag: u8, name: String, link: String, data: Vec<u8> },
    Pax(&'static str, String),
    LongName(Vec<u8>),
}

fn archive(steps: Vec<Step>) -> Vec<u8> {
    let add = |tar: Archive, step| match step {
        Step::Entry { flag, name, link, data } => {
            let link = |header: &mut tar::Header| {
                super::archive::set_link(header, link.as_bytes());
            };
            let has_data = matches!(flag, b'0' | 0 | b'7' | b'S');
            let size = if has_data { data.len() as u64 } else { 0 };
            let tar = tar.header(flag, name, size, link);
            if has_data { tar.data(&data) } else { tar }
        }
        Step::Pax(key, value) => tar.pax(&[(key, value)]),
        Step::LongName(name) => tar.gnu_long(b'L', name),
    };
    steps.into_iter().fold(Archive::new(), add).end()
}

/// Converts and, where that works, puts an image together. Gives its disk.
fn try_all(tar: &[u8]) -> Option<Vec<u8>> {
    let store = fresh_store();
    let converted = convert_within(store.path(), tar, &Limits::default());
    if converted.is_err() {
        assert_eq!(files_in(&store.path().join("layers")), Vec::<String>::new());
    }
    let layers = [converted.ok()?.diff_id];
    let manifest = sha256(b"manifest");
    let record = assemble(store.path(), &manifest, &layers, Settings::default(), "amd64").ok()?;
    let read = |segment: &Segment| fs::read(store.path().join(&segment.path)).unwrap();
    Some(record.segments.iter().flat_map(read).collect())
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 64,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_bytes_are_taken_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
        try_all(&bytes);
    }

    #[test]
    fn any_entries_are_taken_or_refused_and_twice_the_same(
        steps in prop::collection::vec(step(), 0..12),
    ) {
        let tar = archive(steps);
        prop_assert_eq!(try_all(&tar), try_all(&tar));
    }

    #[test]
    fn any_image_that_is_made_is_sound_to_fsck(
        steps in prop::collection::vec(step(), 0..12),
    ) {
        let Some(disk) = try_all(&archive(steps)) else { return Ok(()) };
        let folder = fresh_store();
        let path = folder.path().join("disk");
        fs::write(&path, disk).unwrap();
        let fsck = Command::new("fsck.erofs").arg("--extract").arg(&path).output().unwrap();
        let said = String::from_utf8_lossy(&fsck.stderr).into_owned();
        prop_assert!(fsck.status.success(), "{}", said);
    }

    #[test]
    fn an_archive_with_any_byte_changed_is_taken_or_refused(
        steps in prop::collection::vec(step(), 1..6),
        at in any::<prop::sample::Index>(),
        to in any::<u8>(),
    ) {
        let mut tar = archive(steps);
        let at = at.index(tar.len());
        tar[at] = to;
        try_all(&tar);
    }

    #[test]
    fn a_tree_file_of_any_bytes_is_read_or_refused(
        steps in prop::collection::vec(step(), 0..8),
        at in any::<prop::sample::Index>(),
        to in any::<u8>(),
    ) {
        let store = fresh_store();
        let tar = archive(steps);
        prop_assume!(convert_within(store.path(), &tar, &Limits::default()).is_ok());
        let path = crate::store::tree_path(store.path(), &sha256(&tar));
        let mut bytes = fs::read(path).unwrap();
        prop_assert!(StoredLayer::from_bytes(&bytes).is_some());
        let at = at.index(bytes.len());
        bytes[at] = to;
        if let Some(stored) = StoredLayer::from_bytes(&bytes) {
            let mut tree = crate::tree::Tree::new();
            // Refused or not: it must come to an end.
            let _ = tree.apply(stored.layer, 0);
            let _ = crate::erofs::Image::plan(&tree, &[stored.data_bytes / 4096]).map(|image| {
                image.write(std::io::sink(), &sha256(b"manifest"))
            });
        }
    }
}
