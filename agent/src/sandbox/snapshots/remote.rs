//! Snapshots in a remote store: uploaded behind everybody's back, fetched when somebody asks.
//!
//! `remote/ID` says what is known of one: empty before anything of it is put there, so that nothing
//! can be there that this node does not know of; `there` once its manifest is; `fetched` for one
//! that was put by whoever it came from, who may also delete it.

use std::{
    collections::BTreeMap,
    io,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use fs_err as fs;
use holdfast_model::{GroupKey, SnapshotId};
use holdfast_snapshot::{
    Draft, FileSource, Image, Key, Kind, Name, PAGE_BYTES, Pages, PieceStore, Put, Snapshot,
    SnapshotError, Source, collect,
};
use holdfast_store::SnapshotRecord;
use log::{info, warn};
use tokio::sync::Notify;

use super::{DISK_FILE, SaveError, Snapshots, failed};
use crate::{
    credentials::Site,
    durable::{self, Readers},
    error_chain::error_chain,
    fault::{self, Point},
};

/// Names of images that only a remote snapshot has: the disk, and the record it was made of.
const DISK: &str = "disk";
const RECORD: &str = "record";

/// What a record may have; the API lets nobody make a larger one.
const RECORD_BYTES_MAX: u64 = 4 << 20;

/// Pieces of no snapshot are left alone for so long: another node may be about to name them.
const COLLECT_AGE: Duration = Duration::from_secs(24 * 3600);
const COLLECT_EVERY: Duration = Duration::from_secs(6 * 3600);

const THERE: &[u8] = b"there\n";
const FETCHED: &[u8] = b"fetched\n";

/// Where one is, seen from this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Upload {
    /// The group's snapshots stay on the node.
    No,
    Waiting,
    /// It did not succeed yet, and is tried again.
    Failing(String),
    Done,
}

/// The store, and what decides who may use it.
pub(in crate::sandbox) struct Remote {
    /// Whatever keeps pieces elsewhere.
    store: Box<dyn PieceStore + Send>,
    site: Arc<Site>,
    /// 0: no bound.
    bytes_per_second: u64,
    marks: PathBuf,
    stopping: AtomicBool,
    failing: Mutex<BTreeMap<SnapshotId, String>>,
    collected: Mutex<Option<Instant>>,
    pub(in crate::sandbox) changed: Notify,
}

impl Remote {
    pub(in crate::sandbox) fn new(
        store: impl PieceStore + Send + 'static,
        site: Arc<Site>,
        bytes_per_second: u64,
        marks: PathBuf,
    ) -> Result<Self, SaveError> {
        fs::create_dir_all(&marks).map_err(failed("make", &marks))?;
        Ok(Self {
            store: Box::new(store),
            site,
            bytes_per_second,
            marks,
            stopping: AtomicBool::new(false),
            failing: Mutex::default(),
            collected: Mutex::default(),
            changed: Notify::new(),
        })
    }

    pub(super) fn has(&self, group: &GroupKey) -> bool {
        self.site.has(group)
    }

    pub(super) fn group_key(&self, group: &GroupKey) -> Result<Key, SaveError> {
        Ok(self.site.group_key(group)?)
    }

    /// The store itself.
    #[cfg(test)]
    pub(super) fn pieces(&self) -> &dyn PieceStore {
        &*self.store
    }

    fn mark(&self, id: &SnapshotId) -> PathBuf {
        self.marks.join(id.as_str())
    }

    fn marked(&self, id: &SnapshotId) -> Option<Vec<u8>> {
        fs::read(self.mark(id)).ok()
    }

    fn set_mark(&self, id: &SnapshotId, text: &[u8]) -> Result<(), SaveError> {
        let path = self.mark(id);
        durable::replace(&path, text, Readers::Everyone).map_err(failed("write", &path))
    }

    fn is_settled(&self, id: &SnapshotId) -> bool {
        self.marked(id).is_some_and(|text| text == THERE || text == FETCHED)
    }

    fn note(&self, id: &SnapshotId, failure: Option<String>) {
        let mut failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        match failure {
            Some(failure) => failing.insert(id.clone(), failure),
            None => failing.remove(id),
        };
    }

