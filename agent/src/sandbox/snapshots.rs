//! Snapshots of this node: pieces in the snapshot store, and for each a folder with its disk and,
//! while this boot of the node lasts, its memory as one plain file that guests map privately.
//!
//! `saved/ID/disk.ext4` is durable before the manifest is; `saved/ID/memory-BOOT` is a cache that is
//! made anew from the pieces. What neither a record nor a clone names is swept at the next start.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use fs_err as fs;
use holdfast_model::{GroupKey, SandboxId, SnapshotId};
use holdfast_snapshot::{
    Collected, Draft, FileSource, Folder, Key, Pages, PieceStore, Snapshot, SnapshotError, collect,
};
use holdfast_store::{Store, StoreError};
use log::{info, warn};

use super::{
    disk::{self, DiskError, clone},
    memory::GuestMemory,
};
use crate::{
    durable::{self, Readers},
    error_chain::error_chain,
};

/// Name of the memory's image in a snapshot.
const MEMORY: &str = "memory";
const DISK_FILE: &str = "disk.ext4";
const KEY_BYTES: usize = 32;

#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Folder(#[from] DiskError),
    #[error("{} holds no key of {KEY_BYTES} bytes", path.display())]
    NodeKey { path: PathBuf },
    #[error("the key of group {group} was wrapped by another node's key")]
    GroupKey { group: GroupKey },
    #[error("there is no key for group {group}, so nothing of it was ever saved")]
    NoGroupKey { group: GroupKey },
    #[error("snapshot {id} has no device state")]
    NoState { id: SnapshotId },
}

fn failed(action: &'static str, path: &Path) -> impl Fn(io::Error) -> SaveError {
    let failed = disk::failed(action, path);
    move |source| failed(source).into()
}

/// All of them. Calls block.
pub(super) struct Snapshots {
    pieces: Folder,
    folders: PathBuf,
    /// This boot of the node: no memory file of another is trusted, for none was ever synced.
    boot: String,
    node_key: Key,
    store: Arc<Store>,
    /// Held for reading while a snapshot is written: no collection may take its pieces.
    writing: RwLock<()>,
}

/// What was copied while the guest stood still; removed on drop, unless it was committed.
#[derive(Debug)]
pub(super) struct Copied {
    id: SnapshotId,
    folder: PathBuf,
    memory: fs::File,
    parent: Option<(SnapshotId, Pages)>,
    committed: bool,
}

