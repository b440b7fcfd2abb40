//! A snapshot: written piece by piece, there once its manifest is.

use std::collections::BTreeMap;

use crate::{
    FORMAT, Image, Kind, Manifest, Name, Pages, Part, PieceStore, Put, SnapshotError, Source,
    Written,
    key::{Key, random},
    manifest::{ImageManifest, LAYERS_MAX, LayerManifest, MANIFEST_BYTES_MAX, StateManifest},
    piece::check_id,
    writer::{self, Levels, Plan},
};

/// zstd's level while a guest waits for its suspend to end: half a gigabyte a second.
const LEVEL: i32 = 1;
/// The same of what a guest that goes on waits for: quicker to unpack, a third larger.
const FIRST_LEVEL: i32 = -5;

/// A snapshot that is being written. Dropped before its commit it leaves pieces behind that belong
/// to nobody, for the next collection.
pub struct Draft<'s> {
    store: &'s dyn PieceStore,
    key: &'s Key,
    parent: Option<&'s Snapshot>,
    manifest: Manifest,
}

impl std::fmt::Debug for Draft<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Draft").field(&self.manifest).finish()
    }
}

impl<'s> Draft<'s> {
    /// `parent`: what its images changed from.
    pub fn new(
        store: &'s dyn PieceStore,
        key: &'s Key,
        id: &str,
        parent: Option<&'s Snapshot>,
    ) -> Result<Self, SnapshotError> {
        check_id(id)?;
        let manifest = Manifest {
            format: FORMAT,
            id: id.to_owned(),
            created_ms: 0,
            parent: parent.map(|parent| parent.manifest.id.clone()),
            images: BTreeMap::new(),
            state: None,
            about: BTreeMap::new(),
        };
        Ok(Self { store, key, parent, manifest })
    }

    /// One of the same content and id, to be put into another store. The pieces are the caller's to
    /// bring there.
    pub fn again(store: &'s dyn PieceStore, key: &'s Key, snapshot: &Snapshot) -> Self {
        Self { store, key, parent: None, manifest: snapshot.manifest.clone() }
    }

    /// Adds an image. `changed`: the pages that may differ from the parent's; without a parent's
    /// image, or without this, all of it is written. `first`: pages that a resume will want first,
    /// in that order.
    pub fn image(
        &mut self,
        name: &str,
        source: &dyn Source,
        changed: Option<&Pages>,
        first: &[u64],
    ) -> Result<Written, SnapshotError> {
        let below = self.parent.and_then(|parent| parent.manifest.images.get(name));
        let bytes = source.bytes();
        let used;
        let (pages, mut layers) = match (below, changed) {
            (Some(below), Some(changed)) => {
                if below.bytes != bytes {
                    return Err(SnapshotError::Length { found: bytes, wanted: below.bytes });
                }
                if below.layers.len() >= LAYERS_MAX {
                    let count = below.layers.len() + 1;
                    return Err(SnapshotError::TooDeep { count, max: LAYERS_MAX });
                }
                (changed, below.layers.clone())
            }
            _ => {
                used = source.used().map_err(|source| SnapshotError::Source { at: 0, source })?;
                (&used, Vec::new())
            }
        };
        let levels = Levels { first: FIRST_LEVEL, rest: LEVEL };
        let plan = Plan { levels, pages, first, has_parent: !layers.is_empty() };
        let put = writer::write(self.store, self.key, source, &plan)?;
        layers.insert(0, LayerManifest { name: put.name, segments: put.segments });
        self.manifest.images.insert(name.to_owned(), ImageManifest { bytes, layers });
        Ok(put.written)
    }

    /// Adds the state of CPUs and devices.
    pub fn state(&mut self, state: &[u8]) -> Result<(), SnapshotError> {
        let salt = random()?;
        let mut sealed = state.to_vec();
        self.key.sealer(&salt)?.seal(0, &mut sealed)?;
        let name = Name::of(&sealed);
        self.store.put_piece(Kind::State, &name, &sealed)?;
        self.manifest.state = Some(StateManifest { name, salt });
        Ok(())
    }

    /// Adds a fact that the agent keeps with it.
    pub fn about(&mut self, what: &str, text: &str) {
        self.manifest.about.insert(what.to_owned(), text.to_owned());
    }

    /// Writes the manifest: from here on the snapshot is there. Done twice with the same content it
    /// is done once.
    pub fn commit(mut self, created_ms: u64) -> Result<Snapshot, SnapshotError> {
        self.manifest.created_ms = created_ms;
        let bytes = self.manifest.encode(self.key)?;
        let id = &self.manifest.id;
        if self.store.put_manifest(id, &bytes)? == Put::AlreadyThere
            && self.store.read_manifest(id, MANIFEST_BYTES_MAX)? != bytes
        {
            return Err(SnapshotError::Exists { id: id.clone() });
        }
        Ok(Snapshot { manifest: self.manifest })
    }
}

/// A snapshot that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    pub manifest: Manifest,
}

/// What was found sound.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Verified {
    pub layers: usize,
    pub frames: u64,
}

impl Snapshot {
    pub fn open(store: &dyn PieceStore, key: &Key, id: &str) -> Result<Self, SnapshotError> {
        check_id(id)?;
        let bytes = store.read_manifest(id, MANIFEST_BYTES_MAX)?;
        Ok(Self { manifest: Manifest::decode(id, &bytes, key)? })
    }

    /// An image, ready to be read.
    pub fn image<'s>(
        &self,
        store: &'s dyn PieceStore,
        key: &Key,
        name: &str,
    ) -> Result<Image<'s>, SnapshotError> {
        let Some(image) = self.manifest.images.get(name) else {
            let id = self.manifest.id.clone();
            return Err(SnapshotError::NoImage { id, image: name.to_owned() });
        };
        let layers: Vec<Name> = image.layers.iter().map(|layer| layer.name).collect();
        Image::open(store, key, image.bytes, &layers)
    }

    /// State of CPUs and devices, if it has any.
    pub fn state(
        &self,
        store: &dyn PieceStore,
        key: &Key,
    ) -> Result<Option<Vec<u8>>, SnapshotError> {
        let Some(StateManifest { name, salt }) = &self.manifest.state else { return Ok(None) };
        let mut state = store.whole_piece(Kind::State, name)?;
        let opened = key.sealer(salt)?.open(0, &mut state);
        let part = Part::Piece(Kind::State, *name);
        opened.ok_or(SnapshotError::WrongKey { part })?;
        Ok(Some(state))
    }

    /// Reads all of it. The error names the first thing that is not sound.
    pub fn verify(&self, store: &dyn PieceStore, key: &Key) -> Result<Verified, SnapshotError> {
        self.state(store, key)?;
        let mut verified = Verified::default();
        for (name, image) in &self.manifest.images {
            verified.layers += image.layers.len();
            verified.frames += self.image(store, key, name)?.verify()?;
        }
        Ok(verified)
    }
}
