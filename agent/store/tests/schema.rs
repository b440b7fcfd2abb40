//! What older releases wrote is read, and what newer ones write is refused by name.
//!
//! `fixtures/schema-1.redb.zst` is a store as a release of schema 1 left it, with a record of each
//! kind. It stays as it is when records get fields; a new schema gets a file of its own beside it, made
//! by `HOLDFAST_WRITE_FIXTURE=file cargo test -p holdfast-store --test schema -- write`.

use std::path::Path;

use fs_err as fs;
use holdfast_model::{
    Digest, DiskImageId, GroupKey, Resources, SandboxId, SandboxSpec, SnapshotId, State,
    StopReason, sandbox::ImageSource,
};
use holdfast_store::{
    Answer, Begun, DiskImageState, Operation, SCHEMA_VERSION, SandboxRecord, SnapshotRecord, Store,
    StoreError,
};

const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/schema-1.redb.zst");
/// Names the file that a fixture is to be written to.
const WRITE: &str = "HOLDFAST_WRITE_FIXTURE";
const BYTES_MAX: usize = 64 << 20;

fn sandbox_id(byte: u8) -> SandboxId {
    SandboxId::from_random([byte; 20])
}

fn snapshot_id(byte: u8) -> SnapshotId {
    SnapshotId::from_random([byte; 20])
}

fn spec() -> SandboxSpec {
    SandboxSpec {
        image: ImageSource::Disk(DiskImageId::from_random([3; 20])),
        resources: Resources::DEFAULT,
        labels: [("name".to_owned(), "old".to_owned())].into(),
        environment: [("A".to_owned(), "1".to_owned())].into(),
        entrypoint: None,
        cmd: Some(vec!["sleep".to_owned()]),
        lifecycle_json: Some(r#"{"autoSuspendPolicy":{"enabled":true}}"#.to_owned()),
        egress_json: None,
        skip_egress_proxy: false,
    }
}

/// Does nothing in an ordinary run. Records are written as the text they were when the fixture was
/// made first: their types have other fields by now.
#[test]
fn write_a_fixture() {
    let Ok(file) = std::env::var(WRITE) else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.redb");
    let store = Store::open(&path).unwrap();
    let group = GroupKey::local_default();
    let suspended: SandboxRecord = serde_json::from_value(serde_json::json!({
        "id": sandbox_id(1), "group": group, "spec": spec(), "state": "Suspended", "failure": null,
        "image": Digest::from_sha256([1; 32]), "created_at_ms": 7, "request_id": "r1", "uid": 200_000,
        "saved": {"snapshot": snapshot_id(5), "at_ms": 9, "reason": "Idle", "of_another": false},
        "from_snapshot": snapshot_id(4),
    }))
    .unwrap();
    store.put_sandbox(&suspended).unwrap();
    let creating = SandboxRecord {
        id: sandbox_id(2),
        state: State::Creating,
        request_id: None,
        uid: None,
        saved: None,
        from_snapshot: None,
        ..suspended
    };
    store.create_sandbox(&creating).unwrap();
    let snapshot: SnapshotRecord = serde_json::from_value(serde_json::json!({
        "id": snapshot_id(4), "group": group, "sandbox": sandbox_id(9), "labels": {"name": "base"},
        "data": snapshot_id(6), "spec": spec(), "image": Digest::from_sha256([1; 32]),
        "bytes": 4096, "created_at_ms": 8, "request_id": null,
    }))
    .unwrap();
    store.create_snapshot(&snapshot).unwrap();
    let image = serde_json::from_value(serde_json::json!({
        "id": DiskImageId::from_random([3; 20]), "group": group, "base": "r.io/x:1", "labels": {},
        "entrypoint": null, "cmd": null, "state": "Ready", "message": null, "hint": null,
        "digest": Digest::from_sha256([1; 32]), "created_at_ms": 5, "request_id": null,
    }))
    .unwrap();
    store.put_disk_image(&image).unwrap();
    let record = serde_json::from_value(serde_json::json!({
        "key": group, "location": "here", "tags": {"a": "b"}, "properties_json": "{}",
        "created_at_ms": 1,
    }))
    .unwrap();
    store.put_group(&record).unwrap();
    store.group_secret(&group, b"wrapped".to_vec()).unwrap();
    store.begin_operation("done", "PUT /a", 1).unwrap();
    store.finish_operation("done", Answer { status: 200, body: "{}".to_owned() }).unwrap();
    store.begin_operation("begun", "PUT /b", 2).unwrap();
    drop(store);
    let packed = zstd::bulk::compress(&fs::read(&path).unwrap(), 19).unwrap();
    fs::write(Path::new(&file), packed).unwrap();
}

/// A copy, for a store is written to when it is opened.
fn fixture() -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.redb");
    let bytes = zstd::bulk::decompress(&fs::read(FIXTURE).unwrap(), BYTES_MAX).unwrap();
    fs::write(&path, bytes).unwrap();
    (folder, path)
}

