//! The snapshot folder, without a microVM.

use std::os::unix::fs::FileExt;

use holdfast_model::id::ID_BYTES;

use super::*;
use crate::credentials::Site;

/// What is on the disks: two pages.
pub(super) const DISK: [u8; 8192] = [7; 8192];

fn snapshots(state: &Path) -> Snapshots {
    Snapshots::open(state, keys(state, None), 0).unwrap()
}

fn keys(state: &Path, site: Option<Arc<Site>>) -> Arc<Keys> {
    let store = Arc::new(Store::open(&state.join("store.redb")).unwrap());
    Keys::open(state, store, site).unwrap()
}

/// A node that has this state and store, of the site with this as every byte of its key.
pub(super) fn node_of_site(
    state: &Path,
    store: impl PieceStore + Send + 'static,
    byte: u8,
) -> Snapshots {
    let site = Arc::new(Site::new(Key::new([byte; 32]), vec!["default".to_owned()]));
    let remote = Remote::new(store, Arc::clone(&site), 0, state.join("remote")).unwrap();
    Snapshots::open(state, keys(state, Some(site)), 0).unwrap().with_remote(Some(remote))
}

pub(super) fn id(byte: u8) -> SnapshotId {
    SnapshotId::from_random([byte; ID_BYTES])
}

pub(super) fn group() -> GroupKey {
    GroupKey::local_default()
}

/// As [`Snapshots::copy`] leaves it, of a file.
pub(super) fn copied(snapshots: &Snapshots, id: SnapshotId, text: &[u8]) -> Copied {
    let folder = snapshots.folder(&id);
    fs::create_dir_all(&folder).unwrap();
    let memory = disk::new(&snapshots.memory_path(&id)).unwrap();
    memory.set_len(1 << 20).unwrap();
    memory.file().write_all_at(text, 8192).unwrap();
    fs::write(folder.join(DISK_FILE), DISK).unwrap();
    Copied {
        id,
        folder,
        memory: Some(memory),
        parent: None,
        touched: Touched::default(),
        committed: false,
    }
}

pub(super) fn memory_of(taken: &TakenUp) -> Vec<u8> {
    let mut text = vec![0; 5];
    let Memory::Image(memory) = &taken.memory else { panic!("{taken:?}") };
    memory.file().read_exact_at(&mut text, 8192).unwrap();
    text
}

#[test]
fn what_was_committed_is_taken_up_with_and_without_its_memory_file() {
    let state = tempfile::tempdir().unwrap();
    let first = snapshots(state.path());
    first.commit(&group(), copied(&first, id(1), b"guest"), b"state", 7).unwrap();
    assert_eq!(memory_of(&first.take_up(&group(), &id(1)).unwrap()), b"guest");
    // As after a restart of the node.
    fs::remove_file(first.memory_path(&id(1))).unwrap();
    drop(first);
    let again = snapshots(state.path());
    again.sweep(|name| name == id(1).as_str()).unwrap();
    let taken = again.take_up(&group(), &id(1)).unwrap();
    assert_eq!((memory_of(&taken), taken.state), (b"guest".to_vec(), b"state".to_vec()));
    assert!(fs::read(taken.disk).unwrap() == DISK);
}

#[test]
fn what_a_guest_was_seen_to_touch_is_packed_again_by_its_next_suspend_and_told() {
    let run = |start, end| std::iter::once(start..end).collect::<Pages>();
    let state = tempfile::tempdir().unwrap();
    let all = snapshots(state.path());
    all.commit(&group(), copied(&all, id(1), b"guest"), b"state", 7).unwrap();
    all.saw(&id(1), Touched::seen(&run(2, 4), &run(2, 3)).unwrap());
    let written = all.take_up(&group(), &id(1)).unwrap().written;
    assert_eq!(written, [PageRun { page: 2, count: 1 }]);
    // A page has changed that is zero, so that nothing else is packed.
    for (from, to) in [(1, 2), (2, 3)] {
        let mut copied = copied(&all, id(to), b"guest");
        copied.parent = Some((id(from), run(9, 10)));
        copied.touched = all.touched(&id(from));
        all.commit(&group(), copied, b"state", 7).unwrap();
    }
    let packed = |of: u8| {
        let key = all.keys.known_of_group(&group()).unwrap();
        let snapshot = Snapshot::open(&all.pieces, &key, id(of).as_str()).unwrap();
        !snapshot.manifest.images[MEMORY].layers[0].segments.is_empty()
    };
    assert_eq!([packed(2), packed(3)], [true, false], "once");
    for of in [2, 3] {
        fs::remove_file(all.memory_path(&id(of))).unwrap();
        let (cold, _) = all.cold(&group(), &id(of)).unwrap().unwrap();
        assert_eq!(cold.first, [2 * PAGE, 3 * PAGE]);
        assert_eq!(memory_of(&all.take_up(&group(), &id(of)).unwrap()), b"guest");
    }
}

#[test]
fn what_was_not_committed_is_gone_at_once_and_what_nobody_knows_at_the_next_start() {
    let state = tempfile::tempdir().unwrap();
    let all = snapshots(state.path());
    drop(copied(&all, id(1), b"guest"));
    assert!(!all.folder(&id(1)).exists());
    all.commit(&group(), copied(&all, id(2), b"guest"), b"state", 7).unwrap();
    all.commit(&group(), copied(&all, id(3), b"guest"), b"state", 7).unwrap();
    all.sweep(|name| name == id(3).as_str()).unwrap();
    assert!(!all.folder(&id(2)).exists());
    assert!(all.take_up(&group(), &id(2)).is_err());
    assert!(all.take_up(&group(), &id(3)).is_ok());
    all.remove(&id(3)).unwrap();
    all.remove(&id(3)).unwrap();
    let left = fs::read_dir(state.path().join("snapshots/segments")).unwrap().count();
    assert_eq!(left, 0, "pieces of no snapshot");
}

