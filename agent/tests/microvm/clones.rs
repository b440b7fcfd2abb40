//! Snapshots of sandboxes that go on, and sandboxes that are made of them.

use std::collections::{BTreeMap, BTreeSet};

use fs_err as fs;
use holdfast_model::{
    SandboxId, SandboxSpec, SnapshotId, State,
    sandbox::{CloneSpec, NewSandbox},
};
use holdfast_store::SnapshotRecord;
use holdfast_wire::guest::{ExecKey, Keep};
use holdfastd::sandbox::{CreateError, SnapshotCallError, SuspendError};

use super::{
    counted,
    node::{Node, group, spec},
    shell,
    suspended::{line, stdout, tells_the_time},
};

/// What tells one machine from another, from inside.
const IDENTITY: &str = "hostname; cat /etc/hostname /etc/machine-id; tail -n 1 /etc/hosts; \
                        head -c 16 /dev/urandom | md5sum; cat /proc/sys/kernel/random/uuid";

fn labels() -> BTreeMap<String, String> {
    [("name".to_owned(), "kept".to_owned())].into()
}

async fn snapshot(node: &Node, id: &SandboxId) -> SnapshotRecord {
    node.registry.snapshot(id, labels(), None).await.unwrap()
}

fn clone_of(snapshot: &SnapshotId) -> NewSandbox {
    let labels = BTreeMap::default();
    NewSandbox::OfSnapshot(CloneSpec {
        snapshot: snapshot.clone(),
        labels,
        lifecycle_json: None,
        egress_json: None,
    })
}

async fn cloned(node: &Node, snapshot: &SnapshotId) -> SandboxId {
    let record = node.registry.create(group(), clone_of(snapshot), None).await.unwrap();
    let record = node.settled(&record.id, |state| state != State::Creating).await;
    assert_eq!(record.state, State::Running, "{:?}", record.failure);
    record.id
}

fn count(node: &Node, folder: &str) -> usize {
    fs::read_dir(node.state().join(folder)).unwrap().count()
}