#[test]
fn a_store_of_schema_1_opens_with_every_kind_of_record() {
    let (_folder, path) = fixture();
    let store = Store::open(&path).unwrap();
    let group = GroupKey::local_default();

    let [one, two] = &store.all_sandboxes().unwrap()[..] else { panic!("not two sandboxes") };
    assert_eq!((one.state, one.uid, &one.spec), (State::Suspended, Some(200_000), &spec()));
    let saved = one.saved.as_ref().unwrap();
    assert_eq!(saved.snapshot, snapshot_id(5));
    assert_eq!((saved.at_ms, saved.reason, saved.of_another), (9, StopReason::Idle, false));
    assert_eq!(one.from_snapshot, Some(snapshot_id(4)));
    assert_eq!((two.state, &two.saved), (State::Creating, &None));
    let intent = store.intent(&two.id).unwrap().unwrap();
    assert_eq!((intent.operation, intent.attempts), (Operation::Create, 1));

    let [snapshot] = &store.snapshots(&group).unwrap()[..] else { panic!("not one snapshot") };
    assert_eq!((&snapshot.data, snapshot.bytes, &snapshot.spec), (&snapshot_id(6), 4096, &spec()));
    for needed in [snapshot_id(5), snapshot_id(6)] {
        assert!(store.is_needed(&needed).unwrap(), "{needed}");
    }
    let [image] = &store.disk_images(&group).unwrap()[..] else { panic!("not one disk image") };
    assert_eq!((image.state, image.base.as_str()), (DiskImageState::Ready, "r.io/x:1"));
    assert_eq!(store.groups().unwrap()[0].tags["a"], "b");
    assert_eq!(store.known_group_secret(&group).unwrap().unwrap(), b"wrapped");
    let answer = Answer { status: 200, body: "{}".to_owned() };
    assert_eq!(store.begin_operation("done", "PUT /a", 3).unwrap(), Begun::Finished(answer));
    assert_eq!(store.begin_operation("begun", "PUT /b", 3).unwrap(), Begun::Unfinished);
    assert_eq!(store.errors(), 0);

    // And is written to.
    store.put_sandbox(&SandboxRecord { state: State::Failed, ..two.clone() }).unwrap();
    drop(store);
    let again = Store::open(&path).unwrap();
    assert_eq!(again.sandbox(&sandbox_id(2)).unwrap().unwrap().state, State::Failed);
}

#[test]
fn a_newer_schema_is_refused_by_number_with_the_remedy_and_left_as_it_is() {
    let (_folder, path) = fixture();
    let newer = redb::Database::open(&path).unwrap();
    let txn = newer.begin_write().unwrap();
    let meta = redb::TableDefinition::<&str, u64>::new("meta");
    txn.open_table(meta).unwrap().insert("schema", SCHEMA_VERSION + 1).unwrap();
    txn.commit().unwrap();
    drop(newer);
    for _ in 0..2 {
        let error = Store::open(&path).err().unwrap();
        let StoreError::Newer { found, known, .. } = &error else { panic!("{error}") };
        assert_eq!((*found, *known), (SCHEMA_VERSION + 1, SCHEMA_VERSION));
        let text = error.to_string();
        for part in ["store.redb", &format!("schema {found}"), &format!("{known}")] {
            assert!(text.contains(part), "{part:?} is not in {text:?}");
        }
        assert!(error.hint().contains("newer holdfastd"), "{}", error.hint());
    }
}