#[test]
fn another_nodes_key_opens_nothing_and_says_so() {
    let state = tempfile::tempdir().unwrap();
    let all = snapshots(state.path());
    all.commit(&group(), copied(&all, id(1), b"guest"), b"state", 7).unwrap();
    drop(all);
    fs::write(state.path().join("snapshot-key"), [7; 32]).unwrap();
    let error = snapshots(state.path()).take_up(&group(), &id(1)).unwrap_err();
    assert!(matches!(error, SaveError::Key(KeyError::GroupKey { .. })), "{error}");
    fs::write(state.path().join("snapshot-key"), "short").unwrap();
    let store = Arc::new(Store::open(&state.path().join("other.redb")).unwrap());
    let error = Keys::open(state.path(), store, None).err().unwrap();
    assert!(matches!(error, KeyError::NodeKey { .. }), "{error}");
}

#[test]
fn what_a_record_names_or_somebody_holds_is_not_removed() {
    let state = tempfile::tempdir().unwrap();
    let all = snapshots(state.path());
    all.commit(&group(), copied(&all, id(1), b"guest"), b"state", 7).unwrap();
    let (held, too) = (all.pin(&id(1)), all.pin(&id(1)));
    assert!(!all.release(&id(1)).unwrap());
    drop(held);
    assert!(!all.release(&id(1)).unwrap());
    let record = record(id(2), id(1));
    all.store.create_snapshot(&record).unwrap();
    drop(too);
    assert!(!all.release(&id(1)).unwrap());
    assert!(all.take_up(&group(), &id(1)).is_ok());
    all.store.remove_snapshot(&record.id).unwrap();
    assert!(all.release(&id(1)).unwrap());
    assert!(all.take_up(&group(), &id(1)).is_err());
}

pub(super) fn record(id: SnapshotId, data: SnapshotId) -> holdfast_store::SnapshotRecord {
    holdfast_store::SnapshotRecord {
        id,
        group: group(),
        sandbox: holdfast_model::SandboxId::from_random([1; ID_BYTES]),
        labels: Default::default(),
        data,
        spec: holdfast_model::SandboxSpec {
            resources: holdfast_model::Resources::DEFAULT,
            ..holdfast_model::SandboxSpec::of_image(holdfast_model::sandbox::ImageSource::Public(
                "a".to_owned(),
            ))
        },
        image: holdfast_model::Digest::from_sha256([1; 32]),
        bytes: 0,
        created_at_ms: 0,
        request_id: None,
    }
}

#[test]
fn memory_files_over_the_budget_go_and_are_made_anew_from_the_pieces() {
    let state = tempfile::tempdir().unwrap();
    let mut all = snapshots(state.path());
    for byte in 1..4 {
        let copied = copied(&all, id(byte), b"guest");
        all.commit(&group(), copied, b"state", 7).unwrap();
    }
    // Each has one block of its file system in use, and the first was used last.
    let one = all.memory_files().unwrap()[0].bytes;
    hot::used(&fs::File::open(all.memory_path(&id(1))).unwrap());
    all.hot_bytes_max = 2 * one;
    all.keep_to_budget(&id(2));
    let hot = |byte| all.anatomy(&group(), &id(byte)).unwrap().hot;
    assert_eq!([hot(1), hot(2), hot(3)], [true, true, false]);
    assert_eq!(memory_of(&all.take_up(&group(), &id(3)).unwrap()), b"guest");
    // Taken up, it is the one that is kept, and the one that was not used for longest went.
    assert_eq!([hot(1), hot(2), hot(3)], [true, false, true]);
}

#[test]
fn a_snapshot_says_what_it_is_made_of_and_whether_that_is_sound() {
    let state = tempfile::tempdir().unwrap();
    let all = snapshots(state.path());
    all.commit(&group(), copied(&all, id(1), b"guest"), b"state", 7).unwrap();
    let anatomy = all.anatomy(&group(), &id(1)).unwrap();
    assert_eq!((anatomy.pieces, anatomy.memory_layers, anatomy.hot), (3, 1, true));
    assert_eq!(all.bytes(&group(), &id(1)).unwrap(), anatomy.piece_bytes + anatomy.disk_bytes);
    assert_eq!(all.verify(&group(), &id(1)).unwrap().frames, 1);
    let segments = fs::read_dir(state.path().join("snapshots/segments")).unwrap();
    for segment in segments {
        let path = segment.unwrap().path();
        let mut bytes = fs::read(&path).unwrap();
        bytes[0] ^= 1;
        fs::write(&path, bytes).unwrap();
    }
    assert!(all.verify(&group(), &id(1)).is_err());
}

#[test]
fn a_memory_file_that_several_need_at_once_is_made_once_for_all() {
    let state = tempfile::tempdir().unwrap();
    let snapshots = snapshots(state.path());
    // Long enough that all of them come while it is made.
    let memory = vec![7; 8 << 20];
    snapshots.commit(&group(), copied(&snapshots, id(1), &memory), b"state", 7).unwrap();
    for _ in 0..5 {
        fs::remove_file(snapshots.memory_path(&id(1))).unwrap();
        let warmths: Vec<_> = std::thread::scope(|scope| {
            let take = || snapshots.take_up(&group(), &id(1)).unwrap().fetched.warmth;
            let takers: Vec<_> = (0..8).map(|_| scope.spawn(take)).collect();
            takers.into_iter().map(|taker| taker.join().unwrap()).collect()
        });
        assert_eq!(warmths.iter().filter(|warmth| **warmth == Warmth::Cold).count(), 1);
    }
}
