//! Egress policies, what was decided under them, and secrets: everything that needs no microVM.

use holdfast_api::path;
use holdfast_model::{Digest, SandboxId, SandboxSpec, State, id::ID_BYTES, sandbox::ImageSource};
use holdfast_store::{DecisionRecord, SandboxRecord, Store};
use holdfastd::config::Config;
use serde_json::{Value, json};

use crate::server::{Server, group};

fn id() -> SandboxId {
    SandboxId::from_random([7; ID_BYTES])
}

/// A sandbox that runs nothing, and what was decided when it did.
fn plant(config: &mut Config) {
    let store = Store::open(&config.paths.state.join("store.redb")).unwrap();
    let record = SandboxRecord {
        state: State::Failed,
        failure: Some("the machine was lost".to_owned()),
        ..SandboxRecord::accepted(
            id(),
            group(),
            SandboxSpec::of_image(ImageSource::Public("debian".to_owned())),
            Digest::from_sha256([0; 32]),
            0,
        )
    };
    store.put_sandbox(&record).unwrap();
    let decision = |sequence, allowed| DecisionRecord {
        sandbox: id(),
        sequence,
        at_ms: 1_767_323_045_000 + sequence,
        allowed,
        scheme: "https".to_owned(),
        host: "a.test".to_owned(),
        method: "GET".to_owned(),
        path: "/x".to_owned(),
        address: Some([203, 0, 113, 7].into()),
        port: Some(443),
        rule: "default".to_owned(),
        reason: "default_action".to_owned(),
        generation: 1,
        sent_bytes: 1,
        received_bytes: 2,
    };
    let kept = [decision(3, true), decision(4, false), decision(7, false)];
    store.keep_decisions(&kept, &[]).unwrap();
}

fn sandbox() -> String {
    path::sandbox(&group(), id().as_str())
}

async fn in_force(server: &Server) -> Value {
    server.get(&sandbox()).await.json()["egressPolicy"].clone()
}

fn policy() -> Value {
    json!({
        "defaultAction": "Deny",
        "trafficInspection": "Partial",
        "rules": [{
            "name": "key",
            "match": {"host": "api.test", "path": "/v1/*"},
            "action": {"type": "Transform", "headers": [{
                "operation": "Set", "name": "Authorization",
                "valueRef": {"secretRef": {"secretId": "s", "format": "Bearer {value}"}}
            }]}
        }],
        "hostRules": [{"pattern": "*.wild.test", "action": "Allow"}]
    })
}

