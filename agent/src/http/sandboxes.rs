//! `…/sandboxes`.

use std::sync::Arc;

use axum::{body::Body, extract::State, response::Response};
use holdfast_api::{
    labels::LabelFilter,
    lifecycle::Lifecycle,
    model::sandbox::NewSandbox,
    node::{ExitCounts, Phase, ResumeReport, SandboxDetails, VmmDetails},
    sandbox::{Condition, CreateSandbox, Sandbox, Stopped, Suspend},
};
use holdfast_store::SandboxRecord;

use super::{
    App,
    answer::{empty, json, rfc3339},
    body,
    paging::page,
    problem::Problem,
    request::{Here, InGroup, OfSandbox, Query, RequestId},
};
use crate::sandbox::{DeleteError, ExecError, ResumeError, RuntimeDetails};

type Answer = Result<Response, Problem>;

pub(super) async fn create(
    State(app): State<Arc<App>>,
    InGroup(group): InGroup,
    RequestId(request_id): RequestId,
    body: Body,
) -> Answer {
    let request: CreateSandbox = body::json(body).await?;
    let new = NewSandbox::try_from(request)?;
    let _making = app.making_in(&group).await?;
    let record = app.registry.create(group, new, request_id).await?;
    Ok(json(201, &sandbox(&record)))
}

pub(super) async fn list(
    State(app): State<Arc<App>>,
    InGroup(group): InGroup,
    query: Query,
    here: Here,
) -> Answer {
    let filter: LabelFilter = query.get("labels").unwrap_or_default().parse()?;
    let records = app.registry.list(&group)?.into_iter();
    let matching = records.filter(|record| filter.matches(&record.spec.labels));
    let page = page(matching, &query, &here, |r| r.id.as_str(), |record| sandbox(&record));
    Ok(json(200, &page))
}

pub(super) async fn get(OfSandbox(record): OfSandbox) -> Answer {
    Ok(json(200, &sandbox(&record)))
}

pub(super) async fn delete(State(app): State<Arc<App>>, OfSandbox(record): OfSandbox) -> Answer {
    match app.registry.delete(&record.id).await {
        Ok(()) => Ok(empty(204)),
        // It goes on; the client asks again until it gets 404.
        Err(DeleteError::Slow { .. }) => Ok(empty(202)),
        Err(error) => Err(error.into()),
    }
}

pub(super) async fn stop(State(app): State<Arc<App>>, OfSandbox(record): OfSandbox) -> Answer {
    app.registry.suspend(&record.id, None).await?;
    Ok(empty(204))
}

/// As `stop`, for who says what is to be kept.
pub(super) async fn suspend(
    State(app): State<Arc<App>>,
    OfSandbox(record): OfSandbox,
    body: Body,
) -> Answer {
    let Suspend { mode } = body::json(body).await?;
    app.registry.suspend(&record.id, mode).await?;
    Ok(empty(204))
}

pub(super) async fn resume(State(app): State<Arc<App>>, OfSandbox(record): OfSandbox) -> Answer {
    match app.registry.resume(&record.id).await {
        // It goes on; the client asks until it is Running.
        Ok(()) | Err(ResumeError::Slow { .. }) => Ok(empty(204)),
        Err(error) => Err((&error).into()),
    }
}

/// A policy that the body leaves out stays as it is.
pub(super) async fn lifecycle(
    State(app): State<Arc<App>>,
    OfSandbox(record): OfSandbox,
    body: Body,
) -> Answer {
    let change: Lifecycle = body::json(body).await?;
    let now = Lifecycle::of_record(record.spec.lifecycle_json.as_deref()).changed(change);
    app.registry.change_lifecycle(&record.id, now.checked_json()?).await?;
    Ok(json(200, &now))
}

pub(super) async fn details(State(app): State<Arc<App>>, OfSandbox(record): OfSandbox) -> Answer {
    let runtime = match app.registry.details(&record.id).await {
        Ok(runtime) => Some(runtime),
        Err(ExecError::NotRunning { .. }) => None,
        Err(error) => return Err(Problem::of_exec(&error)),
    };
    let details = SandboxDetails {
        id: record.id.to_string(),
        state: condition(&record).public_state().as_str().to_owned(),
        image_digest: record.image.to_string(),
        vmm: runtime.as_ref().map(vmm),
        phases: runtime.as_ref().map(phases).unwrap_or_default(),
        resume_report: runtime.as_ref().and_then(|runtime| runtime.report).map(report),
    };
    Ok(json(200, &details))
}

fn vmm(runtime: &RuntimeDetails) -> VmmDetails {
    let exits = runtime.vmm.as_ref().map(|stats| ExitCounts {
        mmio: stats.exits.mmio,
        port_io: stats.exits.port_io,
        other: stats.exits.other,
    });
    VmmDetails {
        pid: runtime.vmm_pid,
        exits,
        resident_kib: super::node::resident_kib(runtime.vmm_pid),
    }
}

fn phases(runtime: &RuntimeDetails) -> Vec<Phase> {
    runtime.phases.list().map(phase).into()
}

fn phase((name, us): (&str, u64)) -> Phase {
    Phase { name: name.to_owned(), us }
}

fn report(report: crate::sandbox::ResumeReport) -> ResumeReport {
    let crate::sandbox::ResumeReport { phases, fetched, mended } = report;
    ResumeReport {
        from: fetched.warmth.as_str().to_owned(),
        phases: phases.list().map(phase).into(),
        bytes_read: fetched.bytes,
        frames_read: fetched.frames,
        pages_read: fetched.pages,
        faults: fetched.faults,
        clock_skew_us: mended.map(|mended| mended.skew_ns / 1000),
        connections_reset: mended.and_then(|mended| mended.connections_reset),
    }
}

pub(super) fn sandbox(record: &SandboxRecord) -> Sandbox {
    Sandbox::new(
        &record.id,
        &record.group,
        (&record.spec, record.from_snapshot.as_ref()),
        condition(record),
        rfc3339(record.created_at_ms),
    )
}

/// What the record says of the sandbox's state.
pub(super) fn condition(record: &SandboxRecord) -> Condition {
    Condition {
        state: record.state,
        failure: record.failure.clone(),
        stopped: record.saved.as_ref().filter(|saved| !saved.of_another).map(|saved| Stopped {
            reason: saved.reason,
            at: rfc3339(saved.at_ms),
            mode: saved.mode,
        }),
    }
}
