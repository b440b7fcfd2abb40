//! Bodies as the SDK sends and reads them.

use super::*;
use crate::{decode::decode, error::Code};

const MINIMAL: &str = r#"{"sourcesRef":{"diskImage":{"name":"debian","isPublic":true}}}"#;

/// What the published SDK sends for a create with every served option.
const FULL: &str = r#"{
    "sourcesRef": {"diskImage": {"id": "aaaaaaaaaaaaaaaaaaaa"}},
    "resources": {"cpu": "500m", "memory": "1024Mi", "disk": "10Gi"},
    "lifecycle": {"autoSuspendPolicy": {"enabled": true, "interval": 300, "mode": "Memory"}},
    "labels": {"app": "web"},
    "environment": {"A": "1"},
    "entrypoint": ["/bin/x"],
    "cmd": ["a", ""],
    "ports": [], "volumes": [], "connections": [], "skipEgressProxy": false
}"#;

fn new(text: &str) -> Result<NewSandbox, BadBody> {
    decode::<CreateSandbox>(text.as_bytes()).and_then(NewSandbox::try_from)
}

fn spec(text: &str) -> Result<SandboxSpec, BadBody> {
    match new(text)? {
        NewSandbox::OfImage(spec) => Ok(spec),
        NewSandbox::OfSnapshot(spec) => panic!("{spec:?}"),
    }
}

/// The minimal request with one more field.
fn with(field: &str) -> String {
    format!("{},{field}}}", MINIMAL.strip_suffix('}').unwrap())
}

#[test]
fn the_smallest_request_is_a_sandbox_of_the_default_tier() {
    let spec = spec(MINIMAL).unwrap();
    assert_eq!(spec.image, ImageSource::Public("debian".to_owned()));
    assert_eq!(spec.resources, Resources::DEFAULT);
}

#[test]
fn every_served_field_reaches_the_spec() {
    let spec = spec(FULL).unwrap();
    assert_eq!(spec.image, ImageSource::Disk("aaaaaaaaaaaaaaaaaaaa".parse().unwrap()));
    assert_eq!(
        spec.resources,
        Resources { cpu: MilliCpu(500), memory: Mib(1024), disk: Mib(10240) }
    );
    assert_eq!(spec.labels["app"], "web");
    assert_eq!(spec.environment["A"], "1");
    assert_eq!(spec.entrypoint.as_deref().unwrap(), ["/bin/x"]);
    assert_eq!(spec.cmd.as_deref().unwrap(), ["a", ""]);
    let lifecycle = r#"{"autoSuspendPolicy":{"enabled":true,"interval":300,"mode":"Memory"}}"#;
    assert_eq!(spec.lifecycle_json.as_deref().unwrap(), lifecycle);
}

