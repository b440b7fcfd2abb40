//! The store: open, and the calls on each kind of record.

use std::{
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use holdfast_model::{DiskImageId, GroupKey, SandboxId, SnapshotId};
use redb::{Database, ReadTransaction, ReadableDatabase, TableDefinition, WriteTransaction};

use crate::{
    Answer, Begun, DecisionRecord, DiskImageRecord, GroupRecord, GroupSecretRecord, Intent,
    Operation, SandboxRecord, SnapshotRecord, StoreError,
    operation::{AnswerRecord, OperationRecord, to_forget},
    table::{self, Record},
};

/// Schema written by this version. A store with a higher one is refused.
pub const SCHEMA_VERSION: u64 = 1;

/// How long a store is waited for that another process has open.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_PAUSE: Duration = Duration::from_millis(20);

const META: TableDefinition<'static, &'static str, u64> = TableDefinition::new("meta");
const SCHEMA_KEY: &str = "schema";

impl Record for SandboxRecord {
    const TABLE: &'static str = "sandboxes";

    fn key(&self) -> String {
        self.id.as_str().to_owned()
    }
}

impl Record for DiskImageRecord {
    const TABLE: &'static str = "disk_images";

    fn key(&self) -> String {
        self.id.as_str().to_owned()
    }
}

impl Record for GroupRecord {
    const TABLE: &'static str = "groups";

    fn key(&self) -> String {
        self.key.to_string()
    }
}

impl Record for GroupSecretRecord {
    const TABLE: &'static str = "group_secrets";

    fn key(&self) -> String {
        self.group.to_string()
    }
}

impl Record for SnapshotRecord {
    const TABLE: &'static str = "snapshots";

    fn key(&self) -> String {
        self.id.as_str().to_owned()
    }
}

/// What became of a record that carries a request id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Put<R> {
    /// It is in the store now.
    New,
    /// A record made by the same request was there already; nothing was written.
    Existing(R),
}

/// The durable records of one node. Shared by reference; one process has it open at a time.
pub struct Store {
    database: Database,
    /// Calls that failed since it was opened.
    errors: AtomicU64,
}

/// A program that an agent was just beginning to run when it was killed has the agent's descriptors,
/// the lock among them, until its own code runs: the next agent waits for that.
fn create(path: &Path) -> Result<Database, redb::DatabaseError> {
    let began = Instant::now();
    loop {
        match Database::create(path) {
            Err(redb::DatabaseError::DatabaseAlreadyOpen) if began.elapsed() < LOCK_PATIENCE => {
                std::thread::sleep(LOCK_PAUSE);
            }
            outcome => return outcome,
        }
    }
}

impl Store {
    /// Opens the store, makes it if it is missing, and repairs it after a crash.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let failed = |source: redb::Error| StoreError::Open {
            path: path.to_owned(),
            source: Box::new(source),
        };
        let database = create(path).map_err(|error| failed(error.into()))?;
        let store = Self { database, errors: AtomicU64::new(0) };
        match store.schema()? {
            Some(found) if found > SCHEMA_VERSION => {
                Err(StoreError::Newer { path: path.to_owned(), found, known: SCHEMA_VERSION })
            }
            Some(_) => Ok(store),
            None => {
                store.write("write the schema version", |txn| {
                    let mut meta = txn.open_table(META).map_err(engine("open a table"))?;
                    meta.insert(SCHEMA_KEY, SCHEMA_VERSION).map_err(engine("write a record"))?;
                    Ok(())
                })?;
                Ok(store)
            }
        }
    }

    fn schema(&self) -> Result<Option<u64>, StoreError> {
        let txn = self.database.begin_read().map_err(engine("begin reading"))?;
        let meta = match txn.open_table(META) {
            Ok(meta) => meta,
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
            Err(error) => return Err(engine("open a table")(error)),
        };
        let found = meta.get(SCHEMA_KEY).map_err(engine("read a record"))?;
        Ok(found.map(|schema| schema.value()))
    }

    /// One transaction: all of `change` or nothing, on disk when this returns.
    pub(crate) fn write<T>(
        &self,
        action: &'static str,
        change: impl FnOnce(&WriteTransaction) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let begun = self.database.begin_write().map_err(engine("begin a transaction"));
        self.counted(begun.and_then(|txn| {
            let outcome = change(&txn)?;
            txn.commit().map_err(engine(action))?;
            Ok(outcome)
        }))
    }

    pub(crate) fn get<R: Record>(&self, key: &str) -> Result<Option<R>, StoreError> {
        self.read(|txn| table::get(txn, key))
    }

    pub(crate) fn list<R: Record>(
        &self,
        wanted: impl Fn(&R) -> bool,
    ) -> Result<Vec<R>, StoreError> {
        self.read(|txn| table::list(txn, wanted))
    }

    pub(crate) fn read<T>(
        &self,
        look: impl FnOnce(&ReadTransaction) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let txn = self.database.begin_read().map_err(engine("begin reading"));
        self.counted(txn.and_then(|txn| look(&txn)))
    }

    pub(crate) fn counted<T>(&self, outcome: Result<T, StoreError>) -> Result<T, StoreError> {
        // What a client asked for too late is no fault of the store.
        if matches!(&outcome, Err(error) if !matches!(error, StoreError::NoSnapshot { .. })) {
            self.errors.fetch_add(1, Ordering::Relaxed);
        }
        outcome
    }

    /// How many calls failed since it was opened.
    pub fn errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }

    pub(crate) fn put<R: Record>(&self, record: &R) -> Result<(), StoreError> {
        self.write("put a record", |txn| table::put(txn, record))
    }

    pub(crate) fn remove<R: Record>(&self, key: &str) -> Result<bool, StoreError> {
        self.write("remove a record", |txn| table::remove::<R>(txn, key))
    }

    /// Puts a new record, and what goes with it, unless one exists that `same` recognises as made
    /// by the same request.
    fn put_once<R: Record>(
        &self,
        record: &R,
        same: impl Fn(&R) -> bool,
        beside: impl FnOnce(&WriteTransaction) -> Result<(), StoreError>,
    ) -> Result<Put<R>, StoreError> {
        self.write("put a record", |txn| {
            let existing = {
                let table = txn.open_table(R::definition()).map_err(engine("open a table"))?;
                table::scan(&table, same)?.pop()
            };
            match existing {
                Some(existing) => Ok(Put::Existing(existing)),
                None => {
                    beside(txn)?;
                    table::put(txn, record).map(|()| Put::New)
                }
            }
        })
    }
}

