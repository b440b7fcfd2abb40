//! Stores that fail, forget, change what they are given or say that they have what they have not;
//! and a disk that is full. What is here stays whole, what is there is named only when it is whole,
//! and the error says what went wrong.

use std::{
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
};

use holdfast_snapshot::{Kind, Name, Put};

use super::{
    remote::Upload,
    tests::{DISK, copied, group, id, memory_of, node_of_site, record},
    *,
};

/// What a store does to the call of a number, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// None of its calls is answered from there on.
    Dies(usize),
    /// It does the call, and its answer is an error.
    LosesAnswer(usize),
    /// It says that the put was done, and it was not.
    Lies(usize),
    /// It puts something of the same length.
    Changes(usize),
    /// It puts the beginning.
    Cuts(usize),
    /// It is well.
    None,
}

/// What the test and the store share.
#[derive(Debug, Clone)]
struct Control {
    fault: Arc<Mutex<Fault>>,
    calls: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct Faulty {
    inner: Folder,
    control: Control,
}

enum Doing {
    It,
    Nothing,
    Another,
    Part,
    ThenFailing,
}

fn broken() -> SnapshotError {
    SnapshotError::Store { what: "be reached".to_owned(), source: io::ErrorKind::TimedOut.into() }
}

impl Faulty {
    /// Counts a call. Only puts are counted of stores that lie, change or cut.
    fn turn(&self, puts: bool) -> Result<Doing, SnapshotError> {
        let fault = *self.control.fault.lock().unwrap();
        let counts = puts || matches!(fault, Fault::Dies(_) | Fault::LosesAnswer(_) | Fault::None);
        let number = match counts {
            true => self.control.calls.fetch_add(1, Ordering::SeqCst) + 1,
            false => 0,
        };
        match fault {
            Fault::Dies(from) if number >= from => Err(broken()),
            Fault::LosesAnswer(at) if number == at => Ok(Doing::ThenFailing),
            Fault::Lies(at) if number == at => Ok(Doing::Nothing),
            Fault::Changes(at) if number == at => Ok(Doing::Another),
            Fault::Cuts(at) if number == at => Ok(Doing::Part),
            _ => Ok(Doing::It),
        }
    }

    fn put(
        &self,
        bytes: &[u8],
        put: impl FnOnce(&[u8]) -> Result<Put, SnapshotError>,
    ) -> Result<Put, SnapshotError> {
        match self.turn(true)? {
            Doing::It => put(bytes),
            Doing::Nothing => Ok(Put::Created),
            Doing::Another => put(&bytes.iter().map(|byte| !byte).collect::<Vec<_>>()),
            Doing::Part => put(&bytes[..bytes.len() / 2]),
            Doing::ThenFailing => {
                let _ = put(bytes);
                Err(broken())
            }
        }
    }

    fn ask<T>(&self, ask: impl FnOnce() -> Result<T, SnapshotError>) -> Result<T, SnapshotError> {
        match self.turn(false)? {
            Doing::ThenFailing => {
                let _ = ask();
                Err(broken())
            }
            _ => ask(),
        }
    }
}

impl PieceStore for Faulty {
    fn put_piece(&self, kind: Kind, name: &Name, bytes: &[u8]) -> Result<Put, SnapshotError> {
        self.put(bytes, |bytes| self.inner.put_piece(kind, name, bytes))
    }

    fn read_piece(
        &self,
        kind: Kind,
        name: &Name,
        offset: u64,
        length: usize,
    ) -> Result<Vec<u8>, SnapshotError> {
        self.ask(|| self.inner.read_piece(kind, name, offset, length))
    }

    fn piece_bytes(&self, kind: Kind, name: &Name) -> Result<u64, SnapshotError> {
        self.ask(|| self.inner.piece_bytes(kind, name))
    }

    fn put_manifest(&self, id: &str, bytes: &[u8]) -> Result<Put, SnapshotError> {
        self.put(bytes, |bytes| self.inner.put_manifest(id, bytes))
    }

    fn read_manifest(&self, id: &str, max: u64) -> Result<Vec<u8>, SnapshotError> {
        self.ask(|| self.inner.read_manifest(id, max))
    }

    fn manifests(&self) -> Result<Vec<String>, SnapshotError> {
        self.ask(|| self.inner.manifests())
    }

    fn delete_manifest(&self, id: &str) -> Result<bool, SnapshotError> {
        self.ask(|| self.inner.delete_manifest(id))
    }

    fn pieces(&self, kind: Kind, age_s: u64) -> Result<Vec<Name>, SnapshotError> {
        self.ask(|| self.inner.pieces(kind, age_s))
    }

