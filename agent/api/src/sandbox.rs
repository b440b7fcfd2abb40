//! Sandboxes: the create request, its conversion to a spec, and the answer.

use std::collections::BTreeMap;

use holdfast_model::{
    DiskImageId, GroupKey, Mib, MilliCpu, Resources, SandboxId, SandboxSpec, SnapshotId, State,
    StopReason, SuspendMode,
    id::BadId,
    sandbox::{CloneSpec, ImageSource, NewSandbox},
};
use holdfast_netpolicy::Policy;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    decode::BadBody,
    egress,
    labels::{self, Labels},
    lifecycle::Lifecycle,
    path,
};

const SNAPSHOT_ID: &str = "sourcesRef.snapshot.id";

/// Bytes of all environment names and values: what Linux lets a program be started with, less room
/// for the image's own.
const ENVIRONMENT_BYTES_MAX: usize = 64 * 1024;

/// Bytes of an entrypoint or a cmd, for the same reason.
const ARGUMENTS_BYTES_MAX: usize = 64 * 1024;

/// Longest name of a public disk image, in bytes.
pub const PUBLIC_NAME_BYTES_MAX: usize = 128;

/// Body of `PUT …/sandboxes`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct CreateSandbox {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sources_ref: Option<SourcesRef>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourcesBody>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lifecycle: Option<Lifecycle>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<Labels>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub environment: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmd: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress_policy: Option<Policy>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skip_egress_proxy: Option<bool>,

    // Fields of the contract that this node does not carry out yet. They are read so that they can
    // be refused by name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preset_sandbox_type: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volumes: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ports: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub customer_vnet_connection_name: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vmm_type: Option<Value>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct SourcesRef {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_image: Option<DiskImageRef>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotRef>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRef {
    pub id: String,
}

/// Either an id, or the name of a public image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct DiskImageRef {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub is_public: Option<bool>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResourcesBody {
    pub cpu: String,
    pub memory: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
}

impl From<Resources> for ResourcesBody {
    fn from(Resources { cpu, memory, disk }: Resources) -> Self {
        let (cpu, memory, disk) = (cpu.to_string(), memory.to_string(), disk.to_string());
        Self { cpu, memory, disk: Some(disk) }
    }
}

/// Body of `POST /v1/…/sandboxes/{id}/suspend`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Suspend {
    /// What is to be kept. None: what the sandbox's policy says, and memory where it says nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<SuspendMode>,
}

/// One sandbox as every call answers it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sandbox {
    pub id: String,
    pub state: PublicState,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_details: Option<StateDetails>,
    #[serde(default)]
    pub labels: Labels,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourcesBody>,
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandbox_group_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lifecycle: Option<Lifecycle>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sources_ref: Option<SourcesRef>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmd: Option<Vec<String>>,
    /// The one in force, given or not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress_policy: Option<Policy>,
    /// Whether its flows pass the proxy by where the policy lets them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skip_egress_proxy: bool,
}

/// States by their public names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum PublicState {
    Creating,
    Running,
    Stopping,
    Suspended,
    /// Suspended because nobody used it.
    Idle,
    Resuming,
    Deleting,
    Failed,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StateDetails {
    /// Why the sandbox is Failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// Why it was suspended: `UserStopped`, `Idle` or `NodeStopped`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stopped_reason: Option<String>,
    /// RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stopped_at: Option<String>,
    /// What was kept of it, `Memory` or `Disk`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub suspend_mode: Option<SuspendMode>,
}

/// What a sandbox is doing, and why.
#[derive(Debug, Clone)]
pub struct Condition {
    pub state: State,
    /// Why it is Failed, or what went wrong with it last.
    pub failure: Option<String>,
    /// Its last suspend.
    pub stopped: Option<Stopped>,
}

/// A suspend.
#[derive(Debug, Clone)]
pub struct Stopped {
    pub reason: StopReason,
    /// RFC 3339.
    pub at: String,
    pub mode: SuspendMode,
}

impl Condition {
    pub fn public_state(&self) -> PublicState {
        match (self.state, &self.stopped) {
            // Suspended by the node, which also wakes it.
            (
                State::Suspended,
                Some(Stopped { reason: StopReason::Idle | StopReason::NodeStopped, .. }),
            ) => PublicState::Idle,
            (state, _) => state.into(),
        }
    }

    fn details(self) -> Option<StateDetails> {
        let stopped = self.stopped.filter(|_| self.state == State::Suspended);
        let mut details = StateDetails { failure: self.failure, ..StateDetails::default() };
        if let Some(Stopped { reason, at, mode }) = stopped {
            let reason = match reason {
                StopReason::Asked => "UserStopped",
                StopReason::Idle => "Idle",
                StopReason::NodeStopped => "NodeStopped",
            };
            details.stopped_reason = Some(reason.to_owned());
            details.stopped_at = Some(at);
            details.suspend_mode = Some(mode);
        }
        (details != StateDetails::default()).then_some(details)
    }
}

