//! Content by digest, under `<store>/`: `blobs/sha256/<hex>` (manifests and configs, whole),
//! `tags/` (what names meant when last asked), `tmp/` (drafts). Files appear by rename only, so a
//! crash leaves drafts and nothing half-made. Several processes use one store at a time.

mod collect;
mod draft;
mod tags;

use std::{
    fs::TryLockError,
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use fs_err as fs;
use holdfast_model::Digest;

pub use self::{
    collect::Collected,
    draft::Draft,
    tags::{Access, TagRecord},
};
use crate::{Error, image::digest_of, manifest::DOCUMENT_BYTES_MAX};

/// File whose lock says whether a pull or a collection is going on.
const LOCK: &str = "lock";

#[derive(Debug, Clone)]
pub struct ContentStore {
    root: PathBuf,
}

/// Held while an image is pulled and converted: nothing is collected meanwhile.
#[derive(Debug)]
#[must_use = "dropping the guard lets a collection take what was just received"]
pub struct Pulling(#[expect(dead_code, reason = "the lock ends with the file")] fs::File);

/// Held while garbage is collected, here and by others who keep files in this store.
#[derive(Debug)]
#[must_use = "dropping the guard lets pulls begin"]
pub struct Collecting(#[expect(dead_code, reason = "the lock ends with the file")] fs::File);

impl ContentStore {
    /// Opens the store, making its folders where they are missing.
    pub fn open(root: &Path) -> Result<Self, Error> {
        for folder in ["blobs/sha256", "tags", "tmp"] {
            fs::create_dir_all(root.join(folder)).map_err(Error::Store)?;
        }
        Ok(Self { root: root.to_owned() })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Announces a pull. Waits while garbage is collected, which is short.
    pub fn pulling(&self) -> Result<Pulling, Error> {
        let file = self.open_lock()?;
        file.lock_shared().map_err(Error::Store)?;
        Ok(Pulling(file))
    }

    /// Announces a collection, or says that a pull is going on.
    pub fn collecting(&self) -> Result<Collecting, Error> {
        let file = self.open_lock()?;
        match file.try_lock() {
            Ok(()) => Ok(Collecting(file)),
            Err(TryLockError::WouldBlock) => Err(Error::Busy),
            Err(TryLockError::Error(error)) => Err(Error::Store(error)),
        }
    }

    fn open_lock(&self) -> Result<fs::File, Error> {
        fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.root.join(LOCK))
            .map_err(Error::Store)
    }

    pub fn blob_path(&self, digest: Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }

    pub(crate) fn tmp(&self) -> PathBuf {
        self.root.join("tmp")
    }

    /// A manifest or config that is here. Content that does not fit its name (a damaged disk) is
    /// as good as absent.
    pub fn document(&self, digest: Digest) -> Result<Option<Vec<u8>>, Error> {
        let bytes = match fs::File::open(self.blob_path(digest)) {
            Ok(file) => read_document(file).map_err(Error::Store)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::Store(error)),
        };
        Ok((digest_of(&bytes) == digest).then_some(bytes))
    }

    /// Keeps a manifest or config under its digest.
    pub fn keep_document(&self, bytes: &[u8]) -> Result<Digest, Error> {
        let digest = digest_of(bytes);
        self.replace(&self.blob_path(digest), bytes)?;
        Ok(digest)
    }

    /// Replaces `path` so that a power cut leaves the old file or the new one, whole.
    pub(crate) fn replace(&self, path: &Path, bytes: &[u8]) -> Result<(), Error> {
        let write = || -> io::Result<()> {
            let mut draft = tempfile::Builder::new().prefix("draft-").tempfile_in(self.tmp())?;
            draft.write_all(bytes)?;
            draft.as_file().sync_all()?;
            draft.persist(path)?;
            sync_folder_of(path)
        };
        write().map_err(Error::Store)
    }
}

/// Reads at most one byte more than a document may have: enough to see that it is too large.
pub(crate) fn read_document(reader: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.take(DOCUMENT_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Makes a rename or removal in the folder of `path` durable.
fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    fs::File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_document_is_found_by_its_digest_and_leaves_no_draft() {
        let folder = tempfile::tempdir().unwrap();
        let store = ContentStore::open(folder.path()).unwrap();
        let digest = store.keep_document(b"{}").unwrap();
        assert_eq!(store.document(digest).unwrap().as_deref(), Some(&b"{}"[..]));
        assert_eq!(fs::read_dir(store.tmp()).unwrap().count(), 0);
    }

    #[test]
    fn a_damaged_document_counts_as_absent() {
        let folder = tempfile::tempdir().unwrap();
        let store = ContentStore::open(folder.path()).unwrap();
        let digest = store.keep_document(b"{}").unwrap();
        fs::write(store.blob_path(digest), b"[]").unwrap();
        assert_eq!(store.document(digest).unwrap(), None);
    }

    #[test]
    fn nothing_is_collected_while_something_is_pulled() {
        let folder = tempfile::tempdir().unwrap();
        let store = ContentStore::open(folder.path()).unwrap();
        let first = store.pulling().unwrap();
        let second = store.pulling().unwrap();
        drop(first);
        assert!(matches!(store.collecting(), Err(Error::Busy)));
        drop(second);
        assert!(store.collecting().is_ok());
    }
}
