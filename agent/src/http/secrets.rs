//! `…/secrets`: values of a group that the rules of egress policies put into headers.

use std::sync::Arc;

use axum::{body::Body, extract::State, response::Response};
use holdfast_api::{
    error::Code,
    model::GroupKey,
    secret::{PutSecret, SECRETS_MAX, SecretInfo, SecretKeys, SecretValues, Secrets},
};
use holdfast_store::SecretRecord;

use super::{
    App,
    answer::{empty, json, rfc3339},
    body,
    problem::Problem,
    request::{InGroup, Name, shortened},
};

type Answer = Result<Response, Problem>;

pub(super) async fn list(State(app): State<Arc<App>>, InGroup(group): InGroup) -> Answer {
    let secrets = app.store.secrets(&group)?.iter().map(info).collect();
    Ok(json(200, &Secrets { secrets, next_link: None }))
}

pub(super) async fn put(
    State(app): State<Arc<App>>,
    InGroup(group): InGroup,
    Name(id): Name,
    body: Body,
) -> Answer {
    let request: PutSecret = body::json(body).await?;
    let values = request.checked(&id)?;
    let _making = app.making_in(&group).await?;
    match app.registry.put_secret(group.clone(), id, values, SECRETS_MAX).await? {
        Some(record) => Ok(json(200, &info(&record))),
        None => {
            let message =
                format!("the group {group} has {SECRETS_MAX} secrets, as many as it keeps");
            Err(Problem::new(Code::NoCapacity, message, "delete some, or put values into one"))
        }
    }
}

pub(super) async fn get(
    State(app): State<Arc<App>>,
    InGroup(group): InGroup,
    Name(id): Name,
) -> Answer {
    Ok(json(200, &info(&known(&app, &group, &id)?)))
}

pub(super) async fn keys(
    State(app): State<Arc<App>>,
    InGroup(group): InGroup,
    Name(id): Name,
) -> Answer {
    Ok(json(200, &SecretKeys { keys: known(&app, &group, &id)?.keys }))
}

pub(super) async fn peek(
    State(app): State<Arc<App>>,
    InGroup(group): InGroup,
    Name(id): Name,
) -> Answer {
    let values = app.registry.secret_values(&group, &id)?;
    let values = values.ok_or_else(|| none(&group, &id))?;
    Ok(json(200, &SecretValues { id, values }))
}

pub(super) async fn delete(
    State(app): State<Arc<App>>,
    InGroup(group): InGroup,
    Name(id): Name,
) -> Answer {
    if app.registry.remove_secret(&group, &id).await? {
        Ok(empty(204))
    } else {
        Err(none(&group, &id))
    }
}

fn known(app: &App, group: &GroupKey, id: &str) -> Result<SecretRecord, Problem> {
    app.store.secret(group, id)?.ok_or_else(|| none(group, id))
}

fn none(group: &GroupKey, id: &str) -> Problem {
    let message = format!("there is no secret {} in group {group}", shortened(id));
    Problem::new(Code::SecretNotFound, message, "GET …/secrets lists them")
}

fn info(record: &SecretRecord) -> SecretInfo {
    SecretInfo {
        id: record.id.clone(),
        keys: record.keys.clone(),
        created_at: rfc3339(record.created_at_ms),
        updated_at: rfc3339(record.updated_at_ms),
    }
}
