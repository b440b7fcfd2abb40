//! Sandbox groups, on the ARM paths.

use std::sync::Arc;

use axum::{body::Body, extract::State, response::Response};
use holdfast_api::{
    error::Code,
    group::{Group, PutGroup},
    model::GroupKey,
    path,
};
use holdfast_store::GroupRecord;

use super::{
    App,
    answer::{empty, json},
    body,
    paging::page,
    problem::Problem,
    request::{ArmScope, GroupName, Here, Query, no_group},
};
use crate::{blocking::off_thread, sandbox::now_ms};

/// Location of the group that exists from first boot.
const LOCATION: &str = "local";

type Answer = Result<Response, Problem>;

/// The record of the group that exists from first boot.
pub(crate) fn default_group() -> GroupRecord {
    GroupRecord {
        key: GroupKey::local_default(),
        location: LOCATION.to_owned(),
        tags: std::collections::BTreeMap::new(),
        properties_json: "{}".to_owned(),
        created_at_ms: now_ms(),
    }
}

pub(super) async fn list(
    State(app): State<Arc<App>>,
    scope: ArmScope,
    query: Query,
    here: Here,
) -> Answer {
    let of_scope = |record: &GroupRecord| {
        record.key.subscription() == scope.subscription
            && record.key.resource_group() == scope.resource_group
    };
    let mut records: Vec<_> = app.store.groups()?.into_iter().filter(of_scope).collect();
    records.sort_by(|a, b| a.key.name().cmp(b.key.name()));
    let page = page(records.into_iter(), &query, &here, |r| r.key.name(), |record| group(&record));
    Ok(json(200, &page))
}

pub(super) async fn get(State(app): State<Arc<App>>, GroupName(key): GroupName) -> Answer {
    match app.store.group(&key)? {
        Some(record) => Ok(json(200, &group(&record))),
        None => Err(no_group(&key)),
    }
}

/// Makes the group, or replaces location and tags of one that is there.
pub(super) async fn put(
    State(app): State<Arc<App>>,
    GroupName(key): GroupName,
    body: Body,
) -> Answer {
    let request: PutGroup = body::json(body).await?;
    request.check()?;
    let known = app.store.group(&key)?;
    let created_at_ms = known.as_ref().map_or_else(now_ms, |known| known.created_at_ms);
    let record = GroupRecord {
        key,
        location: request.location,
        tags: request.tags.unwrap_or_default(),
        properties_json: "{}".to_owned(),
        created_at_ms,
    };
    let (store, stored) = (Arc::clone(&app.store), record.clone());
    off_thread(move || store.put_group(&stored)).await?;
    Ok(json(if known.is_some() { 200 } else { 201 }, &group(&record)))
}

/// Removes an empty group. What is in one is not removed along with it: a mistyped name must not
/// cost every sandbox of a team.
pub(super) async fn delete(State(app): State<Arc<App>>, GroupName(key): GroupName) -> Answer {
    if app.store.group(&key)?.is_none() {
        return Err(no_group(&key));
    }
    if key == GroupKey::local_default() {
        let message = format!("the sandbox group {key} exists on every node and cannot be deleted");
        return Err(Problem::new(Code::SandboxGroupProtected, message, "delete what is in it"));
    }
    // While this is held nothing is made in any group.
    let _alone = app.making.write().await;
    let counts = [
        ("sandboxes", app.store.sandboxes(&key)?.len()),
        ("snapshots", app.store.snapshots(&key)?.len()),
        ("disk images", app.store.disk_images(&key)?.len()),
        ("secrets", app.store.secrets(&key)?.len()),
    ];
    let held: Vec<String> = counts
        .into_iter()
        .filter(|(_, count)| *count > 0)
        .map(|(what, count)| format!("{count} {what}"))
        .collect();
    if !held.is_empty() {
        let message = format!("the sandbox group {key} is not empty: it has {}", held.join(", "));
        return Err(Problem::new(Code::SandboxGroupNotEmpty, message, "delete them first"));
    }
    let (store, of) = (Arc::clone(&app.store), key.clone());
    off_thread(move || store.remove_group(&of)).await?;
    // One that is made again under its name has another key, and so another CA.
    app.registry.egress().forget(&key).await;
    Ok(empty(204))
}

fn group(record: &GroupRecord) -> Group {
    Group {
        id: path::arm_group(&record.key),
        name: record.key.name().to_owned(),
        kind: Group::KIND.to_owned(),
        location: record.location.clone(),
        tags: record.tags.clone(),
        properties: Group::made(),
    }
}