/// Sandboxes.
impl Store {
    /// Writes a new sandbox and that it is to be made, or gives the one that the same request made
    /// before. The snapshot it is made from, if any, must be there.
    pub fn create_sandbox(&self, record: &SandboxRecord) -> Result<Put<SandboxRecord>, StoreError> {
        let intent = Intent::new(&record.id, Operation::Create);
        let same = |known: &SandboxRecord| {
            record.request_id.is_some()
                && known.request_id == record.request_id
                && known.group == record.group
        };
        self.put_once(record, same, |txn| {
            // In this transaction: a deletion of the snapshot comes before it, or after it, and
            // then finds that its data is needed.
            if let Some(id) = &record.from_snapshot
                && table::get_mut::<SnapshotRecord>(txn, id.as_str())?.is_none()
            {
                return Err(StoreError::NoSnapshot { id: id.clone() });
            }
            table::put(txn, &intent)
        })
    }

    /// Writes several new sandboxes and that they are to be made: all of them or none.
    pub fn create_sandboxes(&self, records: &[SandboxRecord]) -> Result<(), StoreError> {
        self.write("put records", |txn| {
            for record in records {
                table::put(txn, &Intent::new(&record.id, Operation::Create))?;
                table::put(txn, record)?;
            }
            Ok(())
        })
    }

    /// Writes a sandbox about which nothing is under way any more.
    pub fn put_sandbox(&self, record: &SandboxRecord) -> Result<(), StoreError> {
        self.write("settle a sandbox", |txn| {
            table::remove::<Intent>(txn, record.id.as_str())?;
            table::put(txn, record)
        })
    }

    /// Writes a sandbox together with what is under way about it.
    pub fn put_intent(&self, record: &SandboxRecord, intent: &Intent) -> Result<(), StoreError> {
        self.write("write an intent", |txn| {
            table::put(txn, intent)?;
            table::put(txn, record)
        })
    }

    /// What is under way about a sandbox.
    pub fn intent(&self, id: &SandboxId) -> Result<Option<Intent>, StoreError> {
        self.get(id.as_str())
    }

    pub fn intents(&self) -> Result<Vec<Intent>, StoreError> {
        self.list(|_: &Intent| true)
    }

    pub fn sandbox(&self, id: &SandboxId) -> Result<Option<SandboxRecord>, StoreError> {
        self.get(id.as_str())
    }

    /// The group's sandboxes in the order of their ids.
    pub fn sandboxes(&self, group: &GroupKey) -> Result<Vec<SandboxRecord>, StoreError> {
        self.list(|record: &SandboxRecord| record.group == *group)
    }

    pub fn all_sandboxes(&self) -> Result<Vec<SandboxRecord>, StoreError> {
        self.list(|_: &SandboxRecord| true)
    }

