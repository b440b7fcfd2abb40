//! What a snapshot is made of, and whether it is sound.

use std::os::unix::fs::MetadataExt;

use fs_err as fs;
use holdfast_model::{GroupKey, SnapshotId};
use holdfast_snapshot::{PieceStore, Snapshot, Verified};

use super::{DISK_FILE, MEMORY, SaveError, Snapshots, failed};

/// What a snapshot is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Anatomy {
    pub format: u32,
    pub memory_layers: usize,
    pub pieces: usize,
    pub piece_bytes: u64,
    /// On disk, of the disk's file.
    pub disk_bytes: u64,
    /// Its memory lies there as a plain file.
    pub hot: bool,
}

impl Snapshots {
    /// Bytes on disk of what a snapshot cannot do without.
    pub(in crate::sandbox) fn bytes(
        &self,
        group: &GroupKey,
        id: &SnapshotId,
    ) -> Result<u64, SaveError> {
        let anatomy = self.anatomy(group, id)?;
        Ok(anatomy.piece_bytes + anatomy.disk_bytes)
    }

    pub(in crate::sandbox) fn anatomy(
        &self,
        group: &GroupKey,
        id: &SnapshotId,
    ) -> Result<Anatomy, SaveError> {
        let key = self.keys.known_of_group(group)?;
        let manifest = Snapshot::open(&self.pieces, &key, id.as_str())?.manifest;
        let pieces = manifest.pieces();
        let mut piece_bytes = 0;
        for (kind, name) in &pieces {
            piece_bytes += self.pieces.piece_bytes(*kind, name)?;
        }
        let disk = self.folder(id).join(DISK_FILE);
        let disk_bytes = fs::metadata(&disk).map_err(failed("measure", &disk))?.blocks() * 512;
        Ok(Anatomy {
            format: manifest.format,
            memory_layers: manifest.images.get(MEMORY).map_or(0, |image| image.layers.len()),
            pieces: pieces.len(),
            piece_bytes,
            disk_bytes,
            hot: self.memory_path(id).exists(),
        })
    }

    /// Reads all of its pieces. The error names the first that is not sound.
    pub(in crate::sandbox) fn verify(
        &self,
        group: &GroupKey,
        id: &SnapshotId,
    ) -> Result<Verified, SaveError> {
        let key = self.keys.known_of_group(group)?;
        let snapshot = Snapshot::open(&self.pieces, &key, id.as_str())?;
        Ok(snapshot.verify(&self.pieces, &key)?)
    }
}
