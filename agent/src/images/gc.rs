//! Removing what no disk image, no sandbox and no snapshot needs.

use std::{collections::BTreeSet, path::Path};

use holdfast_model::Digest;
use holdfast_oci::ContentStore;
use holdfast_rootfs::{list_records, remove_record};
use holdfast_store::Store;

use super::GcError;

/// What a collection removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GcReport {
    pub images: u32,
    pub layers: u32,
    pub blobs: u32,
    /// Disk space given back.
    pub bytes: u64,
}

/// Digests of the images that records name.
pub(super) fn referenced(store: &Store) -> Result<BTreeSet<Digest>, GcError> {
    let disk_images = store.all_disk_images()?.into_iter().filter_map(|record| record.digest);
    let sandboxes = store.all_sandboxes()?.into_iter().map(|record| record.image);
    let snapshots = store.all_snapshots()?.into_iter().map(|record| record.image);
    Ok(disk_images.chain(sandboxes).chain(snapshots).collect())
}

/// Removes from the store what is not in `keep`. Runs as the store's owner. Blocks.
pub(super) fn collect(store: &Path, keep: &BTreeSet<Digest>) -> Result<GcReport, GcError> {
    let content = ContentStore::open(store).map_err(GcError::Blobs)?;
    let guard = content.collecting().map_err(|error| match error {
        holdfast_oci::Error::Busy => GcError::Busy,
        other => GcError::Blobs(other),
    })?;
    let layers_error = |error| match error {
        holdfast_rootfs::StoreError::Busy => GcError::Busy,
        other => GcError::Layers(other),
    };
    let mut report = GcReport::default();
    for record in list_records(store).map_err(layers_error)? {
        if !keep.contains(&record.digest) {
            remove_record(store, &record.digest).map_err(layers_error)?;
            report.images += 1;
        }
    }
    let layers = holdfast_rootfs::collect(store, &[]).map_err(layers_error)?;
    let blobs = content.collect(&guard, keep).map_err(GcError::Blobs)?;
    report.layers = layers.layers;
    report.blobs = blobs.blobs;
    report.bytes = layers.bytes + blobs.bytes;
    Ok(report)
}

/// Whether more than `percent` of the file system that holds `folder` is in use. 0: never.
pub(super) fn is_over(folder: &Path, percent: u8) -> std::io::Result<bool> {
    let stat = rustix::fs::statvfs(folder)?;
    Ok(fill_is_over(stat.f_blocks.saturating_sub(stat.f_bfree), stat.f_bavail, percent))
}

/// As `df` counts: what root alone may use is neither used nor available.
fn fill_is_over(used: u64, available: u64, percent: u8) -> bool {
    let usable = used.saturating_add(available);
    percent > 0 && used.saturating_mul(100) > usable.saturating_mul(percent.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watermark_is_passed_above_its_percentage_and_never_when_it_is_off() {
        let cases = [
            (85, 15, 85, false),
            (86, 14, 85, true),
            (100, 0, 99, true),
            (100, 0, 0, false),
            (0, 0, 85, false),
        ];
        for (used, available, percent, over) in cases {
            assert_eq!(
                fill_is_over(used, available, percent),
                over,
                "{used} {available} {percent}"
            );
        }
    }

    #[test]
    fn a_folder_that_is_not_there_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        assert!(is_over(folder.path(), 85).is_ok());
        assert!(is_over(&folder.path().join("missing"), 85).is_err());
    }
}
