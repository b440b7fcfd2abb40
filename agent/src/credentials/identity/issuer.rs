//! The node's own issuer: JSON Web Tokens (RFC 7519) signed with ES256, and what is served so that
//! others can verify them (OpenID Connect Discovery 1.0, RFC 7517).

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use holdfast_api::path;
use holdfast_model::{GroupKey, SandboxId, Secret};
use holdfast_snapshot::Key;
use holdfast_store::SigningKeyRecord;
use p256::ecdsa::{Signature, SigningKey, signature::Signer as _};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::{
    IdentityError, Subject, Token, TokenSource,
    rotation::{next_signs_from_ms, over, signer},
};
use crate::{
    auth::hex,
    credentials::{KeyError, Keys, keys::signing_key},
};

/// How long a token is good for.
pub(super) const TOKEN_MS: u64 = 15 * 60 * 1000;

/// So long before its end another takes its place: an agent that is away for less is not missed.
const MARGIN_MS: u64 = 5 * 60 * 1000;

/// Tokens kept. More are made anew each time.
const KEPT_MAX: usize = 4096;

/// Bytes of a token's own number.
const NUMBER_BYTES: usize = 16;

const PURPOSE: &str = "identity tokens 1";

/// Whom a token is of, and for whom: group, sandbox, audience.
type Of = (GroupKey, SandboxId, String);

/// Issues tokens of groups' own identities. Calls block.
pub struct Issuer {
    url: String,
    keys: Arc<Keys>,
    kept: Mutex<HashMap<Of, Token>>,
    /// Held while keys are made and removed.
    turning: Mutex<()>,
}

/// A public key (RFC 7517, RFC 7518 section 6.2).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Jwk {
    pub kty: &'static str,
    pub crv: &'static str,
    pub x: String,
    pub y: String,
    #[serde(rename = "use")]
    pub usage: &'static str,
    pub alg: &'static str,
    pub kid: String,
}

/// Every key that may have signed a token that is good still, or will sign one soon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Jwks {
    pub keys: Vec<Jwk>,
}

