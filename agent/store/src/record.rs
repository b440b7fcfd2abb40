//! The records themselves.

use std::{collections::BTreeMap, net::IpAddr};

use holdfast_model::{
    Digest, DiskImageId, GroupKey, SandboxId, SandboxSpec, SnapshotId, State, StopReason,
    SuspendMode,
};
use serde::{Deserialize, Serialize};

/// One sandbox, from the moment its creation was accepted until it is gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxRecord {
    pub id: SandboxId,
    pub group: GroupKey,
    pub spec: SandboxSpec,
    pub state: State,
    /// Why it is Failed. `None` in every other state.
    pub failure: Option<String>,
    /// What the spec's image was when the sandbox was made: a tag that moves later does not matter.
    pub image: Digest,
    /// Milliseconds since 1970.
    pub created_at_ms: u64,
    /// The client's name for the create call: a second call of this name finds this record.
    pub request_id: Option<String>,
    /// User id of its VMM, from the moment one is about to be started.
    #[serde(default)]
    pub uid: Option<u32>,
    /// Its last committed state, from its first suspend on. While it runs, the one to fall back to.
    #[serde(default)]
    pub saved: Option<Saved>,
    /// The snapshot it was made from. It may be gone by now.
    #[serde(default)]
    pub from_snapshot: Option<SnapshotId>,
    /// How often its egress policy was given, the first time included: decisions say under which
    /// they were made.
    #[serde(default)]
    pub egress_generation: u64,
}

impl SandboxRecord {
    /// Of a sandbox whose creation was just accepted.
    pub fn accepted(
        id: SandboxId,
        group: GroupKey,
        spec: SandboxSpec,
        image: Digest,
        created_at_ms: u64,
    ) -> Self {
        Self {
            id,
            group,
            spec,
            state: State::Creating,
            failure: None,
            image,
            created_at_ms,
            request_id: None,
            uid: None,
            saved: None,
            from_snapshot: None,
            egress_generation: 0,
        }
    }
}

/// A suspend that was committed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    pub snapshot: SnapshotId,
    /// Milliseconds since 1970.
    pub at_ms: u64,
    pub reason: StopReason,
    /// It is not the sandbox's own: the sandbox is a clone and was not suspended yet.
    #[serde(default)]
    pub of_another: bool,
    /// What was kept of it. Records of agents that knew no other are of memory.
    #[serde(default)]
    pub mode: SuspendMode,
    /// What the guest was told of its link to the outside, as a digest. `None`: not known.
    #[serde(default)]
    pub network: Option<String>,
}

/// A snapshot that a client asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    pub id: SnapshotId,
    pub group: GroupKey,
    /// Whose state it is. That sandbox may be gone by now.
    pub sandbox: SandboxId,
    pub labels: BTreeMap<String, String>,
    /// What it is kept as: several, and sandboxes too, may share one.
    pub data: SnapshotId,
    /// What a sandbox made from it is.
    pub spec: SandboxSpec,
    pub image: Digest,
    /// Bytes on disk of all it needs, what it shares with others included.
    pub bytes: u64,
    /// Milliseconds since 1970.
    pub created_at_ms: u64,
    /// The client's name for the call that made it.
    pub request_id: Option<String>,
}

/// The key of a group's snapshots, wrapped with the node's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupSecretRecord {
    pub group: GroupKey,
    pub wrapped: Vec<u8>,
}

/// Values of a group that rules refer to, sealed with the node's key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretRecord {
    pub group: GroupKey,
    pub id: String,
    /// Names of its values.
    pub keys: Vec<String>,
    pub sealed: Vec<u8>,
    /// Milliseconds since 1970.
    pub created_at_ms: u64,
    /// Milliseconds since 1970.
    pub updated_at_ms: u64,
}

/// A key that tokens of identities are signed with, wrapped with the node's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SigningKeyRecord {
    /// As tokens name it.
    pub id: String,
    pub wrapped: Vec<u8>,
    /// Milliseconds since 1970. The newest key whose time has come signs.
    pub signs_from_ms: u64,
}

/// What was decided about one flow of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecisionRecord {
    pub sandbox: SandboxId,
    /// Counts the sandbox's decisions from 1 on.
    pub sequence: u64,
    /// Milliseconds since 1970.
    pub at_ms: u64,
    pub allowed: bool,
    /// `dns`, `tls`, `http`, `https`, `tcp` or `udp`.
    pub scheme: String,
    /// A name, or an address where there was no name.
    pub host: String,
    /// Of a request its method, of a query the record type; else empty.
    #[serde(default)]
    pub method: String,
    /// Without the query.
    #[serde(default)]
    pub path: String,
    /// What was dialled, if anything was.
    #[serde(default)]
    pub address: Option<IpAddr>,
    #[serde(default)]
    pub port: Option<u16>,
    /// `rules[3] "name"`, `hostRules[0]`, `cidrRules[1]` or `default`.
    pub rule: String,
    pub reason: String,
    /// Of the policy that it was made under.
    pub generation: u64,
    /// Bytes from the sandbox, if they were counted by then.
    #[serde(default)]
    pub sent_bytes: u64,
    /// Bytes to the sandbox, if they were counted by then.
    #[serde(default)]
    pub received_bytes: u64,
}

/// Where a disk image is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskImageState {
    /// It is being fetched and converted.
    Creating,
    Ready,
    Failed,
}

/// One disk image of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskImageRecord {
    pub id: DiskImageId,
    pub group: GroupKey,
    /// The image reference or archive name as the client gave it.
    pub base: String,
    pub labels: BTreeMap<String, String>,
    /// `None`: the image's own.
    pub entrypoint: Option<Vec<String>>,
    /// `None`: the image's own.
    pub cmd: Option<Vec<String>>,
    pub state: DiskImageState,
    /// Why it is Failed. `None` in every other state.
    pub message: Option<String>,
    /// What to do about the failure.
    pub hint: Option<String>,
    /// `Some` when Ready.
    pub digest: Option<Digest>,
    /// Milliseconds since 1970.
    pub created_at_ms: u64,
    pub request_id: Option<String>,
}

/// One sandbox group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupRecord {
    pub key: GroupKey,
    pub location: String,
    pub tags: BTreeMap<String, String>,
    /// The `properties` object as the client sent it.
    pub properties_json: String,
    /// Milliseconds since 1970.
    pub created_at_ms: u64,
}
