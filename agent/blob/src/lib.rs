//! Pieces and manifests of snapshots in object storage: S3, Azure Blob, and what speaks like them.
//!
//! What is put is put whole or not at all, and never in place of something else: pieces are named
//! by their content, and a manifest goes by a create-only put. A piece that is there already is put
//! again when it is old, so that a collection takes it for young. Large pieces go in parts. Calls
//! block, on whatever thread of the runtime's blocking ones they are made.
#![forbid(unsafe_code)]

mod location;

use std::{
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use holdfast_snapshot::{Kind, Name, Part, PieceStore, Put, SnapshotError, check_id};
pub use location::{BadLocation, Location, Secrets};
use object_store::{
    Error, GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
    WriteMultipart, path::Path,
};
use tokio::runtime::Handle;

/// For one call, with all of its repetitions. A stalled store costs this and no more.
const PATIENCE: Duration = Duration::from_secs(180);

/// Pieces larger than this go in parts of this size; it is also the least that S3 takes.
const PART_BYTES: usize = 8 << 20;

/// Parts on their way at once.
const PARTS_AT_ONCE: usize = 4;

/// A piece that is there for longer is put again. Collections must leave pieces alone for longer
/// than this and the longest upload together.
const REFRESH: Duration = Duration::from_secs(3600);

const MANIFESTS: &str = "manifests";

/// A prefix of a bucket, or of a container.
#[derive(Debug, Clone)]
pub struct Bucket {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    runtime: Handle,
}

impl Bucket {
    /// Nothing is sent yet. `runtime`: whose threads carry the calls.
    pub fn open(
        location: &Location,
        secrets: &Secrets,
        runtime: Handle,
    ) -> Result<Self, BadLocation> {
        Ok(Self { store: location.connect(secrets)?, prefix: location.prefix(), runtime })
    }

    fn piece(&self, kind: Kind, name: &Name) -> Path {
        self.prefix.clone().join(kind.folder()).join(name.to_string())
    }

    fn manifest(&self, id: &str) -> Result<Path, SnapshotError> {
        check_id(id)?;
        Ok(self.prefix.clone().join(MANIFESTS).join(id))
    }

    /// Waits for the answer.
    fn wait<T>(&self, call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let late = || Error::Generic {
            store: "remote",
            source: format!("no answer within {} s", PATIENCE.as_secs()).into(),
        };
        self.runtime
            .block_on(async { tokio::time::timeout(PATIENCE, call).await })
            .unwrap_or_else(|_| Err(late()))
    }

    /// Its bytes and its age, if it is there.
    fn known(&self, path: &Path) -> Result<Option<(u64, Duration)>, Error> {
        match self.wait(self.store.head(path)) {
            Ok(found) => Ok(Some((found.size, age(&found.last_modified.into())))),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn create(&self, path: &Path, bytes: &[u8]) -> Result<Put, Error> {
        let options = PutOptions::from(PutMode::Create);
        match self.wait(self.store.put_opts(path, payload(bytes), options)) {
            Ok(_) => Ok(Put::Created),
            Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => Ok(Put::AlreadyThere),
            Err(error) => Err(error),
        }
    }

    /// In parts. It may replace: the name says what the bytes are.
    fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), Error> {
        if bytes.len() <= PART_BYTES {
            return self.wait(self.store.put(path, payload(bytes))).map(drop);
        }
        self.wait(async {
            let upload = self.store.put_multipart(path).await?;
            let mut parts = WriteMultipart::new_with_chunk_size(upload, PART_BYTES);
            for chunk in bytes.chunks(PART_BYTES) {
                parts.wait_for_capacity(PARTS_AT_ONCE).await?;
                parts.put(Bytes::copy_from_slice(chunk));
            }
            // A failure takes the parts away again.
            parts.finish().await.map(drop)
        })
    }
}

fn payload(bytes: &[u8]) -> PutPayload {
    Bytes::copy_from_slice(bytes).into()
}

/// By the store's clock; what is from the future is young.
fn age(modified: &SystemTime) -> Duration {
    SystemTime::now().duration_since(*modified).unwrap_or_default()
}

fn failed(what: impl Into<String>) -> impl FnOnce(Error) -> SnapshotError {
    let what = what.into();
    |error| SnapshotError::Store { what, source: io::Error::other(error) }
}

fn missing(part: Part, what: String) -> impl FnOnce(Error) -> SnapshotError {
    move |error| match error {
        Error::NotFound { .. } => SnapshotError::Missing { part },
        error => failed(what)(error),
    }
}

impl PieceStore for Bucket {
    fn put_piece(&self, kind: Kind, name: &Name, bytes: &[u8]) -> Result<Put, SnapshotError> {
        let path = self.piece(kind, name);
        let put = || match self.known(&path)? {
            // One of another length is none of ours: whoever holds the store changed it.
            Some((length, age)) if length == bytes.len() as u64 => {
                if age > REFRESH {
                    self.write(&path, bytes)?;
                }
                Ok(Put::AlreadyThere)
            }
            Some(_) => self.write(&path, bytes).map(|()| Put::Created),
            None if bytes.len() <= PART_BYTES => self.create(&path, bytes),
            None => self.write(&path, bytes).map(|()| Put::Created),
        };
        put().map_err(failed(format!("keep {kind} {name}")))
    }

    fn read_piece(
        &self,
        kind: Kind,
        name: &Name,
        offset: u64,
        length: usize,
    ) -> Result<Vec<u8>, SnapshotError> {
        if length == 0 {
            return Ok(Vec::new());
        }
        let part = Part::Piece(kind, *name);
        let path = self.piece(kind, name);
        let range = GetRange::Bounded(offset..offset.saturating_add(length as u64));
        let options = GetOptions { range: Some(range), ..GetOptions::default() };
        let bytes = self.wait(async { self.store.get_opts(&path, options).await?.bytes().await });
        let bytes = bytes.map_err(missing(part.clone(), format!("read {part}")))?;
        // A range that reaches beyond the end is answered with what there is.
        if bytes.len() == length { Ok(bytes.into()) } else { Err(SnapshotError::Changed { part }) }
    }

    fn piece_bytes(&self, kind: Kind, name: &Name) -> Result<u64, SnapshotError> {
        let part = Part::Piece(kind, *name);
        let found = self.wait(self.store.head(&self.piece(kind, name)));
        Ok(found.map_err(missing(part.clone(), format!("read {part}")))?.size)
    }

    fn put_manifest(&self, id: &str, bytes: &[u8]) -> Result<Put, SnapshotError> {
        self.create(&self.manifest(id)?, bytes).map_err(failed(format!("keep manifest {id}")))
    }

    fn read_manifest(&self, id: &str, max: u64) -> Result<Vec<u8>, SnapshotError> {
        let part = Part::Manifest(id.to_owned());
        let path = self.manifest(id)?;
        let cannot = || missing(part.clone(), format!("read manifest {id}"));
        let found = self.wait(self.store.get(&path)).map_err(cannot())?;
        let size = found.meta.size;
        if size > max {
            return Err(SnapshotError::TooLarge { part, found: size, max });
        }
        self.wait(found.bytes()).map(Vec::from).map_err(cannot())
    }

    fn manifests(&self) -> Result<Vec<String>, SnapshotError> {
        let folder = self.prefix.clone().join(MANIFESTS);
        let list = self.store.list(Some(&folder));
        let names = list.map_ok(|found| found.location.filename().map(str::to_owned));
        let names: Vec<_> = self.wait(names.try_collect()).map_err(failed("list its snapshots"))?;
        // What has another name is not ours.
        let mut ids: Vec<String> =
            names.into_iter().flatten().filter(|id| check_id(id).is_ok()).collect();
        ids.sort();
        Ok(ids)
    }

    fn delete_manifest(&self, id: &str) -> Result<bool, SnapshotError> {
        let path = self.manifest(id)?;
        let cannot = || failed(format!("delete manifest {id}"));
        // A store may take the deletion of what is not there for done.
        if self.known(&path).map_err(cannot())?.is_none() {
            return Ok(false);
        }
        match self.wait(self.store.delete(&path)) {
            Ok(()) => Ok(true),
            Err(Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(cannot()(error)),
        }
    }

    fn pieces(&self, kind: Kind, age_s: u64) -> Result<Vec<Name>, SnapshotError> {
        let folder = self.prefix.clone().join(kind.folder());
        let old = self.store.list(Some(&folder)).try_filter_map(|found| async move {
            let old = age(&found.last_modified.into()).as_secs() >= age_s;
            let name: Option<Name> = found.location.filename().and_then(|name| name.parse().ok());
            Ok(name.filter(|_| old))
        });
        self.wait(old.boxed().try_collect()).map_err(failed(format!("list each {kind}")))
    }

    fn delete_piece(&self, kind: Kind, name: &Name) -> Result<u64, SnapshotError> {
        let path = self.piece(kind, name);
        let delete = || {
            let Some((bytes, _)) = self.known(&path)? else { return Ok(0) };
            match self.wait(self.store.delete(&path)) {
                Ok(()) => Ok(bytes),
                Err(Error::NotFound { .. }) => Ok(0),
                Err(error) => Err(error),
            }
        };
        delete().map_err(failed(format!("delete {kind} {name}")))
    }
}