    fn delete_piece(&self, kind: Kind, name: &Name) -> Result<u64, SnapshotError> {
        self.ask(|| self.inner.delete_piece(kind, name))
    }
}

struct Site {
    folder: tempfile::TempDir,
    node: Snapshots,
    record: holdfast_store::SnapshotRecord,
    control: Control,
}

impl Site {
    /// A node with a snapshot, and an empty store that will do this.
    fn with(fault: Fault) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let control = Control { fault: Arc::new(Mutex::new(fault)), calls: Arc::default() };
        let node = node(folder.path(), "one", &control);
        node.commit(&group(), copied(&node, id(1), b"guest"), b"state", 7).unwrap();
        let record = record(id(101), id(1));
        node.store.create_snapshot(&record).unwrap();
        Self { folder, node, record, control }
    }

    fn upload(&self) -> Result<(), SaveError> {
        self.node.reconcile(std::slice::from_ref(&self.record), |_| {})
    }

    fn set(&self, fault: Fault) {
        *self.control.fault.lock().unwrap() = fault;
        self.control.calls.store(0, Ordering::SeqCst);
    }

    fn calls(&self) -> usize {
        self.control.calls.load(Ordering::SeqCst)
    }

    /// Another node fetches it from the store.
    fn fetched(&self, name: &str) -> Result<Vec<u8>, SaveError> {
        let other = node(self.folder.path(), name, &self.control);
        let _pin = other.pin(&id(1));
        other.fetch(&group(), &id(1))?;
        other.verify(&group(), &id(1))?;
        let taken = other.take_up(&group(), &id(1))?;
        assert!(fs::read(&taken.disk).unwrap() == DISK);
        Ok(memory_of(&taken))
    }

    /// The node has its snapshot whatever the store does.
    fn has_its_own(&self) {
        self.node.verify(&group(), &id(1)).unwrap();
        assert_eq!(memory_of(&self.node.take_up(&group(), &id(1)).unwrap()), b"guest");
    }

    fn in_store(&self) -> usize {
        self.node.list_remote(&group(), 10).unwrap().len()
    }
}

fn node(folder: &Path, name: &str, control: &Control) -> Snapshots {
    let state = folder.join(name);
    fs::create_dir_all(&state).unwrap();
    let inner = Folder::open(&folder.join("remote")).unwrap();
    let store = Faulty { inner, control: control.clone() };
    node_of_site(&state, store, 9)
}

/// Calls of an upload to a store that is well.
fn calls_of_an_upload(only_puts: bool) -> usize {
    // Far beyond its end: what is counted is what is of interest.
    let fault = if only_puts { Fault::Lies(usize::MAX) } else { Fault::None };
    let site = Site::with(fault);
    site.upload().unwrap();
    site.calls()
}

#[test]
fn a_store_that_dies_or_loses_an_answer_at_any_call_has_the_snapshot_whole_once_it_is_back() {
    let calls = calls_of_an_upload(false);
    assert!(calls > 8, "{calls}");
    for number in 1..=calls {
        for fault in [Fault::Dies(number), Fault::LosesAnswer(number)] {
            let site = Site::with(fault);
            let error = site.upload().unwrap_err();
            let told = crate::error_chain::error_chain(&error);
            assert!(told.contains("the store cannot"), "{fault:?}: {told}");
            let Upload::Failing(reason) = site.node.upload_of(&group(), &id(1)) else {
                panic!("{fault:?}: not failing")
            };
            assert!(reason.contains("the store cannot"), "{fault:?}: {reason}");
            site.has_its_own();
            site.set(Fault::None);
            // What is named there before the upload is repeated is all there.
            if site.in_store() > 0 {
                assert_eq!(site.fetched("early").unwrap(), b"guest", "{fault:?}");
            }
            site.upload().unwrap();
            assert_eq!(site.node.upload_of(&group(), &id(1)), Upload::Done, "{fault:?}");
            assert_eq!(site.fetched("late").unwrap(), b"guest", "{fault:?}");
        }
    }
}

#[test]
fn a_store_that_lies_about_a_put_or_cuts_it_is_found_out_before_the_snapshot_is_taken_for_there() {
    let puts = calls_of_an_upload(true);
    assert!(puts >= 6, "{puts}");
    for number in 1..=puts {
        for fault in [Fault::Lies(number), Fault::Cuts(number)] {
            let site = Site::with(fault);
            let error = site.upload().unwrap_err();
            let found_out = matches!(
                &error,
                SaveError::Snapshot(
                    SnapshotError::Missing { .. }
                        | SnapshotError::Changed { .. }
                        | SnapshotError::WrongKey { .. }
                        | SnapshotError::Malformed { .. }
                )
            );
            assert!(found_out, "{fault:?}: {error}");
            assert!(matches!(site.node.upload_of(&group(), &id(1)), Upload::Failing(_)));
            site.has_its_own();
            site.set(Fault::None);
            if number < puts {
                assert_eq!(site.in_store(), 0, "{fault:?}");
            }
        }
    }
}

