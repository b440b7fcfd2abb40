//! A snapshot whose memory file is gone: what a pager needs to fill a guest's memory from the
//! pieces, and the memory file that it leaves behind.

use std::{io, path::PathBuf};

use fs_err as fs;
use holdfast_model::{GroupKey, SnapshotId};
use holdfast_snapshot::{Key, Kind, Name, Snapshot};
use holdfast_wire::pager::PIECES_MAX;
use log::debug;

use super::{MEMORY, SaveError, Snapshots, TakenUp, disk, failed};
use crate::{
    random::random_id,
    sandbox::{
        memory,
        report::{Fetched, Warmth},
        touched::Touched,
    },
};

/// What a guest touched first.
pub(super) const TOUCHED_FILE: &str = "touched";

/// The memory of a snapshot, in pieces.
pub(in crate::sandbox) struct Cold {
    pub(in crate::sandbox) id: SnapshotId,
    pub(in crate::sandbox) bytes: u64,
    /// The topmost first.
    pub(in crate::sandbox) layers: Vec<Name>,
    pub(in crate::sandbox) pieces: Vec<(Kind, Name, fs::File)>,
    pub(in crate::sandbox) key: Key,
    /// Bytes of the memory that are brought first.
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
                let (memory, written) = (Memory::Missing(Box::new(cold)), Vec::new());
                Ok(TakenUp { memory, written, state, disk, fetched })
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
            first: self.touched(id).to_bring(),
        };
        Ok(Some((cold, state)))
    }

    /// What a guest touches first that goes on from there.
    pub(super) fn touched(&self, id: &SnapshotId) -> Touched {
        let path = self.folder(id).join(TOUCHED_FILE);
        Touched::decode(&fs::read(path).unwrap_or_default())
    }

    /// Without it the next resume from there waits for more pages.
    pub(super) fn keep_touched(&self, id: &SnapshotId, touched: &Touched) {
        // A snapshot that is gone meanwhile needs none; half a list is one of half the pages.
        let path = self.folder(id).join(TOUCHED_FILE);
        if let Err(error) = fs::write(&path, touched.encode()) {
            debug!(error:%; "what a guest touches first is not kept");
        }
    }

    /// Notes what the guest touches first that goes on from there, in the VMM with this process id
    /// and of so many bytes.
    pub(in crate::sandbox) fn look(&self, id: &SnapshotId, pid: u32, bytes: u64) {
        let ahead = self.touched(id);
        let image = fs::File::open(self.memory_path(id));
        match image.and_then(|image| memory::touched(pid, bytes, &image, &ahead)) {
            Ok(Some(seen)) => self.saw(id, seen),
            Ok(None) => {}
            Err(error) => debug!(error:%, pid; "what a guest touches first is not seen"),
        }
    }

    pub(super) fn saw(&self, id: &SnapshotId, seen: Touched) {
        let mut touched = self.touched(id);
        touched.replace(seen);
        self.keep_touched(id, &touched);
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
        missed: &[u64],
    ) -> Result<(), SaveError> {
        let path = self.memory_path(id);
        fs::rename(&draft.path, &path).map_err(failed("rename", &draft.path))?;
        let mut touched = self.touched(id);
        touched.add(missed);
        self.keep_touched(id, &touched);
        self.keep_to_budget(id);
        Ok(())
    }
}
