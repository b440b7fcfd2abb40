//! What can go wrong with the records, and what to do about it.

use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("cannot open the store {}", path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: Box<redb::Error>,
    },
    #[error("the store {} has schema {found}, newer than {known}, the newest known here", path.display())]
    Newer { path: PathBuf, found: u64, known: u64 },
    #[error("there is no snapshot {id} any more")]
    NoSnapshot { id: holdfast_model::SnapshotId },
    #[error("the store could not {action}")]
    Engine {
        action: &'static str,
        #[source]
        source: Box<redb::Error>,
    },
    #[error("the record {key:?} in table {table} cannot be read")]
    Record {
        table: &'static str,
        key: String,
        #[source]
        source: serde_json::Error,
    },
}

impl StoreError {
    /// What the operator can do next.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Open { .. } => "see that no other holdfastd runs and that the folder is writable",
            Self::Newer { .. } => "start the newer holdfastd that wrote it, or restore a backup",
            Self::NoSnapshot { .. } => "it was deleted meanwhile; list what there is",
            Self::Engine { .. } => "see that the data partition has space and is not read-only",
            Self::Record { .. } => "restore a backup of the store; nothing was changed",
        }
    }

    /// Wraps an error of the engine with what was being done.
    pub(crate) fn engine<E: Into<redb::Error>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self::Engine { action, source: Box::new(error.into()) }
    }
}
