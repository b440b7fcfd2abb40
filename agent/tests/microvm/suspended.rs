//! Sandboxes that are suspended and go on.

use std::{os::unix::fs::MetadataExt, path::Path, time::Duration};

use fs_err as fs;
use holdfast_model::{SandboxId, State};
use holdfast_wire::guest::{ExecKey, Exited, Input, Keep, Output};
use holdfastd::sandbox::{ExecSession, ResumeError, SuspendError};

use super::{
    Heard, counted,
    node::{Node, alive, spec},
    run, shell,
};

pub(crate) async fn stdout(node: &Node, id: &SandboxId, script: &str) -> String {
    let Heard { stdout, exited, stderr } = run(node, id, shell(script), b"").await;
    assert_eq!(exited, Some(Exited::Code(0)), "{script}: {stderr}");
    stdout
}

/// The next line of a command's output.
pub(crate) async fn line(session: &mut ExecSession) -> String {
    let mut line = String::new();
    while !line.ends_with('\n') {
        match session.next().await.unwrap() {
            Some(Output::Stdout(bytes)) => line += std::str::from_utf8(&bytes).unwrap(),
            Some(Output::Taken { .. }) => {}
            other => panic!("{line:?}, then {other:?}"),
        }
    }
    line
}

/// Its clock is the host's, to a second.
pub(crate) async fn tells_the_time(node: &Node, id: &SandboxId) {
    let now = || std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
    // On a loaded machine the answer may take its time.
    let before = now();
    let clock: u64 = stdout(node, id, "date +%s").await.trim().parse().unwrap();
    let after = now();
    assert!((before - 1..=after + 1).contains(&clock), "{clock} between {before} and {after}");
}

/// Bytes on disk of all files below.
fn disk_bytes(folder: &Path) -> u64 {
    fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| match entry.metadata().unwrap() {
            metadata if metadata.is_dir() => disk_bytes(&entry.path()),
            metadata => metadata.blocks() * 512,
        })
        .sum()
}

