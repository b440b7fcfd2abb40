//! Both sides of the decompressor: the bytes as received, and the tar inside, each hashed in the
//! one pass that reads it.

use std::io::{self, BufRead, Read};

use flate2::bufread::MultiGzDecoder;
use holdfast_model::Digest;
use sha2::{Digest as _, Sha256};

use super::{Compression, header::BLOCK};
use crate::error::ArchiveError;

/// Large enough that system calls and hash set-up do not show, small enough to stay in the cache.
const BUFFER_BYTES: usize = 128 << 10;

const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];
const ZSTD_MAGIC: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

/// The layer as received.
pub(crate) struct Input<'a, R> {
    reader: R,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    hash: Sha256,
    /// Bytes received so far.
    pub(crate) bytes: u64,
    bytes_max: u64,
    progress: &'a mut dyn FnMut(u64),
    /// The reader's own error, which a decompressor would dress up as its own.
    pub(crate) failed: Option<io::Error>,
}

impl<'a, R: Read> Input<'a, R> {
    /// Reads `bytes_max` bytes and at most one buffer more: then the size is wrong anyway.
    pub(crate) fn new(reader: R, bytes_max: u64, progress: &'a mut dyn FnMut(u64)) -> Self {
        let buffer = vec![0; BUFFER_BYTES].into();
        let hash = Sha256::new();
        Self { reader, buffer, start: 0, end: 0, hash, bytes: 0, bytes_max, progress, failed: None }
    }

    /// What the first bytes say the compression is.
    pub(crate) fn detect(&mut self) -> io::Result<Compression> {
        let start = self.fill_buf()?;
        Ok(match start {
            _ if start.starts_with(GZIP_MAGIC) => Compression::Gzip,
            _ if start.starts_with(ZSTD_MAGIC) => Compression::Zstd,
            _ => Compression::None,
        })
    }

    /// Reads on to the end, so that size and digest can be told.
    pub(crate) fn drain(&mut self) -> io::Result<()> {
        loop {
            let length = self.fill_buf()?.len();
            if length == 0 {
                return Ok(());
            }
            self.consume(length);
        }
    }

    pub(crate) fn digest(self) -> Digest {
        Digest::from_sha256(self.hash.finalize().into())
    }
}

impl<R: Read> BufRead for Input<'_, R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.start == self.end && self.bytes <= self.bytes_max && self.failed.is_none() {
            let read = read_some(&mut self.reader, &mut self.buffer);
            self.start = 0;
            self.end = *read.as_ref().unwrap_or(&0);
            if let Err(error) = read {
                let told = io::Error::from(error.kind());
                self.failed = Some(error);
                return Err(told);
            }
            self.hash.update(&self.buffer[..self.end]);
            self.bytes += self.end as u64;
            (self.progress)(self.bytes);
        }
        Ok(&self.buffer[self.start..self.end])
    }

    fn consume(&mut self, amount: usize) {
        self.start = self.end.min(self.start + amount);
    }
}

impl<R: Read> Read for Input<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.fill_buf()?.read(into)?;
        self.consume(read);
        Ok(read)
    }
}

/// Chooses the decompressor. Both take several members or frames one after the other, and take a
/// missing end for an error.
pub(crate) fn decompressor<'a, R: BufRead + 'a>(
    input: R,
    compression: Compression,
    zstd_window_log: u32,
) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match compression {
        Compression::Gzip => Box::new(MultiGzDecoder::new(input)),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
            decoder.window_log_max(zstd_window_log)?;
            Box::new(decoder)
        }
        Compression::Detect | Compression::None => Box::new(input),
    })
}

/// The tar inside.
pub(crate) struct Stream<R> {
    reader: R,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    hash: Sha256,
    bytes: u64,
    bytes_max: u64,
}

/// Why the tar could not be read on.
#[derive(Debug)]
pub(crate) enum StreamError {
    Read(io::Error),
    TooLarge,
    Archive(ArchiveError),
}

impl From<ArchiveError> for StreamError {
    fn from(error: ArchiveError) -> Self {
        Self::Archive(error)
    }
}

impl<R: Read> Stream<R> {
    pub(crate) fn new(reader: R, bytes_max: u64) -> Self {
        let buffer = vec![0; BUFFER_BYTES].into();
        Self { reader, buffer, start: 0, end: 0, hash: Sha256::new(), bytes: 0, bytes_max }
    }

    /// Some bytes that were not consumed yet; none at the end.
    pub(crate) fn fill(&mut self) -> Result<&[u8], StreamError> {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
            self.end = read_some(&mut self.reader, &mut self.buffer).map_err(StreamError::Read)?;
            self.hash.update(&self.buffer[..self.end]);
            self.bytes += self.end as u64;
            if self.bytes > self.bytes_max {
                return Err(StreamError::TooLarge);
            }
        }
        Ok(&self.buffer[self.start..self.end])
    }

    pub(crate) fn consume(&mut self, amount: usize) {
        self.start = self.end.min(self.start + amount);
    }

    /// Hands the next `length` bytes on, piece by piece.
    pub(crate) fn pass<E: From<StreamError>>(
        &mut self,
        mut length: u64,
        mut to: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while length > 0 {
            let piece = self.fill()?;
            if piece.is_empty() {
                return Err(StreamError::from(ArchiveError::Truncated).into());
            }
            let take = usize::try_from(length).map_or(piece.len(), |left| left.min(piece.len()));
            to(&piece[..take])?;
            self.consume(take);
            length -= take as u64;
        }
        Ok(())
    }

    pub(crate) fn skip(&mut self, length: u64) -> Result<(), StreamError> {
        self.pass(length, |_| Ok(()))
    }

    /// As [`Self::skip`], but the archive may end before: nothing that it says is missing then.
    pub(crate) fn skip_if_there(&mut self, mut length: usize) -> Result<(), StreamError> {
        while length > 0 {
            let there = self.fill()?.len().min(length);
            if there == 0 {
                return Ok(());
            }
            self.consume(there);
            length -= there;
        }
        Ok(())
    }

    /// The next `length` bytes. The caller has checked that they are few.
    pub(crate) fn take(&mut self, length: u64) -> Result<Vec<u8>, StreamError> {
        let mut bytes = Vec::new();
        self.pass(length, |piece| {
            bytes.extend_from_slice(piece);
            Ok::<(), StreamError>(())
        })?;
        Ok(bytes)
    }

    /// The next block; `None` where the archive ends instead.
    pub(crate) fn block(&mut self) -> Result<Option<[u8; BLOCK]>, StreamError> {
        if self.fill()?.is_empty() {
            return Ok(None);
        }
        let mut block = [0; BLOCK];
        let mut filled = 0;
        self.pass(BLOCK as u64, |piece| {
            block[filled..filled + piece.len()].copy_from_slice(piece);
            filled += piece.len();
            Ok::<(), StreamError>(())
        })?;
        Ok(Some(block))
    }

    /// Reads on to the end: what follows the archive's end counts for the digest alone.
    pub(crate) fn finish(mut self) -> Result<Digest, StreamError> {
        loop {
            let length = self.fill()?.len();
            if length == 0 {
                return Ok(Digest::from_sha256(self.hash.finalize().into()));
            }
            self.consume(length);
        }
    }
}

/// Reads once, and again when a signal came in between.
fn read_some(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match reader.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => return read,
        }
    }
}
