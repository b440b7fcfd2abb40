//! Snapshots: the bodies of the calls that make them, and the answers.

use serde::{Deserialize, Serialize};

use crate::{
    decode::BadBody,
    labels::{self, Labels},
    sandbox::{ResourcesBody, Sandbox},
};

/// Sandboxes made by one fork.
pub const FORKS_MAX: u32 = 64;

/// Body of `POST …/sandboxes/{id}/snapshot`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CreateSnapshot {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<Labels>,
}

impl CreateSnapshot {
    pub fn checked(self) -> Result<Labels, BadBody> {
        let labels = self.labels.unwrap_or_default();
        labels::check(&labels)?;
        Ok(labels)
    }
}

/// Body of `POST /v1/…/sandboxes/{id}/fork`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Fork {
    pub count: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<Labels>,
}

impl Default for Fork {
    fn default() -> Self {
        Self { count: 1, labels: None }
    }
}

impl Fork {
    pub fn checked(self) -> Result<(u32, Labels), BadBody> {
        if !(1..=FORKS_MAX).contains(&self.count) {
            return Err(BadBody::shape("count", format!("must be 1 to {FORKS_MAX}")));
        }
        let labels = self.labels.unwrap_or_default();
        labels::check(&labels)?;
        Ok((self.count, labels))
    }
}

/// Answer of a fork, in the order in which they were made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Forked {
    pub value: Vec<Sandbox>,
}

/// One snapshot as every call answers it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Snapshot {
    pub id: String,
    #[serde(default)]
    pub labels: Labels,
    /// The sandbox it was made of, which may be gone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandbox_id: Option<String>,
    /// `Ready`: one that is not is not seen.
    pub status: String,
    /// RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created_at_utc: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourcesBody>,
    /// MiB on disk, rounded up, what it shares with others included.
    #[serde(rename = "sizeInMB", skip_serializing_if = "Option::is_none")]
    pub size_in_mb: Option<u64>,
}

/// What a snapshot is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SnapshotDetails {
    pub id: String,
    pub format: u32,
    pub image_digest: String,
    /// Layers of changed pages that its memory is looked up in.
    pub memory_layers: usize,
    /// Pieces it needs, and their bytes.
    pub pieces: usize,
    pub piece_bytes: u64,
    /// Bytes of the disk's file.
    pub disk_bytes: u64,
    /// Whether its memory lies there as a plain file, from which a clone begins at once.
    pub hot: bool,
    /// In the remote store: `no` (the group's stay on the node), `waiting`, `failing: REASON`, `done`.
    pub upload: String,
}

/// A snapshot in the remote store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RemoteSnapshot {
    pub id: String,
    /// The sandbox it was made of, on whatever node.
    pub sandbox_id: String,
    /// RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created_at_utc: Option<String>,
}

/// Answer of the list of them, at most 1000.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteSnapshots {
    pub value: Vec<RemoteSnapshot>,
}

/// What a verification read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotVerified {
    pub id: String,
    pub layers: usize,
    pub frames: u64,
}

/// What a collection removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SnapshotsCollected {
    pub pieces_removed: u64,
    pub bytes_freed: u64,
    /// A snapshot was being written: nothing was removed.
    pub postponed: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::decode;

    #[test]
    fn what_the_sdk_sends_is_read_and_what_is_out_of_bounds_is_refused_by_name() {
        let read = |text: &str| decode::<CreateSnapshot>(text.as_bytes())?.checked();
        assert_eq!(read("{}").unwrap(), Labels::new());
        assert_eq!(read(r#"{"labels":{"name":"n"}}"#).unwrap()["name"], "n");
        assert!(read(r#"{"label":{}}"#).is_err());
        assert!(read(r#"{"labels":{"a=b":"n"}}"#).is_err());
        let read = |text: &str| decode::<Fork>(text.as_bytes())?.checked();
        assert_eq!(read("{}").unwrap().0, 1);
        for count in [0, FORKS_MAX + 1] {
            let error = read(&format!(r#"{{"count":{count}}}"#)).unwrap_err();
            assert!(error.to_string().starts_with("count: "), "{error}");
        }
    }

    #[test]
    fn the_answer_has_the_form_the_sdk_reads() {
        let snapshot = Snapshot {
            id: "a".to_owned(),
            labels: Labels::new(),
            sandbox_id: Some("b".to_owned()),
            status: "Ready".to_owned(),
            created_at_utc: Some("2026-01-02T03:04:05Z".to_owned()),
            resources: None,
            size_in_mb: Some(3),
        };
        let golden = r#"{"id":"a","labels":{},"sandboxId":"b","status":"Ready","createdAtUtc":"2026-01-02T03:04:05Z","sizeInMB":3}"#;
        assert_eq!(serde_json::to_string(&snapshot).unwrap(), golden);
    }
}
