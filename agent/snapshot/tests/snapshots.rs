//! Snapshots in a folder: what was written is read, whatever happens to the pieces is found, and a
//! collection leaves what is needed.

use std::{collections::BTreeMap, io, os::unix::fs::FileExt};

use fs_err as fs;
use holdfast_snapshot::{
    Draft, FileSource, Fill, Folder, FrameReader, Key, Kind, Name, PAGE_BYTES, Pages, PieceStore,
    Snapshot, SnapshotError, Source, collect,
};
use proptest::prelude::*;
use tempfile::TempDir;

const MEMORY: &str = "memory";

fn key() -> Key {
    Key::new([7; 32])
}

fn store() -> (TempDir, Folder) {
    let folder = tempfile::tempdir().unwrap();
    let store = Folder::open(folder.path()).unwrap();
    (folder, store)
}

/// An image in memory.
#[derive(Debug, Clone, PartialEq)]
struct Bytes(Vec<u8>);

impl Bytes {
    /// Zeros but for these pages, each filled with bytes of its own.
    fn of(pages: usize, filled: &[(usize, u8)]) -> Self {
        let mut bytes = Self(vec![0; pages * PAGE_BYTES]);
        filled.iter().for_each(|&(page, seed)| bytes.fill(page, seed));
        bytes
    }

    /// Seed 0 makes the page zero. Others compress to about a half.
    fn fill(&mut self, page: usize, seed: u8) {
        let text = &mut self.0[page * PAGE_BYTES..(page + 1) * PAGE_BYTES];
        let mut state = u32::from(seed).wrapping_mul(0x9e37_79b9) ^ u32::try_from(page).unwrap();
        for (place, byte) in text.iter_mut().enumerate() {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let noise = (state >> 24).to_le_bytes()[0];
            *byte = if seed == 0 || place % 2 == 0 { seed } else { noise };
        }
    }
}

impl Source for Bytes {
    fn bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn used(&self) -> io::Result<Pages> {
        Ok(std::iter::once(0..self.bytes() / PAGE_BYTES as u64).collect())
    }

    fn read_at(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let at = usize::try_from(at).unwrap();
        into.copy_from_slice(&self.0[at..at + into.len()]);
        Ok(())
    }
}

fn write(store: &Folder, id: &str, image: &Bytes) -> Snapshot {
    let key = key();
    let mut draft = Draft::new(store, &key, id, None).unwrap();
    draft.image(MEMORY, image, None, &[]).unwrap();
    draft.commit(1).unwrap()
}

fn write_child(
    store: &Folder,
    id: &str,
    parent: &Snapshot,
    image: &Bytes,
    changed: &[usize],
) -> Snapshot {
    let key = key();
    let mut draft = Draft::new(store, &key, id, Some(parent)).unwrap();
    let changed: Pages = changed.iter().map(|page| *page as u64..*page as u64 + 1).collect();
    draft.image(MEMORY, image, Some(&changed), &[]).unwrap();
    draft.commit(2).unwrap()
}

/// Frame by frame, the last one first.
fn filled(store: &Folder, snapshot: &Snapshot) -> Result<Vec<u8>, SnapshotError> {
    let image = &snapshot.manifest.images[MEMORY];
    let layers: Vec<Name> = image.layers.iter().map(|layer| layer.name).collect();
    let fill = Fill::open(store, &key(), image.bytes, &layers)?;
    let mut reader = FrameReader::new()?;
    let mut bytes = vec![0; usize::try_from(fill.bytes()).unwrap()];
    let mut times = vec![0; bytes.len() / PAGE_BYTES];
    let frames: Vec<_> = fill.frames().collect();
    let places: Vec<_> = frames.iter().map(|frame| fill.place(*frame)).collect();
    assert_eq!(places, (0..fill.count()).collect::<Vec<_>>());
    for frame in frames.into_iter().rev() {
        for (at, text) in fill.unpack(&mut reader, frame)?.runs() {
            let start = usize::try_from(at).unwrap();
            bytes[start..start + text.len()].copy_from_slice(text);
            let pages = start / PAGE_BYTES..(start + text.len()) / PAGE_BYTES;
            times[pages].iter_mut().for_each(|times| *times += 1);
            assert_eq!(fill.frame_at(at), Some(frame));
        }
    }
    for (page, times) in (0..).zip(times) {
        // Each page that is not zero lies in one frame, and the others in none.
        assert_eq!(usize::from(fill.frame_at(page * PAGE_BYTES as u64).is_some()), times);
    }
    Ok(bytes)
}

