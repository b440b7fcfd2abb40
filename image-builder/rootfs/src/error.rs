//! What can go wrong, naming the layer and the entry, and whose fault it is.

use std::{fmt, io, path::PathBuf};

use holdfast_model::Digest;

/// Whose doing an error is, so that a caller can tell a bad image from a full disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The image breaks a rule or a limit, or is not what its digest says.
    Image,
    /// The bytes could not be fetched.
    Source,
    NoSpace,
    /// The store could not be read or written.
    Store,
}

/// Name of an archive entry as it may stand in a message: cut, and escaped where it is not text.
#[derive(Clone, PartialEq, Eq)]
pub struct EntryName(String);

impl EntryName {
    /// Longest name shown; the start of a path says where to look.
    const CHARS_MAX: usize = 200;

    pub(crate) fn new(path: &[u8]) -> Self {
        let shown = path.escape_ascii().to_string();
        let cut = shown.chars().take(Self::CHARS_MAX).collect::<String>();
        Self(if cut.len() < shown.len() { format!("{cut}…") } else { shown })
    }
}

impl fmt::Display for EntryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for EntryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0)
    }
}

/// A layer could not be taken in.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    #[error("layer {layer} could not be read")]
    Source {
        layer: Digest,
        #[source]
        source: io::Error,
    },
    #[error("layer {layer} has {found} bytes, not the {expected} its descriptor says")]
    Size { layer: Digest, expected: u64, found: u64 },
    #[error("layer {layer} is not what its digest says: the bytes have digest {found}")]
    Digest { layer: Digest, found: Digest },
    #[error("layer {layer} uncompresses to {found}, but the image's config says {expected}")]
    DiffId { layer: Digest, expected: Digest, found: Digest },
    #[error("layer {layer} does not uncompress")]
    Compression {
        layer: Digest,
        #[source]
        source: io::Error,
    },
    #[error("layer {layer} has more than {max} bytes uncompressed")]
    TooLarge { layer: Digest, max: u64 },
    #[error("layer {layer} is no good tar archive after entry {after:?}")]
    Archive {
        layer: Digest,
        after: EntryName,
        #[source]
        source: ArchiveError,
    },
    #[error("layer {layer} has an entry {entry:?} that cannot be taken")]
    Entry {
        layer: Digest,
        entry: EntryName,
        #[source]
        source: EntryError,
    },
    #[error("layer {layer} could not be stored")]
    Store {
        layer: Digest,
        #[source]
        source: StoreError,
    },
}

