//! Keeps what is slow to make under the digest of what it was made from.

use std::path::{Path, PathBuf};

use anyhow::Result;
use fs_err::File;
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest as _, Sha256};

/// Hex digits of a digest used as a name: no two inputs of ours meet in 64 bits.
const NAME_DIGITS: usize = 16;

/// The cache folder, held by this process alone until it is dropped.
#[derive(Debug)]
pub(crate) struct Cache {
    folder: PathBuf,
    /// Its lock ends with it.
    _lock: File,
}

impl Cache {
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        fs_err::create_dir_all(folder)?;
        let lock = File::create(folder.join("lock"))?;
        flock(&lock, FlockOperation::LockExclusive)?;
        Ok(Self { folder: folder.to_owned(), _lock: lock })
    }

    /// The entry `kind` made from `inputs`; `make` fills an empty folder when it is not there.
    /// Older entries of the kind go then. What an interrupted run left is removed: an entry is
    /// whole or absent.
    pub(crate) fn ensure(
        &self,
        kind: &str,
        inputs: &[&str],
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let entry = self.folder.join(format!("{kind}-{}", digest(inputs)));
        if entry.exists() {
            return Ok(entry);
        }
        let draft = self.folder.join(format!("{kind}.draft"));
        if draft.exists() {
            fs_err::remove_dir_all(&draft)?;
        }
        fs_err::create_dir_all(&draft)?;
        make(&draft)?;
        fs_err::rename(&draft, &entry)?;
        self.keep_only(kind, &entry)?;
        Ok(entry)
    }

    /// Removes the entries of `kind` but this one: each is some hundred megabytes.
    fn keep_only(&self, kind: &str, kept: &Path) -> Result<()> {
        for entry in fs_err::read_dir(&self.folder)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with(&format!("{kind}-")) && path != kept {
                fs_err::remove_dir_all(path)?;
            }
        }
        Ok(())
    }
}

/// The digest of a file's content, as an input.
pub(crate) fn file_digest(path: &Path) -> Result<String> {
    let mut sha = Sha256::new();
    std::io::copy(&mut File::open(path)?, &mut sha)?;
    Ok(sha.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A name for `inputs`. Each is counted with its length, so that no two lists read the same.
fn digest(inputs: &[&str]) -> String {
    let mut sha = Sha256::new();
    for input in inputs {
        sha.update(input.len().to_le_bytes());
        sha.update(input);
    }
    let mut hex: String = sha.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    hex.truncate(NAME_DIGITS);
    hex
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_made_once_for_equal_inputs() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path()).unwrap();
        let fill = |draft: &Path| Ok(fs_err::write(draft.join("a"), b"1")?);
        let first = cache.ensure("root", &["x", "y"], fill).unwrap();
        let again = cache.ensure("root", &["x", "y"], |_| panic!("made twice")).unwrap();
        let other = cache.ensure("root", &["xy"], fill).unwrap();
        assert_eq!(first, again);
        assert_ne!(first, other);
    }

    #[test]
    fn of_a_kind_only_the_newest_entry_stays() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path()).unwrap();
        let make = |kind: &str, input: &str| cache.ensure(kind, &[input], |_| Ok(())).unwrap();
        let (old, other, new) = (make("images", "1"), make("root", "1"), make("images", "2"));
        assert_eq!([old.exists(), new.exists(), other.exists()], [false, true, true]);
    }

    #[test]
    fn what_failed_or_was_cut_short_leaves_no_entry_and_the_next_try_starts_empty() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path()).unwrap();
        let outcome = cache.ensure("root", &["x"], |draft| {
            fs_err::write(draft.join("half"), b"")?;
            anyhow::bail!("interrupted")
        });
        assert!(outcome.is_err());
        let made = cache.ensure("root", &["x"], |draft| {
            assert!(!draft.join("half").exists());
            Ok(())
        });
        assert!(made.unwrap().exists());
    }
}
