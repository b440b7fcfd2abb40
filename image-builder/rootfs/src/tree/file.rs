//! A layer's tree as a file: what a later merge needs, so that no archive is read twice.
//!
//! `HFTREE` and a version, then postcard. The file is ours, but it is read as if it were not: its
//! size is bounded, and what it says is checked before it is used.

use serde::{Deserialize, Serialize};

use super::{InodeId, Kind, LayerTree, Layout, ROOT, Tree, components};
use crate::limits::{NAME_BYTES_MAX, PATH_BYTES_MAX};

/// The last byte is the version: raised when a field changes, which makes old layers be converted
/// anew.
const MAGIC: &[u8; 8] = b"HFTREE\0\x01";

/// A layer as its tree file says it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredLayer {
    /// Size of the data blob: a multiple of the block.
    pub(crate) data_bytes: u64,
    pub(crate) layer: LayerTree,
}

impl StoredLayer {
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        postcard::to_extend(self, MAGIC.to_vec()).expect("a tree has no form postcard refuses")
    }

    /// `None`: not a tree of this version, or one that cannot be right.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let body = bytes.strip_prefix(MAGIC)?;
        let (stored, rest) = postcard::take_from_bytes::<Self>(body).ok()?;
        (rest.is_empty() && stored.is_sound()).then_some(stored)
    }

    fn is_sound(&self) -> bool {
        let Self { data_bytes, layer } = self;
        let folder = |id: &InodeId| layer.tree.has(*id) && layer.tree.folder(*id).is_some();
        let sound = |path: &[u8]| components(path, PATH_BYTES_MAX).is_ok();
        let keyed = |(id, name): &(InodeId, super::Name)| folder(id) && is_name(name);
        data_bytes.is_multiple_of(super::BLOCK_BYTES)
            && layer.tree.is_sound(data_bytes / super::BLOCK_BYTES)
            && layer.whiteouts.iter().all(|path| sound(path))
            && layer.lower_links.keys().all(keyed)
            && layer.opaque.iter().all(|path| sound(path))
            && layer.implied.iter().all(folder)
    }
}

impl Tree {
    fn has(&self, id: InodeId) -> bool {
        (id as usize) < self.len()
    }

    /// Every folder but the root has one name, so that no walk goes in circles, and file data lies
    /// within the blob's `blocks`.
    fn is_sound(&self, blocks: u64) -> bool {
        let mut named = vec![0_u8; self.len()];
        for inode in &self.inodes {
            let sound = match &inode.kind {
                Kind::Folder(names) => names.iter().all(|(name, &id)| {
                    let known = self.has(id) && is_name(name);
                    if known {
                        named[id as usize] = named[id as usize].saturating_add(1);
                    }
                    known
                }),
                Kind::File(data) => data.is_sound(blocks),
                _ => true,
            };
            if !sound {
                return false;
            }
        }
        let once = |(id, inode): (usize, &super::Inode)| match inode.kind {
            Kind::Folder(_) => named[id] == u8::from(id != ROOT as usize),
            _ => true,
        };
        self.inodes.iter().enumerate().all(once) && self.has(ROOT) && self.folder(ROOT).is_some()
    }
}

impl super::FileData {
    fn is_sound(&self, blocks: u64) -> bool {
        let own = self.bytes.div_ceil(super::BLOCK_BYTES);
        match &self.layout {
            Layout::Plain(start) => u64::from(*start).checked_add(own).is_some_and(|e| e <= blocks),
            Layout::Chunked { chunk_log, chunks } => {
                let fits = |&chunk: &u32| chunk == super::HOLE || u64::from(chunk) < blocks;
                *chunk_log < 32
                    && own.div_ceil(1 << chunk_log) == chunks.len() as u64
                    && chunks.iter().all(fits)
            }
        }
    }
}

fn is_name(name: &[u8]) -> bool {
    (1..=NAME_BYTES_MAX).contains(&name.len())
        && !name.iter().any(|byte| matches!(byte, 0 | b'/'))
        && !matches!(name, b"." | b"..")
}
