//! Images in a folder of the OCI image layout. The folder may hold anything: links are not
//! followed, and what is no plain file is not read.

use std::{
    io::{self, Read},
    path::{Path, PathBuf},
};

use fs_err as fs;
use fs_err::os::unix::fs::OpenOptionsExt;
use holdfast_model::Digest;
use serde::Deserialize;

use crate::{
    Error, Image, Layer, Platform,
    image::{Documents, Kind},
    manifest::{self, Descriptor, INDEX_ENTRIES_MAX},
    store::read_document,
};

/// Annotation by which tools name the entries of a layout.
const NAME: &str = "org.opencontainers.image.ref.name";
/// The full name, as containerd and docker save it beside a bare tag in [`NAME`].
const FULL_NAME: &str = "io.containerd.image.name";

/// A folder of the OCI image layout.
#[derive(Debug)]
pub struct Layout {
    root: PathBuf,
}

impl Layout {
    /// Opens the layout; its index is read when an image is looked for.
    pub fn open(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// Finds the image with this name, or the only one that fits the platform.
    pub fn resolve(&mut self, name: Option<&str>, platform: &Platform) -> Result<Image, Error> {
        let bytes = self.read("index.json")?;
        let entry = entry_of(&bytes, name, platform, &self.place())?;
        Image::find(self, entry.digest, platform)
    }

    /// A reader of a layer's bytes as they lie there. Whoever reads them checks them.
    pub fn layer(&self, layer: &Layer) -> Result<impl Read + Send + use<>, Error> {
        self.file(&blob_name(layer.digest))
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, Error> {
        let what = format!("{name} in {}", self.place());
        read_document(self.file(name)?).map_err(|source| Error::Read { what, source })
    }

    fn file(&self, name: &str) -> Result<fs::File, Error> {
        let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
        let flags = i32::try_from(flags.bits()).unwrap_or_default();
        let path = self.root.join(name);
        let opened = fs::OpenOptions::new().read(true).custom_flags(flags).open(path);
        let checked = opened.and_then(|file| match file.metadata()?.is_file() {
            true => Ok(file),
            false => Err(io::Error::new(io::ErrorKind::InvalidInput, "not a plain file")),
        });
        checked.map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => {
                Error::NotFound { what: name.to_owned(), place: self.place() }
            }
            _ => Error::Read { what: format!("{name} in {}", self.place()), source },
        })
    }
}

impl Documents for Layout {
    fn document(&mut self, _: Kind, digest: Digest) -> Result<Vec<u8>, Error> {
        self.read(&blob_name(digest))
    }

    fn place(&self) -> String {
        format!("layout {}", self.root.display())
    }
}

/// Where a blob lies in a layout.
pub(crate) fn blob_name(digest: Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// Chooses from the bytes of an `index.json`.
pub(crate) fn entry_of(
    bytes: &[u8],
    name: Option<&str>,
    platform: &Platform,
    place: &str,
) -> Result<Descriptor, Error> {
    #[derive(Deserialize)]
    struct Index {
        manifests: Vec<Descriptor>,
    }
    let what = format!("index.json in {place}");
    let index: Index =
        serde_json::from_slice(bytes).map_err(|error| Error::malformed(&what, error))?;
    let entries = index.manifests;
    manifest::within(&format!("list of manifests of {what}"), entries.len(), INDEX_ENTRIES_MAX)?;
    let names = |entry: &Descriptor| {
        let names = [NAME, FULL_NAME].iter().filter_map(|key| entry.annotations.get(*key).cloned());
        names.collect::<Vec<_>>()
    };
    let Some(name) = name else {
        return match entries.as_slice() {
            [] => Err(Error::NotFound { what: "an image".to_owned(), place: place.to_owned() }),
            [only] => Ok(only.clone()),
            several if several.iter().all(|entry| entry.platform.is_some()) => {
                manifest::choose(several, platform, &what).cloned()
            }
            several => {
                let names = several.iter().take(16).flat_map(names).collect::<Vec<_>>().join(", ");
                Err(Error::Ambiguous { what: place.to_owned(), names })
            }
        };
    };
    let named: Vec<_> = entries
        .into_iter()
        .filter(|entry| names(entry).iter().any(|found| is_name(found, name)))
        .collect();
    match named.as_slice() {
        [] => Err(Error::NotFound { what: format!("image {name:?}"), place: place.to_owned() }),
        [only] => Ok(only.clone()),
        several => manifest::choose(several, platform, &what).cloned(),
    }
}

/// Is a name in a layout or archive the wanted one: as it is, or both made complete?
pub(crate) fn is_name(found: &str, wanted: &str) -> bool {
    let complete = |text: &str| text.parse::<crate::Reference>().ok();
    found == wanted || complete(found).is_some_and(|found| complete(wanted) == Some(found))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::image::digest_of;

    fn entry(name: &str, platform: Option<&str>) -> serde_json::Value {
        let platform =
            platform.map(|architecture| json!({ "os": "linux", "architecture": architecture }));
        json!({ "digest": digest_of(name.as_bytes()), "size": 1, "platform": platform,
            "annotations": { NAME: name } })
    }

    fn chosen(entries: &[serde_json::Value], name: Option<&str>) -> Result<Digest, Error> {
        let bytes = serde_json::to_vec(&json!({ "manifests": entries })).unwrap();
        let platform = "linux/amd64".parse().unwrap();
        entry_of(&bytes, name, &platform, "layout /x").map(|entry| entry.digest)
    }

    #[test]
    fn entries_are_chosen_by_name_or_alone_or_by_platform() {
        let (one, two) = (entry("one", None), entry("two", None));
        let wanted = |name: &str| digest_of(name.as_bytes());
        assert_eq!(chosen(&[one.clone(), two.clone()], Some("two")).unwrap(), wanted("two"));
        assert_eq!(chosen(std::slice::from_ref(&one), None).unwrap(), wanted("one"));
        let platforms = [entry("arm", Some("arm64")), entry("amd", Some("amd64"))];
        assert_eq!(chosen(&platforms, None).unwrap(), wanted("amd"));
        let error = chosen(&[one, two], None).unwrap_err();
        assert_eq!(error.to_string(), "layout /x holds several images: one, two");
        assert!(matches!(chosen(&platforms, Some("no")), Err(Error::NotFound { .. })));
        assert!(matches!(chosen(&[], None), Err(Error::NotFound { .. })));
    }

    #[test]
    fn names_are_the_same_when_their_complete_forms_are() {
        assert!(is_name("docker.io/library/debian:latest", "debian"));
        assert!(is_name("debian:13", "docker.io/library/debian:13"));
        assert!(!is_name("debian:13", "debian"));
        assert!(is_name("Not A Name", "Not A Name"));
    }

    #[test]
    fn links_and_pipes_in_a_layout_are_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout::open(folder.path());
        std::os::unix::fs::symlink("/etc/hostname", folder.path().join("index.json")).unwrap();
        assert!(matches!(layout.read("index.json"), Err(Error::Read { .. })));
        fs::create_dir(folder.path().join("folder")).unwrap();
        assert!(matches!(layout.read("folder"), Err(Error::Read { .. })));
        assert!(matches!(layout.read("absent"), Err(Error::NotFound { .. })));
    }
}
