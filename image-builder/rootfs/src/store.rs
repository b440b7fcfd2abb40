//! Where things lie in the image store, who may touch them when, and what may go.
//!
//! Locks are advisory (flock) and die with their process: `rootfs.lock` is held shared by every
//! conversion and exclusively by what removes layers; `tmp/<digest>.lock` by whoever makes the
//! layer or image of that digest.

use std::{
    collections::BTreeSet,
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use fs_err as fs;
use holdfast_model::Digest;

use crate::{
    error::StoreError,
    record::{list_records, load_record},
};

pub(crate) const LAYERS: &str = "layers";
pub(crate) const IMAGES: &str = "images";
const DRAFTS: &str = "tmp";
const LOCK: &str = "rootfs.lock";

/// While it lives no layer is removed. Taken for a whole conversion, so that layers converted
/// early are still there when the image is put together.
#[must_use = "dropping it lets the layers of an unfinished image be removed"]
#[derive(Debug)]
pub struct Hold {
    /// The lock goes with the file.
    _lock: fs::File,
}

/// Waits until no collection runs, then keeps the layers of this store from being removed.
pub fn hold(store: &Path) -> Result<Hold, StoreError> {
    for folder in [LAYERS, IMAGES, DRAFTS] {
        let path = store.join(folder);
        fs::create_dir_all(&path).map_err(|source| StoreError::Io { path, source })?;
    }
    let path = store.join(LOCK);
    let io = |source| StoreError::Io { path: path.clone(), source };
    let lock = open_lock(&path).map_err(io)?;
    lock.lock_shared().map_err(io)?;
    Ok(Hold { _lock: lock })
}

/// What a collection freed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Collected {
    pub layers: u32,
    /// Disk space given back.
    pub bytes: u64,
}

/// Removes every layer that no image record names and that is not in `keep` (digests of
/// uncompressed layers), and metadata without a record. [`StoreError::Busy`] while a conversion
/// runs.
pub fn collect(store: &Path, keep: &[Digest]) -> Result<Collected, StoreError> {
    let _alone = exclusive(store)?;
    let mut wanted: BTreeSet<Digest> = keep.iter().copied().collect();
    // A record that cannot be read names layers we do not know: then nothing may go.
    for digest in names_with(&store.join(IMAGES), ".json")? {
        if let Some(record) = load_record(store, &digest)? {
            wanted.extend(record.layers);
        }
    }
    let mut collected = Collected::default();
    let mut layers = BTreeSet::new();
    for suffix in [TREE, DATA] {
        // The tree first: a layer without a tree is no layer, so a crash between leaves none half.
        for digest in names_with(&store.join(LAYERS), suffix)? {
            if !wanted.contains(&digest) {
                let path = store.join(LAYERS).join(format!("{}{suffix}", digest.hex()));
                collected.bytes += disk_bytes(&path)?;
                remove_if_there(&path)?;
                layers.insert(digest);
            }
        }
    }
    collected.layers = u32::try_from(layers.len()).unwrap_or(u32::MAX);
    let records: BTreeSet<_> = list_records(store)?.into_iter().map(|r| r.digest).collect();
    for digest in names_with(&store.join(IMAGES), METADATA)? {
        if !records.contains(&digest) {
            let path = metadata_path(store, &digest);
            collected.bytes += disk_bytes(&path)?;
            remove_if_there(&path)?;
        }
    }
    Ok(collected)
}

/// Removes the drafts that killed conversions left. [`StoreError::Busy`] while one runs.
pub fn sweep_drafts(store: &Path) -> Result<(), StoreError> {
    let _alone = exclusive(store)?;
    for suffix in [DATA, TREE, METADATA, ".json", ".lock"] {
        for digest in names_with(&store.join(DRAFTS), suffix)? {
            remove_if_there(&store.join(DRAFTS).join(format!("{}{suffix}", digest.hex())))?;
        }
    }
    Ok(())
}

const DATA: &str = ".data";
const TREE: &str = ".tree";
const METADATA: &str = ".erofs";

pub(crate) fn data_path(store: &Path, diff_id: &Digest) -> PathBuf {
    store.join(data_name(diff_id))
}

/// Relative to the store, as segments say it.
pub(crate) fn data_name(diff_id: &Digest) -> String {
    format!("{LAYERS}/{}{DATA}", diff_id.hex())
}

pub(crate) fn tree_path(store: &Path, diff_id: &Digest) -> PathBuf {
    store.join(LAYERS).join(format!("{}{TREE}", diff_id.hex()))
}