/// The framing of the archive is broken: where an entry begins or ends cannot be told.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArchiveError {
    #[error("it ends in the middle of an entry")]
    Truncated,
    #[error("a header's checksum is wrong")]
    Checksum,
    #[error("the field {0} is not a number that can be")]
    Number(&'static str),
    #[error("an extended header is not of the form `length key=value`")]
    PaxForm,
    #[error("an extended header has {bytes} bytes (at most {max})")]
    PaxTooLarge { bytes: u64, max: u64 },
    #[error("the record {0} of an extended header has no meaning as it is")]
    PaxValue(&'static str),
    #[error("a global header sets {0}, which would change the meaning of other entries")]
    GlobalPax(&'static str),
    #[error("a long name has {bytes} bytes (at most {max})")]
    NameTooLong { bytes: u64, max: usize },
    #[error("an extended header is followed by no entry")]
    Dangling,
    #[error("a sparse file's map is not in order, overlaps or leaves the file")]
    SparseMap,
    #[error("a sparse file has more than {max} extents")]
    SparseTooMany { max: usize },
    #[error("it has more than {max} entries")]
    TooManyEntries { max: u32 },
    #[error("names, link targets and attributes take more than {max} bytes")]
    TreeTooLarge { max: u64 },
}

/// One entry breaks a rule; its frame is sound.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    #[error("the path climbs with '..'")]
    Climbs,
    #[error("the path holds a NUL byte")]
    Nul,
    #[error("the path has {bytes} bytes (at most {max})")]
    PathTooLong { bytes: usize, max: usize },
    #[error("a name in the path has {bytes} bytes (at most {max})")]
    NameTooLong { bytes: usize, max: usize },
    #[error("the path is deeper than {max} folders")]
    TooDeep { max: usize },
    #[error("the root of the image can only be a folder")]
    RootNotFolder,
    #[error("a name that begins with '.wh.' is a whiteout, and this one is not well formed")]
    Whiteout,
    #[error("its type {0:?} is not known")]
    Type(char),
    #[error("it is a hard link to itself")]
    LinkToItself,
    #[error("it is a hard link to the folder {0:?}")]
    LinkToFolder(EntryName),
    #[error("it is a hard link to {0:?}, which is neither in this layer nor in a lower one")]
    LinkToNothing(EntryName),
    #[error("the link has no target, or one of more than {max} bytes")]
    LinkTarget { max: usize },
    #[error("it has a user or group id that no file can have")]
    Id,
    #[error("it has a device number that no device can have")]
    Device,
    #[error("it is a character device 0:0, which overlayfs takes for a deleted file")]
    OverlayWhiteout,
    #[error("it has the attribute {0:?}, which overlayfs would obey")]
    OverlayAttribute(EntryName),
    #[error("its attribute {0:?} has no name, or a name or value that is too long")]
    Attribute(EntryName),
    #[error("its attributes take more than {max} bytes")]
    AttributesTooLarge { max: usize },
    #[error("it takes the layer's data to more than {max} bytes")]
    DataTooLarge { max: u64 },
}

/// An image could not be put together of its layers.
#[derive(Debug, thiserror::Error)]
pub enum AssembleError {
    #[error("layer {0} is not in the store")]
    NoLayer(Digest),
    #[error("layer {layer} has an entry {entry:?} that cannot be taken")]
    Entry {
        layer: Digest,
        entry: EntryName,
        #[source]
        source: EntryError,
    },
    #[error("the image has more than {max} bytes")]
    TooLarge { max: u64 },
    #[error("the image has more than {max} layers")]
    TooManyLayers { max: usize },
    #[error("an entry of the image is linked more than {max} times")]
    TooManyLinks { max: u32 },
    #[error("the image could not be stored")]
    Store(#[from] StoreError),
}

/// The store itself could not do something.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("cannot use {path}", path = path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} is not an image record of this version", path = path.display())]
    BadRecord {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("{path} is the record of another image", path = path.display())]
    WrongRecord { path: PathBuf },
    #[error("{path} is not a layer of this version", path = path.display())]
    BadLayer { path: PathBuf },
    #[error("the image store is in use by a conversion")]
    Busy,
}

impl StoreError {
    pub fn fault(&self) -> Fault {
        match self {
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Fault::NoSpace,
                _ => Fault::Store,
            },
            _ => Fault::Store,
        }
    }

    /// What the operator can do next.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Busy => "try again when the running pulls are done",
            Self::BadRecord { .. } | Self::WrongRecord { .. } | Self::BadLayer { .. } => {
                "delete the image and pull it again"
            }
            Self::Io { .. } if self.fault() == Fault::NoSpace => {
                "free space with `holdfast image gc`, or give the node a larger disk"
            }
            Self::Io { .. } => "see that the image store is writable and its disk is sound",
        }
    }
}

const HINT_IMAGE: &str = "have the image built again; it is refused as it is";

impl LayerError {
    pub fn fault(&self) -> Fault {
        match self {
            Self::Source { .. } => Fault::Source,
            Self::Store { source, .. } => source.fault(),
            _ => Fault::Image,
        }
    }

    /// What the operator can do next.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Source { .. } => "pull again: what arrived is kept",
            Self::Size { .. } | Self::Digest { .. } => {
                "pull again; if it stays so, the registry or a mirror serves wrong bytes"
            }
            Self::Store { source, .. } => source.hint(),
            _ => HINT_IMAGE,
        }
    }
}

impl AssembleError {
    pub fn fault(&self) -> Fault {
        match self {
            Self::NoLayer(_) => Fault::Store,
            Self::Store(source) => source.fault(),
            _ => Fault::Image,
        }
    }

    /// What the operator can do next.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NoLayer(_) => "pull the image again: the layer was removed meanwhile",
            Self::Store(source) => source.hint(),
            _ => HINT_IMAGE,
        }
    }
}