    /// Forgets a sandbox and what was under way about it. Whether there was one.
    pub fn remove_sandbox(&self, id: &SandboxId) -> Result<bool, StoreError> {
        self.write("remove a sandbox", |txn| {
            table::remove::<Intent>(txn, id.as_str())?;
            table::remove_below::<DecisionRecord>(txn, id.as_str())?;
            table::remove::<SandboxRecord>(txn, id.as_str())
        })
    }
}

/// Snapshots.
impl Store {
    /// Writes a new snapshot, or gives the one that the same request made before.
    pub fn create_snapshot(
        &self,
        record: &SnapshotRecord,
    ) -> Result<Put<SnapshotRecord>, StoreError> {
        let same = |known: &SnapshotRecord| {
            record.request_id.is_some()
                && known.request_id == record.request_id
                && known.group == record.group
        };
        self.put_once(record, same, |_| Ok(()))
    }

    pub fn snapshot(&self, id: &SnapshotId) -> Result<Option<SnapshotRecord>, StoreError> {
        self.get(id.as_str())
    }

    /// The group's snapshots in the order of their ids.
    pub fn snapshots(&self, group: &GroupKey) -> Result<Vec<SnapshotRecord>, StoreError> {
        self.list(|record: &SnapshotRecord| record.group == *group)
    }

    pub fn all_snapshots(&self) -> Result<Vec<SnapshotRecord>, StoreError> {
        self.list(|_: &SnapshotRecord| true)
    }

    /// Whether there was one.
    pub fn remove_snapshot(&self, id: &SnapshotId) -> Result<bool, StoreError> {
        self.remove::<SnapshotRecord>(id.as_str())
    }

    /// Whether a sandbox or a snapshot is kept as this.
    pub fn is_needed(&self, data: &SnapshotId) -> Result<bool, StoreError> {
        let saved_as = |record: &SandboxRecord| {
            record.saved.as_ref().is_some_and(|saved| saved.snapshot == *data)
        };
        let txn = self.database.begin_read().map_err(engine("begin reading"));
        self.counted(txn.and_then(|txn| {
            let snapshots = table::list(&txn, |record: &SnapshotRecord| record.data == *data)?;
            Ok(!snapshots.is_empty() || !table::list(&txn, saved_as)?.is_empty())
        }))
    }
}

/// Disk images.
impl Store {
    /// Writes a new disk image, or gives the one that the same request made before.
    pub fn create_disk_image(
        &self,
        record: &DiskImageRecord,
    ) -> Result<Put<DiskImageRecord>, StoreError> {
        let same = |known: &DiskImageRecord| {
            record.request_id.is_some()
                && known.request_id == record.request_id
                && known.group == record.group
        };
        self.put_once(record, same, |_| Ok(()))
    }

    pub fn put_disk_image(&self, record: &DiskImageRecord) -> Result<(), StoreError> {
        self.put(record)
    }

    /// Changes a disk image if it is still there, in one transaction: one deleted meanwhile does
    /// not come back. Gives the changed record.
    pub fn update_disk_image(
        &self,
        id: &DiskImageId,
        change: impl FnOnce(&mut DiskImageRecord),
    ) -> Result<Option<DiskImageRecord>, StoreError> {
        self.write("change a record", |txn| {
            let Some(mut record) = table::get_mut::<DiskImageRecord>(txn, id.as_str())? else {
                return Ok(None);
            };
            change(&mut record);
            table::put(txn, &record)?;
            Ok(Some(record))
        })
    }

    pub fn disk_image(&self, id: &DiskImageId) -> Result<Option<DiskImageRecord>, StoreError> {
        self.get(id.as_str())
    }

    /// The group's disk images in the order of their ids.
    pub fn disk_images(&self, group: &GroupKey) -> Result<Vec<DiskImageRecord>, StoreError> {
        self.list(|record: &DiskImageRecord| record.group == *group)
    }

    pub fn all_disk_images(&self) -> Result<Vec<DiskImageRecord>, StoreError> {
        self.list(|_: &DiskImageRecord| true)
    }

    /// Whether there was one.
    pub fn remove_disk_image(&self, id: &DiskImageId) -> Result<bool, StoreError> {
        self.remove::<DiskImageRecord>(id.as_str())
    }
}

/// Groups.
impl Store {
    pub fn put_group(&self, record: &GroupRecord) -> Result<(), StoreError> {
        self.put(record)
    }

    pub fn group(&self, key: &GroupKey) -> Result<Option<GroupRecord>, StoreError> {
        self.get(&key.to_string())
    }

    pub fn groups(&self) -> Result<Vec<GroupRecord>, StoreError> {
        self.list(|_: &GroupRecord| true)
    }

