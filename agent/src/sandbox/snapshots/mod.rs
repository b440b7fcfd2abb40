//! Snapshots of this node: pieces in the snapshot store, and for each a folder with its disk and,
//! while this boot of the node lasts, its memory as one plain file that guests map privately.
//!
//! `saved/ID/disk.ext4` is durable before the manifest is; `saved/ID/memory-BOOT` is a cache that is
//! made anew from the pieces. Several records may name one snapshot; what none names is removed, at
//! the latest by the sweep of the next start.

use std::{
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
};

use fs_err as fs;
use holdfast_model::{GroupKey, SnapshotId};
use holdfast_snapshot::{
    Collected, Draft, FileSource, Folder, Key, PAGE_BYTES, Pages, PieceStore, Snapshot,
    SnapshotError, collect,
};
use holdfast_store::{Store, StoreError};
use holdfast_wire::vmm::PageRun;
use log::{info, warn};

mod cold;
mod hot;
mod inspect;
#[cfg(test)]
mod kill_tests;
mod remote;
#[cfg(test)]
mod remote_tests;
#[cfg(test)]
mod store_tests;

use super::{
    disk::{self, DiskError, clone},
    memory::GuestMemory,
    report::{Fetched, Warmth},
    touched::Touched,
};
use crate::{
    credentials::{KeyError, Keys},
    error_chain::error_chain,
    fault::{self, Point},
};

/// Name of the memory's image in a snapshot. One without it is of the disk alone.
const MEMORY: &str = "memory";
const DISK_FILE: &str = "disk.ext4";
const PAGE: u64 = PAGE_BYTES as u64;

pub(super) use cold::{Cold, Memory};
pub use inspect::Anatomy;
pub(super) use remote::Remote;
pub use remote::Upload;

#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Folder(#[from] DiskError),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("snapshot {id} has no device state")]
    NoState { id: SnapshotId },
    #[error("snapshots of group {group} stay on this node: no remote store is set up for it")]
    NoRemote { group: GroupKey },
    #[error(
        "the key of group {group} is this node's own: it was made before the group's remote store was \
         set up, and nobody else could open its snapshots"
    )]
    OwnKey { group: GroupKey },
    #[error("the record of remote snapshot {id} cannot be read: {reason}")]
    RemoteRecord { id: SnapshotId, reason: String },
    #[error("the agent is stopping")]
    Stopping,
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
    keys: Arc<Keys>,
    store: Arc<Store>,
    /// Held for reading while a snapshot is written: no collection may take its pieces.
    writing: RwLock<()>,
    pins: Arc<Mutex<Vec<SnapshotId>>>,
    /// Held while a memory file is made, one for many snapshots.
    making: [Mutex<()>; 16],
    /// Of all memory files. 0: a quarter of the file system.
    hot_bytes_max: u64,
    remote: Option<Remote>,
}

/// While it is held the snapshot is not removed.
#[derive(Debug)]
pub(super) struct Pin {
    id: SnapshotId,
    pins: Arc<Mutex<Vec<SnapshotId>>>,
}

impl Pin {
    pub(super) fn id(&self) -> &SnapshotId {
        &self.id
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = pins.iter().position(|id| *id == self.id) {
            pins.swap_remove(at);
        }
    }
}

/// What was copied while the guest stood still; removed on drop, unless it was committed.
#[derive(Debug)]
pub(super) struct Copied {
    id: SnapshotId,
    folder: PathBuf,
    /// `None`: the disk alone.
    memory: Option<fs::File>,
    parent: Option<(SnapshotId, Pages)>,
    /// What a guest that goes on from there touches first.
    touched: Touched,
    committed: bool,
}

impl Copied {
    pub(super) fn id(&self) -> &SnapshotId {
        &self.id
    }

