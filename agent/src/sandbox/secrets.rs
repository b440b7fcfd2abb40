//! Secrets of groups, and the sandboxes that run with what is in them.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use holdfast_model::{GroupKey, Secret};
use holdfast_store::SecretRecord;
use tokio::time::timeout;

use super::{Registry, SecretError};
use crate::{blocking::off_thread, credentials::Vault, egress::EgressError};

/// How long a change of a secret waits until every sandbox obeys it. A process that does not answer
/// is ended before that.
const TOLD_PATIENCE: Duration = Duration::from_secs(30);

impl Registry {
    pub fn vault(&self) -> &Arc<Vault> {
        &self.node.vault
    }

    /// Makes the secret, or replaces all its values. Answers when no request is sent with others any
    /// more. `None`: the group has `max` others already.
    pub async fn put_secret(
        &self,
        group: GroupKey,
        id: String,
        values: BTreeMap<String, Secret>,
        max: usize,
    ) -> Result<Option<SecretRecord>, SecretError> {
        let vault = Arc::clone(&self.node.vault);
        let put = off_thread(move || vault.put_secret(group, id, values, max)).await?;
        if let Some(record) = &put {
            self.tell_secret(&record.group, &record.id).await?;
        }
        Ok(put)
    }

    /// Removes the secret. Answers when no request is sent with its values any more: those that need
    /// them are denied. Whether there was one.
    pub async fn remove_secret(&self, group: &GroupKey, id: &str) -> Result<bool, SecretError> {
        let (vault, of, name) = (Arc::clone(&self.node.vault), group.clone(), id.to_owned());
        let removed = off_thread(move || vault.remove_secret(&of, &name)).await?;
        // Also when it was gone: an earlier call may have got no further.
        self.tell_secret(group, id).await?;
        Ok(removed)
    }

    /// Has every sandbox of the group use the values that there are now: with its next request.
    async fn tell_secret(&self, group: &GroupKey, id: &str) -> Result<(), SecretError> {
        let told = timeout(TOLD_PATIENCE, self.node.egress.revalue(group)).await;
        let told = told.unwrap_or(Err(EgressError::Silent { waited: TOLD_PATIENCE }));
        told.map_err(|source| SecretError::NotTold { id: id.to_owned(), source: Box::new(source) })
    }

    /// The values of a secret, as they are now. `None`: the group has no such secret.
    pub fn secret_values(
        &self,
        group: &GroupKey,
        id: &str,
    ) -> Result<Option<BTreeMap<String, Secret>>, SecretError> {
        self.node.vault.secret_values(group, id)
    }
}
