//! One layer in one pass: digest of the compressed bytes, decompression, digest of the tar, its
//! entries into a tree, its files' bytes into a blob.

mod archive;
mod blob;
mod header;
mod intake;
mod page_buffer;
mod pax;
mod sparse;
mod stream;

use std::{io::Read, path::Path};

use fs_err as fs;
use holdfast_model::Digest;

use crate::{
    error::{LayerError, StoreError},
    limits::{Limits, TREE_FILE_BYTES_MAX},
    store::{self, DigestLock},
    tree::StoredLayer,
};
use blob::Blob;
use intake::{IntakeError, take_in};
use stream::{Input, Stream, StreamError, decompressor};

/// What an image's manifest and config say about one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerDescriptor {
    /// Of the bytes as received.
    pub digest: Digest,
    /// Of the bytes as received.
    pub size: u64,
    /// Digest of the uncompressed tar: the layer's name in the store.
    pub diff_id: Digest,
    pub compression: Compression,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Compression {
    /// Told by the first bytes, as other tools do it: media types are often wrong.
    #[default]
    Detect,
    Gzip,
    Zstd,
    None,
}

/// A layer in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerInfo {
    pub diff_id: Digest,
    /// Size of its data blob; 0 where no file of the layer has a byte.
    pub data_bytes: u64,
    /// Inodes of its tree.
    pub entries: usize,
}

/// The layer, if it is here whole and readable by this version.
pub fn layer_info(store: &Path, diff_id: &Digest) -> Result<Option<LayerInfo>, StoreError> {
    Ok(load_layer(store, diff_id)?.map(|stored| info(*diff_id, &stored)))
}

/// Reads a layer into the store, or returns at once if it is there. While one process does it,
/// others that want the same layer wait. `progress` is called with the bytes received so far.
///
/// Nothing is kept under the layer's name unless both digests are right and the bytes are durable.
pub fn convert_layer(
    store: &Path,
    reader: impl Read,
    layer: &LayerDescriptor,
    limits: &Limits,
    progress: &mut dyn FnMut(u64),
) -> Result<LayerInfo, LayerError> {
    let stored = |source| LayerError::Store { layer: layer.digest, source };
    let _hold = store::hold(store).map_err(stored)?;
    if let Some(info) = layer_info(store, &layer.diff_id).map_err(stored)? {
        return Ok(info);
    }
    let _lock = DigestLock::take(store, &layer.diff_id).map_err(stored)?;
    if let Some(info) = layer_info(store, &layer.diff_id).map_err(stored)? {
        return Ok(info);
    }
    let data = store::data_path(store, &layer.diff_id);
    let draft = store::draft_path(store, &data).map_err(stored)?;
    let made = read_layer(&draft, reader, layer, limits, progress).and_then(|new| {
        store::publish(&draft, &data)
            .and_then(|()| publish_tree(store, layer, &new))
            .map_err(stored)?;
        Ok(info(layer.diff_id, &new))
    });
    if made.is_err() {
        // The error at hand matters more than one here; the sweep at the next start finds the rest.
        let _ = store::remove_if_there(&draft);
    }
    made
}

/// The tree of a layer in the store. `None`: not here, or of another version.
pub(crate) fn load_layer(
    store: &Path,
    diff_id: &Digest,
) -> Result<Option<StoredLayer>, StoreError> {
    let path = store::tree_path(store, diff_id);
    let bytes = match store::read_bounded(&path, TREE_FILE_BYTES_MAX) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(StoreError::Io { path, source }),
    };
    let Some(stored) = StoredLayer::from_bytes(&bytes) else {
        log::warn!(layer:% = diff_id; "tree of another version or damaged; the layer is read anew");
        return Ok(None);
    };
    match fs::metadata(store::data_path(store, diff_id)) {
        Ok(data) if data.len() == stored.data_bytes => Ok(Some(stored)),
        _ => Ok(None),
    }
}

fn info(diff_id: Digest, stored: &StoredLayer) -> LayerInfo {
    LayerInfo { diff_id, data_bytes: stored.data_bytes, entries: stored.layer.len() }
}

/// The tree comes last: a layer with a tree is whole.
fn publish_tree(
    store: &Path,
    layer: &LayerDescriptor,
    new: &StoredLayer,
) -> Result<(), StoreError> {
    let path = store::tree_path(store, &layer.diff_id);
    let draft = store::draft_path(store, &path)?;
    fs::write(&draft, new.to_bytes())
        .map_err(|source| StoreError::Io { path: draft.clone(), source })?;
    store::publish(&draft, &path)
}

/// The one pass. The blob is durable under its draft name when it returns.
fn read_layer(
    draft: &Path,
    reader: impl Read,
    layer: &LayerDescriptor,
    limits: &Limits,
    progress: &mut dyn FnMut(u64),
) -> Result<StoredLayer, LayerError> {
    let digest = layer.digest;
    let mut input = Input::new(reader, layer.size, progress);
    let taken = uncompress_and_take_in(draft, &mut input, layer, limits);
    // Bytes that are not what the digest says explain whatever else went wrong with them, so they
    // are read to the end and checked even then.
    let drained = input.drain();
    if let Some(source) = input.failed.take() {
        return Err(LayerError::Source { layer: digest, source });
    }
    drained.map_err(|source| LayerError::Source { layer: digest, source })?;
    if input.bytes != layer.size {
        let (expected, found) = (layer.size, input.bytes);
        return Err(LayerError::Size { layer: digest, expected, found });
    }
    let found = input.digest();
    if found != digest {
        return Err(LayerError::Digest { layer: digest, found });
    }
    let (stored, found) = taken?;
    if found != layer.diff_id {
        let expected = layer.diff_id;
        return Err(LayerError::DiffId { layer: digest, expected, found });
    }
    Ok(stored)
}

/// Gives the layer and the digest of its tar.
fn uncompress_and_take_in<R: Read>(
    draft: &Path,
    input: &mut Input<'_, R>,
    layer: &LayerDescriptor,
    limits: &Limits,
) -> Result<(StoredLayer, Digest), LayerError> {
    let digest = layer.digest;
    let compression = |source| LayerError::Compression { layer: digest, source };
    let stored = |source| LayerError::Store { layer: digest, source };
    let kind = match layer.compression {
        Compression::Detect => input.detect().map_err(compression)?,
        known => known,
    };
    let tar = decompressor(&mut *input, kind, limits.zstd_window_log).map_err(compression)?;
    let mut stream = Stream::new(tar, limits.bytes);
    let mut blob = Blob::create(draft.to_owned(), limits.bytes).map_err(stored)?;
    let error = |error| match error {
        IntakeError::Entry { entry, source } => LayerError::Entry { layer: digest, entry, source },
        IntakeError::Store(source) => stored(source),
        IntakeError::Stream { source: StreamError::Read(source), .. } => compression(source),
        IntakeError::Stream { source: StreamError::TooLarge, .. } => {
            LayerError::TooLarge { layer: digest, max: limits.bytes }
        }
        IntakeError::Stream { after, source: StreamError::Archive(source) } => {
            LayerError::Archive { layer: digest, after, source }
        }
    };
    let tree = take_in(&mut stream, &mut blob, limits).map_err(error)?;
    let after = crate::error::EntryName::new(b"");
    let found = stream.finish().map_err(|source| error(IntakeError::Stream { after, source }))?;
    let data_bytes = blob.finish().map_err(stored)?;
    Ok((StoredLayer { data_bytes, layer: tree }, found))
}
