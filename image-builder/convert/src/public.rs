//! `public.json`: the images of a store that every sandbox group may use, by name.

use std::{
    io::{self, Write},
    path::Path,
};

use fs_err as fs;
use holdfast_model::Digest;
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// File in the store.
const LIST: &str = "public.json";

/// How an image is to be listed.
#[derive(Debug, Clone)]
pub(crate) struct Listing {
    pub(crate) name: String,
    pub(crate) description: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    name: String,
    digest: Digest,
    description: String,
}

/// Lists the image, in place of another one of that name.
pub(crate) fn list(store: &Path, listing: Listing, digest: Digest) -> Result<(), Error> {
    let Listing { name, description } = listing;
    let change = || -> io::Result<()> {
        let path = store.join(LIST);
        let mut entries: Vec<Entry> = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        entries.retain(|entry| entry.name != name);
        entries.push(Entry { name, digest, description });
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        let mut draft = tempfile::Builder::new()
            .prefix("draft-")
            // The agent may be another user, and the list is no secret.
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
            .tempfile_in(store)?;
        draft.write_all(&serde_json::to_vec_pretty(&entries)?)?;
        draft.as_file().sync_all()?;
        draft.persist(path)?;
        fs::File::open(store)?.sync_all()
    };
    change().map_err(Error::Public)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_listed_once_with_its_last_image() {
        let folder = tempfile::tempdir().unwrap();
        let listing = |name: &str, description: &str| Listing {
            name: name.to_owned(),
            description: description.to_owned(),
        };
        let digest = |byte| Digest::from_sha256([byte; 32]);
        list(folder.path(), listing("debian", "old"), digest(1)).unwrap();
        list(folder.path(), listing("alpine", ""), digest(2)).unwrap();
        list(folder.path(), listing("debian", "new"), digest(3)).unwrap();
        let bytes = fs::read(folder.path().join(LIST)).unwrap();
        let entries: Vec<Entry> = serde_json::from_slice(&bytes).unwrap();
        let found: Vec<_> = entries.iter().map(|e| (&*e.name, e.digest, &*e.description)).collect();
        assert_eq!(found, [("alpine", digest(2), ""), ("debian", digest(3), "new")]);
    }
}
