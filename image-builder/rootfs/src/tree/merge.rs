//! Layers laid over each other.
//!
//! A layer's whiteouts go first, whatever their place in its archive; then its hard links to lower
//! layers are looked up; then its entries are put in. A folder over a folder keeps what the lower
//! one has; anything else replaces.

use std::collections::BTreeMap;

use super::{InodeId, Kind, LayerTree, Name, ROOT, Tree, components};
use crate::{
    error::{EntryError, EntryName},
    limits::PATH_BYTES_MAX,
};

/// An entry of the upper layer that does not fit the lower ones.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MergeError {
    pub(crate) entry: EntryName,
    pub(crate) source: EntryError,
}

impl Tree {
    /// Lays `layer` over this tree. Its files' data is in the image's `segment`th blob.
    pub(crate) fn apply(&mut self, layer: LayerTree, segment: u16) -> Result<(), MergeError> {
        self.clear_for(&layer);
        let pairs = self.pairs(&layer);
        let mut links = Vec::with_capacity(layer.lower_links.len());
        for ((folder, name), target) in &layer.lower_links {
            let id = self.find_link(target).map_err(|source| MergeError {
                entry: EntryName::new(&layer.path_of(*folder, name)),
                source,
            })?;
            links.push((*folder, name.clone(), id));
        }
        // Where each of the layer's inodes ends up: a folder over a folder in its place.
        let fresh = pairs.iter().filter(|pair| pair.is_none()).count();
        self.inodes.reserve(fresh);
        let mut named: Vec<(InodeId, BTreeMap<Name, InodeId>)> = Vec::new();
        let mut new_ids = Vec::with_capacity(layer.tree.len());
        for (upper, mut inode) in (0..).zip(layer.tree.inodes) {
            let names = match &mut inode.kind {
                Kind::Folder(names) => Some(std::mem::take(names)),
                Kind::File(data) => {
                    data.segment = segment;
                    None
                }
                _ => None,
            };
            let new = match pairs[upper as usize] {
                Some(lower) => {
                    if !layer.implied.contains(&upper) {
                        self.inode_mut(lower).meta = inode.meta;
                    }
                    lower
                }
                None => self.add(inode),
            };
            new_ids.push(new);
            named.extend(names.map(|names| (new, names)));
        }
        for (folder, names) in named {
            let names = names.into_iter().map(|(name, id)| (name, new_ids[id as usize]));
            self.folder_mut(folder).expect("a folder over a folder").extend(names);
        }
        for (folder, name, id) in links {
            let folder = new_ids[folder as usize];
            self.folder_mut(folder).expect("links are in folders").insert(name, id);
        }
        Ok(())
    }

    /// Removes what the layer says is gone.
    fn clear_for(&mut self, layer: &LayerTree) {
        // Depth was checked when the layer was read.
        let names = |path| components(path, PATH_BYTES_MAX).unwrap_or_default();
        for path in &layer.whiteouts {
            if let Some((name, parents)) = names(path).split_last()
                && let Some(folder) = self.find(parents).and_then(|id| self.folder_mut(id))
            {
                folder.remove(*name);
            }
        }
        for path in &layer.opaque {
            if let Some(folder) = self.find(&names(path)).and_then(|id| self.folder_mut(id)) {
                folder.clear();
            }
        }
    }

    /// For each of the layer's inodes, the folder of this tree that it merges with.
    fn pairs(&self, layer: &LayerTree) -> Vec<Option<InodeId>> {
        let mut pairs = vec![None; layer.tree.len()];
        pairs[ROOT as usize] = Some(ROOT);
        // Parents come before children, so one pass sees each pair made before it is used.
        for upper in layer.tree.breadth_first() {
            let (Some(names), Some(lower)) = (layer.tree.folder(upper), pairs[upper as usize])
            else {
                continue;
            };
            let below = self.folder(lower).expect("pairs are folders");
            for (name, &id) in names {
                let under = below.get(name).copied().filter(|&under| self.folder(under).is_some());
                if layer.tree.folder(id).is_some() {
                    pairs[id as usize] = under;
                }
            }
        }
        pairs
    }

    fn find_link(&self, target: &[u8]) -> Result<InodeId, EntryError> {
        // The depth was checked when the layer was read.
        let path = components(target, PATH_BYTES_MAX)?;
        let id =
            self.find(&path).ok_or_else(|| EntryError::LinkToNothing(EntryName::new(target)))?;
        match self.folder(id) {
            Some(_) => Err(EntryError::LinkToFolder(EntryName::new(target))),
            None => Ok(id),
        }
    }
}

impl LayerTree {
    /// For messages: the path of a name in a folder.
    fn path_of(&self, folder: InodeId, name: &[u8]) -> Vec<u8> {
        let mut parents = BTreeMap::new();
        for id in self.tree.breadth_first() {
            for (name, &child) in self.tree.folder(id).into_iter().flatten() {
                parents.insert(child, (id, name));
            }
        }
        let mut path = name.to_vec();
        let mut at = folder;
        while let Some((parent, name)) = parents.get(&at) {
            path = [&name[..], &path].join(&b'/');
            at = *parent;
        }
        path
    }
}
