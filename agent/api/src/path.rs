//! Paths of the API, for clients. The daemon's router is tested against them.

use holdfast_model::GroupKey;

/// Provider part of the ARM paths.
pub const ARM_PROVIDER: &str = "providers/Microsoft.App/sandboxGroups";

/// Data plane of one group.
pub fn group(key: &GroupKey) -> String {
    let (subscription, resource_group) = (key.subscription(), key.resource_group());
    let name = key.name();
    format!("/subscriptions/{subscription}/resourceGroups/{resource_group}/sandboxGroups/{name}")
}

/// Groups of a subscription's resource group, as ARM has them.
pub fn arm_groups(subscription: &str, resource_group: &str) -> String {
    format!("/subscriptions/{subscription}/resourceGroups/{resource_group}/{ARM_PROVIDER}")
}

/// One group as ARM has it; also its `id`.
pub fn arm_group(key: &GroupKey) -> String {
    format!("{}/{}", arm_groups(key.subscription(), key.resource_group()), key.name())
}

pub fn sandboxes(key: &GroupKey) -> String {
    format!("{}/sandboxes", group(key))
}

pub fn sandbox(key: &GroupKey, id: &str) -> String {
    format!("{}/sandboxes/{id}", group(key))
}

pub fn execute_shell_command(key: &GroupKey, id: &str) -> String {
    format!("{}/executeShellCommand", sandbox(key, id))
}

pub fn files(key: &GroupKey, id: &str) -> String {
    format!("{}/files", sandbox(key, id))
}

pub fn snapshot_of(key: &GroupKey, id: &str) -> String {
    format!("{}/snapshot", sandbox(key, id))
}

/// POST of a [`crate::sandbox::Suspend`].
pub fn suspend(key: &GroupKey, id: &str) -> String {
    format!("/v1{}/suspend", sandbox(key, id))
}

/// POST: copies of a sandbox, beside it.
pub fn fork(key: &GroupKey, id: &str) -> String {
    format!("/v1{}/fork", sandbox(key, id))
}

pub fn snapshots(key: &GroupKey) -> String {
    format!("{}/snapshots", group(key))
}

pub fn snapshot(key: &GroupKey, id: &str) -> String {
    format!("{}/snapshots/{id}", group(key))
}

/// What a snapshot is made of: [`crate::snapshot::SnapshotDetails`].
pub fn snapshot_details(key: &GroupKey, id: &str) -> String {
    format!("/v1{}/details", snapshot(key, id))
}

/// POST: reads all of a snapshot and says whether it is sound.
pub fn verify(key: &GroupKey, id: &str) -> String {
    format!("/v1{}/verify", snapshot(key, id))
}

pub fn disk_images(key: &GroupKey) -> String {
    format!("{}/diskimages", group(key))
}

pub fn disk_image(key: &GroupKey, id: &str) -> String {
    format!("{}/diskimages/{id}", group(key))
}

pub fn public_disk_images(key: &GroupKey) -> String {
    format!("{}/diskimages/public", group(key))
}

/// POST of a policy: what may leave the sandbox from now on.
pub fn egress_policy(key: &GroupKey, id: &str) -> String {
    format!("{}/egresspolicy", sandbox(key, id))
}

/// What was decided about the sandbox's flows: [`crate::egress::EgressDecisions`]. With the query
/// parameter `after` only those of a higher number.
pub fn egress_decisions(key: &GroupKey, id: &str) -> String {
    format!("{}/egress-decisions", sandbox(key, id))
}

/// What would be decided, and why: [`crate::egress::Explanation`]. With the query parameters `url`
/// and `method`.
pub fn egress_explain(key: &GroupKey, id: &str) -> String {
    format!("/v1{}/egress-explain", sandbox(key, id))
}

pub fn secrets(key: &GroupKey) -> String {
    format!("{}/secrets", group(key))
}

pub fn secret(key: &GroupKey, id: &str) -> String {
    format!("{}/secrets/{id}", group(key))
}

/// What a sandbox is made of on the node: [`crate::node::SandboxDetails`].
pub fn details(key: &GroupKey, id: &str) -> String {
    format!("/v1{}/details", sandbox(key, id))
}

/// Exec with streams, over WebSocket: see [`crate::stream`].
pub fn exec(key: &GroupKey, id: &str) -> String {
    format!("/v1{}/exec", sandbox(key, id))
}

/// How far the making of a disk image is: [`crate::node::ImageProgress`].
pub fn progress(key: &GroupKey, id: &str) -> String {
    format!("/v1{}/progress", disk_image(key, id))
}

/// PUT of an archive; with the query parameter `name`.
pub fn import(key: &GroupKey) -> String {
    format!("/v1{}/images:import", group(key))
}

/// GET: snapshots of the group in the remote store.
pub fn remote_snapshots(key: &GroupKey) -> String {
    format!("/v1{}/remotesnapshots", group(key))
}

/// POST: brings one of them to the node.
pub fn fetch_snapshot(key: &GroupKey, id: &str) -> String {
    format!("{}/{id}/fetch", remote_snapshots(key))
}

pub const NODE: &str = "/v1/node";
pub const NODE_STATUS: &str = "/v1/node/status";
pub const NODE_DOCTOR: &str = "/v1/node/doctor";
pub const NODE_BUNDLE: &str = "/v1/node/bundle";
pub const METRICS: &str = "/metrics";
pub const IMAGES_GC: &str = "/v1/images:gc";
pub const SNAPSHOTS_GC: &str = "/v1/snapshots:gc";
pub const CA: &str = "/v1/ca.pem";
/// What whoever verifies tokens of groups' identities asks for first.
pub const OPENID: &str = "/.well-known/openid-configuration";
/// The keys that they are signed with.
pub const JWKS: &str = "/.well-known/jwks.json";
pub const HEALTHZ: &str = "/healthz";
pub const READYZ: &str = "/readyz";
