//! Sandboxes of which the disk alone is kept, and those that the node takes with it when it stops.

use std::time::Duration;

use fs_err as fs;
use holdfast_model::{
    SandboxId, State, StopReason, SuspendMode,
    sandbox::{CloneSpec, NewSandbox},
};
use holdfastd::sandbox::{Ending, Warmth};

use super::{
    node::{Node, alive, group, spec},
    suspended::{stdout, tells_the_time},
};

async fn to_disk(node: &Node, id: &SandboxId) {
    node.registry.suspend(id, Some(SuspendMode::Disk)).await.unwrap();
    let record = node.registry.get(id).unwrap().unwrap();
    assert_eq!(record.state, State::Suspended, "{:?}", record.failure);
    assert_eq!(record.saved.unwrap().mode, SuspendMode::Disk);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_of_which_the_disk_is_kept_boots_anew_from_it_and_so_does_whatever_is_made_of_it()
{
    let node = Node::start().await;
    let id = node.running(spec(128)).await;
    let pid = node.registry.details(&id).await.unwrap().vmm_pid;
    // In the page cache only, and in memory.
    stdout(&node, &id, "echo kept > /root/file; echo gone > /dev/shm/file").await;
    to_disk(&node, &id).await;
    assert!(!alive(pid));
    assert_eq!(node.registry.free(), node.registry.limits());
    let pieces = node.state().join("snapshots");
    assert_eq!(fs::read_dir(pieces.join("segments")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(pieces.join("manifests")).unwrap().count(), 1);

    let look = "cat /root/file; cat /dev/shm/file || echo none; hostname";
    let found = stdout(&node, &id, look).await;
    assert_eq!(found, format!("kept\nnone\n{id}\n"));
    tells_the_time(&node, &id).await;
    let report = node.registry.details(&id).await.unwrap().report.unwrap();
    assert_eq!((report.fetched.warmth, report.mended), (Warmth::Booted, None));
    assert!(report.phases.total_us > 0 && report.phases.restore_us > 0, "{report:?}");
    // It can be written to, and be kept whole.
    stdout(&node, &id, "echo more >> /root/file; echo there > /dev/shm/file").await;
    node.registry.suspend(&id, Some(SuspendMode::Memory)).await.unwrap();
    assert_eq!(stdout(&node, &id, look).await, format!("kept\nmore\nthere\n{id}\n"));
    let report = node.registry.details(&id).await.unwrap().report.unwrap();
    assert_eq!(report.fetched.warmth, Warmth::Hot, "{report:?}");
    assert!(report.mended.is_some(), "{report:?}");

    to_disk(&node, &id).await;
    let snapshot = node.registry.snapshot(&id, Default::default(), None).await.unwrap();
    let clone = CloneSpec {
        snapshot: snapshot.id.clone(),
        labels: Default::default(),
        lifecycle_json: None,
        egress_json: None,
    };
    let clone = NewSandbox::OfSnapshot(clone);
    let clone = node.registry.create(group(), clone, None).await.unwrap().id;
    let forks = node.registry.fork(&id, 1, Default::default(), None).await.unwrap();
    for other in [&clone, &forks[0].id] {
        let record = node.settled(other, |state| state != State::Creating).await;
        assert_eq!(record.state, State::Running, "{:?}", record.failure);
        let expected = format!("kept\nmore\nnone\n{other}\n");
        assert_eq!(stdout(&node, other, look).await, expected);
        let ids = stdout(&node, other, "cat /etc/machine-id").await;
        assert_ne!(ids, stdout(&node, &id, "cat /etc/machine-id").await);
        node.registry.delete(other).await.unwrap();
    }
    node.registry.delete_snapshot(snapshot).await.unwrap();
    node.registry.delete(&id).await.unwrap();
    assert_eq!(node.traces(&id), Vec::<String>::new());
    assert_eq!(fs::read_dir(node.state().join("saved")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_that_nobody_uses_is_kept_as_its_policy_says() {
    let node = Node::start().await;
    let policy = r#"{"autoSuspendPolicy":{"enabled":true,"interval":2,"mode":"Disk"}}"#;
    let mut spec = spec(128);
    spec.lifecycle_json = Some(policy.to_owned());
    let id = node.running(spec).await;
    stdout(&node, &id, "echo kept > /root/file").await;
    let record = node.settled(&id, |state| state == State::Suspended).await;
    let saved = record.saved.unwrap();
    assert_eq!((saved.reason, saved.mode), (StopReason::Idle, SuspendMode::Disk));
    assert_eq!(stdout(&node, &id, "cat /root/file").await, "kept\n");
    node.registry.delete(&id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_when_the_node_stops_goes_on_when_it_is_back_and_nothing_else_does() {
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_in(folder.path().to_owned()).await;
    let (runs, rests) = (node.running(spec(128)).await, node.running(spec(128)).await);
    stdout(&node, &runs, "echo kept > /dev/shm/file").await;
    node.registry.suspend(&rests, None).await.unwrap();
    node.registry.stop(Ending::Suspend).await;
    let record = node.registry.get(&runs).unwrap().unwrap();
    assert_eq!((record.state, record.failure), (State::Suspended, None));
    assert_eq!(record.saved.unwrap().reason, StopReason::NodeStopped);
    assert_eq!(node.registry.vmm_pids(), Vec::<u32>::new());
    drop(node);

    let node = Node::start_in(folder.path().to_owned()).await;
    // Nobody asks for it.
    node.settled(&runs, |state| state == State::Running).await;
    assert_eq!(stdout(&node, &runs, "cat /dev/shm/file").await, "kept\n");
    tells_the_time(&node, &runs).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(node.registry.get(&rests).unwrap().unwrap().state, State::Suspended);
    for id in [&runs, &rests] {
        node.registry.delete(id).await.unwrap();
    }
    assert_eq!(fs::read_dir(node.state().join("saved")).unwrap().count(), 0);
}
