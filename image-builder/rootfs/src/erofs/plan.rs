//! Gives every inode its place, so that folders can name them before they are written.

use std::collections::BTreeMap;

use super::{Image, folder, inode};
use crate::{
    error::AssembleError,
    tree::{BLOCK_BYTES, HOLE, InodeId, Kind, Layout, ROOT, Time, Tree},
};

/// Inodes are numbered by their place in these units.
const SLOT_BYTES: u64 = 32;

/// One inode's place.
pub(super) struct Slot {
    pub(super) inode: InodeId,
    /// The folder that a folder is in; the root is in itself. Meaningless for others.
    pub(super) parent: InodeId,
    pub(super) links: u32,
    /// Byte on the disk.
    pub(super) position: u64,
    /// The 64-byte form, for what the 32-byte form cannot say.
    pub(super) extended: bool,
    /// Bytes of a folder or symlink.
    pub(super) bytes: u64,
    /// What does not fill a block comes right after the inode.
    pub(super) inline: bool,
    /// Whole blocks of a folder or symlink, and the first of them.
    pub(super) blocks: u32,
    pub(super) first_block: u32,
}

impl Slot {
    pub(super) fn number(&self) -> u64 {
        self.position / SLOT_BYTES
    }

    /// Bytes that are in whole blocks when the rest is inline.
    pub(super) fn blocks_bytes(&self) -> usize {
        usize::try_from(self.bytes / BLOCK_BYTES * BLOCK_BYTES).expect("it is in memory")
    }
}

impl<'a> Image<'a> {
    /// `blob_blocks`: sizes of the segments that file data counts in, in their order.
    pub(crate) fn plan(tree: &'a Tree, blob_blocks: &[u64]) -> Result<Self, AssembleError> {
        let order = tree.breadth_first();
        let names = Names::count(tree, &order);
        let epoch = commonest_time(tree, &order);
        let mut slot_of = vec![0; tree.len()];
        let mut slots = Vec::with_capacity(order.len());
        let mut end = BLOCK_BYTES;
        for (index, id) in (0..).zip(order) {
            slot_of[id as usize] = index;
            let slot = place(tree, id, &names, epoch, &mut end);
            slots.push(slot);
        }
        let mut blocks = end.div_ceil(BLOCK_BYTES);
        for slot in &mut slots {
            slot.first_block = block_number(blocks)?;
            blocks += u64::from(slot.blocks);
        }
        let metadata_blocks = block_number(blocks)?;
        let mut bases = Vec::with_capacity(blob_blocks.len());
        for segment in blob_blocks {
            bases.push(block_number(blocks)?);
            blocks = blocks.saturating_add(*segment);
        }
        let disk_blocks = block_number(blocks)?;
        Ok(Self { tree, slots, slot_of, epoch, bases, metadata_blocks, disk_blocks })
    }
}

/// What the tree's names say about its inodes, by their ids.
struct Names {
    links: Vec<u32>,
    parents: Vec<InodeId>,
}

impl Names {
    fn count(tree: &Tree, order: &[InodeId]) -> Self {
        let mut links = vec![0_u32; tree.len()];
        let mut parents = vec![ROOT; tree.len()];
        for &id in order {
            let Some(names) = tree.folder(id) else { continue };
            // Its name and its `.`, then each folder's `..`.
            links[id as usize] += 2;
            for &child in names.values() {
                if tree.folder(child).is_some() {
                    parents[child as usize] = id;
                    links[id as usize] += 1;
                } else {
                    links[child as usize] += 1;
                }
            }
        }
        Self { links, parents }
    }
}

/// Most files of an image were made in one go: said once, their time needs no room in the inodes.
fn commonest_time(tree: &Tree, order: &[InodeId]) -> Time {
    let mut counts: BTreeMap<Time, u32> = BTreeMap::new();
    for &id in order {
        *counts.entry(tree.inode(id).meta.mtime).or_default() += 1;
    }
    // The earliest of equally common ones: max_by_key keeps the last.
    counts
        .into_iter()
        .rev()
        .max_by_key(|&(_, count)| count)
        .map(|(time, _)| time)
        .unwrap_or_default()
}

/// Finds room for one inode at or after `end`, and moves `end` behind it.
fn place(tree: &Tree, id: InodeId, names: &Names, epoch: Time, end: &mut u64) -> Slot {
    let inode = tree.inode(id);
    let (bytes, table_bytes) = match &inode.kind {
        Kind::Folder(names) => (folder::bytes(names), 0),
        Kind::Symlink(target) => (target.len() as u64, 0),
        Kind::File(data) => match &data.layout {
            Layout::Plain(_) => (0, 0),
            Layout::Chunked { chunks, .. } => (0, 4 * chunks.len() as u64),
        },
        _ => (0, 0),
    };
    let links = names.links[id as usize];
    let extended = inode::needs_extended(inode, links, epoch);
    let fixed = if extended { 64 } else { 32 };
    let head = fixed + inode::xattrs_bytes(&inode.meta.xattrs) as u64;
    let tail = bytes % BLOCK_BYTES;
    let inline = tail > 0 && head + tail <= BLOCK_BYTES;
    // Neither the fixed part nor what is inline may cross a block's end.
    let crosses = |start: u64, length: u64| {
        length > 0 && start / BLOCK_BYTES != (start + length - 1) / BLOCK_BYTES
    };
    let mut position = end.next_multiple_of(SLOT_BYTES);
    if crosses(position, fixed) || (inline && crosses(position + head, tail)) {
        position = position.next_multiple_of(BLOCK_BYTES);
    }
    *end = position + head + table_bytes + if inline { tail } else { 0 };
    let blocks = if inline { bytes / BLOCK_BYTES } else { bytes.div_ceil(BLOCK_BYTES) };
    Slot {
        inode: id,
        parent: names.parents[id as usize],
        links,
        position,
        extended,
        bytes,
        inline,
        blocks: u32::try_from(blocks).expect("a folder in memory has far fewer blocks"),
        first_block: 0,
    }
}

fn block_number(block: u64) -> Result<u32, AssembleError> {
    let fits = u32::try_from(block).ok().filter(|&block| block < HOLE);
    fits.ok_or(AssembleError::TooLarge { max: u64::from(HOLE - 1) * BLOCK_BYTES })
}