    pub(in crate::sandbox) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.changed.notify_one();
    }

    pub(in crate::sandbox) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Holds the upload to its rate.
    fn pace(&self, began: Instant, bytes: u64) {
        if self.bytes_per_second > 0 {
            let due = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
            std::thread::sleep(due.saturating_sub(began.elapsed()));
        }
    }

    /// Deletes what this node put there and needs no more.
    fn delete(&self, id: &SnapshotId) -> Result<(), SaveError> {
        if self.marked(id).is_some_and(|text| text != FETCHED) {
            self.store.delete_manifest(id.as_str())?;
            fault::at(Point::GcRemote);
            info!(snapshot:% = id; "snapshot deleted from the remote store");
        }
        let path = self.mark(id);
        fs::remove_file(&path).map_err(failed("remove", &path))
    }

    fn collect_now_and_then(&self) -> Result<(), SaveError> {
        let mut last = self.collected.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_none_or(|last| last.elapsed() >= COLLECT_EVERY) {
            let collected = collect(&*self.store, COLLECT_AGE.as_secs())?;
            *last = Some(Instant::now());
            let (pieces, bytes) = (collected.pieces_deleted, collected.bytes_deleted);
            info!(pieces, bytes; "remote store collected");
        }
        Ok(())
    }
}

impl Snapshots {
    pub(in crate::sandbox) fn with_remote(mut self, remote: Option<Remote>) -> Self {
        self.remote = remote;
        self
    }

    pub(in crate::sandbox) fn remote(&self) -> Option<&Remote> {
        self.remote.as_ref()
    }

    fn remote_of(&self, group: &GroupKey) -> Result<&Remote, SaveError> {
        let remote = self.remote.as_ref().filter(|remote| remote.has(group));
        remote.ok_or_else(|| SaveError::NoRemote { group: group.clone() })
    }

    /// The group's key, if it is the one that every node of the site has.
    fn site_group_key(&self, remote: &Remote, group: &GroupKey) -> Result<Key, SaveError> {
        let key = self.keys.of_group(group)?;
        if key.is(&remote.group_key(group)?) {
            Ok(key)
        } else {
            Err(SaveError::OwnKey { group: group.clone() })
        }
    }

    /// Where a snapshot is.
    pub(in crate::sandbox) fn upload_of(&self, group: &GroupKey, id: &SnapshotId) -> Upload {
        let Ok(remote) = self.remote_of(group) else { return Upload::No };
        if remote.is_settled(id) {
            return Upload::Done;
        }
        let failing = remote.failing.lock().unwrap_or_else(PoisonError::into_inner);
        failing.get(id).cloned().map_or(Upload::Waiting, Upload::Failing)
    }

    /// Uploads what is needed and not there, then deletes what is there and not needed. The error is
    /// the first of several; the others were tried all the same.
    pub(in crate::sandbox) fn reconcile(
        &self,
        needed: &[SnapshotRecord],
        uploaded: impl Fn(bool),
    ) -> Result<(), SaveError> {
        let Some(remote) = &self.remote else { return Ok(()) };
        let mut outcome = Ok(());
        for record in needed {
            if remote.is_stopping() {
                return Ok(());
            }
            if !remote.has(&record.group) || remote.is_settled(&record.data) {
                continue;
            }
            let pin = self.pin(&record.data);
            let done = self.upload(remote, record);
            drop(pin);
            // Deleted meanwhile: then so is the record, and what was put goes with its mark.
            self.released_or_logged(&record.data);
            uploaded(done.is_ok());
            remote.note(&record.data, done.as_ref().err().map(|error| error_chain(error)));
            if let Err(error) = done {
                warn!(snapshot:% = record.data, error:% = error_chain(&error); "not uploaded");
                outcome = outcome.and(Err(error));
            }
        }
        let marks = &remote.marks;
        let mut deleted = false;
        for mark in fs::read_dir(marks).map_err(failed("list", marks))? {
            let name = mark.map_err(failed("list", marks))?.file_name();
            // What has another name is a draft.
            let id: Option<SnapshotId> = name.to_str().and_then(|name| name.parse().ok());
            let Some(id) = id.filter(|id| needed.iter().all(|record| record.data != *id)) else {
                continue;
            };
            if !self.is_held(&id) && !self.store.is_needed(&id)? {
                outcome = outcome.and(remote.delete(&id));
                remote.note(&id, None);
                deleted = true;
            }
        }
        if deleted {
            outcome = outcome.and(remote.collect_now_and_then());
        }
        outcome
    }

