//! What a node keeps for its groups: the same after a restart and on another node of the site, and
//! nowhere as it is.

use std::path::Path;

use egress::Credentials as _;
use fs_err as fs;
use holdfast_model::Secret;

use super::*;

const SITE_KEY: &str = "0101010101010101010101010101010101010101010101010101010101010101";

fn group(name: &str) -> GroupKey {
    GroupKey::new("local", "default", name).unwrap()
}

/// A node that has this state. `groups`: those whose snapshots leave it.
fn vault(state: &Path, groups: &[&str]) -> Arc<Vault> {
    let mut config = Config::default();
    config.paths.state = state.to_owned();
    if !groups.is_empty() {
        config.remote.url = "s3://bucket/site".to_owned();
        config.remote.site_key = Some(Secret::new(SITE_KEY));
        config.remote.groups = groups.iter().map(|name| (*name).to_owned()).collect();
    }
    let store = Arc::new(Store::open(&state.join("store.redb")).unwrap());
    Vault::open(&config, store).unwrap()
}

fn ca(vault: &Vault, name: &str) -> Authority {
    vault.authority(&group(name)).unwrap()
}

#[test]
fn a_groups_ca_outlives_the_daemon_and_is_no_other_groups() {
    let state = tempfile::tempdir().unwrap();
    let before = vault(state.path(), &[]);
    let (one, other) = (ca(&before, "one"), ca(&before, "other"));
    assert_ne!(one.fingerprint(), other.fingerprint());
    assert_ne!(one.key_pem(), other.key_pem());
    drop(before);
    let after = ca(&vault(state.path(), &[]), "one");
    assert_eq!((after.pem(), after.key_pem()), (one.pem(), one.key_pem()));
}

#[test]
fn a_groups_ca_is_the_same_on_each_node_that_can_open_its_snapshots_and_on_no_other() {
    let states = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let one = ca(&vault(states[0].path(), &["one"]), "one");
    let same = ca(&vault(states[1].path(), &["*"]), "one");
    assert_eq!((one.pem(), one.key_pem()), (same.pem(), same.key_pem()));
    let alone = ca(&vault(states[2].path(), &[]), "one");
    assert_ne!(one.key_pem(), alone.key_pem());
}

#[test]
fn a_leaf_of_one_node_is_trusted_by_a_guest_that_has_the_certificate_of_another() {
    use rustls::{
        RootCertStore,
        client::{WebPkiServerVerifier, danger::ServerCertVerifier as _},
        pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject as _},
    };
    let states = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let [here, there] = states.each_ref().map(|state| ca(&vault(state.path(), &["*"]), "one"));
    // As an egress process does, of what it is told.
    let key = rcgen::KeyPair::from_pem(&there.key_pem()).unwrap();
    let issuer = rcgen::Issuer::from_ca_cert_pem(there.pem(), key).unwrap();
    let leaf = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["a.test".to_owned()]).unwrap();
    let leaf = params.signed_by(&leaf, &issuer).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(here.pem().as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider);
    let name = ServerName::try_from("a.test").unwrap();
    verifier
        .build()
        .unwrap()
        .verify_server_cert(leaf.der(), &[], &name, &[], UnixTime::now())
        .unwrap();
}

#[test]
fn a_group_that_nothing_depends_on_takes_the_sites_key_when_there_is_one() {
    let (alone, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let default = GroupKey::local_default();
    let node = vault(alone.path(), &[]);
    node.store.put_group(&crate::http::default_group()).unwrap();
    let own = node.authority(&default).unwrap();
    drop(node);
    let node = vault(alone.path(), &["*"]);
    let theirs = vault(other.path(), &["*"]).authority(&default).unwrap();
    assert_eq!(node.authority(&default).unwrap().pem(), theirs.pem());
    assert_ne!(own.pem(), theirs.pem());
}

#[test]
fn no_key_of_a_ca_lies_open_in_the_state_folder() {
    let state = tempfile::tempdir().unwrap();
    let node = vault(state.path(), &["*"]);
    let ca = ca(&node, "one");
    let scalar = signing_key(&node.keys.of_group(&group("one")).unwrap(), CA_PURPOSE).unwrap();
    let group_key = *node.keys.of_group(&group("one")).unwrap().reveal();
    drop(node);
    let line = ca.key_pem().lines().nth(1).unwrap().to_owned();
    let secrets = [line.into_bytes(), scalar.to_bytes().to_vec(), group_key.to_vec()];
    let mut looked_at = 0;
    for entry in fs::read_dir(state.path()).unwrap() {
        let bytes = fs::read(entry.unwrap().path()).unwrap();
        looked_at += 1;
        for secret in &secrets {
            assert!(!bytes.windows(secret.len()).any(|part| part == &secret[..]));
        }
    }
    assert_eq!(looked_at, 2, "the node's key and the store");
}

#[test]
fn values_are_those_of_now_each_once_and_of_tokens_with_their_time() {
    let state = tempfile::tempdir().unwrap();
    let node = vault(state.path(), &[]);
    let put = |value: &str| {
        let values = [("k".to_owned(), Secret::new(value))].into();
        node.put_secret(group("one"), "s".to_owned(), values, 10).unwrap().unwrap();
    };
    let header = |name: &str, reference: &str| {
        format!(r#"{{"operation":"Set","name":"{name}","valueRef":{reference}}}"#)
    };
    let secret = r#"{"secretRef":{"secretId":"s"}}"#;
    let identity =
        r#"{"managedIdentityRef":{"type":"SystemAssigned","resource":"https://v.test"}}"#;
    let headers = [header("a", secret), header("b", secret), header("c", identity)].join(",");
    let policy = format!(
        r#"{{"defaultAction":"Deny","rules":[{{"match":{{"host":"a.test"}},
        "action":{{"type":"Transform","headers":[{headers}]}}}}]}}"#
    );
    let policy = Policy::parse(policy.as_bytes()).unwrap();
    let sandbox = SandboxId::from_random([1; 20]);
    let values = |name: &str| node.values(&group(name), &sandbox, &policy);
    put("first");
    put("second");
    let now = values("one");
    let [of_secret, token] = &now.credentials[..] else { panic!("{now:?}") };
    assert_eq!((of_secret.value.as_str(), of_secret.expires_at_ms), ("second", None));
    assert!(token.expires_at_ms > now.renew_at_ms && now.renew_at_ms > Some(now_ms()));
    assert_eq!(values("other").credentials.len(), 1, "another group's secret");
    assert!(node.remove_secret(&group("one"), "s").unwrap());
    assert_eq!(values("one").credentials.len(), 1);
    assert!(!format!("{now:?}").contains("second"));

    put(&"x".repeat(VALUES_BYTES_MAX));
    assert_eq!(values("one").credentials.len(), 1, "there is no room for both");
}
