//! `/metrics`: brings the metrics up to date and prints them; and the count of every answer.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    extract::{MatchedPath, Request, State},
    http::{HeaderValue, header},
    middleware::Next,
    response::Response,
};
use holdfast_api::model::Mib;
use holdfast_store::StoreError;

use super::{
    App,
    node::{self, disk_use, promised, resident_kib},
    problem::Problem,
};
use crate::{
    blocking::off_thread,
    metrics::{CONTENT_TYPE, Now},
};

/// Counts the answer by method, route and status.
pub(super) async fn count(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let response = next.run(request).await;
    let route = route.as_ref().map(MatchedPath::as_str);
    app.metrics.answered(method.as_str(), route, response.status().as_u16());
    response
}

pub(super) async fn scrape(State(app): State<Arc<App>>) -> Result<Response, Problem> {
    let mut response = node::text(200, text(&app).await?);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(CONTENT_TYPE));
    Ok(response)
}

/// Every metric as it is now.
pub(super) async fn text(app: &App) -> Result<String, Problem> {
    // One at a time: counters of other parts are brought up to date by their difference.
    let _alone = app.measuring.lock().await;
    app.registry.count().await;
    // A store that cannot be read is one of the things to be told here: it counts as no sandbox.
    let sandboxes = by_state(app).unwrap_or_default();
    let (state, pids) = (app.config.paths.state.clone(), app.registry.vmm_pids());
    let (memory, disk, agent, files) = off_thread(move || {
        let residents: Vec<u64> = pids.into_iter().filter_map(resident_kib).collect();
        let files = fs_err::read_dir("/proc/self/fd").map_or(0, Iterator::count);
        let disk = disk_use(&state).unwrap_or_default();
        (residents, disk, resident_kib(std::process::id()).unwrap_or(0), files)
    })
    .await;
    let (cpus, _) = promised(app);
    let (memory_offered, memory_free) = (app.registry.limits().memory, app.registry.free().memory);
    let refusals = app.registry.refusals();
    let (egress_processes, egress_sandboxes) = app.registry.egress().counts();
    app.metrics.measured(&Now {
        sandboxes,
        vmm_resident_bytes: memory.iter().sum::<u64>() * 1024,
        vmm_resident_largest_bytes: memory.iter().max().copied().unwrap_or(0) * 1024,
        memory_capacity_bytes: memory_offered.bytes(),
        memory_reserved_bytes: memory_offered.bytes().saturating_sub(memory_free.bytes()),
        cpus_capacity: cpus.capacity,
        cpus_reserved: cpus.reserved,
        disk_total_bytes: disk.total * Mib(1).bytes(),
        disk_available_bytes: disk.available * Mib(1).bytes(),
        slots_ready: u64::try_from(app.registry.slots_ready()).unwrap_or(u64::MAX),
        egress_processes: u64::try_from(egress_processes).unwrap_or(u64::MAX),
        egress_sandboxes: u64::try_from(egress_sandboxes).unwrap_or(u64::MAX),
        byways: u64::try_from(app.registry.egress().byways()).unwrap_or(u64::MAX),
        byway_bytes: app.registry.egress().bypassed().await,
        unrecorded: app.registry.egress().unrecorded(),
        agent_resident_bytes: agent * 1024,
        agent_open_files: u64::try_from(files).unwrap_or(u64::MAX),
        refusals: [
            ("memory", refusals.memory),
            ("cpu", refusals.cpu),
            ("disk", refusals.disk),
            ("count", refusals.count),
        ],
        store_errors: app.store.errors(),
    });
    app.metrics.text().map_err(|error| Problem::internal(&error, "see the node's log"))
}

fn by_state(app: &App) -> Result<BTreeMap<&'static str, u64>, StoreError> {
    use holdfast_api::model::State;
    let mut sandboxes = BTreeMap::new();
    for record in app.store.all_sandboxes()? {
        let state = match record.state {
            State::Creating => "creating",
            State::Running => "running",
            State::Stopping => "stopping",
            State::Suspended => "suspended",
            State::Resuming => "resuming",
            State::Deleting => "deleting",
            State::Failed => "failed",
        };
        *sandboxes.entry(state).or_insert(0) += 1;
    }
    Ok(sandboxes)
}
