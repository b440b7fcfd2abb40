//! A process that saves, uploads, fetches, takes up and removes, killed at each step: whoever comes
//! after it finds each snapshot there whole or not there, can go on with all of it, and in the end
//! has nothing left over. The remote store is a folder.

use std::{
    os::unix::process::ExitStatusExt,
    process::{Command, Stdio},
};

use holdfast_snapshot::Kind;

use super::{
    remote::Upload,
    tests::{DISK, copied, group, id, memory_of, node_of_site, record},
    *,
};
use crate::fault::FAULT_POINT;

/// Set in the killed process's environment only.
const FOLDER: &str = "HOLDFAST_TEST_KILLED";

/// What the operations here come to.
const OPERATIONS: [&str; 5] = ["save", "warm", "upload", "fetch", "gc"];

const STATE: &[u8] = b"state";

/// Two nodes of one site, and the store between them.
struct Site {
    one: Snapshots,
    other: Snapshots,
}

impl Site {
    fn open(folder: &Path) -> Self {
        let node = |name: &str| {
            let state = folder.join(name);
            fs::create_dir_all(&state).unwrap();
            let store = Folder::open(&folder.join("remote")).unwrap();
            node_of_site(&state, store, 9)
        };
        Self { one: node("one"), other: node("other") }
    }

    /// From nothing to nothing, by way of everything. Each step does nothing where it was done.
    fn go_on(&self, number: u8) {
        let Self { one, other } = self;
        let data = id(number);
        let saved = record(id(100 + number), data.clone());
        let kept = record(id(200 + number), data.clone());
        if one.store.snapshot(&saved.id).unwrap().is_none() {
            one.commit(&group(), copied(one, data.clone(), b"guest"), STATE, 7).unwrap();
            one.store.create_snapshot(&saved).unwrap();
        }
        let _ = fs::remove_file(one.memory_path(&data));
        whole(one, &data);
        one.reconcile(std::slice::from_ref(&saved), |_| {}).unwrap();
        assert_eq!(one.upload_of(&group(), &data), Upload::Done);

        if other.store.snapshot(&kept.id).unwrap().is_none() {
            let _pin = other.pin(&data);
            other.fetch(&group(), &data).unwrap();
            other.store.create_snapshot(&kept).unwrap();
        }
        whole(other, &data);
        for (node, record) in [(other, &kept), (one, &saved)] {
            node.store.remove_snapshot(&record.id).unwrap();
            node.release(&data).unwrap();
            node.reconcile(&[], |_| panic!("nothing is to be put")).unwrap();
        }
    }

    /// What a start does first.
    fn swept(&self) {
        for node in [&self.one, &self.other] {
            let known = node.store.all_snapshots().unwrap();
            node.sweep(|id| known.iter().any(|record| record.data.as_str() == id)).unwrap();
            for record in known {
                whole(node, &record.data);
            }
        }
    }

    /// Whatever is in the store between the nodes can be had from it.
    fn sound(&self) {
        let Some(remote) = self.one.remote() else { panic!("there is a store") };
        let key = remote.group_key(&group()).unwrap();
        for (id, ..) in self.one.list_remote(&group(), 10).unwrap() {
            let found = self.one.remote_record(&group(), &id).unwrap();
            assert_eq!(found.data, id);
            let snapshot = Snapshot::open(remote.pieces(), &key, id.as_str()).unwrap();
            snapshot.verify(remote.pieces(), &key).unwrap();
        }
    }
}

/// It is there with all its parts.
fn whole(node: &Snapshots, id: &SnapshotId) {
    node.verify(&group(), id).unwrap();
    let taken = node.take_up(&group(), id).unwrap();
    assert_eq!((memory_of(&taken), taken.state), (b"guest".to_vec(), STATE.to_vec()));
    assert!(fs::read(taken.disk).unwrap() == DISK);
}

fn files(folder: &Path) -> usize {
    fs::read_dir(folder).map_or(0, |entries| entries.count())
}

/// The process that is killed. Does nothing in an ordinary run.
#[test]
fn killed_process() {
    if let Ok(folder) = std::env::var(FOLDER) {
        Site::open(Path::new(&folder)).go_on(1);
    }
}

#[test]
fn one_killed_at_any_step_leaves_each_snapshot_whole_or_not_there_and_nothing_over() {
    let points: Vec<Point> = Point::ALL
        .iter()
        .filter(|point| point.name().split('.').next().is_some_and(|it| OPERATIONS.contains(&it)))
        .copied()
        .collect();
    assert!(points.len() >= 14, "{points:?}");
    for point in points {
        let folder = tempfile::tempdir().unwrap();
        let killed = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "sandbox::snapshots::kill_tests::killed_process", "--nocapture"])
            .env(FOLDER, folder.path())
            .env(FAULT_POINT, point.name())
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert_eq!(killed.signal(), Some(9), "it did not come to {}", point.name());

        println!("killed at {}", point.name());
        let site = Site::open(folder.path());
        site.swept();
        site.sound();
        // What was begun and is not over, and then another.
        if !site.one.store.all_snapshots().unwrap().is_empty() {
            site.go_on(1);
        }
        site.go_on(2);
        site.swept();
        for state in ["one", "other"] {
            let state = folder.path().join(state);
            for left in ["saved", "remote", "snapshots/tmp", "snapshots/manifests"] {
                assert_eq!(files(&state.join(left)), 0, "{left} after {}", point.name());
            }
            for kind in Kind::ALL {
                let left = files(&state.join("snapshots").join(kind.folder()));
                assert_eq!(left, 0, "{kind} after {}", point.name());
            }
        }
        assert_eq!(files(&folder.path().join("remote/manifests")), 0, "{}", point.name());
    }
}
