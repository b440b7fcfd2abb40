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
    /// How long it took, in milliseconds.
    pub ms: u64,
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
