//! What older releases wrote is read, and what newer ones write is refused by name.
//!
//! `fixtures/format-1` is a store as the first release of format 1 left it, its key beside it: `root`
//! with memory, disk, state and a fact, and `child`, which changed two pages of its memory. It is not
//! made anew when the format changes: the next format gets a folder of its own beside it, made by
//! `HOLDFAST_WRITE_FIXTURE=folder cargo test -p holdfast-snapshot --test format -- write`.

use std::{io, path::Path};

use fs_err as fs;
use holdfast_snapshot::{
    Draft, FORMAT, Folder, Key, Kind, PAGE_BYTES, Pages, PieceStore, Snapshot, SnapshotError,
    Source, collect,
};

const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/format-1");
/// Names the folder that a fixture is to be written to.
const WRITE: &str = "HOLDFAST_WRITE_FIXTURE";

const PAGES: u64 = 96;
const STATE: &[u8] = b"state of CPUs and devices";

/// A page in four is zero; the others have bytes of their own.
struct Made {
    changed: &'static [u64],
}

const ROOT: Made = Made { changed: &[] };
/// One page that was zero, one that becomes zero.
const CHILD: Made = Made { changed: &[4, 5] };

impl Made {
    fn page(&self, page: u64) -> Vec<u8> {
        let turned = self.changed.contains(&page);
        if page.is_multiple_of(4) != turned {
            return vec![0; PAGE_BYTES];
        }
        let mut state = u32::try_from(page).unwrap().wrapping_mul(0x9e37_79b9) | 1;
        let mut noise = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_le_bytes()[3]
        };
        (0..PAGE_BYTES).map(|place| if place % 8 == 0 { noise() } else { 0x5a }).collect()
    }

    fn whole(&self) -> Vec<u8> {
        (0..PAGES).flat_map(|page| self.page(page)).collect()
    }
}

impl Source for Made {
    fn bytes(&self) -> u64 {
        PAGES * PAGE_BYTES as u64
    }

    fn used(&self) -> io::Result<Pages> {
        Ok(std::iter::once(0..PAGES).collect())
    }

    fn read_at(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let at = usize::try_from(at).unwrap();
        into.copy_from_slice(&self.whole()[at..at + into.len()]);
        Ok(())
    }
}

fn write(folder: &Path) -> Result<(), SnapshotError> {
    let mut bytes = [0; 32];
    (0_u8..).zip(&mut bytes).for_each(|(number, byte)| *byte = number);
    let key = Key::new(bytes);
    let store = Folder::open(folder)?;
    fs::write(folder.join("key"), bytes).unwrap();
    let mut root = Draft::new(&store, &key, "root", None)?;
    root.image("memory", &ROOT, None, &[9, 8, 7])?;
    root.image("disk", &ROOT, None, &[])?;
    root.state(STATE)?;
    root.about("tier", "XS");
    let root = root.commit(1_700_000_000_000)?;
    let mut child = Draft::new(&store, &key, "child", Some(&root))?;
    let changed: Pages = CHILD.changed.iter().map(|page| *page..*page + 1).collect();
    child.image("memory", &CHILD, Some(&changed), &[])?;
    child.state(STATE)?;
    child.commit(1_700_000_001_000)?;
    Ok(())
}

/// Does nothing in an ordinary run.
#[test]
fn write_a_fixture() {
    if let Ok(folder) = std::env::var(WRITE) {
        write(Path::new(&folder)).unwrap();
    }
}

/// A copy, for a store is written to when it is opened, and its key.
fn fixture() -> (tempfile::TempDir, Folder, Key) {
    let copy = tempfile::tempdir().unwrap();
    for folder in Kind::ALL.map(Kind::folder).into_iter().chain(["manifests"]) {
        fs::create_dir_all(copy.path().join(folder)).unwrap();
        for piece in fs::read_dir(Path::new(FIXTURE).join(folder)).unwrap() {
            let piece = piece.unwrap();
            let to = copy.path().join(folder).join(piece.file_name());
            fs::copy(piece.path(), to).unwrap();
        }
    }
    let key = fs::read(Path::new(FIXTURE).join("key")).unwrap();
    let store = Folder::open(copy.path()).unwrap();
    (copy, store, Key::new(key.try_into().unwrap()))
}

