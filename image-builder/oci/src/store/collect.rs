//! Garbage: documents and blobs that no living image needs, and names that lead to none.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
};

use fs_err as fs;
use holdfast_model::Digest;

use super::{Collecting, ContentStore, TagRecord, tags::read_record};
use crate::{Error, manifest::Document};

/// What a collection gave back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Collected {
    pub blobs: u32,
    pub tags: u32,
    pub bytes: u64,
}

impl ContentStore {
    /// Removes what the images in `live` (digests of manifests) do not need. The guard proves that
    /// no pull is adding content which is not referenced yet.
    pub fn collect(
        &self,
        _guard: &Collecting,
        live: &BTreeSet<Digest>,
    ) -> Result<Collected, Error> {
        let mut needed = live.clone();
        for digest in live {
            if let Some(Document::Manifest(manifest)) = self.parsed(*digest)? {
                needed.insert(manifest.config.digest);
                needed.extend(manifest.layers.iter().map(|layer| layer.digest));
            }
        }
        let mut collected = Collected::default();
        for (path, record) in self.tag_records()? {
            if record.as_ref().map(|record| self.leads_to(record, live)).transpose()? == Some(true)
            {
                // The index between a name and a living image answers offline which one is meant.
                needed.extend(record.map(|record| record.digest));
            } else {
                remove(&path)?;
                collected.tags += 1;
            }
        }
        for (path, name) in files(&self.root().join("blobs/sha256"))? {
            let digest: Option<Digest> = format!("sha256:{name}").parse().ok();
            if digest.is_none_or(|digest| !needed.contains(&digest)) {
                collected.bytes += remove(&path)?;
                collected.blobs += 1;
            }
        }
        Ok(collected)
    }

    /// `None`: not here, or not a document.
    fn parsed(&self, digest: Digest) -> Result<Option<Document>, Error> {
        let bytes = self.document(digest)?;
        Ok(bytes.and_then(|bytes| Document::parse(&bytes, "a kept document").ok()))
    }

    fn leads_to(&self, record: &TagRecord, live: &BTreeSet<Digest>) -> Result<bool, Error> {
        Ok(live.contains(&record.digest)
            || match self.parsed(record.digest)? {
                Some(Document::Index(entries)) => {
                    entries.iter().any(|entry| live.contains(&entry.digest))
                }
                _ => false,
            })
    }

    fn tag_records(&self) -> Result<BTreeMap<PathBuf, Option<TagRecord>>, Error> {
        let files = files(&self.root().join("tags"))?;
        let records = files.into_iter().filter(|(_, name)| name.ends_with(".json"));
        records
            .map(|(path, _)| read_record(&path).map(|record| (path, record)))
            .collect::<io::Result<_>>()
            .map_err(Error::Store)
    }
}

/// Paths and names of the files in a folder. The names are ours, so all of them are text.
fn files(folder: &Path) -> Result<Vec<(PathBuf, String)>, Error> {
    let entries = fs::read_dir(folder).map_err(Error::Store)?;
    entries
        .map(|entry| entry.map(|e| (e.path(), e.file_name().to_string_lossy().into_owned())))
        .collect::<io::Result<_>>()
        .map_err(Error::Store)
}

/// Removes a file and says how many bytes it had.
fn remove(path: &Path) -> Result<u64, Error> {
    let bytes = fs::symlink_metadata(path).map_err(Error::Store)?.len();
    fs::remove_file(path).map_err(Error::Store)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use serde_json::json;

    use super::*;
    use crate::{Reference, image::digest_of, manifest::OCI_LAYER};

    struct Fixture {
        _folder: tempfile::TempDir,
        store: ContentStore,
    }

    impl Fixture {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let store = ContentStore::open(folder.path()).unwrap();
            Self { _folder: folder, store }
        }

        fn keep(&self, value: &serde_json::Value) -> Digest {
            self.store.keep_document(&serde_json::to_vec(value).unwrap()).unwrap()
        }

        fn image(&self, name: &str) -> Digest {
            let config = self.keep(&json!({ "name": name }));
            let layer = self.keep(&json!({ "layer of": name }));
            self.keep(&json!({
                "schemaVersion": 2,
                "config": { "digest": config, "size": 1 },
                "layers": [{ "mediaType": OCI_LAYER, "digest": layer, "size": 1 }],
            }))
        }

        fn tag(&self, name: &str, digest: Digest) -> Reference {
            let reference: Reference = name.parse().unwrap();
            let access = self.store.access(None).unwrap();
            let record = TagRecord::new(&reference, &access, digest, None, SystemTime::now());
            self.store.keep_tag(&record).unwrap();
            reference
        }

        fn has_tag(&self, reference: &Reference) -> bool {
            let access = self.store.access(None).unwrap();
            self.store.tag(reference, &access).unwrap().is_some()
        }
    }

    #[test]
    fn what_a_living_image_needs_stays_and_the_rest_goes() {
        let fixture = Fixture::new();
        let (alive, dead) = (fixture.image("alive"), fixture.image("dead"));
        let index = fixture.keep(&json!({
            "schemaVersion": 2, "manifests": [{ "digest": alive, "size": 1 }],
        }));
        let alive_tag = fixture.tag("r.io/alive", index);
        let dead_tag = fixture.tag("r.io/dead", dead);
        let guard = fixture.store.collecting().unwrap();
        let collected = fixture.store.collect(&guard, &BTreeSet::from([alive])).unwrap();
        assert_eq!((collected.blobs, collected.tags), (3, 1));
        assert!(collected.bytes > 0);
        assert!(fixture.store.document(alive).unwrap().is_some());
        assert!(fixture.store.document(index).unwrap().is_some());
        assert!(fixture.store.document(dead).unwrap().is_none());
        assert!(fixture.has_tag(&alive_tag) && !fixture.has_tag(&dead_tag));
        assert_eq!(fixture.store.collect(&guard, &BTreeSet::from([alive])).unwrap().blobs, 0);
    }

    #[test]
    fn strange_files_among_the_blobs_are_garbage() {
        let fixture = Fixture::new();
        fs::write(fixture.store.root().join("blobs/sha256/notes"), b"x").unwrap();
        let guard = fixture.store.collecting().unwrap();
        assert_eq!(fixture.store.collect(&guard, &BTreeSet::new()).unwrap().blobs, 1);
        assert!(fixture.store.document(digest_of(b"x")).unwrap().is_none());
    }
}
