//! The tree of one layer: what it has, and what it says about the layers below.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{FileData, Inode, InodeId, Kind, Layout, Meta, Name, ROOT, Tree, components};
use crate::{
    error::{ArchiveError, EntryError, EntryName},
    limits::Limits,
};

/// One layer, entry by entry in the archive's order: a later entry replaces an earlier one of the
/// same name, and anything that is not a folder where a folder must be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerTree {
    pub(super) tree: Tree,
    /// Paths that lower layers no longer have. Not by folder, as the layer itself may have
    /// something else where a folder was whose content it takes away one by one.
    pub(super) whiteouts: BTreeSet<Box<[u8]>>,
    /// Paths of folders of which lower layers' content is gone.
    pub(super) opaque: BTreeSet<Box<[u8]>>,
    /// Folders that the archive does not describe: a lower layer's description stands.
    pub(super) implied: BTreeSet<InodeId>,
    /// Hard links to what a lower layer has under this path.
    pub(super) lower_links: BTreeMap<(InodeId, Name), Box<[u8]>>,
}

/// Counts what a layer costs in memory while it is read.
#[derive(Debug)]
pub(crate) struct Budget<'a> {
    limits: &'a Limits,
    entries: u32,
    bytes: u64,
}

impl<'a> Budget<'a> {
    pub(crate) fn new(limits: &'a Limits) -> Self {
        Self { limits, entries: 0, bytes: 0 }
    }

    fn spend(&mut self, bytes: usize) -> Result<(), ArchiveError> {
        self.entries += 1;
        self.bytes += bytes as u64;
        if self.entries > self.limits.entries {
            return Err(ArchiveError::TooManyEntries { max: self.limits.entries });
        }
        if self.bytes > self.limits.tree_bytes {
            return Err(ArchiveError::TreeTooLarge { max: self.limits.tree_bytes });
        }
        Ok(())
    }
}

/// Why an entry was not taken in.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    Entry(EntryError),
    Archive(ArchiveError),
}

impl From<EntryError> for Refusal {
    fn from(error: EntryError) -> Self {
        Self::Entry(error)
    }
}

impl From<ArchiveError> for Refusal {
    fn from(error: ArchiveError) -> Self {
        Self::Archive(error)
    }
}