    /// Whether there was one.
    pub fn remove_group(&self, key: &GroupKey) -> Result<bool, StoreError> {
        let key = key.to_string();
        self.write("remove a group", |txn| {
            table::remove::<GroupSecretRecord>(txn, &key)?;
            table::remove::<GroupRecord>(txn, &key)
        })
    }

    /// The wrapped key of the group's snapshots. If it has none yet, `fresh` is it from now on.
    pub fn group_secret(&self, group: &GroupKey, fresh: Vec<u8>) -> Result<Vec<u8>, StoreError> {
        let record = GroupSecretRecord { group: group.clone(), wrapped: fresh };
        let same = |known: &GroupSecretRecord| known.group == *group;
        Ok(match self.put_once(&record, same, |_| Ok(()))? {
            Put::New => record.wrapped,
            Put::Existing(known) => known.wrapped,
        })
    }

    /// Puts another key in place of the group's, unless something may depend on that: a sandbox or
    /// a snapshot of the group. Whether it did.
    pub fn replace_unused_group_secret(
        &self,
        group: &GroupKey,
        fresh: Vec<u8>,
    ) -> Result<bool, StoreError> {
        self.write("replace a group's key", |txn| {
            let used = any::<SandboxRecord>(txn, |record| record.group == *group)?
                || any::<SnapshotRecord>(txn, |record| record.group == *group)?;
            if !used {
                let record = GroupSecretRecord { group: group.clone(), wrapped: fresh };
                table::put(txn, &record)?;
            }
            Ok(!used)
        })
    }

    /// The wrapped key of the group's snapshots, if there is one.
    pub fn known_group_secret(&self, group: &GroupKey) -> Result<Option<Vec<u8>>, StoreError> {
        let known = self.get::<GroupSecretRecord>(&group.to_string())?;
        Ok(known.map(|known| known.wrapped))
    }
}

/// Operations, by the client's request id.
impl Store {
    /// Says whether the call may be carried out, and if it is new, marks it begun.
    pub fn begin_operation(
        &self,
        request_id: &str,
        fingerprint: &str,
        now_ms: u64,
    ) -> Result<Begun, StoreError> {
        self.write("begin an operation", |txn| {
            if let Some(known) = table::get_mut::<OperationRecord>(txn, request_id)? {
                if known.fingerprint != fingerprint {
                    return Ok(Begun::OtherCall);
                }
                let answered = table::get_mut::<AnswerRecord>(txn, request_id)?;
                return Ok(
                    answered.map_or(Begun::Unfinished, |found| Begun::Finished(found.answer))
                );
            }
            let known: Vec<OperationRecord> = {
                let table = txn
                    .open_table(OperationRecord::definition())
                    .map_err(engine("open a table"))?;
                table::scan(&table, |_| true)?
            };
            let ages = known.into_iter().map(|known| (known.begun_at_ms, known.request_id));
            for key in to_forget(ages.collect(), now_ms) {
                table::remove::<OperationRecord>(txn, &key)?;
                table::remove::<AnswerRecord>(txn, &key)?;
            }
            let record = OperationRecord {
                request_id: request_id.to_owned(),
                fingerprint: fingerprint.to_owned(),
                begun_at_ms: now_ms,
            };
            table::put(txn, &record).map(|()| Begun::New)
        })
    }

    /// Remembers the answer of a begun call. One that was forgotten meanwhile stays forgotten.
    pub fn finish_operation(&self, request_id: &str, answer: Answer) -> Result<(), StoreError> {
        self.write("finish an operation", |txn| {
            match table::get_mut::<OperationRecord>(txn, request_id)? {
                Some(_) => {
                    let request_id = request_id.to_owned();
                    table::put(txn, &AnswerRecord { request_id, answer })
                }
                None => Ok(()),
            }
        })
    }

    /// Forgets a call that did nothing, so that its retry is carried out.
    pub fn forget_operation(&self, request_id: &str) -> Result<(), StoreError> {
        self.write("forget an operation", |txn| {
            table::remove::<OperationRecord>(txn, request_id)?;
            table::remove::<AnswerRecord>(txn, request_id)?;
            Ok(())
        })
    }
}

fn any<R: Record>(txn: &WriteTransaction, wanted: impl Fn(&R) -> bool) -> Result<bool, StoreError> {
    let table = txn.open_table(R::definition()).map_err(engine("open a table"))?;
    Ok(!table::scan(&table, wanted)?.is_empty())
}

fn engine<E: Into<redb::Error>>(action: &'static str) -> impl FnOnce(E) -> StoreError {
    StoreError::engine(action)
}
