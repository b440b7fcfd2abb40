//! A snapshot whose memory file is gone: what a pager needs to fill a guest's memory from the
//! pieces, and the memory file that it leaves behind.

use std::{io, path::PathBuf};

use fs_err as fs;
use holdfast_model::{GroupKey, SnapshotId};
use holdfast_snapshot::{Key, Kind, Name, Snapshot};
use holdfast_wire::pager::{FIRST_MAX, PIECES_MAX};
use log::warn;

use super::{MEMORY, SaveError, Snapshots, TakenUp, disk, failed};
use crate::{
    random::random_id,
    sandbox::report::{Fetched, Warmth},
};

/// What a guest touched first, as numbers of 8 bytes: a hint, believed by nobody.
pub(super) const FIRST_FILE: &str = "first";

/// How many of those were packed side by side when the snapshot was written, in digits.
const PACKED_FILE: &str = "packed";

/// The memory of a snapshot, in pieces.
pub(in crate::sandbox) struct Cold {
    pub(in crate::sandbox) id: SnapshotId,
    pub(in crate::sandbox) bytes: u64,
    /// The topmost first.
    pub(in crate::sandbox) layers: Vec<Name>,
    pub(in crate::sandbox) pieces: Vec<(Kind, Name, fs::File)>,
    pub(in crate::sandbox) key: Key,
    /// Bytes of the memory that were touched first the last time, in that order.
    pub(in crate::sandbox) first: Vec<u64>,
}

impl std::fmt::Debug for Cold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cold({}, {} pieces)", self.id, self.pieces.len())
    }
}

/// Guest memory of a resume.
#[derive(Debug)]
pub(in crate::sandbox) enum Memory {
    /// Shared with others: for reading only.
    Image(fs::File),
    /// To be filled while the guest goes on.
    Missing(Box<Cold>),
    /// There is only a disk, to boot from.
    Nothing,
}

/// A memory file that is being made. Removed on drop, unless it was taken into use.
#[derive(Debug)]
pub(in crate::sandbox) struct MemoryDraft {
    pub(in crate::sandbox) file: fs::File,
    path: PathBuf,
}

impl Drop for MemoryDraft {
    fn drop(&mut self) {
        // Of one that was taken into use there is nothing by this name.
        let _ = fs::remove_file(&self.path);
    }
}

impl Snapshots {
    /// Like [`Self::take_up`], for one guest alone: it does not wait until a memory file is made.
    pub(in crate::sandbox) fn take_up_lazily(
        &self,
        group: &GroupKey,
        id: &SnapshotId,
    ) -> Result<TakenUp, SaveError> {
        if self.memory_path(id).exists() {
            return self.take_up(group, id);
        }
        match self.cold(group, id)? {
            Some((cold, state)) => {
                let disk = self.folder(id).join(super::DISK_FILE);
                // What is read is read while the guest goes on; in the end it is all of it.
                let lengths = cold.pieces.iter().map(|(_, _, file)| file.metadata());
                let bytes = lengths.flatten().map(|metadata| metadata.len()).sum();
                let fetched = Fetched { warmth: Warmth::Cold, bytes, ..Fetched::default() };
                Ok(TakenUp { memory: Memory::Missing(Box::new(cold)), state, disk, fetched })
            }
            None => self.take_up(group, id),
        }
    }

    /// `None`: it is of a disk alone, or has more pieces than a pager takes.
    pub(in crate::sandbox) fn cold(
        &self,
        group: &GroupKey,
        id: &SnapshotId,
    ) -> Result<Option<(Cold, Vec<u8>)>, SaveError> {
        let key = self.keys.known_of_group(group)?;
        let snapshot = Snapshot::open(&self.pieces, &key, id.as_str())?;
        let Some(image) = snapshot.manifest.images.get(MEMORY) else { return Ok(None) };
        let state = self.state_of(&snapshot, &key, id)?;
        let mut names = Vec::new();
        for layer in &image.layers {
            names.push((Kind::Layer, layer.name));
            names.extend(layer.segments.iter().map(|name| (Kind::Segment, *name)));
        }
        names.sort_unstable();
        names.dedup();
        if names.len() > PIECES_MAX {
            return Ok(None);
        }
        let open = |(kind, name)| Ok((kind, name, self.pieces.open_piece(kind, &name)?));
        let cold = Cold {
            id: id.clone(),
            bytes: image.bytes,
            layers: image.layers.iter().map(|layer| layer.name).collect(),
            pieces: names.into_iter().map(open).collect::<Result<_, SaveError>>()?,
            key,
            first: self.first(id),
        };
        Ok(Some((cold, state)))
    }

    /// Bytes of the memory that a guest touches first.
    pub(super) fn first(&self, id: &SnapshotId) -> Vec<u64> {
        let bytes = fs::read(self.folder(id).join(FIRST_FILE)).unwrap_or_default();
        let (numbers, _) = bytes.as_chunks::<8>();
        numbers.iter().take(FIRST_MAX).map(|number| u64::from_le_bytes(*number)).collect()
    }

    /// How many of these the snapshot's own layer has side by side.
    pub(super) fn packed(&self, id: &SnapshotId) -> usize {
        let text = fs::read_to_string(self.folder(id).join(PACKED_FILE)).unwrap_or_default();
        text.parse().unwrap_or_default()
    }

    /// Without it they are packed once more than is needed.
    pub(super) fn keep_packed(&self, id: &SnapshotId, count: usize) {
        if let Err(error) = fs::write(self.folder(id).join(PACKED_FILE), count.to_string()) {
            warn!(error:%; "how much of what a guest touches first is packed is not kept");
        }
    }

    /// Without it the next resume from there waits for more pages.
    pub(super) fn keep_first(&self, id: &SnapshotId, first: &[u64]) {
        let bytes: Vec<u8> = first.iter().flat_map(|at| at.to_le_bytes()).collect();
        let path = self.folder(id).join(FIRST_FILE);
        if let Err(error) = fs::write(&path, bytes) {
            warn!(error:%; "what a guest touches first is not kept");
        }
    }

    /// An empty memory file for the snapshot, not in use yet.
    pub(in crate::sandbox) fn memory_draft(
        &self,
        id: &SnapshotId,
    ) -> Result<MemoryDraft, SaveError> {
        // Of its own: several guests may be resumed from one snapshot.
        let number = SnapshotId::from_random(random_id().map_err(|error| {
            failed("name a draft in", &self.folder(id))(io::Error::other(error.to_string()))
        })?);
        let path = self.memory_path(id).with_extension(number.as_str());
        Ok(MemoryDraft { file: disk::new(&path)?, path })
    }

    /// Takes a memory file into use that holds all of the memory now.
    pub(in crate::sandbox) fn warmed(
        &self,
        id: &SnapshotId,
        draft: MemoryDraft,
        first: &[u64],
    ) -> Result<(), SaveError> {
        let path = self.memory_path(id);
        fs::rename(&draft.path, &path).map_err(failed("rename", &draft.path))?;
        self.keep_first(id, first);
        self.keep_to_budget(id);
        Ok(())
    }
}