    fn upload(&self, remote: &Remote, record: &SnapshotRecord) -> Result<(), SaveError> {
        let key = self.site_group_key(remote, &record.group)?;
        let (id, began) = (&record.data, Instant::now());
        let checked = Checked { store: &*remote.store, put: Mutex::default() };
        remote.set_mark(id, b"")?;
        fault::at(Point::UploadMarked);
        let local = Snapshot::open(&self.pieces, &key, id.as_str())?;
        match Snapshot::open(&checked, &key, id.as_str()) {
            // Its mark was lost, by a crash between the two.
            Ok(_) => return remote.set_mark(id, THERE),
            Err(SnapshotError::Missing { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let mut bytes = 0;
        for (kind, name) in local.manifest.pieces() {
            if remote.is_stopping() {
                return Err(SaveError::Stopping);
            }
            let piece = self.pieces.whole_piece(kind, &name)?;
            checked.put_piece(kind, &name, &piece)?;
            bytes += piece.len() as u64;
            remote.pace(began, bytes);
        }
        fault::at(Point::UploadPieces);
        let path = self.folder(id).join(DISK_FILE);
        let disk = fs::File::open(&path).map_err(failed("open", &path))?;
        let disk = FileSource::new(disk.into_parts().0).map_err(failed("read", &path))?;
        let mut draft = Draft::again(&checked, &key, &local);
        draft.image(DISK, &disk, None, &[])?;
        let text = serde_json::to_vec(record)
            .map_err(|error| failed("write the record of", &path)(error.into()))?;
        draft.image(RECORD, &Text::new(text), None, &[])?;
        draft.about("sandbox", record.sandbox.as_str());
        checked.are_there()?;
        fault::at(Point::UploadDisk);
        draft.commit(local.manifest.created_ms)?;
        // Nor is its word taken for the manifest.
        Snapshot::open(&checked, &key, id.as_str())?;
        fault::at(Point::UploadCommitted);
        remote.set_mark(id, THERE)?;
        info!(snapshot:% = id, bytes, ms = began.elapsed().as_millis(); "snapshot uploaded");
        Ok(())
    }

    /// The group's snapshots in the remote store: their ids, sandboxes and times. Those that do not
    /// open with the group's key are another group's.
    pub(in crate::sandbox) fn list_remote(
        &self,
        group: &GroupKey,
        max: usize,
    ) -> Result<Vec<(SnapshotId, String, u64)>, SaveError> {
        let remote = self.remote_of(group)?;
        let key = remote.group_key(group)?;
        let mut found = Vec::new();
        for name in remote.store.manifests()? {
            let Ok(id) = name.parse::<SnapshotId>() else { continue };
            match Snapshot::open(&*remote.store, &key, &name) {
                Ok(Snapshot { mut manifest }) => {
                    let sandbox = manifest.about.remove("sandbox").unwrap_or_default();
                    found.push((id, sandbox, manifest.created_ms));
                }
                Err(SnapshotError::WrongKey { .. } | SnapshotError::Missing { .. }) => {}
                Err(error) => {
                    warn!(snapshot:% = id, error:% = error_chain(&error); "passed over");
                }
            }
            if found.len() >= max {
                break;
            }
        }
        Ok(found)
    }

    /// The record that a remote snapshot was made of.
    pub(in crate::sandbox) fn remote_record(
        &self,
        group: &GroupKey,
        id: &SnapshotId,
    ) -> Result<SnapshotRecord, SaveError> {
        let remote = self.remote_of(group)?;
        let key = self.site_group_key(remote, group)?;
        let snapshot = Snapshot::open(&*remote.store, &key, id.as_str())?;
        let text = text_of(&mut snapshot.image(&*remote.store, &key, RECORD)?)?;
        let record: SnapshotRecord = serde_json::from_slice(&text).map_err(|error| {
            SaveError::RemoteRecord { id: id.clone(), reason: error.to_string() }
        })?;
        if record.group != *group || record.data != *id {
            let reason = format!("it is that of {} in {}", record.data, record.group);
            return Err(SaveError::RemoteRecord { id: id.clone(), reason });
        }
        Ok(record)
    }

    /// Brings all of a remote snapshot here. The caller holds a pin of it; what is left of an
    /// attempt that failed is swept with what nothing names.
    pub(in crate::sandbox) fn fetch(
        &self,
        group: &GroupKey,
        id: &SnapshotId,
    ) -> Result<(), SaveError> {
        let _writing = self.writing.read().unwrap_or_else(PoisonError::into_inner);
        let remote = self.remote_of(group)?;
        let key = self.site_group_key(remote, group)?;
        if Snapshot::open(&self.pieces, &key, id.as_str()).is_ok() {
            return Ok(());
        }
        let began = Instant::now();
        let snapshot = Snapshot::open(&*remote.store, &key, id.as_str())?;
        // Before the mark of an upload could be written for it.
        remote.set_mark(id, FETCHED)?;
        fault::at(Point::FetchMarked);
        for (kind, name) in snapshot.manifest.pieces() {
            if self.pieces.whole_piece(kind, &name).is_err() {
                let piece = remote.store.whole_piece(kind, &name)?;
                self.pieces.put_piece(kind, &name, &piece)?;
            }
        }
        fault::at(Point::FetchPieces);
        let folder = self.folder(id);
        fs::create_dir_all(&folder).map_err(failed("make", &folder))?;
        let path = folder.join(DISK_FILE);
        // One that an earlier attempt left is of no use.
        let _ = fs::remove_file(&path);
        let disk = super::disk::new(&path)?;
        snapshot.image(&self.pieces, &key, DISK)?.restore(disk.file())?;
        disk.sync_all().map_err(failed("sync", &path))?;
        for folder in [&folder, &self.folders] {
            let synced = fs::File::open(folder).and_then(|folder| folder.sync_all());
            synced.map_err(failed("sync", folder))?;
        }
        fault::at(Point::FetchDisk);
        let again = Draft::again(&self.pieces, &key, &snapshot);
        again.commit(snapshot.manifest.created_ms)?;
        fault::at(Point::FetchCommitted);
        info!(snapshot:% = id, ms = began.elapsed().as_millis(); "snapshot fetched");
        Ok(())
    }
}

/// A store whose word is not taken for what it has kept: it may lie, or lose what it has.
struct Checked<'s> {
    store: &'s dyn PieceStore,
    /// What was put, and how long each is.
    put: Mutex<BTreeMap<(Kind, Name), u64>>,
}

impl Checked<'_> {
    /// Whether everything that was put is there in its length. What its bytes are is found out by
    /// whoever reads them: each piece is named by its content.
    fn are_there(&self) -> Result<(), SnapshotError> {
        let put = self.put.lock().unwrap_or_else(PoisonError::into_inner);
        for (&(kind, name), &length) in &*put {
            if self.store.piece_bytes(kind, &name)? != length {
                let part = holdfast_snapshot::Part::Piece(kind, name);
                return Err(SnapshotError::Changed { part });
            }
        }
        Ok(())
    }
}

impl PieceStore for Checked<'_> {
    fn put_piece(&self, kind: Kind, name: &Name, bytes: &[u8]) -> Result<Put, SnapshotError> {
        let put = self.store.put_piece(kind, name, bytes)?;
        let mut all = self.put.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert((kind, *name), bytes.len() as u64);
        Ok(put)
    }

