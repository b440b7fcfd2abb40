//! The registry's side of the remote store: who is uploaded when, and fetched for whom.

use std::{sync::Arc, time::Duration};

use holdfast_model::{GroupKey, SnapshotId};
use holdfast_store::{SandboxRecord, SnapshotRecord, StoreError};
use log::warn;
use tokio::time::timeout;

use super::{FetchError, Upload, node::Node, now_ms, registry::Registry, snapshots::SaveError};
use crate::{blocking::off_thread, error_chain::error_chain, random::random_id};

/// Between two looks at what is to be uploaded, when nobody says that something changed.
const LOOK_AGAIN: Duration = Duration::from_secs(600);

/// After a failure, doubled at each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// Snapshots of one answer.
const LISTED_MAX: usize = 1000;

impl Registry {
    /// Brings a snapshot of the group from the remote store. One that was fetched before is found.
    pub async fn fetch_snapshot(
        &self,
        group: &GroupKey,
        id: &SnapshotId,
    ) -> Result<SnapshotRecord, FetchError> {
        let all = self.node.store.all_snapshots()?;
        if let Some(known) = all.iter().find(|it| it.data == *id && it.group == *group) {
            return Ok(known.clone());
        }
        if all.len() >= usize::try_from(self.snapshots_max).unwrap_or(usize::MAX) {
            return Err(FetchError::TooMany { max: self.snapshots_max });
        }
        // Until the record is written nothing else says that the image is in use.
        let _in_use = self.node.images.keep().await;
        let (node, asked) = (Arc::clone(&self.node), (group.clone(), id.clone()));
        let found = off_thread(move || node.snapshots.remote_record(&asked.0, &asked.1)).await?;
        let located = self.node.images.locate(found.image).await.map_err(FetchError::ImageStore)?;
        if located.is_none() {
            return Err(FetchError::NoImage { digest: found.image });
        }
        let new = SnapshotId::from_random(random_id().map_err(FetchError::Random)?);
        let node = Arc::clone(&self.node);
        off_thread(move || {
            let pin = node.snapshots.pin(&found.data);
            let fetched = node.snapshots.fetch(&found.group, &found.data).and_then(|()| {
                let bytes = node.snapshots.bytes(&found.group, &found.data)?;
                let record = SnapshotRecord {
                    id: new,
                    bytes,
                    created_at_ms: now_ms(),
                    request_id: None,
                    ..found.clone()
                };
                node.store.create_snapshot(&record)?;
                Ok(record)
            });
            drop(pin);
            if fetched.is_err() {
                node.snapshots.released_or_logged(&found.data);
            }
            Ok(fetched?)
        })
        .await
    }

    /// The group's snapshots in the remote store: id, sandbox, milliseconds since 1970.
    pub async fn list_remote(
        &self,
        group: GroupKey,
    ) -> Result<Vec<(SnapshotId, String, u64)>, SaveError> {
        let node = Arc::clone(&self.node);
        off_thread(move || node.snapshots.list_remote(&group, LISTED_MAX)).await
    }

    /// Where a snapshot is, seen from here.
    pub fn upload_of(&self, record: &SnapshotRecord) -> Upload {
        self.node.snapshots.upload_of(&record.group, &record.data)
    }
}

/// Keeps the remote store as the records say it should be, until the agent stops.
pub(super) async fn keep_uploaded(node: Arc<Node>) {
    let Some(remote) = node.snapshots.remote() else { return };
    let mut pause = FIRST_PAUSE;
    while !remote.is_stopping() {
        let working = Arc::clone(&node);
        let pass = off_thread(move || pass(&working)).await;
        let wait = match pass {
            Ok(()) => {
                pause = FIRST_PAUSE;
                LOOK_AGAIN
            }
            Err(error) => {
                let (error, seconds) = (error_chain(&error), pause.as_secs());
                warn!(error:%, seconds; "the remote store is not as it should be; tried again");
                let wait = pause;
                pause = LONGEST_PAUSE.min(pause * 2);
                wait
            }
        };
        // Waking up early is harmless.
        let _ = timeout(wait, remote.changed.notified()).await;
    }
}

fn pass(node: &Node) -> Result<(), SaveError> {
    let needed = needed(node)?;
    node.snapshots.reconcile(&needed, |done| node.metrics.uploaded(done))
}

/// What somebody may want on another node: snapshots, and the last suspend of each sandbox.
fn needed(node: &Node) -> Result<Vec<SnapshotRecord>, StoreError> {
    let mut needed = node.store.all_snapshots()?;
    let sandboxes = node.store.all_sandboxes()?;
    needed.extend(sandboxes.into_iter().filter_map(last_suspend));
    needed.sort_by(|one, other| one.data.cmp(&other.data));
    needed.dedup_by(|one, other| one.data == other.data);
    Ok(needed)
}

fn last_suspend(sandbox: SandboxRecord) -> Option<SnapshotRecord> {
    let saved = sandbox.saved.filter(|saved| !saved.of_another)?;
    Some(SnapshotRecord {
        id: saved.snapshot.clone(),
        group: sandbox.group,
        sandbox: sandbox.id,
        labels: sandbox.spec.labels.clone(),
        data: saved.snapshot,
        spec: sandbox.spec,
        image: sandbox.image,
        bytes: 0,
        created_at_ms: saved.at_ms,
        request_id: None,
    })
}
