//! The record of one converted image: `<store>/images/<manifest digest>.json`, written last, so
//! that an image with a record is whole.

use std::{io, path::Path};

use fs_err as fs;
use holdfast_model::Digest;
use serde::{Deserialize, Serialize};

use crate::{error::StoreError, limits::RECORD_BYTES_MAX, store};

/// What a host needs to run an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageRecord {
    /// Of the manifest.
    pub digest: Digest,
    /// As the image's config names it, e.g. `amd64`.
    pub architecture: String,
    /// Parts of the read-only disk in their order: the metadata, then the data of the layers.
    pub segments: Vec<Segment>,
    /// The layers, lowest first, by the digest of their uncompressed tar.
    pub layers: Vec<Digest>,
    pub settings: Settings,
    /// Sum of the segments.
    pub bytes: u64,
}

/// One file of the read-only disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Segment {
    /// Relative to the store's folder.
    pub path: String,
    /// Size of the file: a multiple of 4096, never 0.
    pub bytes: u64,
}

/// How the image wants to be run, from its config.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Settings {
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    /// `NAME=value`, in the config's order.
    pub env: Vec<String>,
    pub working_dir: Option<String>,
    pub user: Option<String>,
    pub stop_signal: Option<String>,
    /// `port` or `port/protocol`.
    pub exposed_ports: Vec<String>,
    /// Paths, in order.
    pub volumes: Vec<String>,
}

/// The record of the image with this manifest digest, if it is here.
pub fn load_record(store: &Path, digest: &Digest) -> Result<Option<ImageRecord>, StoreError> {
    let path = store::record_path(store, digest);
    let text = match store::read_bounded(&path, RECORD_BYTES_MAX) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(StoreError::Io { path, source }),
    };
    let record: ImageRecord = serde_json::from_slice(&text)
        .map_err(|source| StoreError::BadRecord { path: path.clone(), source })?;
    if record.digest == *digest { Ok(Some(record)) } else { Err(StoreError::WrongRecord { path }) }
}

/// The records of all images in the store, by digest. One that cannot be read is left out and
/// said in the log: it must not hide the others.
pub fn list_records(store: &Path) -> Result<Vec<ImageRecord>, StoreError> {
    let mut records = Vec::new();
    for digest in store::names_with(&store.join(store::IMAGES), ".json")? {
        match load_record(store, &digest) {
            Ok(Some(record)) => records.push(record),
            Ok(None) => {}
            Err(error) => log::warn!(image:% = digest, error:%; "image record not readable"),
        }
    }
    records.sort_by_key(|record| record.digest);
    Ok(records)
}

/// Forgets an image: its record first, then its metadata. Its layers stay until [`crate::collect`].
/// `false`: there was none.
pub fn remove_record(store: &Path, digest: &Digest) -> Result<bool, StoreError> {
    let existed = store::remove_if_there(&store::record_path(store, digest))?;
    store::remove_if_there(&store::metadata_path(store, digest))?;
    Ok(existed)
}

pub(crate) fn write_record(store: &Path, record: &ImageRecord) -> Result<(), StoreError> {
    let path = store::record_path(store, &record.digest);
    let text = serde_json::to_vec_pretty(record)
        .map_err(|source| StoreError::BadRecord { path: path.clone(), source })?;
    let draft = store::draft_path(store, &path)?;
    let io = |source| StoreError::Io { path: draft.clone(), source };
    fs::write(&draft, text).map_err(io)?;
    store::publish(&draft, &path)
}