    fn read_piece(
        &self,
        kind: Kind,
        name: &Name,
        offset: u64,
        length: usize,
    ) -> Result<Vec<u8>, SnapshotError> {
        self.store.read_piece(kind, name, offset, length)
    }

    fn piece_bytes(&self, kind: Kind, name: &Name) -> Result<u64, SnapshotError> {
        self.store.piece_bytes(kind, name)
    }

    fn put_manifest(&self, id: &str, bytes: &[u8]) -> Result<Put, SnapshotError> {
        self.store.put_manifest(id, bytes)
    }

    fn read_manifest(&self, id: &str, max: u64) -> Result<Vec<u8>, SnapshotError> {
        self.store.read_manifest(id, max)
    }

    fn manifests(&self) -> Result<Vec<String>, SnapshotError> {
        self.store.manifests()
    }

    fn delete_manifest(&self, id: &str) -> Result<bool, SnapshotError> {
        self.store.delete_manifest(id)
    }

    fn pieces(&self, kind: Kind, age_s: u64) -> Result<Vec<Name>, SnapshotError> {
        self.store.pieces(kind, age_s)
    }

    fn delete_piece(&self, kind: Kind, name: &Name) -> Result<u64, SnapshotError> {
        self.store.delete_piece(kind, name)
    }
}

/// A text as an image: its length, then its bytes, then zeros up to a page.
struct Text(Vec<u8>);

const LENGTH_BYTES: usize = 8;

impl Text {
    fn new(text: Vec<u8>) -> Self {
        let mut image = (text.len() as u64).to_le_bytes().to_vec();
        image.extend(text);
        image.resize(image.len().next_multiple_of(PAGE_BYTES), 0);
        Self(image)
    }
}

impl Source for Text {
    fn bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn used(&self) -> io::Result<Pages> {
        Ok(std::iter::once(0..self.bytes() / PAGE_BYTES as u64).collect())
    }

    fn read_at(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let from = usize::try_from(at).map_err(io::Error::other)?;
        let part = self.0.get(from..from + into.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        into.copy_from_slice(part);
        Ok(())
    }
}

/// Reads it back. It is the group's own, but of a size that is not believed.
fn text_of(image: &mut Image<'_>) -> Result<Vec<u8>, SaveError> {
    let bytes = image.bytes();
    if bytes > RECORD_BYTES_MAX {
        let part = holdfast_snapshot::Part::Manifest(RECORD.to_owned());
        let max = RECORD_BYTES_MAX;
        return Err(SnapshotError::TooLarge { part, found: bytes, max }.into());
    }
    let mut text = Vec::new();
    for page in 0..bytes / PAGE_BYTES as u64 {
        match image.page(page)? {
            Some(bytes) => text.extend_from_slice(bytes),
            None => text.resize(text.len() + PAGE_BYTES, 0),
        }
    }
    let length = text.first_chunk::<LENGTH_BYTES>().copied().map_or(0, u64::from_le_bytes);
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    text.drain(..LENGTH_BYTES.min(text.len()));
    text.truncate(length);
    Ok(text)
}