async fn suspended(node: &Node, id: &SandboxId) {
    node.registry.suspend(id, None).await.unwrap();
    let record = node.registry.get(id).unwrap().unwrap();
    assert_eq!(record.state, State::Suspended, "{:?}", record.failure);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspended_sandbox_takes_nothing_of_the_node_and_goes_on_where_it_stood() {
    let node = Node::start().await;
    let id = node.running(spec(128)).await;
    let pid = node.registry.details(&id).await.unwrap().vmm_pid;
    // A command at work, what it knows, and a file that is in the page cache only.
    let script = "read a; echo $a > /tmp/file; echo first $a; read b; echo $a $b; cat /tmp/file";
    let key = ExecKey([7; 16]);
    let keep = Some(Keep { key, alone_ms_max: 600_000 });
    let command = holdfast_wire::guest::Exec { stdin: true, keep, ..shell(script) };
    let mut session = node.registry.exec(&id, command).await.unwrap();
    session.send(&Input::Data(b"one\n".to_vec())).await.unwrap();
    let first = line(&mut session).await;
    assert_eq!(first, "first one\n");

    suspended(&node, &id).await;
    assert!(!alive(pid));
    assert_eq!(node.registry.free(), node.registry.limits());
    assert!(!node.cgroup(&id).exists());
    let left = node.traces(&id);
    assert!(matches!(&left[..], [disk] if disk.contains("/state/sandboxes/")), "{left:?}");
    // Long enough to be seen in its clock.
    tokio::time::sleep(Duration::from_secs(3)).await;

    // It is woken by whoever needs it.
    let from = u64::try_from(first.len()).unwrap();
    let mut session = node.registry.attach(&id, key, from).await.unwrap();
    assert_eq!(session.stdin_taken(), 4);
    session.send(&Input::Data(b"two\n".to_vec())).await.unwrap();
    assert_eq!(line(&mut session).await, "one two\n");
    assert_eq!(line(&mut session).await, "one\n");
    tells_the_time(&node, &id).await;

    // What changed since is kept by the next, and so on beyond the depth of a chain.
    let pieces = node.state().join("snapshots");
    let mut sizes = vec![disk_bytes(&pieces)];
    for round in 0..6 {
        stdout(&node, &id, &format!("echo {round} > /tmp/{round}; echo {round} >> /tmp/all")).await;
        suspended(&node, &id).await;
        sizes.push(disk_bytes(&pieces));
        if round == 3 {
            // As after a restart of the node: the snapshot's pieces alone are left.
            for saved in fs::read_dir(node.state().join("saved")).unwrap() {
                for file in fs::read_dir(saved.unwrap().path()).unwrap() {
                    let path = file.unwrap().path();
                    if !path.ends_with("disk.ext4") {
                        fs::remove_file(path).unwrap();
                    }
                }
            }
        }
        node.registry.resume(&id).await.unwrap();
        let files = stdout(&node, &id, "cat /tmp/file /tmp/all").await;
        let expected: String = (0..=round).map(|round| format!("{round}\n")).collect();
        assert_eq!(files, format!("one\n{expected}"));
    }
    println!("bytes of pieces after each suspend: {sizes:?}");
    // The whole of it again would double what there is.
    assert!(sizes[1] < sizes[0] * 3 / 2, "{sizes:?}");
    assert_eq!(counted(&node, "holdfast_suspends_total{outcome=\"done\"}"), 7.0);
    assert_eq!(counted(&node, "holdfast_resumes_total{outcome=\"done\"}"), 7.0);

    let error = node.registry.resume(&id).await.unwrap_err();
    assert!(matches!(error, ResumeError::NotSuspended { state: State::Running, .. }), "{error}");
    node.registry.delete(&id).await.unwrap();
    assert_eq!(node.traces(&id), Vec::<String>::new());
    assert_eq!(fs::read_dir(node.state().join("saved")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(pieces.join("segments")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspend_that_finds_no_room_leaves_the_sandbox_running_and_says_why() {
    let node = Node::start().await;
    let id = node.running(spec(128)).await;
    let pieces = node.state().join("snapshots");
    let mount = |arguments: &[&str], path: &Path| {
        let done = std::process::Command::new("/bin/busybox").args(arguments).arg(path).status();
        assert!(done.unwrap().success());
    };
    mount(&["mount", "-t", "tmpfs", "-o", "size=64k", "none"], &pieces);
    for folder in ["segments", "layers", "states", "manifests", "tmp"] {
        fs::create_dir(pieces.join(folder)).unwrap();
    }
    let error = node.registry.suspend(&id, None).await.unwrap_err();
    let SuspendError::Failed { reason, .. } = &error else { panic!("{error}") };
    assert!(reason.contains("No space left"), "{reason}");
    assert_eq!(stdout(&node, &id, "echo on").await, "on\n");
    assert_eq!(fs::read_dir(node.state().join("saved")).unwrap().count(), 0);
    mount(&["umount"], &pieces);
    suspended(&node, &id).await;
    assert_eq!(stdout(&node, &id, "echo on").await, "on\n");
    node.registry.delete(&id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspended_sandbox_outlives_the_agent_and_can_be_deleted_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_in(folder.path().to_owned()).await;
    let (kept, deleted) = (node.running(spec(128)).await, node.running(spec(128)).await);
    stdout(&node, &kept, "echo kept > /tmp/file").await;
    for id in [&kept, &deleted] {
        suspended(&node, id).await;
    }
    node.registry.stop(holdfastd::sandbox::Ending::Detach).await;
    drop(node);

    let node = Node::start_in(folder.path().to_owned()).await;
    assert_eq!(node.registry.get(&kept).unwrap().unwrap().state, State::Suspended);
    assert_eq!(node.registry.free(), node.registry.limits());
    node.registry.delete(&deleted).await.unwrap();
    assert_eq!(node.traces(&deleted), Vec::<String>::new());
    assert_eq!(stdout(&node, &kept, "cat /tmp/file").await, "kept\n");

    // What it does from here on goes with the node; what it was suspended with does not.
    stdout(&node, &kept, "echo lost > /tmp/file").await;
    node.registry.stop(holdfastd::sandbox::Ending::PowerOff).await;
    drop(node);
    let node = Node::start_in(folder.path().to_owned()).await;
    let record = node.registry.get(&kept).unwrap().unwrap();
    assert_eq!(record.state, State::Suspended);
    assert!(record.failure.unwrap().contains("the node was shut down"));
    assert_eq!(stdout(&node, &kept, "cat /tmp/file").await, "kept\n");
    node.registry.delete(&kept).await.unwrap();
    assert_eq!(fs::read_dir(node.state().join("saved")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_that_nobody_uses_is_suspended_woken_and_in_time_deleted() {
    let node = Node::start().await;
    let policy = r#"{"autoSuspendPolicy":{"enabled":true,"interval":2,"mode":"Memory"},
        "autoDeletePolicy":{"enabled":true,"deleteIntervalInSeconds":3}}"#;
    let mut spec = spec(128);
    spec.lifecycle_json = Some(policy.to_owned());
    let id = node.running(spec).await;
    // In use, however long that takes; and left to run by a client that went away.
    assert_eq!(stdout(&node, &id, "sleep 4; echo on").await, "on\n");
    assert_eq!(node.registry.get(&id).unwrap().unwrap().saved, None);
    let keep = Some(Keep { key: ExecKey([8; 16]), alone_ms_max: 600_000 });
    let command = holdfast_wire::guest::Exec { keep, ..shell("sleep 4") };
    drop(node.registry.exec(&id, command).await.unwrap());
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(node.registry.get(&id).unwrap().unwrap().saved, None);

    let record = node.settled(&id, |state| state == State::Suspended).await;
    assert_eq!(record.saved.unwrap().reason, holdfast_model::StopReason::Idle);
    assert_eq!(stdout(&node, &id, "echo woken").await, "woken\n");
    node.settled(&id, |state| state == State::Suspended).await;
    let gone = async {
        while node.registry.get(&id).unwrap().is_some() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), gone).await.unwrap();
    assert_eq!(node.traces(&id), Vec::<String>::new());
}
