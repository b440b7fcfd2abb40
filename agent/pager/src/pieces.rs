//! Pieces of a snapshot by the descriptors that were handed over: nothing is opened by a path.

use std::{collections::BTreeMap, io, os::unix::fs::FileExt};

use fs_err as fs;
use holdfast_snapshot::{Kind, Name, Part, PieceStore, Put, SnapshotError};

/// Read-only, and only what was handed over is in it.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    files: BTreeMap<(Kind, Name), fs::File>,
}

impl Pieces {
    pub(crate) fn add(&mut self, kind: Kind, name: Name, file: fs::File) {
        self.files.insert((kind, name), file);
    }

    fn file(&self, kind: Kind, name: &Name) -> Result<&fs::File, SnapshotError> {
        let missing = || SnapshotError::Missing { part: Part::Piece(kind, *name) };
        self.files.get(&(kind, *name)).ok_or_else(missing)
    }
}

fn read_only<T>() -> Result<T, SnapshotError> {
    let source = io::ErrorKind::ReadOnlyFilesystem.into();
    Err(SnapshotError::Store { what: "change anything here".to_owned(), source })
}

impl PieceStore for Pieces {
    fn put_piece(&self, _: Kind, _: &Name, _: &[u8]) -> Result<Put, SnapshotError> {
        read_only()
    }

    fn read_piece(
        &self,
        kind: Kind,
        name: &Name,
        offset: u64,
        length: usize,
    ) -> Result<Vec<u8>, SnapshotError> {
        let file = self.file(kind, name)?;
        let mut bytes = vec![0; length];
        match file.file().read_exact_at(&mut bytes, offset) {
            Ok(()) => Ok(bytes),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(SnapshotError::Changed { part: Part::Piece(kind, *name) })
            }
            Err(source) => {
                Err(SnapshotError::Store { what: format!("read {kind} {name}"), source })
            }
        }
    }

    fn piece_bytes(&self, kind: Kind, name: &Name) -> Result<u64, SnapshotError> {
        let told = self.file(kind, name)?.metadata();
        let cannot = |source| SnapshotError::Store { what: format!("read {kind} {name}"), source };
        Ok(told.map_err(cannot)?.len())
    }

    fn put_manifest(&self, _: &str, _: &[u8]) -> Result<Put, SnapshotError> {
        read_only()
    }

    fn read_manifest(&self, id: &str, _: u64) -> Result<Vec<u8>, SnapshotError> {
        Err(SnapshotError::Missing { part: Part::Manifest(id.to_owned()) })
    }

    fn manifests(&self) -> Result<Vec<String>, SnapshotError> {
        Ok(Vec::new())
    }

    fn delete_manifest(&self, _: &str) -> Result<bool, SnapshotError> {
        read_only()
    }

    fn pieces(&self, kind: Kind, _: u64) -> Result<Vec<Name>, SnapshotError> {
        Ok(self.files.keys().filter(|(of, _)| *of == kind).map(|(_, name)| *name).collect())
    }

    fn delete_piece(&self, _: Kind, _: &Name) -> Result<u64, SnapshotError> {
        read_only()
    }
}