    /// Pages that go into a layer of its own. `None`: all of them.
    fn written(&self) -> Option<Pages> {
        let (_, changed) = self.parent.as_ref()?;
        let pages = self.memory.as_ref()?.metadata().ok()?.len() / PAGE;
        // Those that lie in layers below, here and there, are packed again, side by side.
        let first = self.touched.to_repack().into_iter().filter(|page| *page < pages);
        let first = first.map(|page| page..page + 1);
        Some(changed.runs().iter().cloned().chain(first).collect())
    }

    pub(super) fn take_disk(&self, disk: &Path) -> Result<(), SaveError> {
        let to = self.folder.join(DISK_FILE);
        let saved = disk::new(&to)?;
        let from = fs::File::open(disk).map_err(failed("open", disk))?;
        clone(&from, &saved).map_err(failed("copy the disk to", &to))
    }
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
    pub(super) memory: Memory,
    /// Of an image: what a guest writes first that goes on from there.
    pub(super) written: Vec<PageRun>,
    /// Of CPUs and devices. Empty where there is no memory.
    pub(super) state: Vec<u8>,
    /// To be copied before it is written.
    pub(super) disk: PathBuf,
    pub(super) fetched: Fetched,
}

impl Snapshots {
    pub(super) fn open(
        state: &Path,
        keys: Arc<Keys>,
        hot_bytes_max: u64,
    ) -> Result<Self, SaveError> {
        let folders = state.join("saved");
        fs::create_dir_all(&folders).map_err(failed("make", &folders))?;
        let boot = Path::new("/proc/sys/kernel/random/boot_id");
        Ok(Self {
            pieces: Folder::open(&state.join("snapshots"))?,
            folders,
            boot: fs::read_to_string(boot).map_err(failed("read", boot))?.trim().to_owned(),
            store: Arc::clone(keys.store()),
            keys,
            writing: RwLock::default(),
            pins: Arc::default(),
            making: Default::default(),
            hot_bytes_max,
            remote: None,
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
        let copied = self.copy_memory(id, parent, memory)?;
        copied.take_disk(disk)?;
        Ok(copied)
    }

    /// Copies the memory alone, of a guest that may run: then it is brought up to date afterwards.
    pub(super) fn copy_memory(
        &self,
        id: SnapshotId,
        parent: Option<&SnapshotId>,
        memory: &GuestMemory,
    ) -> Result<Copied, SaveError> {
        let folder = self.folder(&id);
        fs::create_dir_all(&folder).map_err(failed("make", &folder))?;
        let path = self.memory_path(&id);
        // From here on its drop cleans up.
        let touched = parent.map(|parent| self.touched(parent)).unwrap_or_default();
        let mut copied =
            Copied { id, folder, memory: None, parent: None, touched, committed: false };
        let to = disk::new(&path)?;
        let below = parent.and_then(|parent| fs::File::open(self.memory_path(parent)).ok());
        let changed = memory.copy(&to, below.as_ref(), &copied.touched);
        let changed = changed.map_err(failed("copy guest memory to", &path))?;
        copied.memory = Some(to);
        copied.parent = parent.cloned().zip(changed);
        self.keep_to_budget(&copied.id);
        Ok(copied)
    }

    /// Brings a copy of memory up to date that was made while the guest ran, its writes marked. It
    /// stands still now; its VMM has this process id and its memory so many bytes.
    pub(super) fn copy_memory_again(
        &self,
        copied: &mut Copied,
        pid: u32,
        bytes: u64,
    ) -> Result<(), SaveError> {
        let Some(memory) = &copied.memory else { return Ok(()) };
        let (parent, before) = copied.parent.take().unzip();
        let changed = GuestMemory::copy_again(pid, bytes, memory, before);
        let changed = changed.map_err(failed("copy guest memory to", &copied.folder))?;
        copied.parent = parent.zip(changed);
        Ok(())
    }

    /// Copies the disk alone of a guest that stands still.
    pub(super) fn copy_disk(&self, id: SnapshotId, disk: &Path) -> Result<Copied, SaveError> {
        let folder = self.folder(&id);
        fs::create_dir_all(&folder).map_err(failed("make", &folder))?;
        let touched = Touched::default();
        let copied = Copied { id, folder, memory: None, parent: None, touched, committed: false };
        copied.take_disk(disk)?;
        Ok(copied)
    }

    /// Makes it durable. The guest may run meanwhile. `state`: of CPUs and devices, where memory was
    /// copied.
    pub(super) fn commit(
        &self,
        group: &GroupKey,
        mut copied: Copied,
        state: &[u8],
        now_ms: u64,
    ) -> Result<(), SaveError> {
        let _writing = self.writing.read().unwrap_or_else(PoisonError::into_inner);
        let key = self.keys.of_group(group)?;
        let disk = copied.folder.join(DISK_FILE);
        fs::File::open(&disk).and_then(|disk| disk.sync_all()).map_err(failed("sync", &disk))?;
        for folder in [&copied.folder, &self.folders] {
            let synced = fs::File::open(folder).and_then(|folder| folder.sync_all());
            synced.map_err(failed("sync", folder))?;
        }
        fault::at(Point::SaveDisk);
        let parent = match &copied.parent {
            Some((parent, _)) => Some(Snapshot::open(&self.pieces, &key, parent.as_str())?),
            None => None,
        };
        let draft = |parent| Draft::new(&self.pieces, &key, copied.id.as_str(), parent);
        let mut saved = draft(parent.as_ref())?;
        if let Some(memory) = &copied.memory {
            let source = memory.file().try_clone().and_then(FileSource::new);
            let source = source.map_err(failed("read", &copied.folder))?;
            let mut written = copied.written();
            let first: Vec<_> = copied.touched.pages().collect();
            match saved.image(MEMORY, &source, written.as_ref(), &first) {
                Err(SnapshotError::TooDeep { .. }) => {
                    written = None;
                    saved = draft(None)?;
                    saved.image(MEMORY, &source, None, &first)?;
                }
                done => drop(done?),
            }
            saved.state(state)?;
            if !first.is_empty() {
                copied.touched.packed(written.as_ref());
                self.keep_touched(&copied.id, &copied.touched);
            }
        }
        fault::at(Point::SavePieces);
        saved.commit(now_ms)?;
        copied.committed = true;
        Ok(())
    }

    /// For whoever makes this snapshot's memory file. Another's may have to wait for it too.
    fn making(&self, id: &SnapshotId) -> MutexGuard<'_, ()> {
        let add = |sum: usize, byte: u8| sum.wrapping_mul(31).wrapping_add(usize::from(byte));
        let sum = id.as_str().bytes().fold(0, add);
        // One that panicked left a draft, which the next one removes.
        self.making[sum % self.making.len()].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds what is needed to go on from it.
    pub(super) fn take_up(&self, group: &GroupKey, id: &SnapshotId) -> Result<TakenUp, SaveError> {
        let key = self.keys.known_of_group(group)?;
        let snapshot = Snapshot::open(&self.pieces, &key, id.as_str())?;
        let disk = self.folder(id).join(DISK_FILE);
        let mut fetched = Fetched { warmth: Warmth::Booted, ..Fetched::default() };
        if !snapshot.manifest.images.contains_key(MEMORY) {
            let (memory, written, state) = (Memory::Nothing, Vec::new(), Vec::new());
            return Ok(TakenUp { memory, written, state, disk, fetched });
        }
        let state = self.state_of(&snapshot, &key, id)?;
        let path = self.memory_path(id);
        // Several may be made of one snapshot at once: one of them makes the file, the others wait.
        let _making = self.making(id);
        let memory = match fs::File::open(&path) {
            Ok(memory) => {
                hot::used(&memory);
                fetched.warmth = Warmth::Hot;
                memory
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let draft = path.with_extension("draft");
                // One that an earlier attempt left is of no use.
                let _ = fs::remove_file(&draft);
                let file = disk::new(&draft)?;
                let image = snapshot.image(&self.pieces, &key, MEMORY)?;
                if let Err(error) = image.restore(file.file()) {
                    // It may have filled the disk.
                    let _ = fs::remove_file(&draft);
                    return Err(error.into());
                }
                fault::at(Point::WarmWritten);
                let (frames, bytes) = image.stored();
                let pages = file.metadata().map_or(0, |metadata| metadata.blocks() * 512 / PAGE);
                fetched = Fetched { warmth: Warmth::Cold, bytes, frames, pages, faults: None };
                fs::rename(&draft, &path).map_err(failed("rename", &draft))?;
                let memory = fs::File::open(&path).map_err(failed("open", &path))?;
                self.keep_to_budget(id);
                memory
            }
            Err(error) => return Err(failed("open", &path)(error)),
        };
        let (memory, written) = (Memory::Image(memory), self.touched(id).written());
        Ok(TakenUp { memory, written, state, disk, fetched })
    }

    fn state_of(
        &self,
        snapshot: &Snapshot,
        key: &Key,
        id: &SnapshotId,
    ) -> Result<Vec<u8>, SaveError> {
        let state = snapshot.state(&self.pieces, key)?;
        state.ok_or_else(|| SaveError::NoState { id: id.clone() })
    }

    /// Keeps a snapshot that nothing durable names yet, or soon not any more.
    pub(super) fn pin(&self, id: &SnapshotId) -> Pin {
        self.pins.lock().unwrap_or_else(PoisonError::into_inner).push(id.clone());
        Pin { id: id.clone(), pins: Arc::clone(&self.pins) }
    }

    fn is_held(&self, id: &SnapshotId) -> bool {
        self.pins.lock().unwrap_or_else(PoisonError::into_inner).contains(id)
    }

    /// Tells the uploads that there is something new, or something less.
    pub(super) fn changed(&self) {
        if let Some(remote) = &self.remote {
            remote.changed.notify_one();
        }
    }

    /// Removes a snapshot that no record names and nobody holds. Whether it did.
    pub(super) fn release(&self, id: &SnapshotId) -> Result<bool, SaveError> {
        if self.is_held(id) || self.store.is_needed(id)? {
            return Ok(false);
        }
        self.remove(id)?;
        self.changed();
        Ok(true)
    }

    /// Removes a snapshot, and what no other one stands on. Harmless when there is none.
    fn remove(&self, id: &SnapshotId) -> Result<(), SaveError> {
        self.pieces.delete_manifest(id.as_str())?;
        fault::at(Point::GcManifest);
        let folder = self.folder(id);
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove", &folder)(error));
            }
            _ => {}
        }
        fault::at(Point::GcFolder);
        self.collect().map(drop)
    }

