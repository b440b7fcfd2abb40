//! One layer on its way in: a file in `tmp/` that one process at a time may write. It stays when
//! its writer dies, so that the next one goes on where it ended. It never becomes a blob of the
//! store: a layer is used up as soon as it is whole, and its packed bytes are not kept.

use std::{
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::MetadataExt,
    path::PathBuf,
    time::SystemTime,
};

use fs_err as fs;
use holdfast_model::Digest;
use sha2::{Digest as _, Sha256};

use super::ContentStore;
use crate::Error;

/// Bytes read at once when a draft's content is hashed anew.
const REHASH_BYTES: usize = 256 * 1024;

/// The lone writer of one blob. Dropped as it is, the bytes stay for a later try.
#[derive(Debug)]
pub struct Draft {
    file: fs::File,
    path: PathBuf,
    digest: Digest,
}

impl ContentStore {
    /// Takes the draft of a blob, waiting for whoever has it.
    pub fn draft(&self, digest: Digest) -> Result<Draft, Error> {
        let path = self.tmp().join(format!("{}.part", digest.hex()));
        loop {
            let file = fs::OpenOptions::new()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .open(&path)
                .map_err(Error::Store)?;
            // The kernel frees the lock of a process that dies: no follower waits for a dead one.
            file.lock().map_err(Error::Store)?;
            // The one before may have removed the file this lock is on.
            if is_at(&file, &path).map_err(Error::Store)? {
                return Ok(Draft { file, path, digest });
            }
        }
    }

    /// Removes drafts that nobody holds and that were last written before `before`. Returns how
    /// many.
    pub fn sweep(&self, before: SystemTime) -> Result<u32, Error> {
        let mut swept = 0;
        for entry in fs::read_dir(self.tmp()).map_err(Error::Store)? {
            let path = entry.map_err(Error::Store)?.path();
            // Gone meanwhile, or not a plain file: not ours to remove.
            let Ok(file) = fs::File::open(&path) else { continue };
            let metadata = file.metadata().map_err(Error::Store)?;
            let old = metadata.modified().is_ok_and(|written| written < before);
            let free = || file.try_lock().is_ok();
            if metadata.is_file() && old && free() && fs::remove_file(&path).is_ok() {
                swept += 1;
            }
        }
        Ok(swept)
    }
}

fn is_at(file: &fs::File, path: &std::path::Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

impl Draft {
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Hashes what is there already. More than `size` bytes cannot be right and are dropped.
    pub(crate) fn resume(&mut self, size: u64) -> Result<(Sha256, u64), Error> {
        let mut hasher = Sha256::new();
        if self.file.metadata().map_err(Error::Store)?.len() > size {
            self.restart()?;
        }
        self.file.rewind().map_err(Error::Store)?;
        let mut buffer = vec![0; REHASH_BYTES];
        let mut have = 0;
        loop {
            let count = self.file.read(&mut buffer).map_err(Error::Store)?;
            if count == 0 {
                return Ok((hasher, have));
            }
            hasher.update(&buffer[..count]);
            have += u64::try_from(count).unwrap_or(u64::MAX);
        }
    }

    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.file.write_all(bytes).map_err(Error::Store)
    }

    /// Throws away what is there, to begin anew.
    pub(crate) fn restart(&mut self) -> Result<(), Error> {
        self.file.set_len(0).map_err(Error::Store)?;
        self.file.rewind().map_err(Error::Store)
    }

    /// A reader of the bytes from the first. Borrowed: the draft stays locked while it is read.
    pub fn reader(&mut self) -> Result<impl Read + '_, Error> {
        self.file.seek(SeekFrom::Start(0)).map_err(Error::Store)?;
        Ok(&mut self.file)
    }

    /// Removes the bytes: they were used up, or they are wrong.
    pub fn discard(self) -> Result<(), Error> {
        fs::remove_file(&self.path).map_err(Error::Store)
    }
}

#[cfg(test)]
mod tests {
    use std::{thread, time::Duration};

    use super::*;
    use crate::image::digest_of;

    #[test]
    fn a_draft_left_behind_is_continued_and_read_whole() {
        let folder = tempfile::tempdir().unwrap();
        let store = ContentStore::open(folder.path()).unwrap();
        let digest = digest_of(b"onetwo");
        store.draft(digest).unwrap().append(b"one").unwrap();
        let mut draft = store.draft(digest).unwrap();
        let (mut hasher, have) = draft.resume(6).unwrap();
        draft.append(b"two").unwrap();
        hasher.update(b"two");
        assert_eq!((have, Digest::from_sha256(hasher.finalize().into())), (3, digest));
        let mut bytes = Vec::new();
        draft.reader().unwrap().read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, b"onetwo");
        draft.discard().unwrap();
        assert_eq!(fs::read_dir(store.tmp()).unwrap().count(), 0);
    }

    #[test]
    fn a_follower_waits_for_the_writer_and_gets_a_fresh_draft_after_it() {
        let folder = tempfile::tempdir().unwrap();
        let store = ContentStore::open(folder.path()).unwrap();
        let digest = digest_of(b"x");
        let mut first = store.draft(digest).unwrap();
        first.append(b"x").unwrap();
        let follower = thread::spawn({
            let store = store.clone();
            move || store.draft(digest).unwrap().resume(1).unwrap().1
        });
        // Not a condition to wait for: that the follower has not gone on can only be looked at.
        thread::sleep(Duration::from_millis(50));
        assert!(!follower.is_finished());
        first.discard().unwrap();
        assert_eq!(follower.join().unwrap(), 0);
    }

    #[test]
    fn a_sweep_takes_old_drafts_nobody_holds() {
        let folder = tempfile::tempdir().unwrap();
        let store = ContentStore::open(folder.path()).unwrap();
        let later = SystemTime::now() + Duration::from_secs(60);
        drop(store.draft(digest_of(b"left")).unwrap());
        let held = store.draft(digest_of(b"held")).unwrap();
        assert_eq!(store.sweep(SystemTime::UNIX_EPOCH).unwrap(), 0);
        assert_eq!(store.sweep(later).unwrap(), 1);
        drop(held);
        assert_eq!(store.sweep(later).unwrap(), 1);
    }
}
