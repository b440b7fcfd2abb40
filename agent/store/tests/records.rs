//! The calls of the store, on a real file.

use std::path::PathBuf;

use holdfast_model::{
    Digest, DiskImageId, GroupKey, SandboxId, SandboxSpec, SnapshotId, State, StopReason,
    SuspendMode, sandbox::ImageSource,
};
use holdfast_store::{
    Answer, Begun, DiskImageRecord, DiskImageState, GroupRecord, Intent, OPERATION_AGE_MS_MAX,
    Operation, Put, SCHEMA_VERSION, SandboxRecord, Saved, SnapshotRecord, Step, Store, StoreError,
};
use proptest::prelude::*;

struct Fixture {
    store: Store,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

fn fixture() -> Fixture {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.redb");
    Fixture { store: Store::open(&path).unwrap(), path, _folder: folder }
}

fn group(name: &str) -> GroupKey {
    GroupKey::new("local", "default", name).unwrap()
}

fn sandbox(byte: u8, group_name: &str, request_id: Option<&str>) -> SandboxRecord {
    SandboxRecord {
        request_id: request_id.map(str::to_owned),
        ..SandboxRecord::accepted(
            SandboxId::from_random([byte; 20]),
            group(group_name),
            SandboxSpec {
                cmd: Some(vec![]),
                lifecycle_json: Some("{}".to_owned()),
                ..SandboxSpec::of_image(ImageSource::Disk(DiskImageId::from_random([3; 20])))
            },
            Digest::from_sha256([1; 32]),
            7,
        )
    }
}

fn disk_image(byte: u8, request_id: Option<&str>) -> DiskImageRecord {
    DiskImageRecord {
        id: DiskImageId::from_random([byte; 20]),
        group: group("a"),
        base: "r.io/x:1".to_owned(),
        labels: Default::default(),
        entrypoint: None,
        cmd: None,
        state: DiskImageState::Creating,
        message: None,
        hint: None,
        digest: None,
        created_at_ms: 7,
        request_id: request_id.map(str::to_owned),
    }
}

fn answer(body: &str) -> Answer {
    Answer { status: 200, body: body.to_owned() }
}

#[test]
fn a_retried_create_finds_its_sandbox_and_writes_no_second() {
    let Fixture { store, .. } = fixture();
    let first = sandbox(1, "a", Some("r1"));
    assert_eq!(store.create_sandbox(&first).unwrap(), Put::New);
    let retried = store.create_sandbox(&sandbox(2, "a", Some("r1"))).unwrap();
    assert_eq!(retried, Put::Existing(first.clone()));
    assert_eq!(store.all_sandboxes().unwrap(), [first]);
}

#[test]
fn creates_without_a_request_id_or_of_other_groups_are_never_the_same() {
    let Fixture { store, .. } = fixture();
    for (byte, group, request) in
        [(1, "a", None), (2, "a", None), (3, "a", Some("r")), (4, "b", Some("r"))]
    {
        assert_eq!(store.create_sandbox(&sandbox(byte, group, request)).unwrap(), Put::New);
    }
    assert_eq!(store.sandboxes(&group("a")).unwrap().len(), 3);
    assert_eq!(store.sandboxes(&group("b")).unwrap().len(), 1);
}

fn snapshot(byte: u8) -> SnapshotRecord {
    let SandboxRecord { id: sandbox, group, spec, image, .. } = sandbox(9, "a", None);
    SnapshotRecord {
        id: SnapshotId::from_random([byte; 20]),
        group,
        sandbox,
        labels: Default::default(),
        data: SnapshotId::from_random([7; 20]),
        spec,
        image,
        bytes: 1,
        created_at_ms: 7,
        request_id: None,
    }
}

#[test]
fn a_clone_needs_its_snapshot_when_it_is_made_and_the_data_as_long_as_it_stands_on_them() {
    let Fixture { store, .. } = fixture();
    let snapshot = snapshot(1);
    let clone = SandboxRecord {
        from_snapshot: Some(snapshot.id.clone()),
        saved: Some(Saved {
            snapshot: snapshot.data.clone(),
            at_ms: 1,
            reason: StopReason::Asked,
            of_another: true,
            network: Some("digest".to_owned()),
            mode: SuspendMode::Memory,
        }),
        ..sandbox(1, "a", None)
    };
    let error = store.create_sandbox(&clone).unwrap_err();
    assert!(matches!(error, StoreError::NoSnapshot { .. }), "{error}");
    assert_eq!((store.all_sandboxes().unwrap(), store.intents().unwrap()), (vec![], vec![]));
    assert_eq!(store.errors(), 0);

    assert_eq!(store.create_snapshot(&snapshot).unwrap(), Put::New);
    assert_eq!(store.create_sandbox(&clone).unwrap(), Put::New);
    assert_eq!(store.snapshots(&group("a")).unwrap(), std::slice::from_ref(&snapshot));
    assert_eq!(store.snapshots(&group("b")).unwrap(), []);
    assert!(store.remove_snapshot(&snapshot.id).unwrap());
    assert_eq!(store.snapshot(&snapshot.id).unwrap(), None);
    assert!(store.is_needed(&snapshot.data).unwrap());
    store.remove_sandbox(&clone.id).unwrap();
    assert!(!store.is_needed(&snapshot.data).unwrap());
}

#[test]
fn a_retried_disk_image_finds_the_first() {
    let Fixture { store, .. } = fixture();
    let first = disk_image(1, Some("r1"));
    assert_eq!(store.create_disk_image(&first).unwrap(), Put::New);
    let retried = store.create_disk_image(&disk_image(2, Some("r1"))).unwrap();
    assert_eq!(retried, Put::Existing(first));
}

#[test]
fn an_outcome_does_not_bring_a_deleted_disk_image_back() {
    let Fixture { store, .. } = fixture();
    let image = disk_image(1, None);
    store.put_disk_image(&image).unwrap();
    assert!(store.remove_disk_image(&image.id).unwrap());
    let ready = |record: &mut DiskImageRecord| record.state = DiskImageState::Ready;
    assert_eq!(store.update_disk_image(&image.id, ready).unwrap(), None);
    assert_eq!(store.disk_image(&image.id).unwrap(), None);
}

#[test]
fn groups_are_put_found_and_removed_by_their_key() {
    let Fixture { store, .. } = fixture();
    let record = GroupRecord {
        key: group("a"),
        location: "here".to_owned(),
        tags: Default::default(),
        properties_json: "{}".to_owned(),
        created_at_ms: 1,
    };
    store.put_group(&record).unwrap();
    assert_eq!(store.group(&group("a")).unwrap(), Some(record));
    assert!(store.remove_group(&group("a")).unwrap());
    assert!(!store.remove_group(&group("a")).unwrap());
    assert_eq!(store.groups().unwrap(), []);
}

#[test]
fn a_call_is_carried_out_once_and_its_answer_is_remembered() {
    let Fixture { store, .. } = fixture();
    assert_eq!(store.begin_operation("r", "PUT /a", 0).unwrap(), Begun::New);
    assert_eq!(store.begin_operation("r", "PUT /a", 1).unwrap(), Begun::Unfinished);
    store.finish_operation("r", answer("done")).unwrap();
    let again = store.begin_operation("r", "PUT /a", 2).unwrap();
    assert_eq!(again, Begun::Finished(answer("done")));
    assert_eq!(store.begin_operation("r", "PUT /b", 3).unwrap(), Begun::OtherCall);
}

#[test]
fn a_call_that_is_forgotten_or_too_old_may_be_carried_out_again() {
    let Fixture { store, .. } = fixture();
    store.begin_operation("r", "f", 0).unwrap();
    store.forget_operation("r").unwrap();
    assert_eq!(store.begin_operation("r", "f", 0).unwrap(), Begun::New);
    store.finish_operation("r", answer("old")).unwrap();
    store.begin_operation("other", "f", OPERATION_AGE_MS_MAX + 1).unwrap();
    assert_eq!(store.begin_operation("r", "f", OPERATION_AGE_MS_MAX + 1).unwrap(), Begun::New);
    assert_eq!(
        store.begin_operation("r", "f", OPERATION_AGE_MS_MAX + 1).unwrap(),
        Begun::Unfinished
    );
}

#[test]
fn a_store_of_a_newer_agent_is_refused_by_name_and_left_alone() {
    let Fixture { store, path, _folder } = fixture();
    drop(store);
    let newer = redb::Database::open(&path).unwrap();
    let txn = newer.begin_write().unwrap();
    let meta = redb::TableDefinition::<&str, u64>::new("meta");
    txn.open_table(meta).unwrap().insert("schema", SCHEMA_VERSION + 1).unwrap();
    txn.commit().unwrap();
    drop(newer);
    let error = Store::open(&path).err().unwrap();
    assert!(matches!(error, StoreError::Newer { found, .. } if found == SCHEMA_VERSION + 1));
    assert!(error.to_string().contains("store.redb"));
}

#[test]
fn calls_that_fail_are_counted() {
    let Fixture { store, path, _folder } = fixture();
    let record = sandbox(1, "a", None);
    store.put_sandbox(&record).unwrap();
    assert_eq!(store.errors(), 0);
    drop(store);
    let damaged = redb::Database::open(&path).unwrap();
    let txn = damaged.begin_write().unwrap();
    let sandboxes = redb::TableDefinition::<&str, &[u8]>::new("sandboxes");
    txn.open_table(sandboxes).unwrap().insert(record.id.as_str(), &b"no record"[..]).unwrap();
    txn.commit().unwrap();
    drop(damaged);
    let store = Store::open(&path).unwrap();
    assert!(store.sandbox(&record.id).is_err());
    assert!(store.all_sandboxes().is_err());
    assert!(store.groups().is_ok());
    assert_eq!(store.errors(), 2);
}

#[test]
fn a_store_in_use_is_not_opened_twice() {
    let Fixture { store: _store, path, _folder } = fixture();
    let error = Store::open(&path).err().unwrap();
    assert!(error.hint().contains("no other holdfastd"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn after_any_puts_and_removes_the_reopened_store_holds_what_a_map_would(
        steps in proptest::collection::vec((any::<bool>(), 0_u8..6, 0_u64..9), 0..20),
    ) {
        let Fixture { mut store, path, _folder } = fixture();
        let mut model = std::collections::BTreeMap::new();
        for (put, byte, time) in steps {
            let mut record = sandbox(byte, "a", None);
            record.created_at_ms = time;
            if put {
                store.put_sandbox(&record).unwrap();
                model.insert(record.id.clone(), record);
            } else {
                let removed = store.remove_sandbox(&record.id).unwrap();
                prop_assert_eq!(removed, model.remove(&record.id).is_some());
            }
        }
        drop(store);
        store = Store::open(&path).unwrap();
        let expected: Vec<_> = model.into_values().collect();
        prop_assert_eq!(store.all_sandboxes().unwrap(), expected);
    }
}

#[test]
fn what_is_under_way_is_written_with_its_sandbox_and_goes_with_it() {
    let Fixture { store, path, _folder } = fixture();
    let mut record = sandbox(1, "a", None);
    store.create_sandbox(&record).unwrap();
    let created = store.intent(&record.id).unwrap().unwrap();
    assert_eq!(created, Intent::new(&record.id, Operation::Create));
    record.uid = Some(200_000);
    let lending = Intent { step: Step::Lending, attempts: 2, ..created };
    store.put_intent(&record, &lending).unwrap();
    drop(store);
    let store = Store::open(&path).unwrap();
    assert_eq!(store.intents().unwrap(), [lending]);
    assert_eq!(store.sandbox(&record.id).unwrap(), Some(record.clone()));
    record.state = State::Running;
    store.put_sandbox(&record).unwrap();
    assert_eq!(store.intent(&record.id).unwrap(), None);
    store.put_intent(&record, &Intent::new(&record.id, Operation::Delete)).unwrap();
    assert!(store.remove_sandbox(&record.id).unwrap());
    assert_eq!(store.intents().unwrap(), []);
}

#[test]
fn several_sandboxes_are_written_in_one_step_each_with_what_is_to_be_done() {
    let Fixture { store, path, _folder } = fixture();
    let records = [sandbox(1, "a", Some("fork#0")), sandbox(2, "a", Some("fork#1"))];
    store.create_sandboxes(&records).unwrap();
    drop(store);
    let store = Store::open(&path).unwrap();
    assert_eq!(store.all_sandboxes().unwrap(), records);
    let intents = records.map(|record| Intent::new(&record.id, Operation::Create));
    assert_eq!(store.intents().unwrap(), intents);
}

#[test]
fn a_record_of_an_agent_that_knew_no_uids_is_read() {
    let mut value = serde_json::to_value(sandbox(1, "a", None)).unwrap();
    value.as_object_mut().unwrap().remove("uid");
    let read: SandboxRecord = serde_json::from_value(value).unwrap();
    assert_eq!(read, sandbox(1, "a", None));
}

#[test]
fn a_store_that_another_has_open_is_waited_for_and_refused_if_it_stays_so() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.redb");
    let held = Store::open(&path).unwrap();
    let Err(error) = Store::open(&path) else { panic!("it is open twice") };
    assert!(matches!(error, StoreError::Open { .. }), "{error}");
    let letting_go = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(100));
        drop(held);
    });
    Store::open(&path).unwrap();
    letting_go.join().unwrap();
}