#[test]
fn what_a_store_changed_is_found_by_whoever_fetches_it_and_nothing_of_it_is_believed() {
    let puts = calls_of_an_upload(true);
    // The last is the manifest, which the upload itself reads again.
    for number in 1..puts {
        let site = Site::with(Fault::Changes(number));
        site.upload().unwrap();
        site.set(Fault::None);
        let error = site.fetched("other").unwrap_err();
        let changed = matches!(error, SaveError::Snapshot(SnapshotError::Changed { .. }));
        assert!(changed, "put {number}: {error}");
        let other = site.folder.path().join("other");
        assert_eq!(fs::read_dir(other.join("snapshots/manifests")).unwrap().count(), 0);
        site.has_its_own();
    }
}

#[test]
fn a_fetch_from_a_store_that_dies_at_any_call_leaves_nothing_that_counts_and_can_be_repeated() {
    let site = Site::with(Fault::None);
    site.upload().unwrap();
    site.set(Fault::None);
    assert_eq!(site.fetched("first").unwrap(), b"guest");
    let calls = site.calls();
    assert!(calls > 3, "{calls}");
    for number in 1..=calls {
        site.set(Fault::Dies(number));
        let name = format!("other-{number}");
        let error = site.fetched(&name).unwrap_err();
        assert!(error.to_string().contains("the store cannot"), "call {number}: {error}");
        let manifests = site.folder.path().join(&name).join("snapshots/manifests");
        assert_eq!(fs::read_dir(manifests).unwrap().count(), 0, "call {number}");
        site.set(Fault::None);
        assert_eq!(site.fetched(&name).unwrap(), b"guest", "call {number}");
    }
}

/// A file system of its own, so small that it fills.
struct Small<'p>(&'p Path);

impl<'p> Small<'p> {
    fn mount(path: &'p Path, size: &str) -> Self {
        fs::create_dir_all(path).unwrap();
        let options = format!("size={size}");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "none"]).arg(path);
        assert!(mount.status().unwrap().success(), "root can mount");
        Self(path)
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

fn is_full(error: &SaveError) -> bool {
    crate::error_chain::error_chain(error).contains("No space left")
}

#[test]
fn a_full_disk_leaves_the_earlier_snapshot_as_it_is_and_nothing_of_the_new_one() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let _small = Small::mount(&state, "3m");
    let store = Arc::new(Store::open(&folder.path().join("store.redb")).unwrap());
    let keys = Keys::open(&state, Arc::clone(&store), None).unwrap();
    let node = Snapshots::open(&state, keys, 0).unwrap();
    node.commit(&group(), copied(&node, id(1), b"guest"), b"state", 7).unwrap();
    store.create_snapshot(&record(id(101), id(1))).unwrap();

    let filler = state.join("filler");
    let fill = || {
        let file = fs::File::create(&filler).unwrap();
        let mut at = 0;
        while std::os::unix::fs::FileExt::write_all_at(file.file(), &[1; 4096], at).is_ok() {
            at += 4096;
        }
    };
    // Copied before it was full; there is no room to make it durable.
    let copy = copied(&node, id(2), b"other");
    fill();
    let error = node.commit(&group(), copy, b"state", 8).unwrap_err();
    assert!(is_full(&error), "{error}");
    assert!(!node.folder(&id(2)).exists());
    assert_eq!(node.pieces.manifests().unwrap(), [id(1).to_string()]);
    // A memory file that is to be written anew.
    fs::remove_file(node.memory_path(&id(1))).unwrap();
    fs::remove_file(&filler).unwrap();
    fill();
    let error = node.take_up(&group(), &id(1)).unwrap_err();
    assert!(is_full(&error), "{error}");
    let left: Vec<_> = fs::read_dir(node.folder(&id(1))).unwrap().map(|e| e.unwrap()).collect();
    assert_eq!(left.len(), 1, "{left:?}");
    // With room again all is as before.
    fs::remove_file(&filler).unwrap();
    node.verify(&group(), &id(1)).unwrap();
    assert_eq!(memory_of(&node.take_up(&group(), &id(1)).unwrap()), b"guest");
    node.commit(&group(), copied(&node, id(2), b"other"), b"state", 8).unwrap();
    assert_eq!(memory_of(&node.take_up(&group(), &id(2)).unwrap()), b"other");
}

#[test]
fn a_fetch_to_a_full_disk_says_so_and_is_repeated_when_there_is_room() {
    let site = Site::with(Fault::None);
    site.upload().unwrap();
    let state = site.folder.path().join("other");
    // Some of its pieces fit.
    let pieces = state.join("snapshots");
    let small = Small::mount(&pieces, "16k");
    let error = site.fetched("other").unwrap_err();
    assert!(is_full(&error), "{error}");
    assert_eq!(fs::read_dir(state.join("snapshots/manifests")).unwrap().count(), 0);
    drop(small);
    assert_eq!(site.fetched("other").unwrap(), b"guest");
}