impl From<State> for PublicState {
    fn from(state: State) -> Self {
        match state {
            State::Creating => Self::Creating,
            State::Running => Self::Running,
            State::Stopping => Self::Stopping,
            State::Suspended => Self::Suspended,
            State::Resuming => Self::Resuming,
            State::Deleting => Self::Deleting,
            State::Failed => Self::Failed,
        }
    }
}

impl PublicState {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "Creating",
            Self::Running => "Running",
            Self::Stopping => "Stopping",
            Self::Suspended => "Suspended",
            Self::Idle => "Idle",
            Self::Resuming => "Resuming",
            Self::Deleting => "Deleting",
            Self::Failed => "Failed",
        }
    }
}

impl Sandbox {
    /// The answer for a sandbox of this id, group, spec and condition. `created_at`: RFC 3339.
    pub fn new(
        id: &SandboxId,
        group: &GroupKey,
        (spec, snapshot): (&SandboxSpec, Option<&SnapshotId>),
        condition: Condition,
        created_at: String,
    ) -> Self {
        let disk_image = match &spec.image {
            ImageSource::Disk(id) => {
                DiskImageRef { id: Some(id.to_string()), ..DiskImageRef::default() }
            }
            ImageSource::Public(name) => {
                DiskImageRef { id: None, name: Some(name.clone()), is_public: Some(true) }
            }
        };
        let snapshot = snapshot.map(|id| SnapshotRef { id: id.to_string() });
        Self {
            id: id.to_string(),
            state: condition.public_state(),
            state_details: condition.details(),
            labels: spec.labels.clone(),
            resources: Some(spec.resources.into()),
            environment: spec.environment.clone(),
            sandbox_group_id: Some(path::arm_group(group)),
            // It was written by the conversion below, so it reads back.
            lifecycle: spec.lifecycle_json.as_deref().and_then(|s| serde_json::from_str(s).ok()),
            sources_ref: Some(SourcesRef { disk_image: Some(disk_image), snapshot }),
            created_at: Some(created_at),
            entrypoint: spec.entrypoint.clone(),
            cmd: spec.cmd.clone(),
            egress_policy: Some(egress::of_record(spec.egress_json.as_deref())),
            skip_egress_proxy: spec.skip_egress_proxy,
        }
    }
}

impl TryFrom<CreateSandbox> for NewSandbox {
    type Error = BadBody;

    fn try_from(request: CreateSandbox) -> Result<Self, BadBody> {
        refuse_unsupported(&request)?;
        match &request.sources_ref {
            Some(SourcesRef { disk_image: None, snapshot: Some(SnapshotRef { id }) }) => {
                let snapshot = id
                    .parse()
                    .map_err(|error: BadId| BadBody::shape(SNAPSHOT_ID, error.to_string()))?;
                clone_spec(snapshot, request).map(Self::OfSnapshot)
            }
            Some(SourcesRef { snapshot: Some(_), .. }) => {
                let reason =
                    "a sandbox is made from a disk image or from a snapshot, not from both";
                Err(BadBody::shape("sourcesRef", reason))
            }
            _ => SandboxSpec::try_from(request).map(Self::OfImage),
        }
    }
}

/// A clone is what its snapshot was: what it has of its own are names and what is done with it.
fn clone_spec(snapshot: SnapshotId, request: CreateSandbox) -> Result<CloneSpec, BadBody> {
    let fixed = [
        ("resources", request.resources.is_some()),
        ("environment", request.environment.is_some_and(|variables| !variables.is_empty())),
        ("entrypoint", request.entrypoint.is_some()),
        ("cmd", request.cmd.is_some()),
        ("skipEgressProxy", request.skip_egress_proxy == Some(true)),
    ];
    if let Some((field, _)) = fixed.into_iter().find(|(_, given)| *given) {
        let reason = "is the snapshot's for a sandbox that is made from one: leave it out";
        return Err(BadBody::shape(field, reason));
    }
    let labels = request.labels.unwrap_or_default();
    labels::check(&labels)?;
    let lifecycle_json = request.lifecycle.as_ref().map(Lifecycle::checked_json).transpose()?;
    let egress_json = request.egress_policy.as_ref().map(egress::checked_json).transpose()?;
    Ok(CloneSpec { snapshot, labels, lifecycle_json, egress_json })
}

impl TryFrom<CreateSandbox> for SandboxSpec {
    type Error = BadBody;

    fn try_from(request: CreateSandbox) -> Result<Self, BadBody> {
        let image = image_source(request.sources_ref)?;
        let resources = match request.resources {
            Some(body) => resources(&body)?,
            None => Resources::DEFAULT,
        };
        let labels = request.labels.unwrap_or_default();
        labels::check(&labels)?;
        let environment = request.environment.unwrap_or_default();
        check_environment(&environment)?;
        check_arguments("entrypoint", request.entrypoint.as_deref())?;
        check_arguments("cmd", request.cmd.as_deref())?;
        let skip_egress_proxy = request.skip_egress_proxy.unwrap_or(false);
        if let Some(policy) = request.egress_policy.as_ref().filter(|_| skip_egress_proxy) {
            egress::check_without_proxy(policy)?;
        }
        Ok(Self {
            image,
            resources,
            labels,
            environment,
            entrypoint: request.entrypoint,
            cmd: request.cmd,
            lifecycle_json: request.lifecycle.as_ref().map(Lifecycle::checked_json).transpose()?,
            egress_json: request.egress_policy.as_ref().map(egress::checked_json).transpose()?,
            skip_egress_proxy,
        })
    }
}

