//! Bytes gathered for one large write, at an address that direct I/O takes.

use crate::tree::BLOCK;

/// Enough that neither the system call nor the disk's answer shows.
pub(crate) const BYTES_MAX: usize = 1 << 20;

pub(crate) struct PageBuffer {
    /// A block more than is used, so that some byte in the first block is aligned.
    storage: Box<[u8]>,
    start: usize,
    length: usize,
}

impl PageBuffer {
    pub(crate) fn new() -> Self {
        let storage: Box<[u8]> = vec![0; BYTES_MAX + BLOCK].into();
        // The allocation never moves, so what is aligned now stays so. Should no aligned byte be
        // found, direct writes fail; they do not go wrong.
        let start = storage.as_ptr().align_offset(BLOCK).min(BLOCK);
        Self { storage, start, length: 0 }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.storage[self.start..self.start + self.length]
    }

    pub(crate) fn is_full(&self) -> bool {
        self.length == BYTES_MAX
    }

    pub(crate) fn clear(&mut self) {
        self.length = 0;
    }

    /// Takes as many of `bytes` as fit; gives the rest.
    pub(crate) fn fill<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let (now, later) = bytes.split_at(bytes.len().min(BYTES_MAX - self.length));
        let at = self.start + self.length;
        self.storage[at..at + now.len()].copy_from_slice(now);
        self.length += now.len();
        later
    }
}
