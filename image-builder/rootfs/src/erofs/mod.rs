//! Writes the metadata of an image as EROFS: everything but file data, which inodes point to by
//! absolute block on the one disk `metadata ++ blob0 ++ blob1 …`.
//!
//! Block 0 holds the superblock; inodes follow in breadth-first order, each with its attributes and
//! as far as it fits the end of its folder or its symlink's target; then come whole blocks of
//! folders. Nothing depends on the clock or the machine: equal trees give equal bytes.

mod folder;
mod inode;
mod plan;
mod superblock;

use std::io::{self, BufWriter, Write};

use holdfast_model::Digest;

use crate::tree::{BLOCK, BLOCK_BYTES, InodeId, Kind, Time, Tree};
use plan::Slot;

/// An image whose every byte has its place.
pub(crate) struct Image<'a> {
    tree: &'a Tree,
    /// In the order of the disk.
    slots: Vec<Slot>,
    /// Where in `slots` an inode is, by its id.
    slot_of: Vec<u32>,
    /// The modification time of inodes that do not say their own.
    epoch: Time,
    /// First block of each segment of file data on the whole disk.
    bases: Vec<u32>,
    /// Blocks of the metadata, and of the whole disk.
    metadata_blocks: u32,
    disk_blocks: u32,
}

impl Image<'_> {
    /// Size of the metadata: whole blocks.
    pub(crate) fn bytes(&self) -> u64 {
        u64::from(self.metadata_blocks) * BLOCK_BYTES
    }

    pub(crate) fn write(&self, to: impl Write, manifest: &Digest) -> io::Result<()> {
        let mut out = Out { inner: BufWriter::with_capacity(256 << 10, to), at: 0 };
        out.put(&superblock::block(self, manifest))?;
        for slot in &self.slots {
            out.fill_to(slot.position)?;
            out.put(&inode::encode(self, slot))?;
            if slot.inline {
                out.put(self.content(slot).split_off(slot.blocks_bytes()).as_slice())?;
            }
        }
        for slot in self.slots.iter().filter(|slot| slot.blocks > 0) {
            out.fill_to(u64::from(slot.first_block) * BLOCK_BYTES)?;
            let mut content = self.content(slot);
            if slot.inline {
                content.truncate(slot.blocks_bytes());
            }
            out.put(&content)?;
        }
        out.fill_to(self.bytes())?;
        out.inner.flush()
    }

    /// What a folder's or symlink's inode holds.
    fn content(&self, slot: &Slot) -> Vec<u8> {
        match &self.tree.inode(slot.inode).kind {
            Kind::Folder(names) => {
                folder::encode(names, self.number(slot.inode), self.number(slot.parent), |id| {
                    (self.number(id), &self.tree.inode(id).kind)
                })
            }
            Kind::Symlink(target) => target.to_vec(),
            _ => Vec::new(),
        }
    }

    fn number(&self, id: InodeId) -> u64 {
        self.slots[self.slot_of[id as usize] as usize].number()
    }
}

/// Counts what was written, to fill gaps with zeros.
struct Out<W: Write> {
    inner: BufWriter<W>,
    at: u64,
}

impl<W: Write> Out<W> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.at += bytes.len() as u64;
        self.inner.write_all(bytes)
    }

    fn fill_to(&mut self, position: u64) -> io::Result<()> {
        const ZEROS: [u8; BLOCK] = [0; BLOCK];
        while self.at < position {
            let gap = usize::try_from(position - self.at).unwrap_or(usize::MAX).min(ZEROS.len());
            self.put(&ZEROS[..gap])?;
        }
        Ok(())
    }
}