fn restored(store: &Folder, key: &Key, snapshot: &Snapshot, image: &str) -> Vec<u8> {
    let path = tempfile::NamedTempFile::new().unwrap();
    snapshot.image(store, key, image).unwrap().restore(path.as_file()).unwrap();
    fs::read(path.path()).unwrap()
}

#[test]
fn a_store_of_format_1_opens_with_all_that_is_in_it() {
    let (_copy, store, key) = fixture();
    assert_eq!(store.manifests().unwrap(), ["child", "root"]);
    let root = Snapshot::open(&store, &key, "root").unwrap();
    assert_eq!((root.manifest.format, root.manifest.created_ms), (1, 1_700_000_000_000));
    assert_eq!(root.manifest.about["tier"], "XS");
    assert_eq!(root.state(&store, &key).unwrap().unwrap(), STATE);
    for image in ["memory", "disk"] {
        assert!(restored(&store, &key, &root, image) == ROOT.whole(), "{image} of root");
    }
    let child = Snapshot::open(&store, &key, "child").unwrap();
    assert_eq!(child.manifest.parent.as_deref(), Some("root"));
    assert!(restored(&store, &key, &child, "memory") == CHILD.whole(), "memory of child");
    for snapshot in [&root, &child] {
        assert!(snapshot.verify(&store, &key).unwrap().frames > 0);
    }
}

#[test]
fn a_snapshot_is_made_on_one_of_format_1_and_what_nobody_needs_of_it_is_collected() {
    let (_copy, store, key) = fixture();
    let child = Snapshot::open(&store, &key, "child").unwrap();
    let mut next = Draft::new(&store, &key, "next", Some(&child)).unwrap();
    let changed: Pages = CHILD.changed.iter().map(|page| *page..*page + 1).collect();
    next.image("memory", &ROOT, Some(&changed), &[]).unwrap();
    let next = next.commit(1).unwrap();
    for id in ["root", "child"] {
        assert!(store.delete_manifest(id).unwrap());
    }
    let collected = collect(&store, 0).unwrap();
    assert!(collected.pieces_deleted > 0, "{collected:?}");
    assert!(restored(&store, &key, &next, "memory") == ROOT.whole());
    next.verify(&store, &key).unwrap();
}

#[test]
fn a_newer_format_is_refused_by_number_with_the_remedy_and_nothing_of_its_store_is_collected() {
    let (copy, store, key) = fixture();
    let newer = FORMAT + 1;
    let path = copy.path().join("manifests").join("root");
    let text = fs::read_to_string(&path).unwrap();
    let text = text.replacen(r#""format":1"#, &format!(r#""format":{newer},"more":[]"#), 1);
    fs::write(&path, text).unwrap();
    let error = Snapshot::open(&store, &key, "root").unwrap_err();
    let SnapshotError::TooNew { id, found } = &error else { panic!("{error}") };
    assert_eq!((id.as_str(), *found), ("root", newer));
    let text = error.to_string();
    for part in ["snapshot root", &format!("format {newer}"), &format!("up to {FORMAT}"), "update"]
    {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
    // It might need any of them.
    store.delete_manifest("child").unwrap();
    let count = || Kind::ALL.map(|kind| store.pieces(kind, 0).unwrap().len());
    let before = count();
    let error = collect(&store, 0).unwrap_err();
    assert!(matches!(error, SnapshotError::TooNew { .. }), "{error}");
    assert_eq!(count(), before);
    // Others open as ever.
    let (_copy, store, key) = fixture();
    assert!(Snapshot::open(&store, &key, "child").is_ok());
}
