//! Two nodes and a store between them, without a microVM: an S3 server of the tests' own, which
//! `scripts/object-stores` installs.

use std::{
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    thread,
};

use holdfast_blob::{Bucket, Location, Secrets};
use holdfast_snapshot::Kind;
use tokio::runtime::Runtime;

use super::{
    remote::Upload,
    tests::{DISK, copied, group, id, memory_of, node_of_site, record},
    *,
};

/// It is installed first where it is not there.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(300);

struct Server {
    child: Child,
    port: u16,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    /// Keeps nothing from one start to the next.
    fn start(port: u16) -> Self {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/object-stores");
        let child = Command::new(script).args(["s3", &port.to_string()]).spawn().unwrap();
        let deadline = std::time::Instant::now() + PATIENCE;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(std::time::Instant::now() < deadline, "the server does not answer");
            thread::sleep(std::time::Duration::from_millis(100));
        }
        Self { child, port }
    }

    fn make_bucket(&self) {
        let put = Command::new("curl")
            .args(["-sf", "-X", "PUT", &format!("http://127.0.0.1:{}/bucket", self.port)])
            .output();
        assert!(put.unwrap().status.success());
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

struct Site {
    runtime: Runtime,
    port: u16,
}

impl Site {
    fn bucket(&self) -> Bucket {
        let endpoint = format!("http://127.0.0.1:{}", self.port);
        let location = Location::parse("s3://bucket/site", &endpoint, "").unwrap();
        let secrets = Secrets { key_id: "id".to_owned(), key: "secret".to_owned() };
        Bucket::open(&location, &secrets, self.runtime.handle().clone()).unwrap()
    }

    /// A node that has this state, with this as every byte of its site's key.
    fn node(&self, state: &Path, site_key: u8) -> Snapshots {
        node_of_site(state, self.bucket(), site_key)
    }
}

/// A snapshot that a record names.
fn made(node: &Snapshots, byte: u8) -> holdfast_store::SnapshotRecord {
    node.commit(&group(), copied(node, id(byte), b"guest"), b"state", 7).unwrap();
    let record = record(id(byte + 100), id(byte));
    node.store.create_snapshot(&record).unwrap();
    record
}

#[test]
fn a_snapshot_of_one_node_is_fetched_by_another_and_deleted_by_its_own_alone() {
    let server = Server::start(free_port());
    server.make_bucket();
    let site = Site { runtime: Runtime::new().unwrap(), port: server.port };
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (one, other) = (site.node(folders[0].path(), 1), site.node(folders[1].path(), 1));
    let record = made(&one, 1);
    assert_eq!(one.upload_of(&group(), &id(1)), Upload::Waiting);
    one.reconcile(std::slice::from_ref(&record), |done| assert!(done)).unwrap();
    assert_eq!(one.upload_of(&group(), &id(1)), Upload::Done);
    // What is there is not put again.
    one.reconcile(std::slice::from_ref(&record), |_| panic!("put again")).unwrap();

    let listed = other.list_remote(&group(), 10).unwrap();
    assert_eq!(listed, [(id(1), record.sandbox.to_string(), 7)]);
    assert_eq!(other.remote_record(&group(), &id(1)).unwrap(), record);
    let pin = other.pin(&id(1));
    other.fetch(&group(), &id(1)).unwrap();
    other.fetch(&group(), &id(1)).unwrap();
    let taken = other.take_up(&group(), &id(1)).unwrap();
    assert_eq!((memory_of(&taken), taken.state), (b"guest".to_vec(), b"state".to_vec()));
    assert!(fs::read(taken.disk).unwrap() == DISK);
    assert!(other.verify(&group(), &id(1)).unwrap().frames > 0);

    // The other needs it no more: it stays for whoever put it there.
    drop(pin);
    assert!(other.release(&id(1)).unwrap());
    other.reconcile(&[], |_| panic!("nothing is to be put")).unwrap();
    assert_eq!(one.list_remote(&group(), 10).unwrap().len(), 1);
    // Neither does a node that holds it delete what its records name.
    one.reconcile(&[], |_| panic!("nothing is to be put")).unwrap();
    assert_eq!(one.list_remote(&group(), 10).unwrap().len(), 1);
    one.store.remove_snapshot(&record.id).unwrap();
    one.release(&id(1)).unwrap();
    one.reconcile(&[], |_| panic!("nothing is to be put")).unwrap();
    assert_eq!(other.list_remote(&group(), 10).unwrap(), []);
    let error = other.fetch(&group(), &id(1)).unwrap_err();
    assert!(matches!(error, SaveError::Snapshot(SnapshotError::Missing { .. })), "{error}");
}

#[test]
fn nobody_without_the_sites_key_sees_anything_and_a_key_of_its_own_is_not_shared() {
    let server = Server::start(free_port());
    server.make_bucket();
    let site = Site { runtime: Runtime::new().unwrap(), port: server.port };
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let one = site.node(folders[0].path(), 1);
    let record = made(&one, 1);
    one.reconcile(std::slice::from_ref(&record), |done| assert!(done)).unwrap();
    let stranger = site.node(folders[1].path(), 2);
    assert_eq!(stranger.list_remote(&group(), 10).unwrap(), []);
    let error = stranger.remote_record(&group(), &id(1)).unwrap_err();
    assert!(matches!(error, SaveError::Snapshot(SnapshotError::WrongKey { .. })), "{error}");
    // A node that had no store at first has a key that the site does not know.
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(Store::open(&folder.path().join("store.redb")).unwrap());
    let keys = Keys::open(folder.path(), store, None).unwrap();
    let alone = Snapshots::open(folder.path(), keys, 0).unwrap();
    let record = made(&alone, 3);
    assert_eq!(alone.upload_of(&group(), &id(3)), Upload::No);
    let error = alone.list_remote(&group(), 10).unwrap_err();
    assert!(matches!(error, SaveError::NoRemote { .. }), "{error}");
    drop(alone);
    let late = site.node(folder.path(), 1);
    let error = late.reconcile(&[record], |done| assert!(!done)).unwrap_err();
    assert!(matches!(error, SaveError::OwnKey { .. }), "{error}");
    assert!(matches!(late.upload_of(&group(), &id(3)), Upload::Failing(_)));
}

#[test]
fn a_store_that_is_away_or_was_changed_is_told_and_what_it_lacks_is_put_when_it_is_back() {
    let port = free_port();
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let site = Site { runtime: Runtime::new().unwrap(), port };
    let server = Server::start(port);
    // No bucket yet.
    let (one, other) = (site.node(folders[0].path(), 1), site.node(folders[1].path(), 1));
    let record = made(&one, 1);
    let error = one.reconcile(std::slice::from_ref(&record), |done| assert!(!done)).unwrap_err();
    assert!(matches!(error, SaveError::Snapshot(SnapshotError::Store { .. })), "{error}");
    let Upload::Failing(reason) = one.upload_of(&group(), &id(1)) else { panic!("not failing") };
    assert!(reason.contains("the store cannot"), "{reason}");
    // It goes on from here on its own, guest and all.
    assert!(one.take_up(&group(), &id(1)).is_ok());
    server.make_bucket();
    one.reconcile(std::slice::from_ref(&record), |done| assert!(done)).unwrap();
    assert_eq!(one.upload_of(&group(), &id(1)), Upload::Done);

    // Whoever holds the store changes a piece of it.
    let bucket = site.bucket();
    let segments = bucket.pieces(Kind::Segment, 0).unwrap();
    assert!(!segments.is_empty());
    for name in segments {
        bucket.put_piece(Kind::Segment, &name, b"changed").unwrap();
    }
    let pin = other.pin(&id(1));
    let error = other.fetch(&group(), &id(1)).unwrap_err();
    assert!(matches!(error, SaveError::Snapshot(SnapshotError::Changed { .. })), "{error}");
    drop(pin);
    other.release(&id(1)).unwrap();
    assert!(!other.folder(&id(1)).exists());
}