pub(crate) fn metadata_path(store: &Path, manifest: &Digest) -> PathBuf {
    store.join(metadata_name(manifest))
}

/// Relative to the store, as segments say it.
pub(crate) fn metadata_name(manifest: &Digest) -> String {
    format!("{IMAGES}/{}{METADATA}", manifest.hex())
}

pub(crate) fn record_path(store: &Path, manifest: &Digest) -> PathBuf {
    store.join(IMAGES).join(format!("{}.json", manifest.hex()))
}

/// Where the file that will be `path` is written. Its maker holds the [`DigestLock`], so the name
/// needs no random part and what a killed process left is overwritten.
pub(crate) fn draft_path(store: &Path, path: &Path) -> Result<PathBuf, StoreError> {
    let name = path.file_name().ok_or_else(|| StoreError::Io {
        path: path.to_owned(),
        source: io::ErrorKind::InvalidInput.into(),
    })?;
    Ok(store.join(DRAFTS).join(name))
}

/// Makes a written draft durable under its name: the old file or the new one, never half of one.
pub(crate) fn publish(draft: &Path, path: &Path) -> Result<(), StoreError> {
    let io = |source| StoreError::Io { path: path.to_owned(), source };
    fs::File::open(draft).and_then(|file| file.sync_all()).map_err(io)?;
    fs::rename(draft, path).map_err(io)?;
    let folder = path.parent().ok_or(io::ErrorKind::InvalidInput.into()).map_err(io)?;
    fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(io)
}

/// One maker per digest across processes. The file goes when the lock does.
#[must_use = "dropping it lets another process make the same thing"]
pub(crate) struct DigestLock {
    path: PathBuf,
    _file: fs::File,
}

impl DigestLock {
    /// Waits for whoever makes it now.
    pub(crate) fn take(store: &Path, digest: &Digest) -> Result<Self, StoreError> {
        let path = store.join(DRAFTS).join(format!("{}.lock", digest.hex()));
        let io = |source| StoreError::Io { path: path.clone(), source };
        loop {
            let file = open_lock(&path).map_err(io)?;
            file.lock().map_err(io)?;
            // The one before us removed the file while we waited: then this lock is nobody's.
            let ours = file.metadata().map_err(io)?.ino();
            match fs::metadata(&path) {
                Ok(there) if there.ino() == ours => return Ok(Self { path, _file: file }),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(io(error)),
            }
        }
    }
}

impl Drop for DigestLock {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            // An empty file; the sweep at the next start finds it by its name.
            log::warn!(error:%; "lock file not removed");
        }
    }
}

/// Reads a file of ours that must not be larger than `bytes_max`.
pub(crate) fn read_bounded(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = fs::File::open(path)?.take(bytes_max + 1).read_to_end(&mut bytes)?;
    if read as u64 > bytes_max { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(bytes) }
}

/// `false`: it was not there.
pub(crate) fn remove_if_there(path: &Path) -> Result<bool, StoreError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(StoreError::Io { path: path.to_owned(), source }),
    }
}

/// Digests whose hex with `suffix` is a file name in `folder`. Other names are not ours.
pub(crate) fn names_with(folder: &Path, suffix: &str) -> Result<Vec<Digest>, StoreError> {
    let io = |source| StoreError::Io { path: folder.to_owned(), source };
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(io(source)),
    };
    let mut digests = Vec::new();
    for entry in entries {
        let name = entry.map_err(io)?.file_name();
        let hex = name.to_str().and_then(|name| name.strip_suffix(suffix));
        digests.extend(hex.and_then(|hex| format!("sha256:{hex}").parse::<Digest>().ok()));
    }
    digests.sort();
    Ok(digests)
}

fn disk_bytes(path: &Path) -> Result<u64, StoreError> {
    let metadata = fs::metadata(path);
    // st_blocks counts 512 bytes whatever the file system's block is.
    Ok(metadata.map_err(|source| StoreError::Io { path: path.to_owned(), source })?.blocks() * 512)
}

fn open_lock(path: &Path) -> io::Result<fs::File> {
    fs::OpenOptions::new().create(true).truncate(false).write(true).open(path)
}

fn exclusive(store: &Path) -> Result<fs::File, StoreError> {
    let path = store.join(LOCK);
    let lock = open_lock(&path).map_err(|source| StoreError::Io { path, source })?;
    lock.try_lock().map_err(|_| StoreError::Busy)?;
    Ok(lock)
}
