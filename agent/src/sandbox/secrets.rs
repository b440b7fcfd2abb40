//! Secrets of groups: sealed with the node's key, and bound to their group and id, so that a record
//! put in another's place opens nothing.

use std::{collections::BTreeMap, sync::Arc};

use holdfast_model::{GroupKey, Secret, State};
use holdfast_netpolicy::{Policy, SecretRef, ValueRef};
use holdfast_store::SecretRecord;
use holdfast_wire::egress::{Credential, Reference};

use log::warn;

use super::{Registry, SecretError, driver::Node, now_ms};
use crate::{blocking::off_thread, error_chain::error_chain};

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
        let put = off_thread(move || {
            let text = serde_json::to_vec(&values).map_err(SecretError::Values)?;
            let sealed = node.snapshots.node_key().seal(&purpose(&group, &id), &text)?;
            let (keys, now) = (values.into_keys().collect(), now_ms());
            let record =
                SecretRecord { group, id, keys, sealed, created_at_ms: now, updated_at_ms: now };
            Ok::<_, SecretError>(node.store.put_secret(record, max)?)
        });
        let put = put.await?;
        if let Some(record) = &put {
            self.bring_secret(&record.group, &record.id).await?;
        }
        Ok(put)
    }

    /// Has every sandbox whose policy refers to the secret use the values it has now: with their
    /// next request.
    async fn bring_secret(&self, group: &GroupKey, id: &str) -> Result<(), SecretError> {
        let refers = |policy: &Policy| {
            policy.value_refs().any(|reference| {
                matches!(reference, ValueRef::SecretRef(secret) if secret.secret_id == id)
            })
        };
        for record in self.node.store.sandboxes(group)? {
            let Some(json) = record.spec.egress_json.filter(|_| record.state == State::Running)
            else {
                continue;
            };
            if !Policy::parse(json.as_bytes()).is_ok_and(|policy| refers(&policy)) {
                continue;
            }
            if let Err(error) = self.change_egress(&record.id, json).await {
                let error = error_chain(&error);
                warn!(id:% = record.id, error:%; "a sandbox has the former values of a secret");
            }
        }
        Ok(())
    }

    /// The values of a secret, as they are now. `None`: the group has no such secret.
    pub fn secret_values(
        &self,
        group: &GroupKey,
        id: &str,
    ) -> Result<Option<BTreeMap<String, Secret>>, SecretError> {
        values(&self.node, group, id)
    }
}

/// The values of a secret, as they are now. `None`: the group has no such secret.
fn values(
    node: &Node,
    group: &GroupKey,
    id: &str,
) -> Result<Option<BTreeMap<String, Secret>>, SecretError> {
    let Some(record) = node.store.secret(group, id)? else { return Ok(None) };
    let opened = node.snapshots.node_key().open(&purpose(group, id), &record.sealed)?;
    let text =
        opened.ok_or_else(|| SecretError::Sealed { group: group.clone(), id: id.to_owned() })?;
    serde_json::from_slice(&text).map(Some).map_err(SecretError::Values)
}

/// The values behind a policy's references, as far as there are any: whoever carries the policy out
/// refuses one that lacks some. Blocks.
pub(super) fn credentials(
    node: &Node,
    group: &GroupKey,
    policy: &Policy,
) -> Result<Vec<Credential>, SecretError> {
    let mut credentials: Vec<Credential> = Vec::new();
    for reference in policy.value_refs() {
        let ValueRef::SecretRef(SecretRef { secret_id, secret_key, .. }) = reference else {
            continue;
        };
        let wanted = Reference::Secret { id: secret_id.clone(), key: secret_key.clone() };
        if credentials.iter().any(|known| known.reference == wanted) {
            continue;
        }
        let Some(values) = values(node, group, secret_id)? else { continue };
        let value = match secret_key {
            Some(key) => values.get(key),
            // The only one it has.
            None => values.values().next().filter(|_| values.len() == 1),
        };
        if let Some(value) = value {
            credentials.push(Credential { reference: wanted, value: value.reveal().to_owned() });
        }
    }
    Ok(credentials)
}
