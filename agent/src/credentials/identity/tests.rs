//! Tokens, verified by another library with nothing but what the node serves.

use std::sync::Arc;

use holdfast_store::Store;
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header, jwk::JwkSet};
use serde_json::Value;

use super::{issuer::TOKEN_MS, *};
use crate::credentials::Keys;

const ISSUER: &str = "https://node.test:8443";
const AUDIENCE: &str = "https://vault.test";
const DAY_MS: u64 = 24 * 3600 * 1000;

struct Node {
    folder: tempfile::TempDir,
    issuer: Issuer,
    group: GroupKey,
    sandbox: SandboxId,
}

impl Node {
    fn new() -> Self {
        Self::of(tempfile::tempdir().unwrap())
    }

    fn of(folder: tempfile::TempDir) -> Self {
        let store = Arc::new(Store::open(&folder.path().join("store.redb")).unwrap());
        let keys = Keys::open(folder.path(), store, None).unwrap();
        Self {
            folder,
            issuer: Issuer::new(ISSUER.to_owned(), keys),
            group: GroupKey::local_default(),
            sandbox: SandboxId::from_random([1; 20]),
        }
    }

    fn again(self) -> Self {
        let Self { folder, issuer, .. } = self;
        drop(issuer);
        Self::of(folder)
    }

    fn token(&self, now_ms: u64) -> Token {
        let subject = Subject { group: &self.group, sandbox: &self.sandbox, identity: None };
        self.issuer.token(&subject, AUDIENCE, now_ms).unwrap()
    }

    fn kids(&self, now_ms: u64) -> Vec<String> {
        self.issuer.jwks(now_ms).unwrap().keys.into_iter().map(|key| key.kid).collect()
    }

    /// What a library makes of a token, that has the keys the node shows at a time.
    fn verified(
        &self,
        token: &Token,
        audience: &str,
        now_ms: u64,
    ) -> Result<Value, jsonwebtoken::errors::Error> {
        let served = serde_json::to_string(&self.issuer.jwks(now_ms).unwrap()).unwrap();
        let keys: JwkSet = serde_json::from_str(&served).unwrap();
        let kid = decode_header(token.value.reveal())?.kid.unwrap();
        let Some(key) = keys.find(&kid) else {
            return Err(jsonwebtoken::errors::ErrorKind::InvalidKeyFormat.into());
        };
        let mut validation = Validation::new(Algorithm::ES256);
        validation.set_issuer(&[ISSUER]);
        validation.set_audience(&[audience]);
        validation.set_required_spec_claims(&["iss", "sub", "aud", "exp"]);
        decode(token.value.reveal(), &DecodingKey::from_jwk(key)?, &validation)
            .map(|decoded| decoded.claims)
    }
}

fn now() -> u64 {
    crate::sandbox::now_ms()
}

#[test]
fn a_token_is_verified_by_what_the_node_serves_and_says_who_asks_and_whom() {
    let node = Node::new();
    let token = node.token(now());
    let claims = node.verified(&token, AUDIENCE, now()).unwrap();
    assert_eq!(claims["sub"], "sandboxgroup:local/default/default");
    assert_eq!((&claims["iss"], &claims["aud"]), (&ISSUER.into(), &AUDIENCE.into()));
    assert_eq!(claims["sandbox"], node.sandbox.as_str());
    let lasts = claims["exp"].as_u64().unwrap() - claims["iat"].as_u64().unwrap();
    assert_eq!((lasts, token.expires_at_ms), (900, claims["exp"].as_u64().unwrap() * 1000));
    assert!(node.verified(&token, "https://other.test", now()).is_err());
    // Neither another node's keys nor another text fit the signature.
    assert!(Node::new().verified(&token, AUDIENCE, now()).is_err());
    let (text, signature) = token.value.reveal().rsplit_once('.').unwrap();
    let (header, _) = text.split_once('.').unwrap();
    let forged = node.token(now() + DAY_MS);
    let body = forged.value.reveal().split('.').nth(1).unwrap();
    let forged = Token { value: Secret::new(format!("{header}.{body}.{signature}")), ..forged };
    assert!(node.verified(&forged, AUDIENCE, now()).is_err());

    let discovery = serde_json::to_value(node.issuer.discovery()).unwrap();
    assert_eq!(discovery["issuer"], ISSUER);
    assert_eq!(discovery["jwks_uri"], format!("{ISSUER}/.well-known/jwks.json"));
}

#[test]
fn a_token_is_the_same_until_it_is_to_be_renewed_and_each_sandbox_has_its_own() {
    let node = Node::new();
    let start = now();
    let first = node.token(start);
    assert_eq!(node.token(first.renew_at_ms - 1).value, first.value);
    let second = node.token(first.renew_at_ms);
    assert_ne!(second.value, first.value);
    assert!(first.expires_at_ms - first.renew_at_ms >= 60_000, "no time to bring another");
    let other = SandboxId::from_random([2; 20]);
    let subject = Subject { group: &node.group, sandbox: &other, identity: None };
    let of_other = node.issuer.token(&subject, AUDIENCE, first.renew_at_ms).unwrap();
    assert_ne!(of_other.value, second.value);
    // The clock went back: a token that lasts longer than any is given would be refused as too new.
    assert_ne!(node.token(start - DAY_MS).value, second.value);
}

#[test]
fn a_key_that_was_turned_away_is_shown_until_its_last_token_is_over() {
    let node = Node::new();
    // So that the library, which looks at the clock itself, is asked about the present.
    let turn = now();
    let start = turn - 30 * DAY_MS;
    let old = node.kids(start);
    assert_eq!(old.len(), 1);
    let shown = node.kids(turn - DAY_MS);
    assert_eq!(shown.len(), 2, "the next one is shown a day before it signs");
    let last = node.token(turn - 1);
    assert_eq!(decode_header(last.value.reveal()).unwrap().kid.as_ref(), Some(&old[0]));
    // Kept tokens are of their key still.
    let subject = Subject { group: &node.group, sandbox: &node.sandbox, identity: None };
    let next = node.issuer.token(&subject, "https://other.test", turn).unwrap();
    let kid = decode_header(next.value.reveal()).unwrap().kid.unwrap();
    assert!(kid != old[0] && shown.contains(&kid));
    for (token, audience) in [(&last, AUDIENCE), (&next, "https://other.test")] {
        node.verified(token, audience, turn + TOKEN_MS).unwrap();
    }
    let after = turn + TOKEN_MS + 3600 * 1000;
    assert_eq!(node.kids(after), [kid]);
    assert!(node.verified(&last, AUDIENCE, after).is_err());
}

#[test]
fn keys_outlive_the_daemon_and_are_no_other_nodes() {
    let node = Node::new();
    let (start, token) = (now(), node.token(now()));
    let kids = node.kids(start);
    let node = node.again();
    assert_eq!(node.kids(start), kids);
    node.verified(&token, AUDIENCE, start).unwrap();
    let keys = node.issuer.jwks(start).unwrap();
    assert_eq!(keys.keys.len(), 1);
    let store = Store::open(&node.folder.path().join("other.redb")).unwrap();
    assert_eq!(store.signing_keys().unwrap(), [], "a node's keys are its own");
}

#[test]
fn an_identity_that_the_group_does_not_have_gets_no_token_and_is_named() {
    let node = Node::new();
    let subject =
        Subject { group: &node.group, sandbox: &node.sandbox, identity: Some("/other/group") };
    let error = node.issuer.token(&subject, AUDIENCE, now()).unwrap_err();
    assert!(error.to_string().contains("/other/group"), "{error}");
    assert!(error.hint().contains("SystemAssigned"));
}
