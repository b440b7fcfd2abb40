//! What can be wrong with a snapshot or its store.

use std::{fmt, io};

use crate::piece::{Kind, Name};

/// What of a snapshot an error is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    Manifest(String),
    Piece(Kind, Name),
    /// Of a segment, by its place in it.
    Frame(Name, u32),
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Manifest(id) => write!(f, "manifest {id}"),
            Self::Piece(kind, name) => write!(f, "{kind} {name}"),
            Self::Frame(segment, place) => write!(f, "frame {place} of segment {segment}"),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("the store cannot {what}")]
    Store {
        what: String,
        #[source]
        source: io::Error,
    },
    #[error("{part} is not in the store: it was deleted, or never came to be")]
    Missing { part: Part },
    #[error("{part} has {found} bytes where {max} are the most")]
    TooLarge { part: Part, found: u64, max: u64 },
    #[error("{part} was changed or cut since it was written")]
    Changed { part: Part },
    #[error("{part} does not open with this group's key")]
    WrongKey { part: Part },
    #[error("{part} is not of its form: {reason}")]
    Malformed { part: Part, reason: String },
    #[error(
        "snapshot {id} is of format {found}, this release reads up to {}: update the node",
        crate::FORMAT
    )]
    TooNew { id: String, found: u32 },
    #[error("snapshot {id:?} is no name: 1 to 64 of a-z, 0-9 and - are")]
    Id { id: String },
    #[error("there is a snapshot {id} already, of other content")]
    Exists { id: String },
    #[error("snapshot {id} has no image {image}")]
    NoImage { id: String, image: String },
    #[error("image of {found} bytes where its parent has {wanted}")]
    Length { found: u64, wanted: u64 },
    #[error("{count} snapshots stand on each other; {max} are the most: flatten first")]
    TooDeep { count: usize, max: usize },
    #[error("the source cannot be read at byte {at}")]
    Source {
        at: u64,
        #[source]
        source: io::Error,
    },
    #[error("{what} could not be made")]
    Internal { what: &'static str },
}

impl SnapshotError {
    pub(crate) fn store(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        |source| Self::Store { what, source }
    }

    pub(crate) fn malformed(part: Part, reason: impl Into<String>) -> Self {
        Self::Malformed { part, reason: reason.into() }
    }
}
