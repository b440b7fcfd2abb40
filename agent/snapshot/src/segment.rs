//! Segments: stored frames one behind the other, some MiB in a piece.

use crate::{
    Kind, Name, PieceStore, SnapshotError,
    frame::{Packer, STORED_BYTES_MAX},
    key::{Key, Salt16, Sealer, random},
    layer::{FrameRef, SegmentRef},
};

/// A segment is put when it has this many bytes: large enough for one request to a remote store,
/// small enough to be held in memory.
const SEGMENT_BYTES: usize = 6 << 20;

/// Puts frames into segments.
pub(crate) struct Segments<'s> {
    store: &'s dyn PieceStore,
    key: &'s Key,
    packer: Packer,
    filling: Option<Filling>,
    done: Vec<SegmentRef>,
    frames: Vec<FrameRef>,
    stored_bytes: u64,
}

struct Filling {
    salt: Salt16,
    sealer: Sealer,
    bytes: Vec<u8>,
    /// Of the bytes so far: each frame is hashed while it is in the CPU's cache.
    hash: blake3::Hasher,
    frames: u32,
}

/// What [`Segments`] made.
pub(crate) struct Stored {
    pub(crate) segments: Vec<SegmentRef>,
    pub(crate) frames: Vec<FrameRef>,
    pub(crate) bytes: u64,
}

impl<'s> Segments<'s> {
    pub(crate) fn new(
        store: &'s dyn PieceStore,
        key: &'s Key,
        level: i32,
    ) -> Result<Self, SnapshotError> {
        Ok(Self {
            store,
            key,
            packer: Packer::new(level)?,
            filling: None,
            done: Vec::new(),
            frames: Vec::new(),
            stored_bytes: 0,
        })
    }

    /// Appends a frame, compressed at this level of zstd's.
    pub(crate) fn push(&mut self, text: &[u8], level: i32) -> Result<(), SnapshotError> {
        self.packer.set_level(level)?;
        let too_many = || SnapshotError::Internal { what: "so many segments" };
        let segment = u32::try_from(self.done.len()).map_err(|_| too_many())?;
        let filling = match &mut self.filling {
            Some(filling) => filling,
            empty => empty.insert(Filling::new(self.key)?),
        };
        let stored = self.packer.pack(&filling.sealer, filling.frames, text)?;
        // A segment has some MiB: both fit.
        let offset = u32::try_from(filling.bytes.len()).map_err(|_| too_many())?;
        let bytes = u32::try_from(stored.len()).map_err(|_| too_many())?;
        let hash = *blake3::hash(&stored).as_bytes();
        self.frames.push(FrameRef { segment, number: filling.frames, offset, bytes, hash });
        filling.frames += 1;
        filling.bytes.extend_from_slice(&stored);
        filling.hash.update(&stored);
        if filling.bytes.len() >= SEGMENT_BYTES { self.put() } else { Ok(()) }
    }

    fn put(&mut self) -> Result<(), SnapshotError> {
        let Some(Filling { salt, bytes, hash, .. }) = self.filling.take() else { return Ok(()) };
        let name = Name::from_hash(&hash.finalize());
        self.store.put_piece(Kind::Segment, &name, &bytes)?;
        self.stored_bytes += bytes.len() as u64;
        self.done.push(SegmentRef { name, salt });
        Ok(())
    }

    pub(crate) fn finish(mut self) -> Result<Stored, SnapshotError> {
        self.put()?;
        Ok(Stored { segments: self.done, frames: self.frames, bytes: self.stored_bytes })
    }
}

impl Filling {
    fn new(key: &Key) -> Result<Self, SnapshotError> {
        let salt = random()?;
        let sealer = key.sealer(&salt)?;
        let bytes = Vec::with_capacity(SEGMENT_BYTES + STORED_BYTES_MAX);
        Ok(Self { salt, sealer, bytes, hash: blake3::Hasher::new(), frames: 0 })
    }
}
