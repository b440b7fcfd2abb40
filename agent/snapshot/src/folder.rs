//! A store in a local folder: `manifests/<id>`, `segments/<name>`, `layers/<name>`, `states/<name>`,
//! and `tmp/`, whose files are nobody's.

use std::{
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::SystemTime,
};

use fs_err as fs;
use rustix::fs::{CWD, RenameFlags, Timespec, Timestamps, UTIME_NOW, renameat_with, utimensat};

use crate::{Kind, Name, Part, PieceStore, Put, SnapshotError, key::random, piece::check_id};

const MANIFESTS: &str = "manifests";
const DRAFTS: &str = "tmp";

/// The folder, with all that belongs into it made.
#[derive(Debug, Clone)]
pub struct Folder {
    root: PathBuf,
}

impl Folder {
    /// Makes what is missing, and sweeps drafts that a killed process left.
    ///
    /// One process at a time opens a folder for writing: it would sweep another's.
    pub fn open(root: &Path) -> Result<Self, SnapshotError> {
        let made = |error| SnapshotError::store("make its folders")(error);
        for folder in Kind::ALL.iter().map(|kind| kind.folder()).chain([MANIFESTS, DRAFTS]) {
            fs::create_dir_all(root.join(folder)).map_err(made)?;
        }
        for draft in fs::read_dir(root.join(DRAFTS)).map_err(made)? {
            fs::remove_file(draft.map_err(made)?.path()).map_err(made)?;
        }
        Ok(Self { root: root.to_owned() })
    }

    /// A piece, open for reading.
    pub fn open_piece(&self, kind: Kind, name: &Name) -> Result<fs::File, SnapshotError> {
        let part = Part::Piece(kind, *name);
        let what = part.to_string();
        fs::File::open(self.piece(kind, name)).map_err(missing(part, &what))
    }

    fn piece(&self, kind: Kind, name: &Name) -> PathBuf {
        self.root.join(kind.folder()).join(name.to_string())
    }

    fn manifest(&self, id: &str) -> Result<PathBuf, SnapshotError> {
        check_id(id)?;
        Ok(self.root.join(MANIFESTS).join(id))
    }