/// What who verifies tokens asks for first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Discovery {
    pub issuer: String,
    pub jwks_uri: String,
    pub response_types_supported: [&'static str; 1],
    pub subject_types_supported: [&'static str; 1],
    pub id_token_signing_alg_values_supported: [&'static str; 1],
    pub claims_supported: [&'static str; 9],
}

#[derive(Serialize)]
struct Header<'a> {
    alg: &'static str,
    typ: &'static str,
    kid: &'a str,
}

#[derive(Serialize)]
struct Claims<'a> {
    iss: &'a str,
    sub: String,
    aud: &'a str,
    iat: u64,
    nbf: u64,
    exp: u64,
    jti: String,
    group: String,
    sandbox: &'a str,
}

impl Issuer {
    pub(in crate::credentials) fn new(url: String, keys: Arc<Keys>) -> Self {
        Self { url, keys, kept: Mutex::default(), turning: Mutex::default() }
    }

    pub fn discovery(&self) -> Discovery {
        Discovery {
            issuer: self.url.clone(),
            jwks_uri: format!("{}{}", self.url, path::JWKS),
            response_types_supported: ["id_token"],
            subject_types_supported: ["public"],
            id_token_signing_alg_values_supported: ["ES256"],
            claims_supported: ["iss", "sub", "aud", "iat", "nbf", "exp", "jti", "group", "sandbox"],
        }
    }

    /// The keys to be shown now.
    pub fn jwks(&self, now_ms: u64) -> Result<Jwks, IdentityError> {
        let keys = self.current(now_ms)?;
        let public = keys.iter().map(|record| Ok(jwk(&self.opened(record)?)));
        Ok(Jwks { keys: public.collect::<Result<_, IdentityError>>()? })
    }

    /// The keys, after one was made that is due, and those were removed that are over.
    fn current(&self, now_ms: u64) -> Result<Vec<SigningKeyRecord>, IdentityError> {
        let store = self.keys.store();
        let is_settled = |keys: &[SigningKeyRecord]| {
            next_signs_from_ms(keys, now_ms).is_none() && over(keys, now_ms).is_empty()
        };
        let keys = store.signing_keys().map_err(KeyError::from)?;
        if is_settled(&keys) {
            return Ok(keys);
        }
        let _turning = self.turning.lock().unwrap_or_else(PoisonError::into_inner);
        let keys = store.signing_keys().map_err(KeyError::from)?;
        let made = match next_signs_from_ms(&keys, now_ms) {
            Some(signs_from_ms) => Some(self.made(signs_from_ms)?),
            None => None,
        };
        let removed = over(&keys, now_ms);
        store.change_signing_keys(made.as_ref(), &removed).map_err(KeyError::from)?;
        Ok(store.signing_keys().map_err(KeyError::from)?)
    }

    fn made(&self, signs_from_ms: u64) -> Result<SigningKeyRecord, IdentityError> {
        let key = Key::random().map_err(KeyError::from)?;
        let id = jwk(&signing_key(&key, PURPOSE)?).kid;
        let wrapped = self.keys.node().wrap(&key).map_err(KeyError::from)?;
        log::info!(id:%, signs_from_ms; "a key of tokens was made");
        Ok(SigningKeyRecord { id, wrapped, signs_from_ms })
    }

    fn opened(&self, record: &SigningKeyRecord) -> Result<SigningKey, IdentityError> {
        let key = self.keys.node().unwrap(&record.wrapped).map_err(KeyError::from)?;
        let key = key.ok_or_else(|| IdentityError::Wrapped { id: record.id.clone() })?;
        Ok(signing_key(&key, PURPOSE)?)
    }

    fn issued(
        &self,
        subject: &Subject<'_>,
        audience: &str,
        now_ms: u64,
    ) -> Result<Token, IdentityError> {
        let keys = self.current(now_ms)?;
        // There is one: it was made a moment ago where there was none.
        let record = signer(&keys, now_ms)
            .ok_or_else(|| IdentityError::Wrapped { id: "none".to_owned() })?;
        let mut number = [0; NUMBER_BYTES];
        getrandom::fill(&mut number).map_err(|_| {
            KeyError::from(holdfast_snapshot::SnapshotError::Internal { what: "random bytes" })
        })?;
        let (now, group) = (now_ms / 1000, subject.group.to_string());
        let claims = Claims {
            iss: &self.url,
            sub: format!("sandboxgroup:{group}"),
            aud: audience,
            iat: now,
            nbf: now,
            exp: now + TOKEN_MS / 1000,
            jti: hex(&number),
            group,
            sandbox: subject.sandbox.as_str(),
        };
        let header = Header { alg: "ES256", typ: "JWT", kid: &record.id };
        let part = |json: serde_json::Result<Vec<u8>>| {
            json.map(|json| URL_SAFE_NO_PAD.encode(json)).map_err(IdentityError::Form)
        };
        let (header, body) =
            (part(serde_json::to_vec(&header))?, part(serde_json::to_vec(&claims))?);
        let text = format!("{header}.{body}");
        let signature: Signature =
            self.opened(record)?.try_sign(text.as_bytes()).map_err(IdentityError::Sign)?;
        let signature = URL_SAFE_NO_PAD.encode(signature.to_bytes());
        let expires_at_ms = claims.exp * 1000;
        Ok(Token {
            value: Secret::new(format!("{text}.{signature}")),
            expires_at_ms,
            renew_at_ms: expires_at_ms - MARGIN_MS,
        })
    }

    fn kept(&self) -> MutexGuard<'_, HashMap<Of, Token>> {
        // Nothing that holds the lock can panic half way through a change.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TokenSource for Issuer {
    fn token(
        &self,
        subject: &Subject<'_>,
        audience: &str,
        now_ms: u64,
    ) -> Result<Token, IdentityError> {
        if let Some(identity) = subject.identity {
            let (group, identity) = (subject.group.clone(), identity.to_owned());
            return Err(IdentityError::NotAssigned { group, identity });
        }
        let of = (subject.group.clone(), subject.sandbox.clone(), audience.to_owned());
        // One with more time left than any is given was made before the clock went back.
        let serves = |token: &&Token| {
            now_ms < token.renew_at_ms && token.expires_at_ms <= now_ms.saturating_add(TOKEN_MS)
        };
        if let Some(token) = self.kept().get(&of).filter(serves) {
            return Ok(token.clone());
        }
        let token = self.issued(subject, audience, now_ms)?;
        let mut kept = self.kept();
        if kept.len() >= KEPT_MAX {
            kept.retain(|_, token| serves(&&*token));
        }
        if kept.len() < KEPT_MAX {
            kept.insert(of, token.clone());
        }
        Ok(token)
    }
}

fn jwk(key: &SigningKey) -> Jwk {
    let point = key.verifying_key().to_sec1_point(false);
    // 4, then both coordinates (SEC 1, section 2.3.3).
    let (x, y) = point.as_bytes()[1..].split_at(32);
    let (x, y) = (URL_SAFE_NO_PAD.encode(x), URL_SAFE_NO_PAD.encode(y));
    // Its thumbprint (RFC 7638).
    let members = format!(r#"{{"crv":"P-256","kty":"EC","x":"{x}","y":"{y}"}}"#);
    let kid = URL_SAFE_NO_PAD.encode(Sha256::digest(members));
    Jwk { kty: "EC", crv: "P-256", x, y, usage: "sig", alg: "ES256", kid }
}
