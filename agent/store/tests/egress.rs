//! Decisions and secrets, and records from before there were policies.

use holdfast_model::{
    Digest, GroupKey, Resources, SandboxId, SandboxSpec, State, id::ID_BYTES, sandbox::ImageSource,
};
use holdfast_store::{DecisionRecord, SandboxRecord, SecretRecord, Store};

fn store() -> (Store, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    (Store::open(&folder.path().join("store.redb")).unwrap(), folder)
}

fn sandbox(byte: u8) -> SandboxRecord {
    SandboxRecord {
        id: SandboxId::from_random([byte; ID_BYTES]),
        group: GroupKey::local_default(),
        spec: SandboxSpec {
            image: ImageSource::Public("debian".to_owned()),
            resources: Resources::DEFAULT,
            labels: Default::default(),
            environment: Default::default(),
            entrypoint: None,
            cmd: None,
            lifecycle_json: None,
            egress_json: Some(r#"{"defaultAction":"Deny"}"#.to_owned()),
            skip_egress_proxy: false,
        },
        state: State::Running,
        failure: None,
        image: Digest::from_sha256([1; 32]),
        created_at_ms: 7,
        request_id: None,
        uid: None,
        saved: None,
        from_snapshot: None,
        egress_generation: 3,
    }
}

fn decision(byte: u8, sequence: u64) -> DecisionRecord {
    DecisionRecord {
        sandbox: SandboxId::from_random([byte; ID_BYTES]),
        sequence,
        at_ms: 1,
        allowed: false,
        scheme: "dns".to_owned(),
        host: "a.test".to_owned(),
        method: "A".to_owned(),
        path: String::new(),
        address: None,
        port: None,
        rule: "default".to_owned(),
        reason: "name_not_allowed".to_owned(),
        generation: 1,
        sent_bytes: 0,
        received_bytes: 0,
    }
}

fn numbers(store: &Store, byte: u8) -> Vec<u64> {
    let records = store.decisions(&SandboxId::from_random([byte; ID_BYTES])).unwrap();
    records.iter().map(|record| record.sequence).collect()
}

#[test]
fn decisions_lie_in_the_order_of_their_numbers_and_go_with_their_sandbox_alone() {
    let (store, _folder) = store();
    for byte in [1, 2] {
        store.put_sandbox(&sandbox(byte)).unwrap();
    }
    let all = [9, 10, 255, 256, u64::MAX].map(|sequence| decision(1, sequence));
    store.keep_decisions(&all, &[]).unwrap();
    store.keep_decisions(&[decision(2, 1), decision(3, 1)], &[]).unwrap();
    assert_eq!(numbers(&store, 1), [9, 10, 255, 256, u64::MAX]);
    assert_eq!((numbers(&store, 2), numbers(&store, 3)), (vec![1], vec![]), "3 is no sandbox");
    let old = [(all[0].sandbox.clone(), 9), (all[0].sandbox.clone(), 255)];
    store.keep_decisions(&[decision(1, 257)], &old).unwrap();
    assert_eq!(numbers(&store, 1), [10, 256, 257, u64::MAX]);
    store.remove_sandbox(&all[0].sandbox).unwrap();
    assert_eq!((numbers(&store, 1), numbers(&store, 2)), (vec![], vec![1]));
}

#[test]
fn a_sandbox_from_before_there_were_policies_has_none() {
    let mut json = serde_json::to_value(sandbox(1)).unwrap();
    json.as_object_mut().unwrap().remove("egress_generation");
    json["spec"].as_object_mut().unwrap().remove("egress_json");
    let record: SandboxRecord = serde_json::from_value(json).unwrap();
    assert_eq!((record.egress_generation, record.spec.egress_json), (0, None));
}

#[test]
fn a_secret_keeps_its_age_and_a_group_has_a_bounded_number_of_them() {
    let (store, _folder) = store();
    let group = |name: &str| GroupKey::new("local", "default", name).unwrap();
    let secret = |of: &str, id: &str, ms| SecretRecord {
        group: group(of),
        id: id.to_owned(),
        keys: vec!["k".to_owned()],
        sealed: vec![1, 2, 3],
        created_at_ms: ms,
        updated_at_ms: ms,
    };
    assert!(store.put_secret(secret("a", "x", 1), 2).unwrap().is_some());
    assert!(store.put_secret(secret("a", "y", 1), 2).unwrap().is_some());
    assert_eq!(store.put_secret(secret("a", "z", 1), 2).unwrap(), None);
    // A group whose name begins like the other's is another group.
    assert!(store.put_secret(secret("a-b", "z", 1), 2).unwrap().is_some());
    let again = store.put_secret(secret("a", "x", 5), 2).unwrap().unwrap();
    assert_eq!((again.created_at_ms, again.updated_at_ms), (1, 5));
    assert_eq!(store.secret(&group("a"), "x").unwrap(), Some(again));
    let ids = |of| store.secrets(&group(of)).unwrap().into_iter().map(|it| it.id);
    assert_eq!(ids("a").collect::<Vec<_>>(), ["x", "y"]);
    assert_eq!(ids("a-b").collect::<Vec<_>>(), ["z"]);
    assert!(store.remove_secret(&group("a"), "x").unwrap());
    assert!(!store.remove_secret(&group("a"), "x").unwrap());
    assert_eq!(store.secret(&group("a"), "x").unwrap(), None);
}
