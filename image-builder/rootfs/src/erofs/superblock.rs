//! Block 0.

use holdfast_model::Digest;

use super::Image;
use crate::tree::{BLOCK, Kind, Layout, ROOT};

const MAGIC: u32 = 0xe0f5_e1e2;

/// Where the superblock is in its block, as a boot sector may come before it.
const OFFSET: usize = 1024;

/// Bit shift of the block size.
const BLOCK_LOG: u8 = 12;
const _: () = assert!(1 << BLOCK_LOG == BLOCK);

/// Compatible features: the checksum is there; times are of modification.
const CHECKSUM: u32 = 1;
const MTIME: u32 = 2;

/// Incompatible feature: some files are in chunks.
const CHUNKED: u32 = 4;

pub(super) fn block(image: &Image<'_>, manifest: &Digest) -> Vec<u8> {
    let chunked = |slot: &super::Slot| {
        let kind = &image.tree.inode(slot.inode).kind;
        matches!(kind, Kind::File(data) if matches!(data.layout, Layout::Chunked { .. }))
    };
    let incompatible = if image.slots.iter().any(chunked) { CHUNKED } else { 0 };
    let root = u16::try_from(image.number(ROOT)).expect("the root comes first");
    let mut out = vec![0; OFFSET];
    out.extend(MAGIC.to_le_bytes());
    out.extend([0; 4]); // Checksum, below.
    out.extend((CHECKSUM | MTIME).to_le_bytes());
    out.extend([BLOCK_LOG, 0]);
    out.extend(root.to_le_bytes());
    out.extend((image.slots.len() as u64).to_le_bytes());
    out.extend(image.epoch.seconds.to_le_bytes());
    out.extend(image.epoch.nanos.to_le_bytes());
    out.extend(image.disk_blocks.to_le_bytes());
    out.extend([0; 4]); // Inode numbers count from the disk's start.
    out.extend([0; 4]); // No shared attributes.
    out.extend(uuid(manifest));
    out.extend([0; 16]); // No volume name.
    out.extend(incompatible.to_le_bytes());
    out.resize(BLOCK, 0);
    let checksum = crc32c(&out[OFFSET..]);
    out[OFFSET + 4..OFFSET + 8].copy_from_slice(&checksum.to_le_bytes());
    out
}

/// Of the manifest's digest, so that it tells images apart and equal ones not; marked as version 8
/// (made by a rule of one's own).
fn uuid(manifest: &Digest) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&manifest.as_bytes()[..16]);
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

/// CRC-32C as EROFS wants it, without the inversion at the end. Bit by bit: it is for one block.
fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            let low_bit = crc & 1;
            (crc >> 1) ^ (POLYNOMIAL * low_bit)
        })
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_checksum_is_the_castagnoli_one() {
        // The check value of the catalogue of CRC algorithms, before its inversion at the end.
        assert_eq!(super::crc32c(b"123456789"), !0xe306_9283);
    }
}