impl Drop for Copied {
    fn drop(&mut self) {
        if !self.committed {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

/// What a resume begins with.
#[derive(Debug)]
pub(super) struct TakenUp {
    /// Shared with others: for reading only.
    pub(super) memory: fs::File,
    pub(super) state: Vec<u8>,
    /// To be copied before it is written.
    pub(super) disk: PathBuf,
}

impl Snapshots {
    pub(super) fn open(state: &Path, store: Arc<Store>) -> Result<Self, SaveError> {
        let folders = state.join("saved");
        fs::create_dir_all(&folders).map_err(failed("make", &folders))?;
        let boot = Path::new("/proc/sys/kernel/random/boot_id");
        Ok(Self {
            pieces: Folder::open(&state.join("snapshots"))?,
            folders,
            boot: fs::read_to_string(boot).map_err(failed("read", boot))?.trim().to_owned(),
            node_key: node_key(&state.join("snapshot-key"))?,
            store,
            writing: RwLock::default(),
        })
    }

    fn folder(&self, id: &SnapshotId) -> PathBuf {
        self.folders.join(id.as_str())
    }

    fn memory_path(&self, id: &SnapshotId) -> PathBuf {
        self.folder(id).join(format!("memory-{}", self.boot))
    }

    /// Copies memory and disk of a guest that stands still. `parent`: what it was resumed from.
    pub(super) fn copy(
        &self,
        id: SnapshotId,
        parent: Option<&SnapshotId>,
        memory: &GuestMemory,
        disk: &Path,
    ) -> Result<Copied, SaveError> {
        let folder = self.folder(&id);
        fs::create_dir_all(&folder).map_err(failed("make", &folder))?;
        let path = self.memory_path(&id);
        // From here on its drop cleans up.
        let mut copied =
            Copied { memory: disk::new(&path)?, id, folder, parent: None, committed: false };
        let below = parent.and_then(|parent| fs::File::open(self.memory_path(parent)).ok());
        let changed = memory.copy(&copied.memory, below.as_ref());
        let changed = changed.map_err(failed("copy guest memory to", &path))?;
        copied.parent = parent.cloned().zip(changed);

        let to = copied.folder.join(DISK_FILE);
        let saved = disk::new(&to)?;
        let from = fs::File::open(disk).map_err(failed("open", disk))?;
        clone(&from, &saved).map_err(failed("copy the disk to", &to))?;
        Ok(copied)
    }

    /// Makes it durable. The guest may run meanwhile.
    pub(super) fn commit(
        &self,
        group: &GroupKey,
        mut copied: Copied,
        state: &[u8],
        now_ms: u64,
    ) -> Result<(), SaveError> {
        let _writing = self.writing.read().unwrap_or_else(PoisonError::into_inner);
        let key = self.group_key(group)?;
        let disk = copied.folder.join(DISK_FILE);
        fs::File::open(&disk).and_then(|disk| disk.sync_all()).map_err(failed("sync", &disk))?;
        for folder in [&copied.folder, &self.folders] {
            let synced = fs::File::open(folder).and_then(|folder| folder.sync_all());
            synced.map_err(failed("sync", folder))?;
        }
        let source = copied.memory.file().try_clone().and_then(FileSource::new);
        let source = source.map_err(failed("read", &copied.folder))?;
        let parent = match &copied.parent {
            Some((parent, _)) => Some(Snapshot::open(&self.pieces, &key, parent.as_str())?),
            None => None,
        };
        let draft = |parent| Draft::new(&self.pieces, &key, copied.id.as_str(), parent);
        let mut saved = draft(parent.as_ref())?;
        let changed = copied.parent.as_ref().map(|(_, changed)| changed);
        match saved.image(MEMORY, &source, changed, &[]) {
            Err(SnapshotError::TooDeep { .. }) => {
                saved = draft(None)?;
                saved.image(MEMORY, &source, None, &[])?;
            }
            written => drop(written?),
        }
        saved.state(state)?;
        saved.commit(now_ms)?;
        copied.committed = true;
        Ok(())
    }

    /// Finds what is needed to go on from it.
    pub(super) fn take_up(&self, group: &GroupKey, id: &SnapshotId) -> Result<TakenUp, SaveError> {
        let wrapped = self.store.known_group_secret(group)?;
        let wrapped = wrapped.ok_or_else(|| SaveError::NoGroupKey { group: group.clone() })?;
        let key = self.unwrapped(group, &wrapped)?;
        let snapshot = Snapshot::open(&self.pieces, &key, id.as_str())?;
        let state = snapshot.state(&self.pieces, &key)?;
        let state = state.ok_or_else(|| SaveError::NoState { id: id.clone() })?;
        let path = self.memory_path(id);
        let memory = match fs::File::open(&path) {
            Ok(memory) => memory,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let draft = path.with_extension("draft");
                // One that an earlier attempt left is of no use.
                let _ = fs::remove_file(&draft);
                let file = disk::new(&draft)?;
                snapshot.image(&self.pieces, &key, MEMORY)?.restore(file.file())?;
                fs::rename(&draft, &path).map_err(failed("rename", &draft))?;
                fs::File::open(&path).map_err(failed("open", &path))?
            }
            Err(error) => return Err(failed("open", &path)(error)),
        };
        Ok(TakenUp { memory, state, disk: self.folder(id).join(DISK_FILE) })
    }

    /// Removes a snapshot, and what no other one stands on. Harmless when there is none.
    pub(super) fn remove(&self, id: &SnapshotId) -> Result<(), SaveError> {
        self.pieces.delete_manifest(id.as_str())?;
        let folder = self.folder(id);
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove", &folder)(error));
            }
            _ => {}
        }
        self.collect().map(drop)
    }

    /// Removes pieces that belong to no snapshot, unless one is being written.
    fn collect(&self) -> Result<Collected, SaveError> {
        match self.writing.try_write() {
            Ok(_alone) => Ok(collect(&self.pieces, 0)?),
            // The next removal does it.
            Err(_) => Ok(Collected::default()),
        }
    }

    /// Removes every snapshot that is not one of these, and memory files of another boot.
    pub(super) fn sweep(&self, known: impl Fn(&str) -> bool) -> Result<(), SaveError> {
        for id in self.pieces.manifests()? {
            if !known(&id) {
                self.pieces.delete_manifest(&id)?;
                info!(id:%; "snapshot that nobody knows removed");
            }
        }
        let own = format!("memory-{}", self.boot);
        let cannot = failed("sweep", &self.folders);
        for entry in fs::read_dir(&self.folders).map_err(&cannot)? {
            let entry = entry.map_err(&cannot)?;
            let name = entry.file_name();
            if !name.to_str().is_some_and(&known) {
                fs::remove_dir_all(entry.path()).map_err(&cannot)?;
                continue;
            }
            for file in fs::read_dir(entry.path()).map_err(&cannot)? {
                let file = file.map_err(&cannot)?;
                if file.file_name() != *own && file.file_name() != DISK_FILE {
                    fs::remove_file(file.path()).map_err(&cannot)?;
                }
            }
        }
        let collected = self.collect()?;
        info!(collected:?; "snapshots swept");
        Ok(())
    }

    fn group_key(&self, group: &GroupKey) -> Result<Key, SaveError> {
        let fresh = self.node_key.wrap(&Key::random()?)?;
        let wrapped = self.store.group_secret(group, fresh)?;
        self.unwrapped(group, &wrapped)
    }

    fn unwrapped(&self, group: &GroupKey, wrapped: &[u8]) -> Result<Key, SaveError> {
        let key = self.node_key.unwrap(wrapped)?;
        key.ok_or_else(|| SaveError::GroupKey { group: group.clone() })
    }