#[tokio::test(flavor = "multi_thread")]
async fn clones_begin_where_the_sandbox_stood_and_are_machines_of_their_own() {
    let node = Node::start().await;
    let id = node.running(spec(128)).await;
    stdout(&node, &id, "echo before > /tmp/file; sync; echo later >> /tmp/file").await;
    // A command at work, under which the snapshot is made.
    let keep = Some(Keep { key: ExecKey([7; 16]), alone_ms_max: 600_000 });
    let command = holdfast_wire::guest::Exec {
        keep,
        ..shell("i=0; while :; do echo $i; i=$((i + 1)); usleep 50000; done")
    };
    let mut counter = node.registry.exec(&id, command).await.unwrap();
    assert_eq!(line(&mut counter).await, "0\n");

    let kept = snapshot(&node, &id).await;
    assert_eq!((kept.sandbox.clone(), kept.labels.clone()), (id.clone(), labels()));
    assert!(kept.bytes > 1 << 20, "{}", kept.bytes);
    // Not a number is missing: it went on, and its client with it.
    for number in 1..20 {
        assert_eq!(line(&mut counter).await, format!("{number}\n"));
    }
    stdout(&node, &id, "echo after >> /tmp/file").await;

    let clones = [cloned(&node, &kept.id).await, cloned(&node, &kept.id).await];
    let mut seen = BTreeSet::new();
    for clone in &clones {
        assert_eq!(stdout(&node, clone, "cat /tmp/file").await, "before\nlater\n");
        let identity = stdout(&node, clone, IDENTITY).await;
        let lines: Vec<_> = identity.lines().map(str::to_owned).collect();
        assert_eq!(lines[..2], [clone.to_string(), clone.to_string()], "{identity}");
        assert_eq!(lines[2].len(), 32, "{identity}");
        assert_eq!(lines[3], format!("127.0.1.1\t{clone}"));
        seen.extend(lines);
    }
    let own = stdout(&node, &id, IDENTITY).await;
    assert_eq!(own.lines().next(), Some(id.as_str()));
    seen.extend(own.lines().map(str::to_owned));
    // Five things of each that nobody else has: the host name is there twice.
    assert_eq!(seen.len(), 3 * 5, "{seen:?}");

    // What one does the others do not see, and the snapshot outlives the sandbox.
    stdout(&node, &clones[0], "echo mine > /tmp/file").await;
    assert_eq!(stdout(&node, &clones[1], "cat /tmp/file").await, "before\nlater\n");
    node.registry.delete(&id).await.unwrap();
    let third = cloned(&node, &kept.id).await;
    assert_eq!(stdout(&node, &third, "cat /tmp/file").await, "before\nlater\n");

    // A clone is suspended by what it changed, and goes on under its own name.
    node.registry.suspend(&clones[0], None).await.unwrap();
    assert_eq!(
        stdout(&node, &clones[0], "cat /tmp/file; hostname").await,
        format!("mine\n{}\n", clones[0])
    );
    // Of the snapshot stays what the others stand on, until the last of them is gone.
    node.registry.delete_snapshot(kept.clone()).await.unwrap();
    assert_eq!(node.registry.get_snapshot(&kept.id).unwrap(), None);
    assert_eq!(count(&node, "saved"), 2);
    let error = node.registry.create(group(), clone_of(&kept.id), None).await.unwrap_err();
    assert!(matches!(error, CreateError::NoSnapshot { .. }), "{error}");
    for clone in clones.iter().chain([&third]) {
        node.registry.delete(clone).await.unwrap();
        assert_eq!(node.traces(clone), Vec::<String>::new());
    }
    assert_eq!((count(&node, "saved"), count(&node, "snapshots/segments")), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_is_as_many_clones_of_what_runs_or_is_suspended_or_none() {
    let node = Node::start().await;
    let id = node.running(spec(128)).await;
    stdout(&node, &id, "echo one > /dev/shm/file").await;
    let request = || Some("fork".to_owned());
    let forks = node.registry.fork(&id, 2, labels(), request()).await.unwrap();
    assert_eq!(forks.len(), 2);
    // The same call again finds what was made.
    let again = node.registry.fork(&id, 2, labels(), request()).await.unwrap();
    assert_eq!(
        again.iter().map(|it| &it.id).collect::<Vec<_>>(),
        forks.iter().map(|it| &it.id).collect::<Vec<_>>()
    );
    for fork in &forks {
        node.settled(&fork.id, |state| state == State::Running).await;
        assert_eq!((&fork.spec.labels, fork.from_snapshot.clone()), (&labels(), None));
        assert_eq!(stdout(&node, &fork.id, "cat /dev/shm/file").await, "one\n");
    }
    // What they were forked from is no snapshot of anybody's.
    assert_eq!(node.registry.list_snapshots(&group()).unwrap(), []);

    node.registry.suspend(&id, None).await.unwrap();
    let later = node.registry.fork(&id, 1, BTreeMap::new(), None).await.unwrap();
    let kept = snapshot(&node, &id).await;
    let record = node.registry.get(&id).unwrap().unwrap();
    assert_eq!(
        (record.state, record.saved.map(|it| it.snapshot)),
        (State::Suspended, Some(kept.data.clone()))
    );
    node.settled(&later[0].id, |state| state == State::Running).await;
    assert_eq!(stdout(&node, &later[0].id, "cat /dev/shm/file").await, "one\n");
    assert_eq!(stdout(&node, &id, "cat /dev/shm/file; hostname").await, format!("one\n{id}\n"));

    // More than the node has room for: none, and what runs is as it was.
    let before = node.registry.list(&group()).unwrap().len();
    node.registry.fork(&id, 64, BTreeMap::new(), None).await.unwrap_err();
    assert_eq!(node.registry.list(&group()).unwrap().len(), before);
    assert_eq!(stdout(&node, &id, "cat /dev/shm/file").await, "one\n");

    for record in node.registry.list(&group()).unwrap() {
        node.registry.delete(&record.id).await.unwrap();
    }
    // The client's own is still there, of a sandbox that is gone.
    assert_eq!(count(&node, "saved"), 1);
    node.registry.verify_snapshot(kept.clone()).await.unwrap();
    node.registry.delete_snapshot(kept).await.unwrap();
    assert_eq!((count(&node, "saved"), count(&node, "snapshots/segments")), (0, 0));
    let error = node.registry.snapshot(&id, labels(), None).await.unwrap_err();
    let SnapshotCallError::Suspend(SuspendError::NotFound { .. }) = error else {
        panic!("{error}")
    };
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kind_asked_for_again_begins_as_a_clone_of_a_booted_guest() {
    let node = Node::start().await;
    let templates =
        |event: &str| counted(&node, &format!("holdfast_templates_total{{event=\"{event}\"}}"));
    let script = "echo $OF_SPEC $OF_IMAGE; cat /tmp/own; hostname; \
                  cat /etc/machine-id /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | md5sum";
    let mut seen = BTreeSet::new();
    for number in 0..4 {
        let environment = [("OF_SPEC".to_owned(), number.to_string())].into();
        let entrypoint = Some(
            ["/bin/sh", "-c", "echo $OF_SPEC > /tmp/own; sleep 1000"].map(str::to_owned).into(),
        );
        let id = node.running(SandboxSpec { environment, entrypoint, ..spec(128) }).await;
        // The entrypoint was started a moment ago.
        let own = stdout(&node, &id, "until [ -s /tmp/own ]; do sleep 0.1; done").await;
        assert_eq!(own, "");
        let text = stdout(&node, &id, script).await;
        let lines: Vec<_> = text.lines().map(str::to_owned).collect();
        let expected = [format!("{number} image"), number.to_string(), id.to_string()];
        assert_eq!(lines[..3], expected, "{text}");
        seen.extend(lines.into_iter().skip(2));
        // The first is asked for once, the second kept, the others are made of it.
        let expected = [u32::from(number > 0), number.max(1) - 1].map(f64::from);
        assert_eq!([templates("made"), templates("used")], expected, "{number}");
        tells_the_time(&node, &id).await;
        // It is suspended and goes on as any other.
        node.registry.suspend(&id, None).await.unwrap();
        assert_eq!(stdout(&node, &id, "cat /tmp/own").await, format!("{number}\n"));
        node.registry.delete(&id).await.unwrap();
    }
    assert_eq!(seen.len(), 4 * 4, "{seen:?}");
    // Another size is another kind.
    let id = node.running(spec(160)).await;
    assert_eq!(templates("used"), 2.0);
    node.registry.delete(&id).await.unwrap();
    assert_eq!((count(&node, "saved"), count(&node, "templates/guests")), (0, 1));
}
