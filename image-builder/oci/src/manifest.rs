//! Manifests, indexes and configs, as far as a pull needs them. OCI and docker schema 2 forms.
//! What is not named here is not read: above all `urls`, by which a manifest could make us fetch
//! from places of its own choice.

use holdfast_model::Digest;
use serde::{Deserialize, Serialize};

use crate::{Error, Platform};

/// Most bytes of one JSON document: what registries themselves accept for a manifest.
pub(crate) const DOCUMENT_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// Most layers of one image. Builders stop at 127; overlay tools at 500.
pub(crate) const LAYERS_MAX: usize = 256;
/// Most compressed bytes of one layer: ten times the largest images in use.
pub(crate) const LAYER_BYTES_MAX: u64 = 64 * 1024 * 1024 * 1024;
/// Most entries of one index.
pub(crate) const INDEX_ENTRIES_MAX: usize = 1024;

pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub(crate) const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
pub(crate) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub(crate) const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// Every form of manifest that is understood, for `Accept`.
pub(crate) const MANIFEST_TYPES: [&str; 4] =
    [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST];

/// Names one piece of content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    #[serde(default, skip_serializing)]
    pub platform: Option<Platform>,
    #[serde(default, skip_serializing)]
    pub(crate) annotations: std::collections::BTreeMap<String, String>,
}

impl Descriptor {
    pub(crate) fn new(media_type: impl Into<String>, digest: Digest, size: u64) -> Self {
        let media_type = media_type.into();
        Self { media_type, digest, size, platform: None, annotations: Default::default() }
    }

    fn is_manifest(&self) -> bool {
        // Some layouts leave the type of their only entry out.
        self.media_type.is_empty() || MANIFEST_TYPES.contains(&self.media_type.as_str())
    }
}

/// How the bytes of a layer are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    Plain,
    Gzip,
    Zstd,
}

impl Compression {
    /// By the media type of a layer. `None`: not a layer that can be in a root file system.
    pub(crate) fn of(media_type: &str) -> Option<Self> {
        const DOCKER: &str = "application/vnd.docker.image.rootfs.diff.tar";
        const DOCKER_FOREIGN: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar";
        const OCI_FOREIGN: &str = "application/vnd.oci.image.layer.nondistributable.v1.tar";
        let packing = [OCI_LAYER, OCI_FOREIGN, DOCKER, DOCKER_FOREIGN]
            .iter()
            .find_map(|plain| media_type.strip_prefix(plain))?;
        match packing {
            "" => Some(Self::Plain),
            "+gzip" | ".gzip" => Some(Self::Gzip),
            "+zstd" | ".zstd" => Some(Self::Zstd),
            _ => None,
        }
    }

    /// By the first bytes of a layer, where an archive does not say its type.
    pub(crate) fn of_magic(head: &[u8]) -> Self {
        match head {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            _ => Self::Plain,
        }
    }

    /// The OCI media type of a layer packed so.
    pub(crate) fn media_type(self) -> String {
        let packing = match self {
            Self::Plain => "",
            Self::Gzip => "+gzip",
            Self::Zstd => "+zstd",
        };
        format!("{OCI_LAYER}{packing}")
    }
}

/// One image's manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Manifest {
    pub schema_version: u32,
    #[serde(default)]
    pub media_type: String,
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

/// A manifest, or the list of manifests one was chosen from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Document {
    Manifest(Manifest),
    Index(Vec<Descriptor>),
}

/// Both forms' fields, so that a document which is both can be refused: two readers would take
/// it for two different images.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Either {
    #[serde(default)]
    schema_version: u32,
    #[serde(default)]
    media_type: String,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
}

