//! What the node serves so that others can verify tokens of groups' identities.

use std::sync::Arc;

use holdfast_api::path;
use holdfast_model::SandboxId;
use holdfast_store::Store;
use holdfastd::{
    config::Config,
    credentials::{Subject, TokenSource as _, Vault},
    sandbox::now_ms,
};
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header, jwk::JwkSet};
use reqwest::Method;
use serde_json::Value;

use crate::server::{Answer, Server, group};

const ISSUER: &str = "https://node.test";
const AUDIENCE: &str = "https://vault.test";

#[tokio::test]
async fn a_token_of_the_node_is_verified_by_what_anybody_is_served() {
    let server = Server::prepared(|config| config.identity.issuer = ISSUER.to_owned()).await;
    let open =
        async |path: &str| Answer::of(server.open(Method::GET, path).send().await.unwrap()).await;
    let discovery = open(path::OPENID).await;
    assert_eq!(discovery.status, 200);
    let discovery = discovery.json();
    assert_eq!(discovery["issuer"], ISSUER);
    let below = discovery["jwks_uri"].as_str().unwrap().strip_prefix(ISSUER).unwrap();
    let served = open(below).await;
    assert_eq!(
        (served.status.as_u16(), &served.headers["cache-control"]),
        (200, &"public, max-age=3600".parse().unwrap())
    );
    let keys: JwkSet = serde_json::from_str(&served.text).unwrap();
    assert_eq!(keys.keys.len(), 1);
    for field in served.json()["keys"][0].as_object().unwrap().keys() {
        assert!(["kty", "crv", "x", "y", "use", "alg", "kid"].contains(&field.as_str()), "{field}");
    }

    // What the daemon's egress processes are given, by the same part of it.
    let folder = server.stop().await;
    let mut config = Config::default();
    config.identity.issuer = ISSUER.to_owned();
    config.paths.state = folder.path().join("state");
    let store = Arc::new(Store::open(&config.paths.state.join("store.redb")).unwrap());
    let vault = Vault::open(&config, store).unwrap();
    let (group, sandbox) = (group(), SandboxId::from_random([1; 20]));
    let subject = Subject { group: &group, sandbox: &sandbox, identity: None };
    let token = vault.issuer().token(&subject, AUDIENCE, now_ms()).unwrap();
    let kid = decode_header(token.value.reveal()).unwrap().kid.unwrap();
    let key = DecodingKey::from_jwk(keys.find(&kid).unwrap()).unwrap();
    let mut validation = Validation::new(Algorithm::ES256);
    validation.set_issuer(&[ISSUER]);
    validation.set_audience(&[AUDIENCE]);
    let claims = decode::<Value>(token.value.reveal(), &key, &validation).unwrap().claims;
    assert_eq!(claims["sub"], format!("sandboxgroup:{group}"));
    assert_eq!(claims["sandbox"], sandbox.as_str());
    let bytes = fs_err::read(folder.path().join("state/store.redb")).unwrap();
    let shown = token.value.reveal().as_bytes();
    assert!(!bytes.windows(40).any(|part| part == &shown[..40]), "a token is kept");
}
