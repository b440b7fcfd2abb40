//! Secrets of groups: sealed with the node's key, and bound to their group and id, so that a record
//! put in another's place opens nothing.

use std::collections::BTreeMap;

use holdfast_model::{GroupKey, Secret};
use holdfast_snapshot::SnapshotError;
use holdfast_store::{SecretRecord, StoreError};

use super::Vault;
use crate::sandbox::now_ms;

/// Why a secret could not be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error("the values of secret {id} of group {group} were sealed by another node or changed")]
    Sealed { group: GroupKey, id: String },
    #[error("the values of a secret are not what was kept")]
    Values(#[source] serde_json::Error),
    #[error(transparent)]
    Seal(#[from] SnapshotError),
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It is kept, or gone, as was asked; somebody may have the former values still.
    #[error("an egress process was not told of the change of secret {id} yet")]
    NotTold {
        id: String,
        #[source]
        source: Box<crate::egress::EgressError>,
    },
}

impl SecretError {
    /// What the operator can do next.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Sealed { .. } | Self::Values(_) => "put the secret again",
            Self::Seal(_) => "see the node's log",
            Self::Store(error) => error.hint(),
            Self::NotTold { .. } => "ask again: it is told then, or has ended",
        }
    }
}

fn purpose(group: &GroupKey, id: &str) -> String {
    format!("secret {group}/{id}")
}

impl Vault {
    /// Makes the secret, or replaces all its values. `None`: the group has `max` others already.
    pub fn put_secret(
        &self,
        group: GroupKey,
        id: String,
        values: BTreeMap<String, Secret>,
        max: usize,
    ) -> Result<Option<SecretRecord>, SecretError> {
        let text = serde_json::to_vec(&values).map_err(SecretError::Values)?;
        let sealed = self.keys.node().seal(&purpose(&group, &id), &text)?;
        let (keys, now) = (values.into_keys().collect(), now_ms());
        let record =
            SecretRecord { group, id, keys, sealed, created_at_ms: now, updated_at_ms: now };
        Ok(self.store.put_secret(record, max)?)
    }

    /// Whether there was one.
    pub fn remove_secret(&self, group: &GroupKey, id: &str) -> Result<bool, SecretError> {
        Ok(self.store.remove_secret(group, id)?)
    }

    /// The values of a secret, as they are now. `None`: the group has no such secret.
    pub fn secret_values(
        &self,
        group: &GroupKey,
        id: &str,
    ) -> Result<Option<BTreeMap<String, Secret>>, SecretError> {
        let Some(record) = self.store.secret(group, id)? else { return Ok(None) };
        let opened = self.keys.node().open(&purpose(group, id), &record.sealed)?;
        let text = opened
            .ok_or_else(|| SecretError::Sealed { group: group.clone(), id: id.to_owned() })?;
        serde_json::from_slice(&text).map(Some).map_err(SecretError::Values)
    }
}
