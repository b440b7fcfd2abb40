//! A root file system in memory: inodes by number, names in folders. No host path is ever touched
//! and no symlink is ever followed. What is special to a layer (deletions, links to lower layers)
//! is in [`layer`], how layers are laid over each other in [`merge`].

mod file;
mod layer;
mod merge;
mod path;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub(crate) use file::StoredLayer;
pub(crate) use layer::{Budget, LayerTree, Refusal};
pub(crate) use path::{Place, components, place};

/// Position in [`Tree::inodes`].
pub(crate) type InodeId = u32;

pub(crate) const ROOT: InodeId = 0;

/// Bytes of one block, the unit of addresses in the image.
pub(crate) const BLOCK: usize = 4096;
pub(crate) const BLOCK_BYTES: u64 = BLOCK as u64;

/// A chunk that is not stored: all zeros.
pub(crate) const HOLE: u32 = u32::MAX;

pub(crate) type Name = Box<[u8]>;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tree {
    inodes: Vec<Inode>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Inode {
    pub(crate) meta: Meta,
    pub(crate) kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Meta {
    /// Permission bits, set-id and sticky included; the type is the [`Kind`]'s affair.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Time,
    /// Sorted by name, each name once.
    pub(crate) xattrs: Box<[Xattr]>,
}

/// Seconds since 1970, and nanoseconds after those.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub(crate) struct Time {
    pub(crate) seconds: i64,
    pub(crate) nanos: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Xattr {
    /// With its namespace, e.g. `user.comment`.
    pub(crate) name: Name,
    pub(crate) value: Box<[u8]>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    Folder(BTreeMap<Name, InodeId>),
    File(FileData),
    Symlink(Box<[u8]>),
    Character(Device),
    Block(Device),
    Fifo,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Device {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

/// Where a file's bytes are: in the data blob of the `segment`th layer of the image (0 in a
/// layer's own tree), at block numbers counted from that blob's start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileData {
    pub(crate) bytes: u64,
    pub(crate) segment: u16,
    pub(crate) layout: Layout,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Layout {
    /// In one piece from this block on. 0 for an empty file.
    Plain(u32),
    /// Cut into chunks of `1 << chunk_log` blocks, each in one piece from its block on, or a
    /// [`HOLE`].
    Chunked { chunk_log: u8, chunks: Box<[u32]> },
}

impl Meta {
    /// Of a folder that no archive describes.
    pub(crate) fn implied_folder() -> Self {
        Self { mode: 0o755, uid: 0, gid: 0, mtime: Time::default(), xattrs: Box::default() }
    }
}

impl Kind {
    pub(crate) fn empty_folder() -> Self {
        Self::Folder(BTreeMap::new())
    }
}

impl Tree {
    /// Nothing but an empty root.
    pub(crate) fn new() -> Self {
        let root = Inode { meta: Meta::implied_folder(), kind: Kind::empty_folder() };
        Self { inodes: vec![root] }
    }

    pub(crate) fn len(&self) -> usize {
        self.inodes.len()
    }

    pub(crate) fn inode(&self, id: InodeId) -> &Inode {
        &self.inodes[id as usize]
    }

    fn inode_mut(&mut self, id: InodeId) -> &mut Inode {
        &mut self.inodes[id as usize]
    }

    /// The names in a folder; `None` for anything else.
    pub(crate) fn folder(&self, id: InodeId) -> Option<&BTreeMap<Name, InodeId>> {
        match &self.inode(id).kind {
            Kind::Folder(names) => Some(names),
            _ => None,
        }
    }

    fn folder_mut(&mut self, id: InodeId) -> Option<&mut BTreeMap<Name, InodeId>> {
        match &mut self.inode_mut(id).kind {
            Kind::Folder(names) => Some(names),
            _ => None,
        }
    }

    /// Follows names from the root, and no symlinks.
    pub(crate) fn find(&self, path: &[&[u8]]) -> Option<InodeId> {
        path.iter().try_fold(ROOT, |at, name| self.folder(at)?.get(*name).copied())
    }

    fn add(&mut self, inode: Inode) -> InodeId {
        let id = InodeId::try_from(self.inodes.len()).expect("limits keep inodes far below 2^32");
        self.inodes.push(inode);
        id
    }
}
