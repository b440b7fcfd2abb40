//! The store against a writer that is killed: every change it reported is there, whole, and the
//! store opens.

use std::{
    io::{BufRead, BufReader},
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Command, Stdio},
};

use holdfast_model::{
    Digest, GroupKey, Resources, SandboxId, SandboxSpec, State, sandbox::ImageSource,
};
use holdfast_store::{SandboxRecord, Store};

/// Set in the writer's environment only.
const STORE_OF_WRITER: &str = "HOLDFAST_TEST_STORE";

fn record(number: u64) -> SandboxRecord {
    let mut random = [0; 20];
    for (place, byte) in random.iter_mut().enumerate() {
        *byte = u8::try_from(number >> (5 * place.min(12)) & 31).unwrap();
    }
    SandboxRecord {
        id: SandboxId::from_random(random),
        group: GroupKey::local_default(),
        spec: SandboxSpec {
            image: ImageSource::Public("debian".to_owned()),
            resources: Resources::DEFAULT,
            labels: [("n".to_owned(), number.to_string())].into(),
            environment: Default::default(),
            entrypoint: None,
            cmd: None,
            lifecycle_json: None,
            egress_json: None,
            skip_egress_proxy: false,
        },
        state: State::Creating,
        failure: None,
        image: Digest::from_sha256([1; 32]),
        created_at_ms: number,
        request_id: None,
        uid: None,
        saved: None,
        from_snapshot: None,
        egress_generation: 0,
    }
}

/// Writes records for ever, saying each when it is durable. Does nothing in an ordinary run.
#[test]
fn writer_process() {
    let Ok(path) = std::env::var(STORE_OF_WRITER) else { return };
    let store = Store::open(Path::new(&path)).unwrap();
    // The writer before this one may have been killed half-way through its last record.
    let whole = |record: &SandboxRecord| record.state == State::Running;
    let first = store.all_sandboxes().unwrap().into_iter().filter(whole).count() as u64;
    for number in first.. {
        let mut record = record(number);
        store.put_sandbox(&record).unwrap();
        record.state = State::Running;
        store.put_sandbox(&record).unwrap();
        println!("\ndurable {number}");
    }
}

#[test]
fn what_a_killed_writer_reported_is_there_and_nothing_is_half() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.redb");
    let mut known = 0;
    for round in 0..6_u64 {
        let mut writer = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writer_process", "--nocapture"])
            .env(STORE_OF_WRITER, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(writer.stdout.take().unwrap()).lines().map_while(Result::ok);
        let mut reported = lines
            .filter_map(|line| line.strip_prefix("durable ").and_then(|n| n.parse::<u64>().ok()));
        // A few more each round, so that the kill falls on different states of the file.
        let last = reported.by_ref().find(|number| *number > known + 3 * round).unwrap();
        writer.kill().unwrap();
        let last = reported.last().unwrap_or(last);
        assert_eq!(writer.wait().unwrap().signal(), Some(9));

        let store = Store::open(&path).unwrap();
        let records = store.all_sandboxes().unwrap();
        for number in 0..=last {
            let mut expected = record(number);
            expected.state = State::Running;
            let found = store.sandbox(&expected.id).unwrap();
            assert_eq!(found, Some(expected), "record {number} in round {round}");
        }
        known = u64::try_from(records.len()).unwrap();
        // One more than reported may have been written, and none may be made up.
        assert!((last + 1..=last + 2).contains(&known), "{known} records, {last} reported");
    }
}