/// Read in all ways: page by page in an order of its own, into a file, and frame by frame.
fn read(store: &Folder, snapshot: &Snapshot) -> Result<Bytes, SnapshotError> {
    let mut image = snapshot.image(store, &key(), MEMORY)?;
    let length = usize::try_from(image.bytes()).unwrap();
    let mut bytes = vec![0; length];
    let pages = length / PAGE_BYTES;
    for step in 0..pages {
        // 7919 is prime: it goes over all pages of any image here.
        let page = step * 7919 % pages;
        if let Some(text) = image.page(page as u64)? {
            bytes[page * PAGE_BYTES..(page + 1) * PAGE_BYTES].copy_from_slice(text);
        }
    }
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[0xee; 9000], 0).unwrap();
    image.restore(&file)?;
    assert_eq!(file.metadata().unwrap().len(), image.bytes());
    let mut restored = vec![0; length];
    file.read_exact_at(&mut restored, 0).unwrap();
    assert!(restored == bytes, "the two ways to read differ");
    assert!(filled(store, snapshot)? == bytes, "what is filled in differs");
    Ok(Bytes(bytes))
}

fn piece_files(folder: &TempDir, kind: Kind) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(folder.path().join(kind.folder())).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

#[test]
fn memory_disk_and_state_come_back_and_facts_with_them() {
    let (_folder, store) = store();
    let memory = Bytes::of(100, &[(0, 1), (1, 2), (40, 3), (99, 4)]);
    let disk = Bytes::of(30, &[(7, 9)]);
    let key = key();
    let mut draft = Draft::new(&store, &key, "a", None).unwrap();
    let written = draft.image(MEMORY, &memory, None, &[40, 0]).unwrap();
    assert_eq!((written.considered, written.zero, written.packed), (100, 96, 4));
    // What is wanted first is to be unpacked quickly, not to be small.
    assert!(written.stored_bytes <= 4 * PAGE_BYTES as u64 + 32, "{written:?}");
    let written = draft.image("disk", &disk, None, &[]).unwrap();
    assert!(written.stored_bytes < PAGE_BYTES as u64 * 3 / 4, "{written:?}");
    draft.state(b"registers").unwrap();
    draft.about("tier", "XS");
    assert!(matches!(Snapshot::open(&store, &key, "a"), Err(SnapshotError::Missing { .. })));
    let committed = draft.commit(5).unwrap();

    let snapshot = Snapshot::open(&store, &key, "a").unwrap();
    assert_eq!(snapshot, committed);
    assert_eq!(read(&store, &snapshot).unwrap(), memory);
    let mut image = snapshot.image(&store, &key, "disk").unwrap();
    assert_eq!(image.page(7).unwrap().unwrap(), &disk.0[7 * PAGE_BYTES..8 * PAGE_BYTES]);
    assert_eq!(image.page(6).unwrap(), None);
    assert_eq!(snapshot.state(&store, &key).unwrap().unwrap(), b"registers");
    assert_eq!(snapshot.manifest.about["tier"], "XS");
    assert_eq!(snapshot.verify(&store, &key).unwrap().frames, 2);
    assert!(snapshot.image(&store, &key, "nothing").is_err());
}

#[test]
fn nothing_of_the_guest_lies_in_the_store_in_the_clear() {
    let (folder, store) = store();
    let mut memory = Bytes::of(4, &[]);
    let secret = b"the tenant's secret, long enough to be found";
    memory.0[5000..5000 + secret.len()].copy_from_slice(secret);
    let key = key();
    let mut draft = Draft::new(&store, &key, "a", None).unwrap();
    draft.image(MEMORY, &memory, None, &[]).unwrap();
    draft.state(secret).unwrap();
    draft.commit(1).unwrap();
    for path in Kind::ALL.iter().flat_map(|kind| piece_files(&folder, *kind)) {
        let bytes = fs::read(&path).unwrap();
        assert!(!bytes.windows(12).any(|window| window == &secret[..12]), "{path:?}");
    }
    let other = Key::new([8; 32]);
    let error = Snapshot::open(&store, &other, "a").unwrap_err();
    assert!(matches!(error, SnapshotError::WrongKey { .. }), "{error}");
}

