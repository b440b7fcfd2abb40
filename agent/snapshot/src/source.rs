//! Where the bytes of an image come from.

use std::{
    io,
    ops::Range,
    os::{fd::AsFd, unix::fs::FileExt},
};

use rustix::{
    fs::{SeekFrom, fstat, seek},
    io::Errno,
};

use crate::{PAGE_BYTES, Pages};

/// An image as it is at one instant. Nobody changes it meanwhile, or whoever does answers for that.
pub trait Source {
    /// A multiple of the page.
    fn bytes(&self) -> u64;

    /// What may hold anything but zeros.
    fn used(&self) -> io::Result<Pages>;

    fn read_at(&self, at: u64, into: &mut [u8]) -> io::Result<()>;
}

/// A file with holes: guest memory, a disk.
#[derive(Debug)]
pub struct FileSource<F> {
    file: F,
    bytes: u64,
}

impl<F: FileExt + AsFd> FileSource<F> {
    /// The whole of `file`, whose length must be a multiple of the page.
    pub fn new(file: F) -> io::Result<Self> {
        let bytes = u64::try_from(fstat(&file)?.st_size).unwrap_or_default();
        if bytes.is_multiple_of(PAGE_BYTES as u64) {
            Ok(Self { file, bytes })
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "its length is no multiple of 4096"))
        }
    }

    /// The next part that is no hole, from `from` on.
    fn data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        match seek(&self.file, SeekFrom::Data(from)) {
            Ok(start) => Ok(Some(start..seek(&self.file, SeekFrom::Hole(start))?)),
            Err(Errno::NXIO) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl<F: FileExt + AsFd> Source for FileSource<F> {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn used(&self) -> io::Result<Pages> {
        let page = PAGE_BYTES as u64;
        let mut used = Vec::new();
        let mut from = 0;
        while from < self.bytes
            && let Some(data) = self.data(from)?
        {
            let end = data.end.min(self.bytes);
            used.push(data.start / page..end.div_ceil(page));
            from = data.end;
        }
        Ok(used.into_iter().collect())
    }

    fn read_at(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_not_used() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 24).unwrap();
        file.write_all_at(&[1; PAGE_BYTES], 5 << 20).unwrap();
        let source = FileSource::new(file).unwrap();
        let used = source.used().unwrap();
        // A file system may keep more than was written, but not all of it.
        assert!(used.runs().iter().any(|run| run.contains(&(5 << 8))), "{used:?}");
        assert!(used.count() < 1 << 10, "{used:?}");
    }

    #[test]
    fn a_length_between_pages_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4097).unwrap();
        assert!(FileSource::new(file).is_err());
    }
}