impl LayerTree {
    pub(crate) fn new() -> Self {
        Self {
            tree: Tree::new(),
            whiteouts: BTreeSet::new(),
            opaque: BTreeSet::new(),
            implied: BTreeSet::from([ROOT]),
            lower_links: BTreeMap::new(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.tree.len()
    }

    /// Describes the root folder.
    pub(crate) fn put_root(&mut self, meta: Meta) {
        self.tree.inode_mut(ROOT).meta = meta;
        self.implied.remove(&ROOT);
    }

    /// Puts an entry under a name. A folder over a folder describes it anew and keeps its content.
    pub(crate) fn put(
        &mut self,
        parents: &[&[u8]],
        name: &[u8],
        inode: Inode,
        budget: &mut Budget<'_>,
    ) -> Result<(), Refusal> {
        budget.spend(name.len() + inode.held_bytes())?;
        let folder = self.open(parents, budget)?;
        let there = self.names(folder).get(name).copied();
        match there {
            Some(old) if matches!(inode.kind, Kind::Folder(_)) && self.is_folder(old) => {
                self.tree.inode_mut(old).meta = inode.meta;
                self.implied.remove(&old);
            }
            _ => {
                let over = there.is_some() || self.has_lower_link(folder, name);
                let opaque = over && matches!(inode.kind, Kind::Folder(_));
                let id = self.tree.add(inode);
                self.bind(folder, name, id);
                // What it replaced had replaced the lower layers' folder.
                if opaque {
                    self.opaque.insert(joined(parents, name));
                }
            }
        }
        Ok(())
    }

    /// Puts a second name on what `target` names: in this layer if it is there, else in a lower one.
    pub(crate) fn link(
        &mut self,
        parents: &[&[u8]],
        name: &[u8],
        target: &[u8],
        budget: &mut Budget<'_>,
    ) -> Result<(), Refusal> {
        budget.spend(name.len() + target.len())?;
        let to = components(target, budget.limits.depth)?;
        let Some((to_name, to_parents)) = to.split_last() else {
            return Err(EntryError::LinkToFolder(EntryName::new(target)).into());
        };
        if to_parents == parents && *to_name == name {
            return Err(EntryError::LinkToItself.into());
        }
        let holder = self.tree.find(to_parents);
        let here = self.tree.find(&to);
        if here.is_some_and(|id| self.is_folder(id)) {
            return Err(EntryError::LinkToFolder(EntryName::new(target)).into());
        }
        let lower = holder.and_then(|folder| self.lower_links.get(&key(folder, to_name)).cloned());
        let folder = self.open(parents, budget)?;
        match (here, lower) {
            (Some(id), _) => self.bind(folder, name, id),
            (None, lower) => {
                // A link to a link to a lower layer goes where that one goes.
                let path = lower.unwrap_or_else(|| to.join(&b'/').into());
                self.names_mut(folder).remove(name);
                self.lower_links.insert(key(folder, name), path);
            }
        }
        Ok(())
    }

    pub(crate) fn white_out(
        &mut self,
        parents: &[&[u8]],
        name: &[u8],
        budget: &mut Budget<'_>,
    ) -> Result<(), Refusal> {
        let path = joined(parents, name);
        budget.spend(path.len())?;
        self.whiteouts.insert(path);
        Ok(())
    }

    pub(crate) fn make_opaque(
        &mut self,
        folder: &[&[u8]],
        budget: &mut Budget<'_>,
    ) -> Result<(), Refusal> {
        let path: Box<[u8]> = folder.join(&b'/').into();
        budget.spend(path.len())?;
        self.opaque.insert(path);
        Ok(())
    }

    /// The folder at this path, made if it is not there. What else is in the way is replaced: a
    /// symlink too, as following it would let an archive write where it does not say.
    fn open(&mut self, path: &[&[u8]], budget: &mut Budget<'_>) -> Result<InodeId, Refusal> {
        let mut at = ROOT;
        for (depth, name) in path.iter().enumerate() {
            at = match self.names(at).get(*name).copied() {
                Some(id) if self.is_folder(id) => id,
                there => {
                    budget.spend(name.len())?;
                    let over = there.is_some() || self.has_lower_link(at, name);
                    let meta = Meta::implied_folder();
                    let id = self.tree.add(Inode { meta, kind: Kind::empty_folder() });
                    self.bind(at, name, id);
                    self.implied.insert(id);
                    if over {
                        self.opaque.insert(joined(&path[..depth], name));
                    }
                    id
                }
            };
        }
        Ok(at)
    }

    fn bind(&mut self, folder: InodeId, name: &[u8], id: InodeId) {
        self.lower_links.remove(&key(folder, name));
        self.names_mut(folder).insert(name.into(), id);
    }

    fn has_lower_link(&self, folder: InodeId, name: &[u8]) -> bool {
        !self.lower_links.is_empty() && self.lower_links.contains_key(&key(folder, name))
    }

    fn is_folder(&self, id: InodeId) -> bool {
        self.tree.folder(id).is_some()
    }

    fn names(&self, folder: InodeId) -> &BTreeMap<Name, InodeId> {
        self.tree.folder(folder).expect("open gives folders only")
    }

    fn names_mut(&mut self, folder: InodeId) -> &mut BTreeMap<Name, InodeId> {
        self.tree.folder_mut(folder).expect("open gives folders only")
    }

    /// Drops what was replaced on the way and numbers the rest breadth first, so that equal layers
    /// give equal trees.
    pub(crate) fn finish(self) -> Self {
        let order = self.tree.breadth_first();
        let mut new_ids = vec![None; self.tree.len()];
        for (new, old) in (0..).zip(&order) {
            new_ids[*old as usize] = Some(new);
        }
        let new = |old: InodeId| new_ids[old as usize];
        Self {
            tree: self.tree.renumbered(&order, &new),
            whiteouts: self.whiteouts,
            opaque: self.opaque,
            implied: self.implied.into_iter().filter_map(new).collect(),
            lower_links: self
                .lower_links
                .into_iter()
                .filter_map(|((folder, name), path)| Some(((new(folder)?, name), path)))
                .collect(),
        }
    }
}

fn joined(parents: &[&[u8]], name: &[u8]) -> Box<[u8]> {
    [parents, &[name]].concat().join(&b'/').into()
}

fn key(folder: InodeId, name: &[u8]) -> (InodeId, Name) {
    (folder, name.into())
}

impl Inode {
    /// What it holds outside itself.
    fn held_bytes(&self) -> usize {
        let xattrs: usize = self.meta.xattrs.iter().map(|x| x.name.len() + x.value.len()).sum();
        xattrs
            + match &self.kind {
                Kind::Symlink(target) => target.len(),
                Kind::File(FileData { layout: Layout::Chunked { chunks, .. }, .. }) => {
                    chunks.len() * 4
                }
                _ => 0,
            }
    }
}

impl Tree {
    /// Every inode that has a name, once: folders level by level, names in order.
    pub(crate) fn breadth_first(&self) -> Vec<InodeId> {
        let mut order = vec![ROOT];
        let mut seen = vec![false; self.len()];
        seen[ROOT as usize] = true;
        let mut next = 0;
        while let Some(&id) = order.get(next) {
            next += 1;
            for &child in self.folder(id).into_iter().flat_map(BTreeMap::values) {
                if !std::mem::replace(&mut seen[child as usize], true) {
                    order.push(child);
                }
            }
        }
        order
    }

    fn renumbered(mut self, order: &[InodeId], new: &dyn Fn(InodeId) -> Option<InodeId>) -> Self {
        let inodes = order.iter().map(|&old| {
            let gone = Inode { meta: Meta::implied_folder(), kind: Kind::Fifo };
            let mut inode = std::mem::replace(self.inode_mut(old), gone);
            if let Kind::Folder(names) = &mut inode.kind {
                for id in names.values_mut() {
                    *id = new(*id).expect("what a named folder names has a name");
                }
            }
            inode
        });
        Self { inodes: inodes.collect() }
    }
}