#[test]
fn a_child_stores_what_changed_and_outlives_its_parents_manifest() {
    let (folder, store) = store();
    let mut image = Bytes::of(1000, &(0..1000).map(|page| (page, 1)).collect::<Vec<_>>());
    let parent = write(&store, "a", &image);
    let before: u64 = piece_files(&folder, Kind::Segment)
        .iter()
        .map(|path| fs::metadata(path).unwrap().len())
        .sum();
    image.fill(10, 5);
    image.fill(500, 0);
    let child = write_child(&store, "b", &parent, &image, &[10, 11, 500]);
    let after: u64 = piece_files(&folder, Kind::Segment)
        .iter()
        .map(|path| fs::metadata(path).unwrap().len())
        .sum();
    assert!(after - before < 3 * PAGE_BYTES as u64, "{} bytes", after - before);
    assert_eq!(read(&store, &child).unwrap(), image);

    assert!(store.delete_manifest("a").unwrap());
    assert!(!store.delete_manifest("a").unwrap());
    let collected = collect(&store, 0).unwrap();
    assert_eq!((collected.snapshots, collected.pieces_deleted), (1, 0));
    assert_eq!(read(&store, &child).unwrap(), image);
    store.delete_manifest("b").unwrap();
    let collected = collect(&store, 0).unwrap();
    assert!(collected.pieces_deleted >= 4 && collected.bytes_deleted > before);
    assert!(Kind::ALL.iter().all(|kind| piece_files(&folder, *kind).is_empty()));
}

#[test]
fn a_chain_ends_where_every_page_would_be_looked_for_too_often() {
    let (_folder, store) = store();
    let mut image = Bytes::of(20, &[(0, 1)]);
    let mut last = write(&store, "s-0", &image);
    for step in 1..4_u8 {
        image.fill(step.into(), step);
        last = write_child(&store, &format!("s-{step}"), &last, &image, &[step.into()]);
        assert_eq!(read(&store, &last).unwrap(), image);
    }
    let key = key();
    let mut draft = Draft::new(&store, &key, "s-4", Some(&last)).unwrap();
    let error = draft.image(MEMORY, &image, Some(&Pages::default()), &[]).unwrap_err();
    assert!(matches!(error, SnapshotError::TooDeep { .. }), "{error}");
    // Without saying what changed it is written whole.
    draft.image(MEMORY, &image, None, &[]).unwrap();
    let flat = draft.commit(3).unwrap();
    assert_eq!(flat.manifest.images[MEMORY].layers.len(), 1);
    assert_eq!(read(&store, &flat).unwrap(), image);
}

#[test]
fn an_image_of_another_length_is_no_child() {
    let (_folder, store) = store();
    let parent = write(&store, "a", &Bytes::of(4, &[]));
    let key = key();
    let mut draft = Draft::new(&store, &key, "b", Some(&parent)).unwrap();
    let error = draft.image(MEMORY, &Bytes::of(5, &[]), Some(&Pages::default()), &[]);
    assert!(matches!(error, Err(SnapshotError::Length { .. })));
}

#[test]
fn an_id_is_given_once() {
    let (_folder, store) = store();
    let image = Bytes::of(4, &[(1, 1)]);
    write(&store, "a", &image);
    let key = key();
    let mut draft = Draft::new(&store, &key, "a", None).unwrap();
    draft.image(MEMORY, &image, None, &[]).unwrap();
    // Another salt, so other content.
    assert!(matches!(draft.commit(1), Err(SnapshotError::Exists { .. })));
    assert_eq!(read(&store, &Snapshot::open(&store, &key, "a").unwrap()).unwrap(), image);
}

#[test]
fn every_changed_byte_and_every_cut_is_found_before_it_is_believed() {
    let (folder, store) = store();
    let image = Bytes::of(64, &(0..40).map(|page| (page, 3)).collect::<Vec<_>>());
    let key = key();
    let mut draft = Draft::new(&store, &key, "a", None).unwrap();
    draft.image(MEMORY, &image, None, &[]).unwrap();
    draft.state(b"state").unwrap();
    let snapshot = draft.commit(1).unwrap();
    for path in Kind::ALL.iter().flat_map(|kind| piece_files(&folder, *kind)) {
        let whole = fs::read(&path).unwrap();
        for at in (0..whole.len()).step_by((whole.len() / 50).max(1)) {
            let mut changed = whole.clone();
            changed[at] ^= 0x40;
            fs::write(&path, &changed).unwrap();
            assert!(snapshot.verify(&store, &key).is_err(), "byte {at} of {path:?}");
            fs::write(&path, &whole[..at]).unwrap();
            assert!(snapshot.verify(&store, &key).is_err(), "cut at {at} of {path:?}");
        }
        fs::remove_file(&path).unwrap();
        let error = snapshot.verify(&store, &key).unwrap_err();
        assert!(matches!(error, SnapshotError::Missing { .. }), "{error}");
        fs::write(&path, &whole).unwrap();
    }
    assert!(snapshot.verify(&store, &key).is_ok());
}

