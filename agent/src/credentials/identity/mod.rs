//! Identities of groups: tokens by which whoever is asked outside knows which group asks, without a
//! secret that somebody would have to keep. Where they come from is a trait; this node has an issuer
//! of its own behind it.

mod issuer;
mod rotation;

use holdfast_model::{GroupKey, SandboxId, Secret};

pub use self::issuer::{Discovery, Issuer, Jwk, Jwks};
use super::KeyError;

/// Where tokens come from. Calls block.
pub trait TokenSource: Send + Sync {
    /// A token by which whoever is meant by `audience` knows this subject. The same one until it is
    /// to be renewed.
    fn token(
        &self,
        subject: &Subject<'_>,
        audience: &str,
        now_ms: u64,
    ) -> Result<Token, IdentityError>;
}

/// Whose token it is.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    pub group: &'a GroupKey,
    pub sandbox: &'a SandboxId,
    /// `None`: the group's own identity, which every group has.
    pub identity: Option<&'a str>,
}

#[derive(Debug, Clone)]
pub struct Token {
    pub value: Secret,
    /// Milliseconds since 1970. It is put into no request from then on.
    pub expires_at_ms: u64,
    /// Milliseconds since 1970, when another should take its place.
    pub renew_at_ms: u64,
}

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("the group {group} has no identity {identity:?}")]
    NotAssigned { group: GroupKey, identity: String },
    #[error("the key of tokens {id} was wrapped by another node's key")]
    Wrapped { id: String },
    #[error("the keys of tokens cannot be had")]
    Key(#[from] KeyError),
    #[error("a token cannot be written")]
    Form(#[source] serde_json::Error),
    #[error("a token cannot be signed")]
    Sign(#[source] p256::ecdsa::Error),
}

impl IdentityError {
    /// What whoever wrote the rule, or the operator, can do next.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NotAssigned { .. } => "a group has its own identity alone: use SystemAssigned",
            Self::Wrapped { .. } => "restore the file snapshot-key of the state folder",
            Self::Key(error) => error.hint(),
            Self::Form(_) | Self::Sign(_) => "see the node's log",
        }
    }
}

#[cfg(test)]
mod tests;
