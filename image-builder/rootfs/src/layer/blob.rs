//! The data blob of a layer: files' bytes one after the other, each file from a block's start.

use std::{
    io::{self, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use fs_err as fs;
use fs_err::os::unix::fs::OpenOptionsExt;
use rustix::fs::OFlags;

use super::{
    page_buffer::PageBuffer,
    sparse::{Extent, SparseMap},
};
use crate::{
    error::{EntryError, StoreError},
    limits::CHUNKS_MAX,
    tree::{BLOCK, BLOCK_BYTES, FileData, HOLE, Layout},
};

pub(crate) struct Blob {
    path: PathBuf,
    file: fs::File,
    buffer: PageBuffer,
    /// Where in the file the buffer's bytes belong.
    flushed: u64,
    bytes_max: u64,
}

/// Why the blob does not take a byte.
#[derive(Debug)]
pub(crate) enum BlobError {
    Entry(EntryError),
    Store(StoreError),
}

impl Blob {
    pub(crate) fn create(path: PathBuf, bytes_max: u64) -> Result<Self, StoreError> {
        let file = create(&path).map_err(|source| StoreError::Io { path: path.clone(), source })?;
        // One block number less than there are, as the last means a hole.
        let bytes_max = bytes_max.min(u64::from(HOLE - 1) * BLOCK_BYTES);
        Ok(Self { path, file, buffer: PageBuffer::new(), flushed: 0, bytes_max })
    }

    fn position(&self) -> u64 {
        self.flushed + self.buffer.bytes().len() as u64
    }

    /// The block where the next byte goes: call at a block's start.
    fn block(&self) -> u32 {
        u32::try_from(self.position() / BLOCK_BYTES).expect("bytes_max keeps blocks in 32 bits")
    }

    fn room_for(&self, bytes: u64) -> Result<(), BlobError> {
        let end = self.position().checked_add(bytes);
        match end.filter(|&end| end <= self.bytes_max) {
            Some(_) => Ok(()),
            None => Err(BlobError::Entry(EntryError::DataTooLarge { max: self.bytes_max })),
        }
    }

    fn append(&mut self, mut bytes: &[u8]) -> Result<(), BlobError> {
        self.room_for(bytes.len() as u64)?;
        while !bytes.is_empty() {
            bytes = self.buffer.fill(bytes);
            if self.buffer.is_full() {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), BlobError> {
        self.file.write_all(self.buffer.bytes()).map_err(|source| self.io(source))?;
        self.flushed += self.buffer.bytes().len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// Appends zeros, whole blocks of them as a hole.
    fn append_zeros(&mut self, bytes: u64) -> Result<(), BlobError> {
        const ZEROS: [u8; BLOCK] = [0; BLOCK];
        self.room_for(bytes)?;
        let zeros = |bytes: u64| &ZEROS[..usize::try_from(bytes).expect("less than a block")];
        let head = (self.position().wrapping_neg() % BLOCK_BYTES).min(bytes);
        self.append(zeros(head))?;
        let blocks = (bytes - head) / BLOCK_BYTES * BLOCK_BYTES;
        if blocks > 0 {
            self.flush()?;
            self.flushed += blocks;
            let to = SeekFrom::Start(self.flushed);
            self.file.seek(to).map_err(|source| self.io(source))?;
        }
        self.append(zeros(bytes - head - blocks))
    }

    fn align(&mut self) -> Result<(), BlobError> {
        self.append_zeros(self.position().wrapping_neg() % BLOCK_BYTES)
    }

    /// Writes the last bytes and makes the blob durable under its draft name. Gives its size.
    pub(crate) fn finish(mut self) -> Result<u64, StoreError> {
        let wrote = self.flush().and_then(|()| {
            // A hole at the end is not written by anything else.
            let sized = self.file.set_len(self.flushed).and_then(|()| self.file.sync_all());
            sized.map_err(|source| self.io(source))
        });
        match wrote {
            Ok(()) => Ok(self.flushed),
            Err(BlobError::Store(error)) => Err(error),
            Err(BlobError::Entry(_)) => unreachable!("flushing takes no entry"),
        }
    }

    fn io(&self, source: io::Error) -> BlobError {
        BlobError::Store(StoreError::Io { path: self.path.clone(), source })
    }
}

/// Creates the file for direct writes: half a gigabyte of fresh page cache costs more than all the
/// copying, and most of a layer is not read soon. Not every file system has them.
fn create(path: &Path) -> io::Result<fs::File> {
    let direct = OFlags::DIRECT.bits().cast_signed();
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true);
    match options.custom_flags(direct).open(path) {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => fs::File::create(path),
        opened => opened,
    }
}

/// Takes one file's bytes as they come, and tells where they went.
pub(crate) struct FileWriter<'a> {
    blob: &'a mut Blob,
    bytes: u64,
    layout: Writing,
}

enum Writing {
    Plain { start: u32 },
    Sparse(Chunks),
}

impl<'a> FileWriter<'a> {
    pub(crate) fn new(blob: &'a mut Blob, stored: u64, sparse: Option<SparseMap>) -> Self {
        let whole = |map: &SparseMap| map.real_size == stored;
        let (bytes, layout) = match sparse.filter(|map| !whole(map)) {
            Some(map) => (map.real_size, Writing::Sparse(Chunks::new(map))),
            None => (stored, Writing::Plain { start: if stored > 0 { blob.block() } else { 0 } }),
        };
        Self { blob, bytes, layout }
    }

    pub(crate) fn write(&mut self, piece: &[u8]) -> Result<(), BlobError> {
        match &mut self.layout {
            Writing::Plain { .. } => self.blob.append(piece),
            Writing::Sparse(chunks) => chunks.write(self.blob, piece),
        }
    }

    pub(crate) fn finish(self) -> Result<FileData, BlobError> {
        let layout = match self.layout {
            Writing::Plain { start } => Layout::Plain(start),
            Writing::Sparse(mut chunks) => {
                chunks.fill_up(self.blob)?;
                let Chunks { chunk_log, chunks, .. } = chunks;
                Layout::Chunked { chunk_log, chunks: chunks.into() }
            }
        };
        self.blob.align()?;
        Ok(FileData { bytes: self.bytes, segment: 0, layout })
    }
}

/// A sparse file on its way into the blob: chunks that hold a stored byte are there as a whole,
/// the others not at all.
struct Chunks {
    real_size: u64,
    /// What is still to come, next one last.
    extents: Vec<Extent>,
    chunk_log: u8,
    chunks: Vec<u32>,
    /// Where in the file the blob's end is, inside the chunk begun last.
    at: u64,
    /// End of that chunk, or of the file if that is earlier. `at` before the first chunk.
    end: u64,
}

impl Chunks {
    fn new(map: SparseMap) -> Self {
        let SparseMap { real_size, mut extents } = map;
        extents.reverse();
        let blocks = real_size.div_ceil(BLOCK_BYTES);
        let fitting = (0..32).find(|log| blocks.div_ceil(1 << log) <= CHUNKS_MAX);
        let chunk_log = fitting.expect("the largest sparse file has fewer chunks");
        let count = usize::try_from(blocks.div_ceil(1 << chunk_log)).expect("at most CHUNKS_MAX");
        Self { real_size, extents, chunk_log, chunks: vec![HOLE; count], at: 0, end: 0 }
    }

    fn write(&mut self, blob: &mut Blob, mut piece: &[u8]) -> Result<(), BlobError> {
        while !piece.is_empty() {
            let mut extent = self.extents.pop().expect("the map adds up to what is stored");
            if extent.offset >= self.end {
                self.begin(blob, extent.offset)?;
            }
            blob.append_zeros(extent.offset - self.at)?;
            let take = extent.bytes.min(self.end - extent.offset).min(piece.len() as u64);
            let split = usize::try_from(take).expect("at most the piece");
            blob.append(&piece[..split])?;
            piece = &piece[split..];
            extent.offset += take;
            extent.bytes -= take;
            self.at = extent.offset;
            if extent.bytes > 0 {
                self.extents.push(extent);
            }
        }
        Ok(())
    }

    /// Begins the chunk that holds the byte at `offset`.
    fn begin(&mut self, blob: &mut Blob, offset: u64) -> Result<(), BlobError> {
        self.fill_up(blob)?;
        blob.align()?;
        let chunk_bytes = BLOCK_BYTES << self.chunk_log;
        let index = offset / chunk_bytes;
        self.chunks[usize::try_from(index).expect("inside the file")] = blob.block();
        self.at = index * chunk_bytes;
        self.end = (self.at + chunk_bytes).min(self.real_size);
        Ok(())
    }

    /// The rest of a begun chunk is a hole in the file.
    fn fill_up(&mut self, blob: &mut Blob) -> Result<(), BlobError> {
        let rest = self.end - self.at;
        self.at = self.end;
        blob.append_zeros(rest)
    }
}
