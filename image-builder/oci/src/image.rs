//! From a manifest or index to one image: its platform's manifest, its config, its layers.

use holdfast_model::Digest;
use sha2::{Digest as _, Sha256};

use crate::{
    ContentStore, Error, Platform,
    manifest::{self, Compression, Config, DOCUMENT_BYTES_MAX, Descriptor, Document},
};

/// Indexes inside one another: a `docker save` archive has two, nobody has three.
const INDEX_DEPTH_MAX: usize = 3;

/// One layer as it will be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Digest of the bytes as they lie in the registry or archive.
    pub digest: Digest,
    /// Size of those bytes.
    pub size: u64,
    /// Digest of the uncompressed tar.
    pub diff_id: Digest,
    pub compression: Compression,
}

/// One image for one platform: everything but the layers' content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The digest of its manifest: the image's name in the store.
    pub digest: Digest,
    pub architecture: String,
    /// The manifest as received, or as made for an archive that has none.
    pub manifest: Vec<u8>,
    /// The config as received: settings are read from it by whoever runs the image.
    pub config: Vec<u8>,
    pub layers: Vec<Layer>,
}

/// Where documents come from. Implementations check nothing: [`Image::find`] does, for all.
pub(crate) trait Documents {
    /// The bytes of a document; `kind` tells a manifest from a config. At most
    /// [`DOCUMENT_BYTES_MAX`] and one more are read.
    fn document(&mut self, kind: Kind, digest: Digest) -> Result<Vec<u8>, Error>;
    /// Names the place in errors.
    fn place(&self) -> String;
}

/// Registries serve manifests and other content at different addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Manifest,
    Config,
}

impl Image {
    /// Follows `top` (a manifest or an index) down to one image.
    pub(crate) fn find(
        documents: &mut impl Documents,
        top: Digest,
        platform: &Platform,
    ) -> Result<Self, Error> {
        let mut digest = top;
        let mut size = None;
        for _ in 0..=INDEX_DEPTH_MAX {
            let what = format!("manifest {digest} of {}", documents.place());
            let bytes = documents.document(Kind::Manifest, digest)?;
            check(&bytes, digest, size, &what)?;
            match Document::parse(&bytes, &what)? {
                Document::Index(entries) => {
                    let entry = manifest::choose(&entries, platform, &what)?;
                    digest = entry.digest;
                    size = Some(entry.size);
                }
                Document::Manifest(manifest) => {
                    return Self::read(documents, digest, bytes, &manifest, platform);
                }
            }
        }
        let what = format!("index {top} of {}", documents.place());
        Err(Error::malformed(what, "too many indexes inside one another"))
    }

    fn read(
        documents: &mut impl Documents,
        digest: Digest,
        received: Vec<u8>,
        manifest: &manifest::Manifest,
        platform: &Platform,
    ) -> Result<Self, Error> {
        let what = format!("config of {digest} of {}", documents.place());
        if manifest.config.size > DOCUMENT_BYTES_MAX {
            return Err(Error::TooLarge { what, limit: DOCUMENT_BYTES_MAX });
        }
        let bytes = documents.document(Kind::Config, manifest.config.digest)?;
        check(&bytes, manifest.config.digest, Some(manifest.config.size), &what)?;
        let config = Config::parse(&bytes, &what)?;
        config.check(platform, manifest.layers.len(), &what)?;
        let layers = manifest.layers.iter().zip(&config.rootfs.diff_ids);
        let layers = layers.map(|(layer, diff_id)| layer_of(layer, *diff_id, &what));
        Ok(Self {
            digest,
            architecture: platform.architecture.clone(),
            layers: layers.collect::<Result<_, _>>()?,
            manifest: received,
            config: bytes,
        })
    }

    /// Keeps manifest and config in a store. What came from a registry is kept already.
    pub fn keep(&self, store: &ContentStore) -> Result<(), Error> {
        store.keep_document(&self.config)?;
        store.keep_document(&self.manifest).map(drop)
    }

    /// Compressed bytes of all layers.
    pub fn bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.size).sum()
    }
}

fn layer_of(layer: &Descriptor, diff_id: Digest, what: &str) -> Result<Layer, Error> {
    let compression = Compression::of(&layer.media_type)
        .ok_or_else(|| Error::malformed(what, "a layer of unknown type"))?;
    Ok(Layer { digest: layer.digest, size: layer.size, diff_id, compression })
}

/// Digest of a document held in memory.
pub(crate) fn digest_of(bytes: &[u8]) -> Digest {
    Digest::from_sha256(Sha256::digest(bytes).into())
}

fn check(bytes: &[u8], expected: Digest, size: Option<u64>, what: &str) -> Result<(), Error> {
    let found = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    if found > DOCUMENT_BYTES_MAX {
        return Err(Error::TooLarge { what: what.to_owned(), limit: DOCUMENT_BYTES_MAX });
    }
    if let Some(expected) = size.filter(|size| *size != found) {
        return Err(Error::Size { what: what.to_owned(), expected, found });
    }
    let found = digest_of(bytes);
    if found != expected {
        return Err(Error::Digest { what: what.to_owned(), expected, found });
    }
    Ok(())
}

#[cfg(test)]
#[path = "image_tests.rs"]
mod tests;