#[test]
fn a_field_that_is_not_carried_out_is_refused_by_name() {
    let cases = [
        ("presetSandboxType", r#""code""#),
        ("connections", r#"["c"]"#),
        ("volumes", r#"[{"volumeName":"v","mountpoint":"/v"}]"#),
        ("ports", r#"[{"port":80}]"#),
        ("customerVnetConnectionName", r#""v""#),
        ("vmmType", r#""x""#),
    ];
    for (field, value) in cases {
        let error = spec(&with(&format!("\"{field}\":{value}"))).unwrap_err();
        assert_eq!(error, BadBody::NotYet { field });
        assert_eq!(error.code(), Code::UnsupportedField);
    }
}

#[test]
fn a_policy_that_is_wrong_refuses_the_sandbox_and_names_the_rule() {
    let policy = |text: &str| with(&format!(r#""egressPolicy":{text}"#));
    let kept = spec(&policy(r#"{"defaultAction":"Allow"}"#)).unwrap().egress_json;
    assert_eq!(kept.as_deref(), Some(r#"{"defaultAction":"Allow"}"#));
    assert_eq!(spec(MINIMAL).unwrap().egress_json, None);
    let cases = [
        ("{}", "egressPolicy: defaultAction: is missing"),
        (r#"{"defaultAction":"allow"}"#, "egressPolicy.defaultAction: unknown variant"),
        (
            r#"{"defaultAction":"Deny","rules":[{"name":"n","match":{"host":"*.com"},"action":{"type":"Allow"}}]}"#,
            "egressPolicy: rules[0] \"n\": match.host: ",
        ),
    ];
    for (text, start) in cases {
        let error = spec(&policy(text)).unwrap_err();
        assert_eq!(error.code(), Code::InvalidRequest);
        assert!(error.to_string().starts_with(start), "{error}");
    }
}

#[test]
fn a_sandbox_that_skips_the_proxy_has_no_policy_that_only_a_proxy_could_carry_out() {
    let skipping =
        |policy: &str| spec(&with(&format!(r#""skipEgressProxy":true,"egressPolicy":{policy}"#)));
    assert!(!spec(MINIMAL).unwrap().skip_egress_proxy);
    assert!(spec(&with(r#""skipEgressProxy":true"#)).unwrap().skip_egress_proxy);
    let by_address = r#"{"defaultAction":"Allow","cidrRules":[{"cidr":"9.9.9.9/32","protocol":"tcp","action":"Deny"}]}"#;
    assert!(skipping(by_address).unwrap().skip_egress_proxy);
    for (policy, field) in [
        (
            r#"{"defaultAction":"Allow","hostRules":[{"pattern":"a.test","action":"Deny"}]}"#,
            "hostRules",
        ),
        (r#"{"defaultAction":"Allow","trafficInspection":"Full"}"#, "trafficInspection"),
    ] {
        let error = skipping(policy).unwrap_err();
        assert_eq!(error.code(), Code::InvalidRequest);
        assert!(error.to_string().starts_with(&format!("egressPolicy.{field}: ")), "{error}");
    }
}

#[test]
fn a_clone_has_names_of_its_own_and_the_rest_from_its_snapshot() {
    let source = r#"{"sourcesRef":{"snapshot":{"id":"aaaaaaaaaaaaaaaaaaaa"}}"#;
    let asked = |more: &str| new(&format!("{source}{more}}}"));
    let NewSandbox::OfSnapshot(clone) = asked(r#","labels":{"a":"b"}"#).unwrap() else { panic!() };
    assert_eq!(clone.snapshot.as_str(), "aaaaaaaaaaaaaaaaaaaa");
    assert_eq!((clone.labels["a"].as_str(), clone.lifecycle_json), ("b", None));
    assert_eq!(clone.egress_json, None);
    let own = r#","egressPolicy":{"defaultAction":"Deny"}"#;
    let NewSandbox::OfSnapshot(clone) = asked(own).unwrap() else { panic!() };
    assert_eq!(clone.egress_json.as_deref(), Some(r#"{"defaultAction":"Deny"}"#));
    let cases = [
        (r#","resources":{"cpu":"1","memory":"2Gi"}"#, "resources: "),
        (r#","environment":{"A":"1"}"#, "environment: "),
        (r#","entrypoint":["x"]"#, "entrypoint: "),
        (r#","cmd":[]"#, "cmd: "),
        (r#","skipEgressProxy":true"#, "skipEgressProxy: "),
        (r#","labels":{"a=b":"c"}"#, "labels.a=b: "),
    ];
    for (more, start) in cases {
        let error = asked(more).unwrap_err();
        assert!(error.to_string().starts_with(start), "{error}");
    }
    let error = new(r#"{"sourcesRef":{"snapshot":{"id":"s"}}}"#).unwrap_err();
    assert!(error.to_string().starts_with(SNAPSHOT_ID), "{error}");
    let both =
        r#"{"sourcesRef":{"snapshot":{"id":"aaaaaaaaaaaaaaaaaaaa"},"diskImage":{"id":"b"}}}"#;
    assert!(new(both).unwrap_err().to_string().starts_with("sourcesRef: "));
}

#[test]
fn a_value_that_cannot_be_worked_with_is_refused_by_its_field() {
    let cases = [
        (r#""labels":{"a=b":"c"}"#, "labels.a=b: "),
        (r#""environment":{"A=B":"c"}"#, "environment.A=B: "),
        ("\"environment\":{\"A\":\"\\u0000\"}", "environment.A: "),
        (r#""entrypoint":[""]"#, "entrypoint: "),
        ("\"cmd\":[\"\\u0000\"]", "cmd: "),
        (r#""resources":{"cpu":"1","memory":"2048"}"#, "resources.memory: "),
        (r#""resources":{"cpu":"x","memory":"2Gi"}"#, "resources.cpu: "),
        (r#""resources":{"cpu":"1","memory":"2Gi","disk":"big"}"#, "resources.disk: "),
        (
            r#""lifecycle":{"autoSuspendPolicy":{"enabled":true,"interval":0}}"#,
            "lifecycle.autoSuspendPolicy.interval: ",
        ),
        (
            r#""lifecycle":{"autoSuspendPolicy":{"enabled":true,"mode":"Sleep"}}"#,
            "lifecycle.autoSuspendPolicy.mode: ",
        ),
    ];
    for (field, start) in cases {
        let error = spec(&with(field)).unwrap_err();
        assert_eq!(error.code(), Code::InvalidRequest, "{field}");
        assert!(error.to_string().starts_with(start), "{error}");
    }
}

#[test]
fn a_body_of_arguments_or_environment_over_its_limit_is_refused() {
    let long = "x".repeat(ARGUMENTS_BYTES_MAX);
    for (field, name) in [
        (format!(r#""cmd":["{long}"]"#), "cmd: "),
        (format!(r#""environment":{{"A":"{long}"}}"#), "environment: "),
    ] {
        assert!(spec(&with(&field)).unwrap_err().to_string().starts_with(name));
    }
}

#[test]
fn amounts_outside_the_tiers_have_their_own_code() {
    let error = spec(&with(r#""resources":{"cpu":"250m","memory":"8Gi"}"#)).unwrap_err();
    assert_eq!(error.code(), Code::InvalidResourceTier);
}

#[test]
fn no_source_or_two_of_them_is_refused() {
    let cases = [
        "{}",
        r#"{"sourcesRef":{}}"#,
        r#"{"sourcesRef":{"diskImage":{}}}"#,
        r#"{"sourcesRef":{"diskImage":{"name":"debian"}}}"#,
        r#"{"sourcesRef":{"diskImage":{"name":"debian","isPublic":true,"id":"a"}}}"#,
    ];
    for text in cases {
        let error = spec(text).unwrap_err();
        assert!(error.to_string().starts_with("sourcesRef"), "{text}: {error}");
    }
}

#[test]
fn a_public_name_cannot_climb_out_of_its_folder() {
    for name in ["..", "a/b", "../etc", "a..b", ".hidden", "", &"x".repeat(129)] {
        assert!(check_public_name(name).is_err(), "{name}");
    }
    for name in ["debian", "python-3.12", "debian:trixie"] {
        assert_eq!(check_public_name(name), Ok(()));
    }
}

#[test]
fn the_answer_has_the_form_the_sdk_reads() {
    let spec = spec(FULL).unwrap();
    let id = "bbbbbbbbbbbbbbbbbbbb".parse().unwrap();
    let time = "2026-01-02T03:04:05Z".to_owned();
    let group = GroupKey::local_default();
    let condition = Condition {
        state: State::Failed,
        failure: Some("the VMM ended".to_owned()),
        stopped: Some(Stopped {
            reason: StopReason::Asked,
            at: time.clone(),
            mode: SuspendMode::Memory,
        }),
    };
    let sandbox = Sandbox::new(&id, &group, (&spec, None), condition, time);
    let golden = include_str!("golden.json");
    assert_eq!(serde_json::to_string_pretty(&sandbox).unwrap(), golden.trim_end());
    assert_eq!(serde_json::from_str::<Sandbox>(golden).unwrap(), sandbox);
}

#[test]
fn what_was_suspended_says_why_when_and_what_was_kept() {
    let stopped = |reason, mode| {
        let stopped = Some(Stopped { reason, at: "2026-01-02T03:04:05Z".to_owned(), mode });
        let condition = Condition { state: State::Suspended, failure: None, stopped };
        let state = condition.public_state();
        let sandbox = Sandbox::new(
            &"bbbbbbbbbbbbbbbbbbbb".parse().unwrap(),
            &GroupKey::local_default(),
            (&spec(FULL).unwrap(), None),
            condition,
            String::new(),
        );
        (state, serde_json::to_value(sandbox).unwrap()["stateDetails"].clone())
    };
    let details = |reason: &str, mode: &str| {
        serde_json::json!({
            "stoppedReason": reason, "stoppedAt": "2026-01-02T03:04:05Z", "suspendMode": mode,
        })
    };
    let cases = [
        (StopReason::Asked, SuspendMode::Memory, PublicState::Suspended, "UserStopped", "Memory"),
        (StopReason::Asked, SuspendMode::Disk, PublicState::Suspended, "UserStopped", "Disk"),
        (StopReason::Idle, SuspendMode::Disk, PublicState::Idle, "Idle", "Disk"),
        (StopReason::NodeStopped, SuspendMode::Memory, PublicState::Idle, "NodeStopped", "Memory"),
    ];
    for (why, mode, state, reason, kept) in cases {
        assert_eq!(stopped(why, mode), (state, details(reason, kept)), "{why:?} {mode:?}");
    }
}

#[test]
fn a_request_made_by_a_client_of_ours_is_read_as_it_was_meant() {
    let request: CreateSandbox = decode(FULL.as_bytes()).unwrap();
    let sent = serde_json::to_vec(&request).unwrap();
    assert_eq!(decode::<CreateSandbox>(&sent).unwrap(), request);
}

#[test]
fn a_state_is_printed_as_it_is_sent() {
    for state in State::ALL.map(PublicState::from) {
        let sent = serde_json::to_value(state).unwrap();
        assert_eq!(sent, state.as_str());
    }
}
