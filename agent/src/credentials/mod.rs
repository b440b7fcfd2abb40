//! What is kept for groups and shown to nobody but those who need it: keys, the CA of each group's
//! egress, values of secrets, tokens of identities. Nothing of it is in a log or an error.

mod identity;
mod keys;
mod secrets;

use std::sync::Arc;

use holdfast_model::{GroupKey, SandboxId};
use holdfast_netpolicy::{Identity, ManagedIdentityRef, Policy, SecretRef, ValueRef};
use holdfast_store::Store;
use holdfast_wire::egress::{Credential, Reference};
use log::warn;

use self::keys::signing_key;
pub(crate) use self::keys::{Keys, Site};
pub use self::{
    identity::{Discovery, IdentityError, Issuer, Jwk, Jwks, Subject, Token, TokenSource},
    keys::KeyError,
    secrets::SecretError,
};
use crate::{
    config::Config,
    egress::{self, Values},
    error_chain::error_chain,
    sandbox::now_ms,
    tls::Authority,
};

/// What the key of a group's CA is derived for. Another number makes other CAs, which guests that
/// run do not trust.
const CA_PURPOSE: &str = "egress CA 1";

/// Bytes of the values that one policy refers to: they have room in a message behind the longest
/// policy. Those beyond are withheld.
const VALUES_BYTES_MAX: usize = 64 * 1024;

/// A token is asked for again after this when there was none.
const TOKEN_AGAIN_MS: u64 = 30_000;

/// All of it. Calls block.
pub struct Vault {
    keys: Arc<Keys>,
    store: Arc<Store>,
    issuer: Arc<Issuer>,
    tokens: Arc<dyn TokenSource>,
}

impl Vault {
    /// With the node's keys, made at the first start.
    pub fn open(config: &Config, store: Arc<Store>) -> Result<Arc<Self>, KeyError> {
        let site = Site::of(&config.remote);
        let keys = Keys::open(&config.paths.state, Arc::clone(&store), site)?;
        let issuer = Arc::new(Issuer::new(config.issuer_url(), Arc::clone(&keys)));
        let tokens = Arc::clone(&issuer) as Arc<dyn TokenSource>;
        Ok(Arc::new(Self { keys, store, issuer, tokens }))
    }

    pub(crate) fn keys(&self) -> &Arc<Keys> {
        &self.keys
    }

    /// Who signs this node's tokens.
    pub fn issuer(&self) -> &Arc<Issuer> {
        &self.issuer
    }

    /// The value behind a reference to a secret. `None`: there is no such value.
    fn secret(&self, group: &GroupKey, of: &SecretRef) -> Option<Credential> {
        let SecretRef { secret_id, secret_key, .. } = of;
        let values = match self.secret_values(group, secret_id) {
            Ok(values) => values?,
            Err(error) => {
                warn!(group:%, secret:% = secret_id, error:% = error_chain(&error); "withheld");
                return None;
            }
        };
        let value = match secret_key {
            Some(key) => values.get(key),
            // The only one it has.
            None => values.values().next().filter(|_| values.len() == 1),
        };
        let reference = Reference::Secret { id: secret_id.clone(), key: secret_key.clone() };
        let value = value?.reveal().to_owned();
        Some(Credential { reference, value, expires_at_ms: None })
    }

    /// A token, and when there should be another. `None`: there is none, and one is tried again then.
    fn token(
        &self,
        group: &GroupKey,
        sandbox: &SandboxId,
        of: &ManagedIdentityRef,
        now_ms: u64,
    ) -> (Option<Credential>, u64) {
        let identity = match &of.identity {
            Identity::SystemAssigned => None,
            Identity::UserAssigned { resource_id } => Some(resource_id.as_str()),
        };
        let subject = Subject { group, sandbox, identity };
        match self.tokens.token(&subject, &of.resource, now_ms) {
            Ok(token) => {
                let reference = Reference::Identity {
                    resource: of.resource.clone(),
                    identity: identity.map(str::to_owned),
                };
                let (value, expires_at_ms) = (token.value.reveal().to_owned(), token.expires_at_ms);
                let expires_at_ms = Some(expires_at_ms);
                (Some(Credential { reference, value, expires_at_ms }), token.renew_at_ms)
            }
            Err(error) => {
                let (error, hint) = (error_chain(&error), error.hint());
                warn!(group:%, sandbox:%, error:%, hint; "an identity has no token");
                (None, now_ms + TOKEN_AGAIN_MS)
            }
        }
    }
}

impl egress::Credentials for Vault {
    /// The CA's key is derived from the group's: it is in the store as that is, wrapped, and on each
    /// node that can open the group's snapshots, whose guests trust it.
    fn authority(&self, group: &GroupKey) -> Result<Authority, KeyError> {
        let key = signing_key(&self.keys.of_group(group)?, CA_PURPOSE)?;
        let made = Authority::of_key(&key, "Holdfast egress CA");
        made.map_err(|source| KeyError::Authority(Box::new(source)))
    }

    fn values(&self, group: &GroupKey, sandbox: &SandboxId, policy: &Policy) -> Values {
        let (mut values, mut bytes, now_ms) = (Values::default(), 0, now_ms());
        for reference in policy.value_refs() {
            let known = |reference: &Reference| {
                values.credentials.iter().any(|known| known.reference == *reference)
            };
            let credential = match reference {
                ValueRef::SecretRef(of) => self.secret(group, of),
                ValueRef::ManagedIdentityRef(of) => {
                    let (credential, renew_at_ms) = self.token(group, sandbox, of, now_ms);
                    let soonest = values.renew_at_ms.map_or(renew_at_ms, |at| at.min(renew_at_ms));
                    values.renew_at_ms = Some(soonest);
                    credential
                }
            };
            let Some(credential) = credential.filter(|it| !known(&it.reference)) else { continue };
            bytes += credential.value.len();
            if bytes > VALUES_BYTES_MAX {
                let of = credential.reference;
                warn!(sandbox:%, of:?, bytes_max = VALUES_BYTES_MAX; "a policy's values are too long");
                break;
            }
            values.credentials.push(credential);
        }
        values
    }
}

#[cfg(test)]
mod tests;
