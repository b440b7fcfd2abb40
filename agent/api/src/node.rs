//! `/v1` answers about the node itself and about what is under a sandbox or disk image.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// `GET /v1/node`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeInfo {
    /// Of the daemon.
    pub version: String,
    pub hostname: String,
    /// `NAME=value` pairs of the host's os-release.
    pub os_release: BTreeMap<String, String>,
    /// Release of the host's kernel.
    pub kernel: String,
    pub addresses: Vec<String>,
    pub cpus: Amounts,
    pub memory_mib: Amounts,
    /// Resident memory of the node that is in use, by everything on it.
    pub memory_used_mib: u64,
    pub disk_mib: DiskUse,
    /// By state.
    pub sandboxes: BTreeMap<String, u64>,
    /// Seconds since the daemon started.
    pub uptime_seconds: u64,
}

/// What may be promised to sandboxes, and what is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Amounts {
    pub capacity: f64,
    pub reserved: f64,
}

/// The state file system.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskUse {
    pub total: u64,
    pub available: u64,
}

/// `GET /v1/node/status`: who has what of the node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeStatus {
    pub cpus: Amounts,
    pub memory_mib: Amounts,
    /// Of the memory and CPUs that the machine has, how many times they may be promised.
    pub memory_factor: f64,
    pub cpu_factor: f64,
    pub disk_mib: DiskUse,
    /// Sandboxes at most, in whatever state.
    pub sandboxes_max: u32,
    /// What bounds sandboxes' disk traffic, in words. None: nothing does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_bound: Option<String>,
    /// Creates refused since the daemon started.
    pub refusals: Refusals,
    /// In the order of their ids.
    pub sandboxes: Vec<SandboxUse>,
}

/// By what was short.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusals {
    pub memory: u64,
    pub cpu: u64,
    pub disk: u64,
    pub count: u64,
}

/// What one sandbox was promised and has used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SandboxUse {
    pub id: String,
    /// `subscription/resource group/name`.
    pub group: String,
    pub state: String,
    pub cpus: f64,
    /// Of the guest.
    pub memory_mib: u32,
    /// Of its cgroup. None when no VMM runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub used: Option<Used>,
}

/// Figures of a cgroup.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Used {
    /// CPU time in seconds.
    pub cpu_seconds: f64,
    /// How long it was held back by its CPU limit.
    pub throttled_seconds: f64,
    pub memory_mib: f64,
    /// The most it ever had.
    pub memory_peak_mib: f64,
    /// Threads.
    pub pids: u64,
    pub io_read_bytes: u64,
    pub io_written_bytes: u64,
}

/// `GET /v1/node/doctor`: a list of these.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HostCheck {
    pub name: String,
    pub verdict: Verdict,
    pub detail: String,
    /// What to do about it. None when it is well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Ok,
    /// Sandboxes run, less well kept apart or less fairly than they could be.
    Warning,
    /// No sandbox can run.
    Failed,
}

/// `GET /v1/node/bundle`: what only the node knows of a support bundle. No token, key, environment
/// value or credential is in it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeBundle {
    /// The configuration as it is in force, TOML; secrets are left out.
    pub config: String,
    /// Last lines of the daemon's log, the oldest first.
    pub log: Vec<String>,
    pub sandboxes: Vec<BundledSandbox>,
    /// About the machine, by name.
    pub host: BTreeMap<String, String>,
    pub checks: Vec<HostCheck>,
    pub status: NodeStatus,
    /// As `/metrics` says it.
    pub metrics: String,
}

/// What a bundle tells of a sandbox: nothing that its owner wrote but the names of things.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BundledSandbox {
    pub id: String,
    pub group: String,
    pub state: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    pub image_digest: String,
    /// Milliseconds since 1970.
    pub created_at_ms: u64,
    pub label_names: Vec<String>,
    pub environment_names: Vec<String>,
    /// Phases of its launch, if it was launched by this daemon and runs.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub phases: Vec<Phase>,
}

/// `GET /v1/…/sandboxes/{id}/details`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SandboxDetails {
    pub id: String,
    pub state: String,
    /// Manifest digest of the image it was made from.
    pub image_digest: String,
    /// None when no VMM runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vmm: Option<VmmDetails>,
    /// Phases of the launch, in their order.
    pub phases: Vec<Phase>,
    /// How it came to run, if it went on from something that was kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resume_report: Option<ResumeReport>,
}

/// What a resume, or the launch of a clone, came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ResumeReport {
    /// `hot`: memory was mapped from a file; `cold`: read from the snapshot's pieces; `booted`: there
    /// was a disk only.
    pub from: String,
    /// In their order; the last, `total`, is from the call until it ran.
    pub phases: Vec<Phase>,
    /// Stored bytes read before it ran or while it does, the frames they were, and the pages of
    /// 4 KiB that were brought by now. 0 where nobody counted.
    pub bytes_read: u64,
    pub frames_read: u64,
    pub pages_read: u64,
    /// Times it waited for a page. None until all are there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub faults: Option<u64>,
    /// How far its clock was set forward, in microseconds. None of one that booted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clock_skew_us: Option<i64>,
    /// TCP connections to others that were ended in it. None where nobody looked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections_reset: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VmmDetails {
    /// On the node.
    pub pid: u32,
    /// VM exits to user space since it started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exits: Option<ExitCounts>,
    /// Memory it uses beyond the guest's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resident_kib: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExitCounts {
    pub mmio: u64,
    pub port_io: u64,
    pub other: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    pub name: String,
    /// How long it took, in microseconds.
    pub us: u64,
}

/// `GET /v1/…/diskimages/{id}/progress`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageProgress {
    /// As in the disk image's status.
    pub state: String,
    pub layers: u32,
    pub layers_done: u32,
    /// Compressed bytes of all layers; 0 while unknown.
    pub bytes: u64,
    pub bytes_done: u64,
}

/// `POST /v1/images:gc`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GcResult {
    pub images_removed: u64,
    pub layers_removed: u64,
    pub blobs_removed: u64,
    pub bytes_freed: u64,
}
