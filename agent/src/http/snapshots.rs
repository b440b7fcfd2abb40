//! `…/sandboxes/{id}/snapshot`, `…/snapshots`, and what is ours beside them: fork, details,
//! verification, collection.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    body::Body,
    extract::{Path, State},
    response::Response,
};
use holdfast_api::{
    error::Code,
    labels::LabelFilter,
    model::{Mib, SnapshotId},
    snapshot::{
        CreateSnapshot, Fork, Forked, RemoteSnapshot, RemoteSnapshots, Snapshot, SnapshotDetails,
        SnapshotVerified, SnapshotsCollected,
    },
};
use holdfast_store::SnapshotRecord;

use super::{
    App,
    answer::{empty, json, rfc3339},
    body,
    paging::page,
    problem::{Problem, remote_problem},
    request::{Here, InGroup, OfSandbox, OfSnapshot, Query, RequestId},
    sandboxes::sandbox,
};
use crate::sandbox::Upload;

type Answer = Result<Response, Problem>;

pub(super) async fn create(
    State(app): State<Arc<App>>,
    OfSandbox(record): OfSandbox,
    RequestId(request_id): RequestId,
    body: Body,
) -> Answer {
    let request: CreateSnapshot = body::json(body).await?;
    let labels = request.checked()?;
    let _making = app.making_in(&record.group).await?;
    let record = app.registry.snapshot(&record.id, labels, request_id).await?;
    Ok(json(200, &snapshot(&record)))
}

pub(super) async fn fork(
    State(app): State<Arc<App>>,
    OfSandbox(record): OfSandbox,
    RequestId(request_id): RequestId,
    body: Body,
) -> Answer {
    let request: Fork = body::json(body).await?;
    let (count, labels) = request.checked()?;
    let _making = app.making_in(&record.group).await?;
    let made = app.registry.fork(&record.id, count, labels, request_id).await?;
    Ok(json(201, &Forked { value: made.iter().map(sandbox).collect() }))
}

pub(super) async fn list(
    State(app): State<Arc<App>>,
    InGroup(group): InGroup,
    query: Query,
    here: Here,
) -> Answer {
    let filter: LabelFilter = query.get("labels").unwrap_or_default().parse()?;
    let records = app.registry.list_snapshots(&group)?.into_iter();
    let matching = records.filter(|record| filter.matches(&record.labels));
    let page = page(matching, &query, &here, |r| r.id.as_str(), |record| snapshot(&record));
    Ok(json(200, &page))
}

pub(super) async fn get(OfSnapshot(record): OfSnapshot) -> Answer {
    Ok(json(200, &snapshot(&record)))
}

pub(super) async fn delete(State(app): State<Arc<App>>, OfSnapshot(record): OfSnapshot) -> Answer {
    app.registry.delete_snapshot(record).await?;
    Ok(empty(204))
}

pub(super) async fn details(State(app): State<Arc<App>>, OfSnapshot(record): OfSnapshot) -> Answer {
    let anatomy = app.registry.inspect_snapshot(record.clone()).await?;
    let body = SnapshotDetails {
        id: record.id.to_string(),
        format: anatomy.format,
        image_digest: record.image.to_string(),
        memory_layers: anatomy.memory_layers,
        pieces: anatomy.pieces,
        piece_bytes: anatomy.piece_bytes,
        disk_bytes: anatomy.disk_bytes,
        hot: anatomy.hot,
        upload: match app.registry.upload_of(&record) {
            Upload::No => "no".to_owned(),
            Upload::Waiting => "waiting".to_owned(),
            Upload::Failing(reason) => format!("failing: {reason}"),
            Upload::Done => "done".to_owned(),
        },
    };
    Ok(json(200, &body))
}

pub(super) async fn verify(State(app): State<Arc<App>>, OfSnapshot(record): OfSnapshot) -> Answer {
    let id = record.id.to_string();
    let verified = app.registry.verify_snapshot(record).await?;
    Ok(json(200, &SnapshotVerified { id, layers: verified.layers, frames: verified.frames }))
}

pub(super) async fn list_remote(State(app): State<Arc<App>>, InGroup(group): InGroup) -> Answer {
    let found = app.registry.list_remote(group).await.map_err(remote_problem)?;
    let value = found.into_iter().map(|(id, sandbox_id, created_ms)| RemoteSnapshot {
        id: id.to_string(),
        sandbox_id,
        created_at_utc: Some(rfc3339(created_ms)),
    });
    Ok(json(200, &RemoteSnapshots { value: value.collect() }))
}

pub(super) async fn fetch(
    State(app): State<Arc<App>>,
    InGroup(group): InGroup,
    Path(ids): Path<BTreeMap<String, String>>,
) -> Answer {
    let text = ids.get("id").map_or("", String::as_str);
    let id: SnapshotId = text.parse().map_err(|_| {
        let hint = "GET …/remotesnapshots lists them";
        Problem::new(Code::SnapshotNotFound, format!("there is no remote snapshot {text:?}"), hint)
    })?;
    let _making = app.making_in(&group).await?;
    let record = app.registry.fetch_snapshot(&group, &id).await?;
    Ok(json(201, &snapshot(&record)))
}

pub(super) async fn gc(State(app): State<Arc<App>>) -> Answer {
    let collected = app.registry.collect_snapshots().await?;
    let postponed = collected.is_none();
    let collected = collected.unwrap_or_default();
    let body = SnapshotsCollected {
        pieces_removed: collected.pieces_deleted as u64,
        bytes_freed: collected.bytes_deleted,
        postponed,
    };
    Ok(json(200, &body))
}

fn snapshot(record: &SnapshotRecord) -> Snapshot {
    Snapshot {
        id: record.id.to_string(),
        labels: record.labels.clone(),
        sandbox_id: Some(record.sandbox.to_string()),
        status: "Ready".to_owned(),
        created_at_utc: Some(rfc3339(record.created_at_ms)),
        resources: Some(record.spec.resources.into()),
        size_in_mb: Some(record.bytes.div_ceil(Mib(1).bytes())),
    }
}
