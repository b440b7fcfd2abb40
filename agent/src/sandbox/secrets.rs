//! Secrets of groups: sealed with the node's key, and bound to their group and id, so that a record
//! put in another's place opens nothing.

use std::{collections::BTreeMap, sync::Arc};

use holdfast_model::{GroupKey, Secret};
use holdfast_store::SecretRecord;

use super::{Registry, SecretError, now_ms};
use crate::blocking::off_thread;

fn purpose(group: &GroupKey, id: &str) -> String {
    format!("secret {group}/{id}")
}

impl Registry {
    /// Makes the secret, or replaces all its values. `None`: the group has `max` others already.
    pub async fn put_secret(
        &self,
        group: GroupKey,
        id: String,
        values: BTreeMap<String, Secret>,
        max: usize,
    ) -> Result<Option<SecretRecord>, SecretError> {
        let node = Arc::clone(&self.node);
        off_thread(move || {
            let text = serde_json::to_vec(&values).map_err(SecretError::Values)?;
            let sealed = node.snapshots.node_key().seal(&purpose(&group, &id), &text)?;
            let (keys, now) = (values.into_keys().collect(), now_ms());
            let record =
                SecretRecord { group, id, keys, sealed, created_at_ms: now, updated_at_ms: now };
            Ok(node.store.put_secret(record, max)?)
        })
        .await
    }

    /// The values of a secret, as they are now. `None`: the group has no such secret.
    pub fn secret_values(
        &self,
        group: &GroupKey,
        id: &str,
    ) -> Result<Option<BTreeMap<String, Secret>>, SecretError> {
        let Some(record) = self.node.store.secret(group, id)? else { return Ok(None) };
        let opened = self.node.snapshots.node_key().open(&purpose(group, id), &record.sealed)?;
        let text = opened
            .ok_or_else(|| SecretError::Sealed { group: group.clone(), id: id.to_owned() })?;
        serde_json::from_slice(&text).map(Some).map_err(SecretError::Values)
    }
}
