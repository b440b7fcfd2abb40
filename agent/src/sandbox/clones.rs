//! The registry's side of snapshots that clients ask for, and of sandboxes that are made of them.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use holdfast_api::egress::{check_without_proxy, of_record};
use holdfast_model::{
    Digest, GroupKey, SandboxId, SandboxSpec, SnapshotId, State, sandbox::CloneSpec,
};
use holdfast_snapshot::{Collected, Verified};
use holdfast_store::{Put, SandboxRecord, SnapshotRecord, StoreError};
use tokio::{
    sync::{oneshot, watch},
    time::timeout,
};

use super::{
    Anatomy, CreateError, ForkError, SnapshotCallError, SuspendError,
    asks::Ask,
    now_ms,
    registry::{Draft, Origin, Registry},
    snapshots::{Pin, SaveError},
    status::Status,
    suspend::Kept,
};
use crate::{
    blocking::off_thread,
    fault::{self, Point},
    images::Located,
    random::random_id,
};

/// How long whoever asks for a snapshot waits for it. It is made after that all the same.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(120);

impl Registry {
    /// Makes a snapshot of a sandbox that runs or is suspended. It goes on as it was. A request made
    /// before finds its snapshot again.
    pub async fn snapshot(
        &self,
        id: &SandboxId,
        labels: BTreeMap<String, String>,
        request_id: Option<String>,
    ) -> Result<SnapshotRecord, SnapshotCallError> {
        let sandbox = self.node.store.sandbox(id)?;
        let sandbox = sandbox.ok_or_else(|| SuspendError::NotFound { id: id.clone() })?;
        let all = self.node.store.all_snapshots()?;
        let same = |known: &&SnapshotRecord| {
            request_id.is_some() && known.request_id == request_id && known.group == sandbox.group
        };
        if let Some(known) = all.iter().find(same) {
            return Ok(known.clone());
        }
        if all.len() >= usize::try_from(self.snapshots_max).unwrap_or(usize::MAX) {
            return Err(SnapshotCallError::TooMany { max: self.snapshots_max });
        }
        // Until the record is written nothing else says that the image is in use.
        let _in_use = self.node.images.keep().await;
        let Kept { pin, bytes, of } = self.kept(id).await?;
        let record = SnapshotRecord {
            id: SnapshotId::from_random(random_id().map_err(SuspendError::Random)?),
            group: of.group,
            sandbox: of.id,
            labels,
            data: pin.id().clone(),
            spec: of.spec,
            image: of.image,
            bytes,
            created_at_ms: now_ms(),
            request_id,
        };
        let node = Arc::clone(&self.node);
        off_thread(move || {
            let put = node.store.create_snapshot(&record)?;
            fault::at(Point::SnapshotRecorded);
            let data = pin.id().clone();
            drop(pin);
            match put {
                Put::New => {
                    node.snapshots.changed();
                    Ok(record)
                }
                Put::Existing(known) => {
                    node.snapshots.released_or_logged(&data);
                    Ok(known)
                }
            }
        })
        .await
    }

    /// Has the sandbox's driver keep what it is now.
    async fn kept(&self, id: &SandboxId) -> Result<Kept, SuspendError> {
        let mut handle =
            self.handle(id).ok_or_else(|| SuspendError::NotFound { id: id.clone() })?;
        // What is on its way is waited for.
        let passing = [State::Creating, State::Stopping, State::Resuming];
        let settled = |status: &Status| status.gone || !passing.contains(&status.state);
        let not_running = |state| SuspendError::NotRunning { id: id.clone(), state };
        let waited = async {
            let state = match handle.status.wait_for(settled).await {
                Ok(status) => status.state,
                Err(_) => return Err(SuspendError::NotFound { id: id.clone() }),
            };
            if !matches!(state, State::Running | State::Suspended) {
                return Err(not_running(state));
            }
            let (reply, replied) = oneshot::channel();
            let asked = handle.inbox.send(Ask::Keep(reply)).await;
            asked.map_err(|_| SuspendError::NotFound { id: id.clone() })?;
            // Dropped: it was about to be something else, or to end.
            let now = handle.status.borrow().state;
            replied.await.unwrap_or_else(|_| Err(not_running(now)))
        };
        let slow = || SuspendError::Slow { id: id.clone(), waited: SNAPSHOT_PATIENCE };
        timeout(SNAPSHOT_PATIENCE, waited).await.map_err(|_| slow())?
    }

