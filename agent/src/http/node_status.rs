//! Who has what of the node, whether its host is as it should be, and the node's part of a support
//! bundle.

use std::sync::Arc;

use axum::{extract::State, response::Response};
use holdfast_api::{
    model::Secret,
    node::{HostCheck, NodeBundle, NodeStatus, Phase, Refusals, SandboxUse, Used},
};
use holdfast_jail::Usage;
use holdfast_store::SandboxRecord;

use super::{
    App,
    answer::json,
    metrics,
    node::{disk_use, promised},
    problem::Problem,
    sandboxes::condition,
};
use crate::{
    auth::ADMIN_TOKEN_FILE,
    blocking::off_thread,
    bundle::{self, Censor, config_text},
    error_chain::error_chain,
    host::{self, Host},
    logging,
    sandbox::DiskBound,
};

const BYTES_PER_MIB: f64 = 1024.0 * 1024.0;
const US_PER_SECOND: f64 = 1e6;

pub(super) async fn status(State(app): State<Arc<App>>) -> Result<Response, Problem> {
    Ok(json(200, &status_of(&app).await?))
}

pub(super) async fn doctor(State(app): State<Arc<App>>) -> Result<Response, Problem> {
    Ok(json(200, &checks(&app).await))
}

pub(super) async fn bundle(State(app): State<Arc<App>>) -> Result<Response, Problem> {
    let records = app.store.all_sandboxes()?;
    let token = app.config.paths.state.join(ADMIN_TOKEN_FILE);
    let (kept, facts) = off_thread(move || {
        let token = fs_err::read_to_string(token).ok();
        (token.map(|token| Secret::new(token.trim())), Host::here().facts())
    })
    .await;
    let censor = Censor::new(&app.config, kept, &records);
    let sandboxes = records.iter().map(|record| {
        let phases = app.registry.phases(&record.id);
        let phase = |(name, us): (&str, u64)| Phase { name: name.to_owned(), us };
        let phases = phases.map(|known| known.list().map(phase).to_vec()).unwrap_or_default();
        bundle::sandbox(record, phases, &censor)
    });
    let bundle = NodeBundle {
        config: config_text(&app.config),
        log: logging::kept().iter().map(|line| censor.clean(line)).collect(),
        sandboxes: sandboxes.collect(),
        host: facts,
        checks: checks(&app).await,
        status: status_of(&app).await?,
        metrics: metrics::text(&app).await?,
    };
    Ok(json(200, &bundle))
}

async fn status_of(app: &Arc<App>) -> Result<NodeStatus, Problem> {
    let records = app.store.all_sandboxes()?;
    let own = Arc::clone(app);
    let (sandboxes, disk_mib) = off_thread(move || {
        let sandboxes: Vec<_> = records.iter().map(|record| sandbox_use(&own, record)).collect();
        (sandboxes, disk_use(&own.config.paths.state).unwrap_or_default())
    })
    .await;
    let (cpus, memory_mib) = promised(app);
    let refused = app.registry.refusals();
    Ok(NodeStatus {
        cpus,
        memory_mib,
        memory_factor: app.config.capacity.memory_factor,
        cpu_factor: app.config.capacity.cpu_factor,
        disk_mib,
        sandboxes_max: app.config.limits.sandboxes_max,
        disk_bound: match app.registry.disk_bound() {
            DiskBound::Cgroup(device) => Some(format!("bounded on device {device}")),
            DiskBound::Vmm => Some("bounded by each VMM, for its own disk".to_owned()),
            DiskBound::None => None,
        },
        refusals: Refusals {
            memory: refused.memory,
            cpu: refused.cpu,
            disk: refused.disk,
            count: refused.count,
        },
        sandboxes,
    })
}

fn sandbox_use(app: &App, record: &SandboxRecord) -> SandboxUse {
    let resources = record.spec.resources;
    SandboxUse {
        id: record.id.to_string(),
        group: record.group.to_string(),
        state: condition(record).public_state().as_str().to_owned(),
        cpus: f64::from(resources.cpu.0) / 1000.0,
        memory_mib: resources.memory.0,
        used: app.registry.usage(&record.id).map(used),
    }
}

#[expect(clippy::cast_precision_loss, reason = "amounts far below 2^53")]
fn used(usage: Usage) -> Used {
    Used {
        cpu_seconds: usage.cpu_us as f64 / US_PER_SECOND,
        throttled_seconds: usage.throttled_us as f64 / US_PER_SECOND,
        memory_mib: usage.memory_bytes as f64 / BYTES_PER_MIB,
        memory_peak_mib: usage.memory_peak_bytes as f64 / BYTES_PER_MIB,
        pids: usage.pids,
        io_read_bytes: usage.io_read_bytes,
        io_written_bytes: usage.io_written_bytes,
    }
}

/// The host's checks and the ones of what the agent needs of it.
async fn checks(app: &Arc<App>) -> Vec<HostCheck> {
    let app = Arc::clone(app);
    off_thread(move || {
        let mut checks = Host::here().examine(app.config.host.smt);
        checks.push(match app.registry.cgroups_ready() {
            Ok(()) => host::ok("cgroups", "cpu, memory and pids are there for sandboxes"),
            Err(error) => host::failed("cgroups", error_chain(&error), error.hint()),
        });
        let remedy = "keep the state folder on one disk, offer the cgroups the io controller, and \
                      set limits.io_mib_per_second";
        checks.push(match app.registry.disk_bound() {
            DiskBound::Cgroup(device) => {
                host::ok("disk traffic", format!("bounded on device {device}"))
            }
            DiskBound::Vmm => host::warning(
                "disk traffic",
                "bounded by each VMM for its own disk: what reading an image costs is not",
                remedy,
            ),
            DiskBound::None => host::warning(
                "disk traffic",
                "not bounded: one sandbox can take all of the disk's",
                remedy,
            ),
        });
        checks
    })
    .await
}
