//! Collection: pieces that no manifest names go. Works without keys.

use std::collections::BTreeSet;

use crate::{Kind, Manifest, Name, PieceStore, SnapshotError, manifest::MANIFEST_BYTES_MAX};

/// What a collection did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Collected {
    pub snapshots: usize,
    pub pieces_kept: usize,
    pub pieces_deleted: usize,
    pub bytes_deleted: u64,
}

/// Deletes pieces that are of no snapshot and at least `age_s` old: younger ones may be of one that
/// is being written. A manifest that cannot be read, or is of a newer release, ends it before
/// anything is deleted.
pub fn collect(store: &dyn PieceStore, age_s: u64) -> Result<Collected, SnapshotError> {
    // Listed before the manifests are: what is committed in between is then in them.
    let mut old = Vec::new();
    for kind in Kind::ALL {
        old.extend(store.pieces(kind, age_s)?.into_iter().map(|name| (kind, name)));
    }
    let mut used: BTreeSet<(Kind, Name)> = BTreeSet::new();
    let mut collected = Collected::default();
    for id in store.manifests()? {
        let bytes = match store.read_manifest(&id, MANIFEST_BYTES_MAX) {
            // Deleted since it was listed.
            Err(SnapshotError::Missing { .. }) => continue,
            read => read?,
        };
        let manifest = Manifest::decode_unauthenticated(&id, &bytes)?;
        collected.snapshots += 1;
        used.extend(manifest.pieces());
    }
    for (kind, name) in old {
        if used.contains(&(kind, name)) {
            collected.pieces_kept += 1;
        } else {
            collected.bytes_deleted += store.delete_piece(kind, &name)?;
            collected.pieces_deleted += 1;
        }
    }
    Ok(collected)
}
