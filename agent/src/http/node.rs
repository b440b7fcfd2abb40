//! The node itself: what it is and has, whether it is well, and its CA.

use std::{collections::BTreeMap, sync::Arc, sync::atomic::Ordering};

use axum::{
    body::Body,
    extract::State,
    http::{HeaderValue, header},
    response::Response,
};
use holdfast_api::{
    model::{Mib, MilliCpu},
    node::{Amounts, DiskUse, NodeInfo},
};

use super::{App, answer::json, problem::Problem, sandboxes::condition};
use crate::{blocking::off_thread, tls};

pub(super) async fn ca(State(app): State<Arc<App>>) -> Response {
    let mut response = text(200, app.tls.authority().pem().to_owned());
    let kind = HeaderValue::from_static("application/x-pem-file");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

/// The process answers.
pub(super) async fn healthz() -> Response {
    text(200, "ok\n".to_owned())
}

/// The node takes work.
pub(super) async fn readyz(State(app): State<Arc<App>>) -> Response {
    if app.stopping.load(Ordering::Acquire) {
        return text(503, "stopping\n".to_owned());
    }
    if app.audit_broken.load(Ordering::Acquire) {
        return text(503, "the audit log cannot be written\n".to_owned());
    }
    text(200, "ok\n".to_owned())
}

pub(super) async fn info(State(app): State<Arc<App>>) -> Result<Response, Problem> {
    let mut sandboxes = BTreeMap::new();
    for record in app.store.all_sandboxes()? {
        let state = condition(&record).public_state().as_str().to_owned();
        *sandboxes.entry(state).or_insert(0) += 1;
    }
    let (cpus, memory_mib) = promised(&app);
    let state = app.config.paths.state.clone();
    let (memory_used_mib, disk_mib, os_release) = off_thread(move || {
        (memory_used_mib().unwrap_or(0), disk_use(&state).unwrap_or_default(), os_release())
    })
    .await;
    let info = NodeInfo {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        hostname: tls::host_name(),
        os_release,
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        addresses: tls::addresses().into_iter().map(|address| address.to_string()).collect(),
        cpus,
        memory_mib,
        memory_used_mib,
        disk_mib,
        sandboxes,
        uptime_seconds: app.started.elapsed().as_secs(),
    };
    Ok(json(200, &info))
}

/// CPUs and memory that may be promised to sandboxes, and that are.
pub(super) fn promised(app: &App) -> (Amounts, Amounts) {
    let (capacity, free) = (app.registry.limits(), app.registry.free());
    let cpus = |amount: MilliCpu| f64::from(amount.0) / 1000.0;
    let mib = |amount: Mib| f64::from(amount.0);
    let amounts = |capacity: f64, free: f64| Amounts { capacity, reserved: capacity - free };
    (amounts(cpus(capacity.cpu), cpus(free.cpu)), amounts(mib(capacity.memory), mib(free.memory)))
}

pub(super) fn text(status: u16, text: String) -> Response {
    let mut response = super::answer::empty(status);
    *response.body_mut() = Body::from(text);
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

fn os_release() -> BTreeMap<String, String> {
    let text = fs_err::read_to_string("/etc/os-release").unwrap_or_default();
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    pairs
        .filter(|(name, _)| !name.starts_with('#'))
        .map(|(name, value)| (name.to_owned(), value.trim_matches(['"', '\'']).to_owned()))
        .collect()
}

fn memory_used_mib() -> Option<u64> {
    let text = fs_err::read_to_string("/proc/meminfo").ok()?;
    let kib = |name: &str| kib_of(&text, name);
    Some(kib("MemTotal:")?.saturating_sub(kib("MemAvailable:")?) / 1024)
}

/// Resident memory of a VMM beyond its guest's, which is the only shared memory it has.
pub(super) fn resident_kib(pid: u32) -> Option<u64> {
    let text = fs_err::read_to_string(format!("/proc/{pid}/status")).ok()?;
    Some(kib_of(&text, "RssAnon:")? + kib_of(&text, "RssFile:")?)
}

/// The number of the line `name <number> kB`.
fn kib_of(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.trim().strip_suffix(" kB")?.parse().ok()
}

pub(super) fn disk_use(folder: &std::path::Path) -> std::io::Result<DiskUse> {
    let stat = rustix::fs::statvfs(folder)?;
    let mib = |blocks: u64| blocks.saturating_mul(stat.f_frsize) / Mib(1).bytes();
    Ok(DiskUse { total: mib(stat.f_blocks), available: mib(stat.f_bavail) })
}
