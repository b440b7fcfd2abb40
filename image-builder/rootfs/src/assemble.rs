//! Layers into an image: trees merged, metadata written, and last of all the record.

use std::path::Path;

use fs_err as fs;
use holdfast_model::Digest;

use crate::{
    erofs,
    error::{AssembleError, StoreError},
    layer::load_layer,
    record::{ImageRecord, Segment, Settings, write_record},
    store::{self, DigestLock},
    tree::{BLOCK_BYTES, Tree},
};

/// Puts an image together of layers that are in the store (lowest first, by the digest of their
/// uncompressed tar). Equal input gives equal bytes, whichever process and node makes them.
pub fn assemble(
    store: &Path,
    manifest: &Digest,
    layers: &[Digest],
    settings: Settings,
    architecture: &str,
) -> Result<ImageRecord, AssembleError> {
    let _hold = store::hold(store)?;
    let _lock = DigestLock::take(store, manifest)?;
    let (tree, blobs) = merge(store, layers)?;
    let metadata = store::metadata_path(store, manifest);
    let draft = store::draft_path(store, &metadata)?;
    let blocks: Vec<u64> = blobs.iter().map(|blob| blob.bytes / BLOCK_BYTES).collect();
    let written = write_metadata(&draft, &tree, &blocks, manifest)
        .and_then(|bytes| store::publish(&draft, &metadata).map(|()| bytes).map_err(Into::into));
    if written.is_err() {
        // The error at hand matters more than one here; the sweep at the next start finds the rest.
        let _ = store::remove_if_there(&draft);
    }
    let first = Segment { path: store::metadata_name(manifest), bytes: written? };
    let segments: Vec<Segment> =
        [first].into_iter().chain(blobs.into_iter().filter(|blob| blob.bytes > 0)).collect();
    let record = ImageRecord {
        digest: *manifest,
        architecture: architecture.to_owned(),
        bytes: segments.iter().map(|segment| segment.bytes).sum(),
        segments,
        layers: layers.to_vec(),
        settings,
    };
    write_record(store, &record)?;
    Ok(record)
}

/// The merged tree, and the blobs that its files' segments count in.
pub(crate) fn merge(
    store: &Path,
    layers: &[Digest],
) -> Result<(Tree, Vec<Segment>), AssembleError> {
    let mut tree = Tree::new();
    let mut blobs: Vec<Segment> = Vec::new();
    for diff_id in layers {
        let stored = load_layer(store, diff_id)?.ok_or(AssembleError::NoLayer(*diff_id))?;
        let path = store::data_name(diff_id);
        // An image may have the same layer twice; its data is needed once.
        let segment = blobs.iter().position(|blob| blob.path == path).unwrap_or(blobs.len());
        if segment == blobs.len() {
            blobs.push(Segment { path, bytes: stored.data_bytes });
        }
        let segment = u16::try_from(segment)
            .map_err(|_| AssembleError::TooManyLayers { max: usize::from(u16::MAX) })?;
        tree.apply(stored.layer, segment).map_err(|error| AssembleError::Entry {
            layer: *diff_id,
            entry: error.entry,
            source: error.source,
        })?;
    }
    Ok((tree, blobs))
}

fn write_metadata(
    draft: &Path,
    tree: &Tree,
    blob_blocks: &[u64],
    manifest: &Digest,
) -> Result<u64, AssembleError> {
    let image = erofs::Image::plan(tree, blob_blocks)?;
    let io = |source| StoreError::Io { path: draft.to_owned(), source };
    let file = fs::File::create(draft).map_err(io)?;
    image.write(file, manifest).map_err(io)?;
    Ok(image.bytes())
}