    /// Says in the log why a snapshot of this sandbox stays behind; the next start sweeps it.
    pub(super) fn removed_or_logged(&self, sandbox: &SandboxId, id: &SnapshotId) {
        if let Err(error) = self.remove(id) {
            let error = error_chain(&error);
            warn!(id:% = sandbox, snapshot:% = id, error:%; "snapshot not removed");
        }
    }
}

/// The node's key, made at the first start.
fn node_key(path: &Path) -> Result<Key, SaveError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mut fresh = [0; KEY_BYTES];
            getrandom::fill(&mut fresh)
                .map_err(|error| failed("make", path)(io::Error::other(error.to_string())))?;
            durable::replace(path, &fresh, Readers::Owner).map_err(failed("write", path))?;
            fresh.to_vec()
        }
        Err(error) => return Err(failed("read", path)(error)),
    };
    let bytes = bytes.try_into().map_err(|_| SaveError::NodeKey { path: path.to_owned() })?;
    Ok(Key::new(bytes))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use holdfast_model::id::ID_BYTES;

    use super::*;

    fn snapshots(state: &Path) -> Snapshots {
        let store = Arc::new(Store::open(&state.join("store.redb")).unwrap());
        Snapshots::open(state, store).unwrap()
    }

    fn id(byte: u8) -> SnapshotId {
        SnapshotId::from_random([byte; ID_BYTES])
    }

    fn group() -> GroupKey {
        GroupKey::local_default()
    }

    /// As [`Snapshots::copy`] leaves it, of a file.
    fn copied(snapshots: &Snapshots, id: SnapshotId, text: &[u8]) -> Copied {
        let folder = snapshots.folder(&id);
        fs::create_dir_all(&folder).unwrap();
        let memory = disk::new(&snapshots.memory_path(&id)).unwrap();
        memory.set_len(1 << 20).unwrap();
        memory.file().write_all_at(text, 8192).unwrap();
        fs::write(folder.join(DISK_FILE), "disk").unwrap();
        Copied { id, folder, memory, parent: None, committed: false }
    }

    fn memory_of(taken: &TakenUp) -> Vec<u8> {
        let mut text = vec![0; 5];
        taken.memory.file().read_exact_at(&mut text, 8192).unwrap();
        text
    }

    #[test]
    fn what_was_committed_is_taken_up_with_and_without_its_memory_file() {
        let state = tempfile::tempdir().unwrap();
        let first = snapshots(state.path());
        first.commit(&group(), copied(&first, id(1), b"guest"), b"state", 7).unwrap();
        assert_eq!(memory_of(&first.take_up(&group(), &id(1)).unwrap()), b"guest");
        // As after a restart of the node.
        fs::remove_file(first.memory_path(&id(1))).unwrap();
        drop(first);
        let again = snapshots(state.path());
        again.sweep(|name| name == id(1).as_str()).unwrap();
        let taken = again.take_up(&group(), &id(1)).unwrap();
        assert_eq!((memory_of(&taken), taken.state), (b"guest".to_vec(), b"state".to_vec()));
        assert_eq!(fs::read(taken.disk).unwrap(), b"disk");
    }

    #[test]
    fn what_was_not_committed_is_gone_at_once_and_what_nobody_knows_at_the_next_start() {
        let state = tempfile::tempdir().unwrap();
        let all = snapshots(state.path());
        drop(copied(&all, id(1), b"guest"));
        assert!(!all.folder(&id(1)).exists());
        all.commit(&group(), copied(&all, id(2), b"guest"), b"state", 7).unwrap();
        all.commit(&group(), copied(&all, id(3), b"guest"), b"state", 7).unwrap();
        all.sweep(|name| name == id(3).as_str()).unwrap();
        assert!(!all.folder(&id(2)).exists());
        assert!(all.take_up(&group(), &id(2)).is_err());
        assert!(all.take_up(&group(), &id(3)).is_ok());
        all.remove(&id(3)).unwrap();
        all.remove(&id(3)).unwrap();
        let left = fs::read_dir(state.path().join("snapshots/segments")).unwrap().count();
        assert_eq!(left, 0, "pieces of no snapshot");
    }

    #[test]
    fn another_nodes_key_opens_nothing_and_says_so() {
        let state = tempfile::tempdir().unwrap();
        let all = snapshots(state.path());
        all.commit(&group(), copied(&all, id(1), b"guest"), b"state", 7).unwrap();
        drop(all);
        fs::write(state.path().join("snapshot-key"), [7; KEY_BYTES]).unwrap();
        let error = snapshots(state.path()).take_up(&group(), &id(1)).unwrap_err();
        assert!(matches!(error, SaveError::GroupKey { .. }), "{error}");
        fs::write(state.path().join("snapshot-key"), "short").unwrap();
        let store = Arc::new(Store::open(&state.path().join("other.redb")).unwrap());
        let error = Snapshots::open(state.path(), store).err().unwrap();
        assert!(matches!(error, SaveError::NodeKey { .. }), "{error}");
    }
}