    /// A sandbox of a snapshot, as far as it can be refused.
    pub(super) async fn accept_clone(
        &self,
        group: GroupKey,
        clone: CloneSpec,
        request_id: Option<String>,
    ) -> Result<(SandboxId, watch::Receiver<Status>), CreateError> {
        let CloneSpec { snapshot: id, labels, lifecycle_json, egress_json } = clone;
        let found = self.node.store.snapshot(&id)?.filter(|record| record.group == group);
        let SnapshotRecord { data, mut spec, image: digest, .. } =
            found.ok_or_else(|| CreateError::NoSnapshot { id: id.clone() })?;
        spec.labels = labels;
        spec.lifecycle_json = lifecycle_json.or(spec.lifecycle_json);
        spec.egress_json = egress_json.or(spec.egress_json);
        if spec.skip_egress_proxy {
            let policy = of_record(spec.egress_json.as_deref());
            check_without_proxy(&policy).map_err(CreateError::Policy)?;
        }
        let origin = Some(Origin { snapshot: Some(id), data });
        let image = self.located(digest).await?;
        match self.admit(Draft { group, spec, image, origin, request_id }).await {
            Err(CreateError::Store(StoreError::NoSnapshot { id })) => {
                Err(CreateError::NoSnapshot { id })
            }
            admitted => admitted,
        }
    }

    async fn located(&self, digest: Digest) -> Result<Located, CreateError> {
        let located = self.node.images.locate(digest).await.map_err(CreateError::ImageStore)?;
        located.ok_or(CreateError::NoImage { digest })
    }

    /// Makes `count` clones of a sandbox as it is now, all or none. They have labels of their own.
    pub async fn fork(
        &self,
        id: &SandboxId,
        count: u32,
        labels: BTreeMap<String, String>,
        request_id: Option<String>,
    ) -> Result<Vec<SandboxRecord>, ForkError> {
        let sandbox = self.node.store.sandbox(id)?;
        let sandbox = sandbox.ok_or_else(|| SuspendError::NotFound { id: id.clone() })?;
        let name = |number: u32| request_id.as_ref().map(|id| format!("{id}#{number}"));
        // A retry finds what was made; what is missing of it was deleted since.
        if self.made_before(&sandbox.group, name(0).as_deref())?.is_some() {
            let mut known = self.node.store.sandboxes(&sandbox.group)?;
            let names: Vec<_> = (0..count).map(name).collect();
            known.retain(|record| names.contains(&record.request_id));
            known.sort_by_key(|record| names.iter().position(|it| *it == record.request_id));
            return Ok(known);
        }
        // Until the records are written nothing else says that the image is in use.
        let _in_use = self.node.images.keep().await;
        let Kept { pin, of, .. } = self.kept(id).await?;
        fault::at(Point::ForkKept);
        let forked = self.fork_of(&of, pin.id(), labels, (0..count).map(name)).await;
        self.let_go(pin).await;
        Ok(forked?)
    }

    /// Clones of what is kept, one for each name, all or none.
    async fn fork_of(
        &self,
        of: &SandboxRecord,
        data: &SnapshotId,
        labels: BTreeMap<String, String>,
        names: impl Iterator<Item = Option<String>>,
    ) -> Result<Vec<SandboxRecord>, CreateError> {
        let mut drafts = Vec::new();
        for request_id in names {
            let spec = SandboxSpec { labels: labels.clone(), ..of.spec.clone() };
            let image = self.located(of.image).await?;
            let origin = Some(Origin { snapshot: None, data: data.clone() });
            drafts.push(Draft { group: of.group.clone(), spec, image, origin, request_id });
        }
        let mut records = Vec::with_capacity(drafts.len());
        for (id, status) in self.admit_all(drafts).await? {
            records.push(self.settled(id, status).await?);
        }
        Ok(records)
    }

    /// Gives up a hold, and what was held if nobody needs it.
    async fn let_go(&self, pin: Pin) {
        let node = Arc::clone(&self.node);
        off_thread(move || {
            let data = pin.id().clone();
            drop(pin);
            node.snapshots.released_or_logged(&data);
        })
        .await;
    }

    pub fn get_snapshot(&self, id: &SnapshotId) -> Result<Option<SnapshotRecord>, StoreError> {
        self.node.store.snapshot(id)
    }

    /// The group's snapshots in the order of their ids.
    pub fn list_snapshots(&self, group: &GroupKey) -> Result<Vec<SnapshotRecord>, StoreError> {
        self.node.store.snapshots(group)
    }

    /// Removes a snapshot. Sandboxes that were made from it keep what they need of it.
    pub async fn delete_snapshot(&self, record: SnapshotRecord) -> Result<(), StoreError> {
        let node = Arc::clone(&self.node);
        off_thread(move || {
            node.store.remove_snapshot(&record.id)?;
            node.snapshots.released_or_logged(&record.data);
            Ok(())
        })
        .await
    }

    pub async fn inspect_snapshot(&self, record: SnapshotRecord) -> Result<Anatomy, SaveError> {
        let node = Arc::clone(&self.node);
        off_thread(move || node.snapshots.anatomy(&record.group, &record.data)).await
    }

    pub async fn verify_snapshot(&self, record: SnapshotRecord) -> Result<Verified, SaveError> {
        let node = Arc::clone(&self.node);
        off_thread(move || node.snapshots.verify(&record.group, &record.data)).await
    }

    /// Removes pieces that nobody needs. `None`: a snapshot is being written, nothing was done.
    pub async fn collect_snapshots(&self) -> Result<Option<Collected>, SaveError> {
        let node = Arc::clone(&self.node);
        off_thread(move || node.snapshots.collect_now()).await
    }
}
