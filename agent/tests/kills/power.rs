//! The power goes while an agent is at a step: what is on the disk after that is one state of each
//! sandbox, and whole. In two halves, each on a machine of its own with the same disk
//! (`scripts/soak power`); `HOLDFAST_POWER` says which half of which step.

use std::{env, path::PathBuf};

use fs_err as fs;
use holdfastd::fault::Point;
use serde_json::json;

use crate::{
    agent::{Agent, Place},
    points,
};

/// What the first half leaves for the second, besides the disk.
const NOTE: &str = "ids.json";

/// Operations that the power may go in.
const OPERATIONS: [&str; 8] =
    ["create", "suspend", "save", "resume", "snapshot", "fork", "gc", "delete"];

fn folder() -> PathBuf {
    env::temp_dir().join("power")
}

fn point_of(name: &str) -> Point {
    let all: Vec<Point> = OPERATIONS.into_iter().flat_map(points).collect();
    // The store's own has another test: a machine without power has lost it in any case.
    let point = all.iter().find(|point| point.name() == name);
    *point.unwrap_or_else(|| panic!("no step {name:?}: {all:?}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn without_power() {
    let Ok(asked) = env::var("HOLDFAST_POWER") else { return };
    let (half, name) = asked.split_once(':').unwrap();
    let point = point_of(name);
    match half {
        "cut" => cut(point).await,
        "after" => after(point).await,
        _ => panic!("no such half: {half}"),
    }
}

/// Ends with the machine.
async fn cut(point: Point) {
    fs::create_dir_all(folder()).unwrap();
    let place = Place::new(&folder());
    let agent = Agent::start(&place, None).await;
    let mut ids = Vec::new();
    for name in ["runs", "suspended"] {
        let id = agent.create(name).await.id();
        agent.runs(&id).await;
        agent.look(&id, "echo kept > /dev/shm/marker").await;
        ids.push(id);
    }
    let [runs, suspended] = &ids[..] else { unreachable!() };
    assert_eq!(agent.order(suspended, "stop").await.status, 204);
    let note = json!({"runs": runs, "suspended": suspended}).to_string();
    fs::write(folder().join(NOTE), note).unwrap();
    agent.stops().await;
    rustix::fs::sync();

    let agent = Agent::start_without_power(&place, point).await;
    let answer = match point.name().split('.').next().unwrap() {
        "create" => agent.create("new").await,
        "suspend" | "save" => agent.order(runs, "stop").await,
        "resume" => agent.execute(suspended, "true", "resume").await,
        "snapshot" => agent.snapshot(runs, "snapshot").await,
        "fork" => agent.fork(runs, 2, "fork").await,
        "gc" => agent.delete(suspended).await,
        "delete" => agent.delete(runs).await,
        other => panic!("{other}"),
    };
    // Some are after the answer.
    tokio::time::sleep(std::time::Duration::from_secs(20)).await;
    panic!("the power did not go: {answer:?}");
}

async fn after(point: Point) {
    // What lay in memory.
    let _ = fs::remove_dir_all(folder().join("run"));
    let note: serde_json::Value =
        serde_json::from_slice(&fs::read(folder().join(NOTE)).unwrap()).unwrap();
    let (runs, suspended) = (note["runs"].as_str().unwrap(), note["suspended"].as_str().unwrap());
    let operation = point.name().split('.').next().unwrap();
    let place = Place::new(&folder());
    let agent = Agent::start(&place, None).await;
    let kept = "kept\n";
    let mut saved = 0;

    match operation {
        "gc" => assert_eq!(agent.get(&agent.sandbox(suspended)).await.status, 404),
        _ => {
            assert_eq!(agent.state(suspended).await, "Suspended");
            assert_eq!(agent.look(suspended, "cat /dev/shm/marker").await, kept);
            saved += 1;
        }
    }
    let committed = matches!(point, Point::SuspendCommitted);
    match operation {
        "delete" => assert_eq!(agent.get(&agent.sandbox(runs)).await.status, 404),
        _ if committed => {
            assert_eq!(agent.state(runs).await, "Suspended");
            assert_eq!(agent.look(runs, "cat /dev/shm/marker").await, kept);
            saved += 1;
        }
        // Its memory was nowhere else.
        _ => {
            let sandbox = agent.get(&agent.sandbox(runs)).await.json();
            assert_eq!(sandbox["state"], json!("Failed"), "{sandbox}");
            assert!(sandbox["stateDetails"]["failure"].is_string(), "{sandbox}");
        }
    }
    let others: Vec<String> =
        agent.list().await.into_iter().filter(|id| id != runs && id != suspended).collect();
    match point {
        // All of them were promised.
        Point::ForkAccepted => {
            assert_eq!(others.len(), 2, "{others:?}");
            for id in &others {
                agent.runs(id).await;
                assert_eq!(agent.look(id, "cat /dev/shm/marker").await, kept);
            }
            saved += 1;
        }
        _ if operation == "create" => {
            let [id] = &others[..] else { panic!("{others:?}") };
            if point == Point::CreateRunning {
                assert_eq!(agent.state(id).await, "Failed");
            } else {
                agent.runs(id).await;
            }
        }
        _ => assert_eq!(others, Vec::<String>::new()),
    }
    let snapshots = agent.snapshots().await;
    assert_eq!(snapshots.len(), usize::from(point == Point::SnapshotRecorded));
    for id in &snapshots {
        let clone = agent.create_from(id, "of-snapshot").await.id();
        agent.runs(&clone).await;
        assert_eq!(agent.look(&clone, "cat /dev/shm/marker").await, kept);
        saved += 1;
        assert_eq!(agent.delete(&clone).await.status, 204);
    }
    // Nothing of what was not committed is left.
    let state = folder().join("state");
    let count = |name: &str| fs::read_dir(state.join(name)).map_or(0, Iterator::count);
    assert_eq!((count("saved"), count("snapshots/manifests")), (saved, saved));
    for id in agent.list().await {
        assert_eq!(agent.delete(&id).await.status, 204);
    }
    for id in snapshots {
        assert_eq!(agent.delete_snapshot(&id).await.status, 204);
    }
    assert_eq!((count("saved"), count("snapshots/segments"), count("sandboxes")), (0, 0, 0));
    agent.stops().await;
}