#[test]
fn drafts_of_a_killed_process_are_swept_and_its_pieces_collected_once_they_are_old() {
    let (folder, store) = store();
    let kept = write(&store, "kept", &Bytes::of(4, &[(0, 1)]));
    let key = key();
    let mut draft = Draft::new(&store, &key, "lost", None).unwrap();
    draft.image(MEMORY, &Bytes::of(4, &[(0, 2)]), None, &[]).unwrap();
    drop(draft);
    fs::write(folder.path().join("tmp/half"), "half a piece").unwrap();
    let store = Folder::open(folder.path()).unwrap();
    assert_eq!(fs::read_dir(folder.path().join("tmp")).unwrap().count(), 0);
    let young = collect(&store, 3600).unwrap();
    assert_eq!((young.snapshots, young.pieces_deleted), (1, 0));
    let old = collect(&store, 0).unwrap();
    assert_eq!((old.pieces_kept, old.pieces_deleted), (2, 2));
    assert!(kept.verify(&store, &key).is_ok());
}

#[test]
fn a_manifest_that_a_collection_cannot_read_keeps_everything() {
    let (folder, store) = store();
    write(&store, "a", &Bytes::of(4, &[(0, 1)]));
    let strange = r#"{"format":99,"id":"b","images":{"memory":"in a form of the future"}}"#;
    for text in [format!("{strange}\n00\n"), "not JSON\n00\n".to_owned(), String::new()] {
        fs::write(folder.path().join("manifests/b"), text).unwrap();
        store.delete_manifest("a").unwrap();
        assert!(collect(&store, 0).is_err());
        assert_eq!(piece_files(&folder, Kind::Segment).len(), 1);
    }
}

#[test]
fn guest_memory_with_holes_is_read_from_its_file() {
    let (_folder, store) = store();
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 << 20).unwrap();
    let page = Bytes::of(1, &[(0, 3)]).0;
    for at in [0, 1 << 20, (64 << 20) - PAGE_BYTES as u64] {
        file.write_all_at(&page, at).unwrap();
    }
    let key = key();
    let mut draft = Draft::new(&store, &key, "a", None).unwrap();
    let source = FileSource::new(file).unwrap();
    let written = draft.image(MEMORY, &source, None, &[]).unwrap();
    assert_eq!(written.packed, 3);
    // A file system may keep some more than was written.
    assert!(written.considered < 2000, "{written:?}");
    let snapshot = draft.commit(1).unwrap();
    let mut image = snapshot.image(&store, &key, MEMORY).unwrap();
    assert_eq!(image.page(256).unwrap().unwrap(), page);
    assert_eq!(image.page(257).unwrap(), None);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// A root and up to three children, each after random changes, one of them with a wanted order.
    #[test]
    fn what_is_read_is_what_was_written(
        pages in 1_usize..200,
        filled in prop::collection::vec((0_usize..200, 1_u8..6), 0..80),
        steps in prop::collection::vec(prop::collection::vec((0_usize..200, 0_u8..6), 0..40), 0..3),
        first in prop::collection::vec(0_u64..220, 0..20),
    ) {
        let (_folder, store) = store();
        let key = key();
        let inside = |list: &[(usize, u8)]| -> Vec<(usize, u8)> {
            list.iter().copied().filter(|(page, _)| *page < pages).collect()
        };
        let mut image = Bytes::of(pages, &inside(&filled));
        let mut draft = Draft::new(&store, &key, "s-0", None).unwrap();
        draft.image(MEMORY, &image, None, &first).unwrap();
        let mut chain = vec![(draft.commit(0).unwrap(), image.clone())];
        for (step, changes) in steps.iter().enumerate() {
            let changes = inside(changes);
            changes.iter().for_each(|&(page, seed)| image.fill(page, seed));
            let changed: Vec<usize> = changes.iter().map(|(page, _)| *page).collect();
            let parent = &chain.last().unwrap().0;
            let id = format!("s-{}", step + 1);
            let child = write_child(&store, &id, parent, &image, &changed);
            chain.push((child, image.clone()));
        }
        for (snapshot, image) in &chain {
            prop_assert_eq!(&read(&store, snapshot).unwrap(), image);
        }
    }

    #[test]
    fn no_bytes_make_a_manifest_of_a_key(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let (folder, store) = store();
        fs::write(folder.path().join("manifests/a"), bytes).unwrap();
        prop_assert!(Snapshot::open(&store, &key(), "a").is_err());
    }
}

#[test]
fn what_a_manifest_looks_like() {
    let (_folder, store) = store();
    let snapshot = write(&store, "a", &Bytes::of(4, &[(0, 1)]));
    let json: BTreeMap<String, serde_json::Value> =
        serde_json::from_value(serde_json::to_value(&snapshot.manifest).unwrap()).unwrap();
    let keys: Vec<&str> = json.keys().map(String::as_str).collect();
    assert_eq!(keys, ["about", "createdMs", "format", "id", "images", "parent", "state"]);
}
