//! What a name meant when its registry was last asked. A record belongs to the access it was got
//! with: who may not pull an image gets nothing from the record of one who may.

use std::{
    io::{self, Write},
    time::{Duration, SystemTime},
};

use fs_err as fs;
use holdfast_model::Digest;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::ContentStore;
use crate::{Credentials, Error, Reference};

/// File of the random key that keeps secrets from being guessed by their fingerprint.
const KEY: &str = "tags/key";
const KEY_BYTES: usize = 32;

/// Most bytes of one record: names of at most 0.7 KB, an etag, two digests.
const RECORD_BYTES_MAX: u64 = 16 * 1024;

/// With which rights something was asked: nobody's, or a fingerprint of credentials that is worth
/// nothing outside this store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Access(String);

/// One answer of a registry, kept under `tags/`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TagRecord {
    /// The complete name that was asked for.
    pub reference: String,
    /// Manifest or index it stood for.
    pub digest: Digest,
    pub etag: Option<String>,
    /// When the registry last said so, in seconds since 1970.
    pub checked_unix_seconds: u64,
    pub access: Access,
}

impl TagRecord {
    pub(crate) fn new(
        reference: &Reference,
        access: &Access,
        digest: Digest,
        etag: Option<String>,
        now: SystemTime,
    ) -> Self {
        let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self {
            reference: reference.to_string(),
            digest,
            etag,
            checked_unix_seconds: since.as_secs(),
            access: access.clone(),
        }
    }

    /// How long ago the registry said so. A clock set back gives zero.
    pub(crate) fn age(&self, now: SystemTime) -> Duration {
        let checked = SystemTime::UNIX_EPOCH + Duration::from_secs(self.checked_unix_seconds);
        now.duration_since(checked).unwrap_or_default()
    }

    fn file_name(&self) -> String {
        file_name(&self.reference, &self.access)
    }
}

/// Names may hold `/` and end in anything, so the file is named by a digest of them.
fn file_name(reference: &str, access: &Access) -> String {
    let hash = Sha256::digest(format!("{reference}\0{}", access.0));
    format!("tags/{}.json", Digest::from_sha256(hash.into()).hex())
}

impl ContentStore {
    /// The fingerprint of credentials in this store.
    pub fn access(&self, credentials: Option<&Credentials>) -> Result<Access, Error> {
        let Some(credentials) = credentials else {
            return Ok(Access("anonymous".to_owned()));
        };
        let mut hasher = Sha256::new();
        hasher.update(self.key().map_err(Error::Store)?);
        hasher.update(u64::try_from(credentials.username.len()).unwrap_or(u64::MAX).to_le_bytes());
        hasher.update(&credentials.username);
        hasher.update(credentials.secret.reveal());
        Ok(Access(Digest::from_sha256(hasher.finalize().into()).hex()))
    }

    fn key(&self) -> io::Result<Vec<u8>> {
        let path = self.root().join(KEY);
        match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
        let mut key = [0; KEY_BYTES];
        getrandom::fill(&mut key)?;
        let mut draft = tempfile::Builder::new().prefix("draft-").tempfile_in(self.tmp())?;
        draft.write_all(&key)?;
        draft.as_file().sync_all()?;
        match draft.persist_noclobber(&path) {
            Ok(_) => {}
            // Another process was first: its key is the key.
            Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error.error),
        }
        fs::read(&path)
    }

    /// What this name meant when last asked with this access.
    pub fn tag(&self, reference: &Reference, access: &Access) -> Result<Option<TagRecord>, Error> {
        let path = self.root().join(file_name(&reference.to_string(), access));
        read_record(&path).map_err(Error::Store)
    }

    pub(crate) fn keep_tag(&self, record: &TagRecord) -> Result<(), Error> {
        let bytes = serde_json::to_vec(record).map_err(|error| Error::Store(error.into()))?;
        self.replace(&self.root().join(record.file_name()), &bytes)
    }
}

/// Reads a record. One that is absent, too large or not understood (made by another version)
/// says nothing: the registry is asked again.
pub(super) fn read_record(path: &std::path::Path) -> io::Result<Option<TagRecord>> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_file() && metadata.len() <= RECORD_BYTES_MAX => {}
        Ok(_) => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    }
    Ok(serde_json::from_slice(&fs::read(path)?).ok())
}

#[cfg(test)]
mod tests {
    use holdfast_model::Secret;

    use super::*;
    use crate::image::digest_of;

    fn credentials(username: &str, secret: &str) -> Credentials {
        Credentials { username: username.to_owned(), secret: Secret::new(secret) }
    }

    #[test]
    fn a_record_is_found_only_with_the_access_it_was_made_with() {
        let folder = tempfile::tempdir().unwrap();
        let store = ContentStore::open(folder.path()).unwrap();
        let mine = store.access(Some(&credentials("me", "secret"))).unwrap();
        let reference: Reference = "r.io/a:b".parse().unwrap();
        let now = SystemTime::now();
        let record = TagRecord::new(&reference, &mine, digest_of(b"m"), None, now);
        store.keep_tag(&record).unwrap();
        assert_eq!(store.tag(&reference, &mine).unwrap(), Some(record));
        for other in [None, Some(credentials("me", "guess")), Some(credentials("mes", "ecret"))] {
            let access = store.access(other.as_ref()).unwrap();
            assert_eq!(store.tag(&reference, &access).unwrap(), None, "{other:?}");
        }
    }

    #[test]
    fn a_record_ages_from_the_last_answer() {
        let reference: Reference = "r.io/a:b".parse().unwrap();
        let then = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let access = Access("anonymous".to_owned());
        let record = TagRecord::new(&reference, &access, digest_of(b"m"), None, then);
        assert_eq!(record.age(then + Duration::from_secs(60)), Duration::from_secs(60));
        assert_eq!(record.age(SystemTime::UNIX_EPOCH), Duration::ZERO);
    }

    #[test]
    fn a_record_that_is_not_understood_says_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record");
        for bytes in [&b""[..], b"{", b"[]", &[b' '; 20_000]] {
            fs::write(&path, bytes).unwrap();
            assert_eq!(read_record(&path).unwrap(), None);
        }
    }
}
