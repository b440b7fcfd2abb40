//! The older form of `docker save`: a `manifest.json` that names config and layers by path. It has
//! no manifest with a digest, so one is made from it: the same archive gives the same digest.

use std::io::Read;

use holdfast_model::Digest;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::{Archive, PLACE};
use crate::{
    Compression, Error,
    image::{Kind, digest_of},
    layout::is_name,
    manifest::{
        Config, Descriptor, INDEX_ENTRIES_MAX, LAYERS_MAX, Manifest, OCI_CONFIG, OCI_MANIFEST,
        within,
    },
};

/// One entry of `manifest.json`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    config: String,
    /// Absent or null for an image without a name.
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// The image made of such an archive.
#[derive(Debug)]
pub(super) struct Saved {
    manifest: Vec<u8>,
    config: Vec<u8>,
    /// Digest of each layer as it lies there, and its path.
    layers: Vec<(Digest, String)>,
}

impl Saved {
    pub(super) fn read(archive: &Archive, name: Option<&str>) -> Result<Self, Error> {
        let what = format!("manifest.json in {PLACE}");
        let bytes = archive.read("manifest.json")?;
        let entries: Vec<Entry> =
            serde_json::from_slice(&bytes).map_err(|error| Error::malformed(&what, error))?;
        within(&format!("list of images of {what}"), entries.len(), INDEX_ENTRIES_MAX)?;
        let entry = choose(entries, name)?;
        within(&format!("list of layers of {what}"), entry.layers.len(), LAYERS_MAX)?;
        let config = archive.read(&entry.config)?;
        let parsed = Config::parse(&config, &format!("{} in {PLACE}", entry.config))?;
        if parsed.rootfs.diff_ids.len() != entry.layers.len() {
            let found = parsed.rootfs.diff_ids.len();
            let reason = format!("{found} diff_ids for {} layers", entry.layers.len());
            return Err(Error::malformed(what, reason));
        }
        let mut layers = Vec::new();
        let mut descriptors = Vec::new();
        for (path, diff_id) in entry.layers.into_iter().zip(&parsed.rootfs.diff_ids) {
            let descriptor = describe(archive, &path, *diff_id)?;
            layers.push((descriptor.digest, path));
            descriptors.push(descriptor);
        }
        let config_bytes = u64::try_from(config.len()).unwrap_or(u64::MAX);
        let manifest = Manifest {
            schema_version: 2,
            media_type: OCI_MANIFEST.to_owned(),
            config: Descriptor::new(OCI_CONFIG, digest_of(&config), config_bytes),
            layers: descriptors,
        };
        let manifest =
            serde_json::to_vec(&manifest).map_err(|error| Error::malformed(&what, error))?;
        Ok(Self { manifest, config, layers })
    }

    pub(super) fn digest(&self) -> Digest {
        digest_of(&self.manifest)
    }

    pub(super) fn document(&self, kind: Kind) -> Option<&[u8]> {
        match kind {
            Kind::Manifest => Some(&self.manifest),
            Kind::Config => Some(&self.config),
        }
    }

    pub(super) fn layer(&self, digest: Digest) -> Option<&str> {
        let found = self.layers.iter().find(|(layer, _)| *layer == digest);
        found.map(|(_, path)| path.as_str())
    }
}

fn choose(entries: Vec<Entry>, name: Option<&str>) -> Result<Entry, Error> {
    let names = |entry: &Entry| entry.repo_tags.clone().unwrap_or_default();
    let all = entries.iter().take(16).flat_map(names).collect::<Vec<_>>().join(", ");
    let fits = |entry: &Entry| {
        name.is_none_or(|name| names(entry).iter().any(|found| is_name(found, name)))
    };
    let mut fitting = entries.into_iter().filter(fits);
    match (fitting.next(), fitting.next()) {
        (Some(only), None) => Ok(only),
        (None, _) => {
            let what = name.map_or("an image".to_owned(), |name| format!("image {name:?}"));
            Err(Error::NotFound { what, place: PLACE.to_owned() })
        }
        (Some(_), Some(_)) => Err(Error::Ambiguous { what: PLACE.to_owned(), names: all }),
    }
}

/// What a registry would say of the layer. A plain one has the digest the config names; that it
/// tells the truth is checked when the layer is read.
fn describe(archive: &Archive, path: &str, diff_id: Digest) -> Result<Descriptor, Error> {
    let mut reader = archive.reader(path)?;
    let bytes = reader.piece.bytes;
    let unreadable = |source| Error::Read { what: format!("layer {path} in {PLACE}"), source };
    let mut head = Vec::new();
    reader.by_ref().take(4).read_to_end(&mut head).map_err(unreadable)?;
    let compression = Compression::of_magic(&head);
    let digest = match compression {
        Compression::Plain => diff_id,
        Compression::Gzip | Compression::Zstd => {
            let mut hasher = Sha256::new_with_prefix(&head);
            std::io::copy(&mut reader, &mut hasher).map_err(unreadable)?;
            Digest::from_sha256(hasher.finalize().into())
        }
    };
    Ok(Descriptor::new(compression.media_type(), digest, bytes))
}