impl Document {
    /// Parses and checks one document. `what` names it in errors.
    pub(crate) fn parse(bytes: &[u8], what: &str) -> Result<Self, Error> {
        let either: Either =
            serde_json::from_slice(bytes).map_err(|error| Error::malformed(what, error))?;
        if either.schema_version != 2 {
            let reason = format!("schemaVersion is {}, only 2 is read", either.schema_version);
            return Err(Error::malformed(what, reason));
        }
        let media_type = either.media_type;
        match (either.config, either.layers, either.manifests) {
            (Some(config), Some(layers), None)
                if ["", OCI_MANIFEST, DOCKER_MANIFEST].contains(&media_type.as_str()) =>
            {
                let manifest = Manifest { schema_version: 2, media_type, config, layers };
                manifest.check(what)?;
                Ok(Self::Manifest(manifest))
            }
            (None, None, Some(entries))
                if ["", OCI_INDEX, DOCKER_LIST].contains(&media_type.as_str()) =>
            {
                within(&format!("list of manifests of {what}"), entries.len(), INDEX_ENTRIES_MAX)?;
                Ok(Self::Index(entries))
            }
            _ => Err(Error::malformed(what, "it is neither a manifest nor an index")),
        }
    }
}

impl Manifest {
    fn check(&self, what: &str) -> Result<(), Error> {
        within(&format!("list of layers of {what}"), self.layers.len(), LAYERS_MAX)?;
        for layer in &self.layers {
            if Compression::of(&layer.media_type).is_none() {
                let reason = format!("layer {} has type {:?}", layer.digest, layer.media_type);
                return Err(Error::malformed(what, reason));
            }
            if layer.size > LAYER_BYTES_MAX {
                let what = format!("layer {} of {what}", layer.digest);
                return Err(Error::TooLarge { what, limit: LAYER_BYTES_MAX });
            }
        }
        Ok(())
    }
}

pub(crate) fn within(what: &str, count: usize, limit: usize) -> Result<(), Error> {
    if count <= limit {
        return Ok(());
    }
    Err(Error::TooLarge { what: what.to_owned(), limit: u64::try_from(limit).unwrap_or(u64::MAX) })
}

/// Chooses from an index. Entries that are no images (signatures, attestations) are passed over.
pub(crate) fn choose<'a>(
    entries: &'a [Descriptor],
    wanted: &Platform,
    what: &str,
) -> Result<&'a Descriptor, Error> {
    let images = || entries.iter().filter(|entry| entry.is_manifest());
    let fits = |entry: &&Descriptor| entry.platform.as_ref().is_some_and(|p| wanted.accepts(p));
    let plain = |entry: &&Descriptor| entry.platform.as_ref().is_some_and(|p| p.variant.is_none());
    // The one without a variant runs on every machine of its architecture.
    if let Some(entry) = images().filter(fits).find(plain).or_else(|| images().find(fits)) {
        return Ok(entry);
    }
    // An entry that names no platform is believed only alone; its config is checked like any.
    let mut nameless = images().filter(|entry| entry.platform.is_none());
    if let (Some(entry), None) = (nameless.next(), nameless.next()) {
        return Ok(entry);
    }
    let mut offered: Vec<_> =
        images().filter_map(|entry| entry.platform.as_ref()).map(Platform::to_string).collect();
    offered.truncate(16);
    Err(Error::NoPlatform {
        what: what.to_owned(),
        wanted: wanted.to_string(),
        offered: if offered.is_empty() { "none".to_owned() } else { offered.join(", ") },
    })
}

/// What a pull needs of an image's config.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Config {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    variant: Option<String>,
    pub(crate) rootfs: RootFs,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct RootFs {
    #[serde(default)]
    pub(crate) diff_ids: Vec<Digest>,
}

impl Config {
    pub(crate) fn parse(bytes: &[u8], what: &str) -> Result<Self, Error> {
        serde_json::from_slice(bytes).map_err(|error| Error::malformed(what, error))
    }

    /// Checks that the image runs on the platform, whatever an index said of it.
    pub(crate) fn check(&self, wanted: &Platform, layers: usize, what: &str) -> Result<(), Error> {
        let is = Platform {
            os: self.os.clone(),
            architecture: self.architecture.clone(),
            variant: self.variant.clone(),
        };
        if is.os != wanted.os || is.architecture != wanted.architecture {
            return Err(Error::NoPlatform {
                what: what.to_owned(),
                wanted: wanted.to_string(),
                offered: is.to_string(),
            });
        }
        if self.rootfs.diff_ids.len() != layers {
            let reason = format!("{} diff_ids for {layers} layers", self.rootfs.diff_ids.len());
            return Err(Error::malformed(what, reason));
        }
        Ok(())
    }
}