/// Refuses what would be dropped. An empty list and `false` ask for nothing and are let through.
fn refuse_unsupported(request: &CreateSandbox) -> Result<(), BadBody> {
    let fields = [
        ("presetSandboxType", request.preset_sandbox_type.as_ref()),
        ("connections", request.connections.as_ref()),
        ("volumes", request.volumes.as_ref()),
        ("ports", request.ports.as_ref()),
        ("customerVnetConnectionName", request.customer_vnet_connection_name.as_ref()),
        ("vmmType", request.vmm_type.as_ref()),
    ];
    let asks = |value: &Value| match value {
        Value::Bool(flag) => *flag,
        Value::Array(items) => !items.is_empty(),
        _ => true,
    };
    let asked = fields.into_iter().find(|(_, value)| value.is_some_and(asks));
    asked.map_or(Ok(()), |(field, _)| Err(BadBody::NotYet { field }))
}

fn image_source(sources: Option<SourcesRef>) -> Result<ImageSource, BadBody> {
    const FIELD: &str = "sourcesRef.diskImage";
    let Some(image) = sources.and_then(|sources| sources.disk_image) else {
        let reason = "'sourcesRef' is required when not using a preset sandbox type";
        return Err(BadBody::shape("sourcesRef", reason));
    };
    match image {
        DiskImageRef { id: Some(id), name: None, is_public: None | Some(false) } => id
            .parse::<DiskImageId>()
            .map(ImageSource::Disk)
            .map_err(|error| BadBody::shape("sourcesRef.diskImage.id", error.to_string())),
        DiskImageRef { id: None, name: Some(name), is_public: Some(true) } => {
            check_public_name(&name)
                .map_err(|reason| BadBody::shape("sourcesRef.diskImage.name", reason))?;
            Ok(ImageSource::Public(name))
        }
        _ => Err(BadBody::shape(FIELD, "must be an id, or a name with isPublic true")),
    }
}

/// Whether `name` can be the name of a public disk image.
pub fn check_public_name(name: &str) -> Result<(), String> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':');
    let fits = (1..=PUBLIC_NAME_BYTES_MAX).contains(&name.len())
        && name.bytes().all(allowed)
        && name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && !name.contains("..");
    if fits {
        return Ok(());
    }
    let shown: String = name.chars().take(40).collect();
    Err(format!(
        "{shown:?} is not the name of a public image: up to {PUBLIC_NAME_BYTES_MAX} letters, digits \
         and -_.: without '..'"
    ))
}

fn resources(body: &ResourcesBody) -> Result<Resources, BadBody> {
    fn amount<T: std::str::FromStr>(field: &str, text: &str) -> Result<T, BadBody>
    where
        T::Err: std::fmt::Display,
    {
        text.parse().map_err(|error: T::Err| BadBody::shape(field, error.to_string()))
    }
    let cpu: MilliCpu = amount("resources.cpu", &body.cpu)?;
    let memory: Mib = amount("resources.memory", &body.memory)?;
    let disk = body.disk.as_deref().map(|text| amount("resources.disk", text)).transpose()?;
    Ok(Resources::new(cpu, memory, disk)?)
}

fn check_environment(environment: &BTreeMap<String, String>) -> Result<(), BadBody> {
    let mut bytes = 0;
    for (name, value) in environment {
        bytes += name.len() + value.len() + 2;
        let name_fits = !name.is_empty() && !name.contains(['=', '\0']);
        if !name_fits || value.contains('\0') {
            let field = format!("environment.{}", name.chars().take(40).collect::<String>());
            return Err(BadBody::shape(field, "a name has no '=', and neither part has a NUL"));
        }
    }
    if bytes > ENVIRONMENT_BYTES_MAX {
        let reason = format!("longer than {ENVIRONMENT_BYTES_MAX} bytes");
        return Err(BadBody::shape("environment", reason));
    }
    Ok(())
}

pub(crate) fn check_arguments(
    field: &'static str,
    arguments: Option<&[String]>,
) -> Result<(), BadBody> {
    let arguments = arguments.unwrap_or_default();
    if arguments.iter().any(|argument| argument.contains('\0')) {
        return Err(BadBody::shape(field, "an argument has no NUL"));
    }
    if arguments.first().is_some_and(String::is_empty) {
        return Err(BadBody::shape(field, "the first argument must not be empty"));
    }
    if arguments.iter().map(|argument| argument.len() + 1).sum::<usize>() > ARGUMENTS_BYTES_MAX {
        return Err(BadBody::shape(field, format!("longer than {ARGUMENTS_BYTES_MAX} bytes")));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