    /// Writes beside, syncs, renames without replacing, syncs the folder.
    fn put(&self, path: &Path, bytes: &[u8], what: &str) -> Result<Put, SnapshotError> {
        let cannot = || SnapshotError::store(format!("keep {what}"));
        if path.exists() {
            // A collection takes it for young again.
            let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
            let times = Timestamps { last_access: now, last_modification: now };
            match utimensat(CWD, path, &times, rustix::fs::AtFlags::empty()) {
                Ok(()) => return Ok(Put::AlreadyThere),
                // Collected in between.
                Err(rustix::io::Errno::NOENT) => {}
                Err(error) => return Err(cannot()(error.into())),
            }
        }
        let number = u128::from_le_bytes(random()?);
        let draft = self.root.join(DRAFTS).join(format!("{number:032x}"));
        let written = write_synced(&draft, bytes).and_then(|()| {
            match renameat_with(CWD, &draft, CWD, path, RenameFlags::NOREPLACE) {
                Ok(()) => Ok(Put::Created),
                Err(rustix::io::Errno::EXIST) => Ok(Put::AlreadyThere),
                Err(error) => Err(error.into()),
            }
        });
        if !matches!(written, Ok(Put::Created)) {
            // Of no use any more; a sweep finds what stays.
            let _ = fs::remove_file(&draft);
        }
        let put = written.map_err(cannot())?;
        if let Some(folder) = path.parent() {
            fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(cannot())?;
        }
        Ok(put)
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn missing(part: Part, what: &str) -> impl FnOnce(io::Error) -> SnapshotError {
    let cannot = SnapshotError::store(format!("read {what}"));
    move |error| match error.kind() {
        io::ErrorKind::NotFound => SnapshotError::Missing { part },
        _ => cannot(error),
    }
}

impl PieceStore for Folder {
    fn put_piece(&self, kind: Kind, name: &Name, bytes: &[u8]) -> Result<Put, SnapshotError> {
        self.put(&self.piece(kind, name), bytes, &format!("{kind} {name}"))
    }

    fn read_piece(
        &self,
        kind: Kind,
        name: &Name,
        offset: u64,
        length: usize,
    ) -> Result<Vec<u8>, SnapshotError> {
        let part = Part::Piece(kind, *name);
        let what = part.to_string();
        let file = fs::File::open(self.piece(kind, name)).map_err(missing(part.clone(), &what))?;
        let mut bytes = vec![0; length];
        match file.file().read_exact_at(&mut bytes, offset) {
            Ok(()) => Ok(bytes),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(SnapshotError::Changed { part })
            }
            Err(error) => Err(SnapshotError::store(format!("read {what}"))(error)),
        }
    }

    fn piece_bytes(&self, kind: Kind, name: &Name) -> Result<u64, SnapshotError> {
        let part = Part::Piece(kind, *name);
        let what = part.to_string();
        Ok(fs::metadata(self.piece(kind, name)).map_err(missing(part, &what))?.len())
    }

    fn put_manifest(&self, id: &str, bytes: &[u8]) -> Result<Put, SnapshotError> {
        self.put(&self.manifest(id)?, bytes, &format!("manifest {id}"))
    }

    fn read_manifest(&self, id: &str, max: u64) -> Result<Vec<u8>, SnapshotError> {
        let path = self.manifest(id)?;
        let part = Part::Manifest(id.to_owned());
        let what = part.to_string();
        let found = fs::metadata(&path).map_err(missing(part.clone(), &what))?.len();
        if found > max {
            return Err(SnapshotError::TooLarge { part, found, max });
        }
        fs::read(&path).map_err(missing(part, &what))
    }

    fn manifests(&self) -> Result<Vec<String>, SnapshotError> {
        let cannot = |error| SnapshotError::store("list its snapshots")(error);
        let mut ids = Vec::new();
        for entry in fs::read_dir(self.root.join(MANIFESTS)).map_err(cannot)? {
            let name = entry.map_err(cannot)?.file_name();
            // What has another name is not ours.
            ids.extend(name.into_string().ok().filter(|id| check_id(id).is_ok()));
        }
        ids.sort();
        Ok(ids)
    }

    fn delete_manifest(&self, id: &str) -> Result<bool, SnapshotError> {
        match fs::remove_file(self.manifest(id)?) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(SnapshotError::store(format!("delete manifest {id}"))(error)),
        }
    }

    fn pieces(&self, kind: Kind, age_s: u64) -> Result<Vec<Name>, SnapshotError> {
        let cannot = |error| SnapshotError::store(format!("list each {kind}"))(error);
        let now = SystemTime::now();
        let mut names = Vec::new();
        for entry in fs::read_dir(self.root.join(kind.folder())).map_err(cannot)? {
            let entry = entry.map_err(cannot)?;
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            let old = match modified {
                // From the future: a clock was set. Young, then.
                Ok(modified) => {
                    now.duration_since(modified).is_ok_and(|age| age.as_secs() >= age_s)
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => false,
                Err(error) => return Err(cannot(error)),
            };
            let name: Option<Name> = entry.file_name().to_str().and_then(|name| name.parse().ok());
            names.extend(name.filter(|_| old));
        }
        Ok(names)
    }

    fn delete_piece(&self, kind: Kind, name: &Name) -> Result<u64, SnapshotError> {
        let path = self.piece(kind, name);
        let deleted = fs::metadata(&path).and_then(|metadata| {
            fs::remove_file(&path)?;
            Ok(metadata.len())
        });
        match deleted {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            deleted => deleted.map_err(SnapshotError::store(format!("delete {kind} {name}"))),
        }
    }
}