    /// Removes pieces that belong to no snapshot, unless one is being written.
    fn collect(&self) -> Result<Collected, SaveError> {
        // The next removal does it.
        Ok(self.collect_now()?.unwrap_or_default())
    }

    /// Removes pieces that belong to no snapshot. `None`: one is being written, so nothing was done.
    pub(super) fn collect_now(&self) -> Result<Option<Collected>, SaveError> {
        match self.writing.try_write() {
            Ok(_alone) => Ok(Some(collect(&self.pieces, 0)?)),
            Err(_) => Ok(None),
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
                let kept = [own.as_str(), DISK_FILE, cold::TOUCHED_FILE];
                if !kept.iter().any(|kept| file.file_name() == **kept) {
                    fs::remove_file(file.path()).map_err(&cannot)?;
                }
            }
        }
        let collected = self.collect()?;
        info!(collected:?; "snapshots swept");
        Ok(())
    }

    /// Says in the log why a snapshot stays behind that nobody needs; the next start sweeps it.
    pub(super) fn released_or_logged(&self, id: &SnapshotId) {
        if let Err(error) = self.release(id) {
            let error = error_chain(&error);
            warn!(snapshot:% = id, error:%; "snapshot not removed");
        }
    }
}

#[cfg(test)]
mod tests;