#[tokio::test]
async fn a_policy_rules_until_another_one_that_is_right_and_outlives_the_daemon() {
    let server = Server::prepared(plant).await;
    let at = path::egress_policy(&group(), id().as_str());
    assert_eq!(in_force(&server).await, json!({"defaultAction": "Deny"}));
    let answer = server.post(&at, policy().to_string()).await;
    assert_eq!((answer.status.as_u16(), answer.json()), (200, policy()));
    assert_eq!(in_force(&server).await, policy());

    let mut wrong = policy();
    wrong["rules"][0]["match"]["host"] = json!("a.*.test");
    let answer = server.post(&at, wrong.to_string()).await;
    let message = answer.refused(400, "InvalidRequest");
    assert!(message.starts_with(r#"rules[0] "key": match.host: "#), "{message}");
    assert!(answer.error().hint.unwrap().contains("`*.example.com`"));
    let mut assigned = policy();
    assigned["rules"][0]["action"]["headers"][0]["valueRef"] = json!({"managedIdentityRef": {
        "type": "UserAssigned", "resource": "https://v.test", "identityResourceId": "/x/other"
    }});
    let answer = server.post(&at, assigned.to_string()).await;
    answer.refused(400, "UnsupportedField");
    let cases = [
        ("", "MalformedJson"),
        ("{}", "InvalidRequest"),
        (r#"{"defaultAction":"Allow","more":1}"#, "InvalidRequest"),
        (r#"{"defaultAction":"Deny","defaultAction":"Allow"}"#, "InvalidRequest"),
    ];
    for (body, code) in cases {
        server.post(&at, body).await.refused(400, code);
    }
    assert_eq!(in_force(&server).await, policy(), "the old policy stays whole");

    let folder = server.stop().await;
    let state = folder.path().join("state");
    let again = Server::prepared(|config| config.paths.state = state).await;
    assert_eq!(in_force(&again).await, policy());
    let explained = path::egress_explain(&group(), id().as_str());
    let explained = format!("{explained}?url=https://x.wild.test/");
    assert_eq!(again.get(&explained).await.json()["generation"], 1);
}

#[tokio::test]
async fn a_create_with_a_policy_that_is_wrong_makes_nothing() {
    let server = Server::start().await;
    let body = |policy: Value| {
        json!({
            "sourcesRef": {"diskImage": {"name": "debian", "isPublic": true}},
            "egressPolicy": policy
        })
        .to_string()
    };
    let at = path::sandboxes(&group());
    let mut wrong = policy();
    wrong["hostRules"][0]["pattern"] = json!("*.test");
    let message = server.put(&at, body(wrong)).await.refused(400, "InvalidRequest");
    assert!(message.starts_with("egressPolicy: hostRules[0]: pattern: "), "{message}");
    // One that is right gets as far as the image, which is not there.
    server.put(&at, body(policy())).await.refused(404, "DiskImageNotFound");
}

#[tokio::test]
async fn decisions_are_told_in_the_contracts_form_and_from_a_number_on() {
    let server = Server::prepared(plant).await;
    let at = path::egress_decisions(&group(), id().as_str());
    let all = server.get(&at).await.json();
    let allowed = json!([{
        "timestamp": "2026-01-02T03:04:05.003Z", "host": "a.test", "method": "GET", "path": "/x",
        "scheme": "https", "sequence": 3, "rule": "default", "reason": "default_action",
        "address": "203.0.113.7", "port": 443, "bytesSent": 1, "bytesReceived": 2, "generation": 1
    }]);
    assert_eq!(all["networkEgress"]["allowed"], allowed);
    assert_eq!(all["networkEgress"]["denied"].as_array().unwrap().len(), 2);
    assert_eq!(all["lastUpdated"], "2026-01-02T03:04:05.007Z");
    assert_eq!((&all["lastSequence"], &all["dropped"]), (&json!(7), &json!(4)));

    let later = server.get(&format!("{at}?after=4")).await.json();
    assert_eq!(later["networkEgress"]["allowed"], json!([]));
    assert_eq!(later["networkEgress"]["denied"][0]["sequence"], 7);
    server.get(&format!("{at}?after=x")).await.refused(400, "InvalidRequest");

    assert_eq!(server.delete(&sandbox()).await.status, 204);
    server.get(&at).await.refused(404, "SandboxNotFound");
    let folder = server.stop().await;
    let store = Store::open(&folder.path().join("state/store.redb")).unwrap();
    assert_eq!(store.all_decisions().unwrap(), [], "they go with their sandbox");
}

#[tokio::test]
async fn an_explanation_names_the_rule_and_what_no_policy_opens() {
    let server = Server::prepared(plant).await;
    let at = path::egress_policy(&group(), id().as_str());
    let mut policy = policy();
    policy["cidrRules"] = json!([{"cidr": "10.0.0.0/8", "protocol": "tcp", "action": "Allow"}]);
    assert_eq!(server.post(&at, policy.to_string()).await.status, 200);
    let at = path::egress_explain(&group(), id().as_str());
    let explain = async |query: &str| server.get(&format!("{at}?{query}")).await;

    let answer = explain("url=https://api.test/v1/x&method=POST").await.json();
    assert_eq!((&answer["verdict"], &answer["generation"]), (&json!("transform"), &json!(1)));
    let steps: Vec<_> = answer["steps"]
        .as_array()
        .unwrap()
        .iter()
        .map(|step| (step["of"].as_str().unwrap(), step["outcome"].as_str().unwrap()))
        .collect();
    assert_eq!(steps, [("dns", "allow"), ("tls", "open"), ("http", "transform")]);
    assert_eq!(answer["steps"][2]["rule"], r#"rules[0] "key""#);

    let denied = explain("url=https://evil.test/").await.json();
    assert_eq!(
        (&denied["verdict"], &denied["steps"][0]["rule"]),
        (&json!("deny"), &json!("default"))
    );
    let inside = explain("url=tcp://10.0.0.1:22").await.json();
    assert_eq!(inside["steps"][0]["rule"], "cidrRules[0]");
    assert_eq!(
        (&inside["verdict"], &inside["steps"][1]["reason"]),
        (&json!("deny"), &json!("denied_range"))
    );
    for query in ["", "url=x", "url=https://a.test/&method=G%20T"] {
        explain(query).await.refused(400, "InvalidRequest");
    }
}

#[tokio::test]
async fn of_a_sandbox_that_skips_its_proxy_the_explanation_is_by_address() {
    let skips = |skips: bool| {
        move |config: &mut Config| {
            plant(config);
            let store = Store::open(&config.paths.state.join("store.redb")).unwrap();
            let mut record = store.sandbox(&id()).unwrap().unwrap();
            record.spec.skip_egress_proxy = skips;
            let policy = json!({"defaultAction": "Allow", "cidrRules": [
                {"cidr": "9.0.0.0/8", "protocol": "udp", "action": "Deny"}]});
            record.spec.egress_json = Some(policy.to_string());
            store.put_sandbox(&record).unwrap();
        }
    };
    let at = path::egress_explain(&group(), id().as_str());
    let ask = async |server: &Server, url: &str| {
        let answer = server.get(&format!("{at}?url={url}")).await.json();
        let steps = answer["steps"].as_array().unwrap();
        let of: Vec<_> = steps.iter().map(|step| step["of"].as_str().unwrap().to_owned()).collect();
        (answer["verdict"].as_str().unwrap().to_owned(), of.join(" "))
    };
    let through = Server::prepared(skips(false)).await;
    let past = Server::prepared(skips(true)).await;
    for (url, by_proxy, by_address) in [
        ("https://a.test/", ("allow", "dns tls"), ("allow", "dns tcp")),
        ("udp://8.8.8.8:443", ("deny", "udp"), ("allow", "udp")),
        ("udp://9.9.9.9:443", ("deny", "udp"), ("deny", "udp")),
        ("udp://10.0.0.1:443", ("deny", "udp"), ("deny", "udp address")),
    ] {
        let expected = |(verdict, of): (&str, &str)| (verdict.to_owned(), of.to_owned());
        assert_eq!(ask(&through, url).await, expected(by_proxy), "{url}");
        assert_eq!(ask(&past, url).await, expected(by_address), "{url}");
    }
}

#[tokio::test]
async fn a_secret_is_kept_sealed_and_given_back_to_whoever_asks_for_its_values_only() {
    let server = Server::start().await;
    let (list, at) = (path::secrets(&group()), path::secret(&group(), "api-key"));
    let none: Value = server.get(&list).await.json();
    assert_eq!(none, json!({"secrets": []}));
    server.get(&format!("{at}/keys")).await.refused(404, "SecretNotFound");
    server.post(&format!("{at}/peek"), "").await.refused(404, "SecretNotFound");
    server.delete(&at).await.refused(404, "SecretNotFound");

    let made = server.put(&at, r#"{"values":{"b":"hunter2-b","a":"hunter2-a"}}"#).await;
    assert_eq!((made.status.as_u16(), &made.json()["id"]), (200, &json!("api-key")));
    assert!(!made.text.contains("hunter2"));
    let listed = server.get(&list).await.json();
    assert_eq!(listed["secrets"][0]["keys"], json!(["a", "b"]));
    assert_eq!(server.get(&format!("{at}/keys")).await.json(), json!({"keys": ["a", "b"]}));
    let peeked = server.post(&format!("{at}/peek"), "").await.json();
    assert_eq!(peeked, json!({"id": "api-key", "values": {"a": "hunter2-a", "b": "hunter2-b"}}));

    // All values are replaced, and a line break is none of a header's.
    assert_eq!(server.put(&at, r#"{"values":{"c":"hunter2-c"}}"#).await.status, 200);
    server.put(&at, r#"{"values":{"c":"x\r\ny"}}"#).await.refused(400, "InvalidRequest");
    let peeked = server.post(&format!("{at}/peek"), "").await.json();
    assert_eq!(peeked["values"], json!({"c": "hunter2-c"}));
    let odd = path::secret(&group(), "..%2fx");
    server.put(&odd, r#"{"values":{"c":"x"}}"#).await.refused(400, "InvalidRequest");

    let log = serde_json::to_string(&server.audit()).unwrap();
    assert!(log.contains("secrets/api-key/peek") && !log.contains("hunter2"), "{log}");
    let folder = server.stop().await;
    let bytes = fs_err::read(folder.path().join("state/store.redb")).unwrap();
    assert!(!bytes.windows(7).any(|window| window == b"hunter2"), "it lies open in the store");

    let state = folder.path().join("state");
    let again = Server::prepared(|config| config.paths.state = state).await;
    let peeked = again.post(&format!("{at}/peek"), "").await.json();
    assert_eq!(peeked["values"], json!({"c": "hunter2-c"}));
    assert_eq!(again.delete(&at).await.status, 204);
    assert_eq!(again.get(&list).await.json(), json!({"secrets": []}));
}

#[tokio::test]
async fn a_group_with_a_secret_is_not_deleted_and_another_group_does_not_see_it() {
    let server = Server::start().await;
    let other = holdfast_model::GroupKey::new("local", "default", "other").unwrap();
    assert_eq!(server.put(&path::arm_group(&other), r#"{"location":"here"}"#).await.status, 201);
    let at = path::secret(&other, "s");
    assert_eq!(server.put(&at, r#"{"values":{"k":"v"}}"#).await.status, 200);
    server.get(&path::secret(&group(), "s")).await.refused(404, "SecretNotFound");
    let message =
        server.delete(&path::arm_group(&other)).await.refused(409, "SandboxGroupNotEmpty");
    assert!(message.contains("1 secrets"), "{message}");
    assert_eq!(server.delete(&at).await.status, 204);
    assert_eq!(server.delete(&path::arm_group(&other)).await.status, 204);
}
