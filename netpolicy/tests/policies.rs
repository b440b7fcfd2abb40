//! Policies as clients send them: what is taken, what is given back, and what is refused with which
//! words.

use holdfast_netpolicy::{
    Action, Inspection, Policy, PolicyError,
    limits::{CIDR_RULES_MAX, HOST_RULES_MAX, POLICY_BYTES_MAX, RULES_MAX},
};
use serde_json::{Value, json};

fn parse(policy: &Value) -> Result<Policy, PolicyError> {
    Policy::parse(policy.to_string().as_bytes())
}

/// A policy that denies by default, with this one rule.
fn with_rule(rule: Value) -> Value {
    json!({"defaultAction": "Deny", "rules": [{"match": {"host": "a.test"}, "action": {"type": "Allow"}}, rule]})
}

fn with_action(action: Value) -> Value {
    with_rule(json!({"name": "n", "match": {"host": "a.test"}, "action": action}))
}

fn with_header(header: Value) -> Value {
    with_action(json!({"type": "Transform", "headers": [header]}))
}

/// Every field there is.
fn full() -> Value {
    json!({
        "defaultAction": "Allow",
        "trafficInspection": "Partial",
        "rules": [
            {
                "name": "no admin",
                "match": {"host": "allowed.test", "path": "/admin*", "methods": ["GET", "POST"], "ports": [8443]},
                "action": {"type": "Deny"}
            },
            {
                "name": "key",
                "match": {"host": "api.test"},
                "action": {
                    "type": "Transform",
                    "headers": [
                        {"operation": "Set", "name": "Authorization", "valueRef": {"secretRef": {"secretId": "s", "secretKey": "k", "format": "Bearer {value}"}}},
                        {"operation": "Insert", "name": "X-Token", "valueRef": {"managedIdentityRef": {"type": "UserAssigned", "resource": "api://x", "identityResourceId": "/subscriptions/s/id"}}},
                        {"operation": "Set", "name": "X-Own", "valueRef": {"managedIdentityRef": {"type": "SystemAssigned", "resource": "api://x", "format": "{value}"}}},
                        {"operation": "Set", "name": "X-Static", "value": "1"},
                        {"operation": "Remove", "name": "Cookie"}
                    ],
                    "allowPlainHttp": true
                }
            },
            {
                "match": {"host": "*.old.test", "methods": ["GET"]},
                "action": {"type": "Rewrite", "scheme": "https", "host": "new.test", "port": 8443, "path": "/v2", "headers": [{"operation": "Remove", "name": "Cookie"}]},
                "tls": "Open"
            },
            {"match": {"host": "pinned.test"}, "action": {"type": "Allow"}, "tls": "Passthrough", "dnsTypes": ["TXT", "MX"]}
        ],
        "hostRules": [
            {"pattern": "*.wild.test", "action": "Allow", "ports": [22], "tls": "Open", "dnsTypes": ["SRV"]},
            {"pattern": "*", "action": "Deny"}
        ],
        "cidrRules": [
            {"name": "db", "cidr": "203.0.113.7/32", "protocol": "tcp", "ports": [5432], "action": "Allow"},
            {"cidr": "2001:db8::/32", "protocol": "any", "action": "Deny"}
        ]
    })
}

#[test]
fn every_field_is_given_back_as_it_was_sent() {
    let policy = parse(&full()).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&policy.to_json()).unwrap(), full());
    assert_eq!(policy.value_refs().count(), 3);
}

#[test]
fn what_the_sdk_sends_is_taken_with_nulls_and_empty_lists() {
    let sent = json!({
        "defaultAction": "Deny",
        "hostRules": [],
        "rules": [{
            "name": null,
            "match": {"host": "a.test", "path": null, "methods": []},
            "action": {"type": "Allow", "headers": null, "host": null, "path": null, "scheme": null}
        }],
        "trafficInspection": null
    });
    assert_eq!(parse(&sent).unwrap().rules().len(), 1);
}

#[test]
fn without_a_mode_everything_is_opened_where_the_default_is_to_deny() {
    let mode = |action: &str| parse(&json!({"defaultAction": action})).unwrap().inspection();
    assert_eq!(mode("Deny"), Inspection::Full);
    assert_eq!(mode("Allow"), Inspection::Partial);
    assert_eq!(Policy::default().default_action(), Action::Deny);
    assert_eq!(Policy::default(), parse(&json!({"defaultAction": "Deny"})).unwrap());
}

#[test]
fn an_error_names_the_rule_the_field_and_the_remedy() {
    let mut policy = full();
    policy["rules"][2]["match"]["host"] = json!("*.com");
    policy["rules"][2]["name"] = json!("old");
    let error = parse(&policy).unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with(r#"rules[2] "old": match.host: "*.com" is no pattern"#), "{text}");
    assert!(error.remedy().contains("`*.example.com`"), "{}", error.remedy());

    let mut policy = full();
    policy["rules"][1]["action"]["headers"][3]["value"] = json!(5);
    let text = parse(&policy).unwrap_err().to_string();
    let start = r#"rules[1] "key": action.headers[3].value: invalid type"#;
    assert!(text.starts_with(start), "{text}");

    let mut policy = full();
    policy["cidrRules"][0]["cidr"] = json!("203.0.113.7/24");
    let text = parse(&policy).unwrap_err().to_string();
    assert!(text.starts_with(r#"cidrRules[0] "db": cidr: 203.0.113.7 has bits"#), "{text}");
}

#[test]
fn what_is_wrong_anywhere_is_refused_where_it_is() {
    let action = |action: Value| with_action(action);
    let set = |more: Value| {
        let mut header = json!({"operation": "Set", "name": "X"});
        header.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        with_header(header)
    };
    let rule = |more: Value| {
        let mut rule =
            json!({"name": "n", "match": {"host": "a.test"}, "action": {"type": "Allow"}});
        rule.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        with_rule(rule)
    };
    let host_rule = |rule: Value| json!({"defaultAction": "Deny", "hostRules": [rule]});
    let cidr_rule = |rule: Value| json!({"defaultAction": "Deny", "cidrRules": [rule]});
    let matching = |m: Value| rule(json!({"match": m}));
    let secret = |s: Value| set(json!({"valueRef": {"secretRef": s}}));
    let identity = |i: Value| set(json!({"valueRef": {"managedIdentityRef": i}}));
    let cases = [
        (json!({}), "defaultAction: is missing"),
        (json!([]), "invalid type"),
        (json!({"defaultAction": "allow"}), "defaultAction: unknown variant"),
        (json!({"defaultAction": "Deny", "colour": 1}), "colour: unknown field"),
        (json!({"defaultAction": "Deny", "trafficInspection": "Some"}), "trafficInspection: "),
        (json!({"defaultAction": "Deny", "rules": {}}), "rules: "),
        (rule(json!({"colour": 1})), r#"rules[1] "n": colour: unknown field"#),
        (rule(json!({"name": ""})), r#"rules[1] "": name: "#),
        (rule(json!({"name": "a\nb"})), r#"rules[1] "a\nb": name: "#),
        (rule(json!({"name": "n".repeat(129)})), "rules[1] "),
        (rule(json!({"match": null})), r#"rules[1] "n": match: is missing"#),
        (rule(json!({"action": null})), r#"rules[1] "n": action: is missing"#),
        (rule(json!({"dnsTypes": ["ANY"]})), r#"rules[1] "n": dnsTypes: "ANY""#),
        (rule(json!({"dnsTypes": ["AXFR"]})), r#"rules[1] "n": dnsTypes: "#),
        (rule(json!({"tls": "Closed"})), r#"rules[1] "n": tls: "#),
        (
            rule(json!({"tls": "Passthrough", "match": {"host": "a.test", "path": "/a"}})),
            r#"rules[1] "n": tls: looks into requests"#,
        ),
        (matching(json!({})), r#"rules[1] "n": match.host: is missing"#),
        (matching(json!({"host": ""})), r#"rules[1] "n": match.host: "#),
        (
            matching(json!({"host": "1.2.3.4"})),
            r#"rules[1] "n": match.host: "1.2.3.4" is an address"#,
        ),
        (matching(json!({"host": "a.test", "path": "a"})), r#"rules[1] "n": match.path: "#),
        (
            matching(json!({"host": "a.test", "path": "/a/../b"})),
            r#"rules[1] "n": match.path: is not in its shortest form"#,
        ),
        (
            matching(json!({"host": "a.test", "methods": ["get"]})),
            r#"rules[1] "n": match.methods: "get" would match nothing"#,
        ),
        (
            matching(json!({"host": "a.test", "methods": ["G T"]})),
            r#"rules[1] "n": match.methods: "#,
        ),
        (
            matching(json!({"host": "a.test", "methods": vec!["GET"; 17]})),
            r#"rules[1] "n": match.methods: has 17"#,
        ),
        (
            matching(json!({"host": "a.test", "ports": [0]})),
            r#"rules[1] "n": match.ports: 0 is no port"#,
        ),
        (
            matching(json!({"host": "a.test", "ports": [65536]})),
            r#"rules[1] "n": match.ports[0]: "#,
        ),
        (action(json!({})), r#"rules[1] "n": action.type: is missing"#),
        (
            action(json!({"type": "Allow", "host": "b.test"})),
            r#"rules[1] "n": action.host: means nothing"#,
        ),
        (
            action(json!({"type": "Deny", "allowPlainHttp": true})),
            r#"rules[1] "n": action.allowPlainHttp: "#,
        ),
        (action(json!({"type": "Transform"})), r#"rules[1] "n": action.headers: is missing"#),
        (action(json!({"type": "Transform", "path": "/"})), r#"rules[1] "n": action.path: "#),
        (action(json!({"type": "Rewrite"})), r#"rules[1] "n": action.host: is missing"#),
        (action(json!({"type": "Rewrite", "scheme": "ftp"})), r#"rules[1] "n": action.scheme: "#),
        (action(json!({"type": "Rewrite", "host": "a b"})), r#"rules[1] "n": action.host: "#),
        (action(json!({"type": "Rewrite", "host": "*.a.test"})), r#"rules[1] "n": action.host: "#),
        (action(json!({"type": "Rewrite", "path": "/a*"})), r#"rules[1] "n": action.path: "#),
        (action(json!({"type": "Rewrite", "path": "/a\r\nb"})), r#"rules[1] "n": action.path: "#),
        (action(json!({"type": "Rewrite", "port": 0})), r#"rules[1] "n": action.port: "#),
        (
            action(
                json!({"type": "Rewrite", "scheme": "http", "headers": [{"operation": "Set", "name": "A", "value": "b"}]}),
            ),
            r#"rules[1] "n": action.scheme: headers are not put in over plain HTTP"#,
        ),
        (set(json!({})), r#"rules[1] "n": action.headers[0].value: is missing"#),
        (
            set(json!({"name": "Host", "value": "a"})),
            r#"rules[1] "n": action.headers[0].name: host is"#,
        ),
        (
            set(json!({"value": "a", "valueRef": {}})),
            r#"rules[1] "n": action.headers[0].valueRef: "#,
        ),
        (set(json!({"value": "a\r\nb"})), r#"rules[1] "n": action.headers[0].value: "#),
        (
            set(json!({"operation": "Remove", "value": "a"})),
            r#"rules[1] "n": action.headers[0].value: "#,
        ),
        (
            set(json!({"value": "a".repeat(8193)})),
            r#"rules[1] "n": action.headers[0].value: is longer"#,
        ),
        (
            set(json!({"valueRef": {}})),
            r#"rules[1] "n": action.headers[0].valueRef.secretRef: is missing"#,
        ),
        (
            secret(json!({})),
            r#"rules[1] "n": action.headers[0].valueRef.secretRef.secretId: is missing"#,
        ),
        (
            secret(json!({"secretId": "../x"})),
            r#"rules[1] "n": action.headers[0].valueRef.secretRef.secretId: "#,
        ),
        (
            secret(json!({"secretId": "s", "format": "Bearer"})),
            r#"rules[1] "n": action.headers[0].valueRef.secretRef.format: a format"#,
        ),
        (
            secret(json!({"secretId": "s", "format": "{value}\r\nX: y"})),
            r#"rules[1] "n": action.headers[0].valueRef.secretRef.format: "#,
        ),
        (
            identity(json!({"resource": "r"})),
            r#"rules[1] "n": action.headers[0].valueRef.managedIdentityRef.type: is missing"#,
        ),
        (
            identity(json!({"type": "UserAssigned", "resource": "r"})),
            r#"rules[1] "n": action.headers[0].valueRef.managedIdentityRef.identityResourceId: is missing"#,
        ),
        (
            identity(json!({"type": "SystemAssigned", "resource": ""})),
            r#"rules[1] "n": action.headers[0].valueRef.managedIdentityRef.resource: "#,
        ),
        (host_rule(json!({"pattern": "a.*.com", "action": "Allow"})), "hostRules[0]: pattern: "),
        (host_rule(json!({"pattern": "a.com"})), "hostRules[0]: action: is missing"),
        (host_rule(json!({"action": "Allow"})), "hostRules[0]: pattern: is missing"),
        (host_rule(json!({"pattern": "a.com", "action": "Transform"})), "hostRules[0]: action: "),
        (
            host_rule(json!({"pattern": "a.com", "action": "Deny", "tls": "Open"})),
            "hostRules[0]: tls: ",
        ),
        (
            host_rule(json!({"pattern": "a.com", "action": "Deny", "dnsTypes": ["TXT"]})),
            "hostRules[0]: dnsTypes: ",
        ),
        (
            cidr_rule(json!({"cidr": "10.0.0.0", "protocol": "tcp", "action": "Allow"})),
            "cidrRules[0]: cidr: ",
        ),
        (
            cidr_rule(json!({"cidr": "10.0.0.0/8", "protocol": "icmp", "action": "Allow"})),
            "cidrRules[0]: protocol: ",
        ),
        (
            cidr_rule(json!({"cidr": "10.0.0.0/8", "action": "Allow"})),
            "cidrRules[0]: protocol: is missing",
        ),
        (
            cidr_rule(json!({"cidr": "10.0.0.0/8", "protocol": "tcp"})),
            "cidrRules[0]: action: is missing",
        ),
    ];
    for (policy, start) in cases {
        let error = parse(&policy).expect_err(&policy.to_string());
        assert!(error.to_string().starts_with(start), "{error} does not begin with {start}");
        assert!(!error.remedy().is_empty(), "{error}");
    }
}

#[test]
fn what_is_not_json_or_is_two_things_at_once_is_refused() {
    let cases: [&[u8]; 10] = [
        b"",
        b"{",
        b"{}{}",
        b"null",
        b"\xff",
        br#"{"defaultAction":"Deny","defaultAction":"Allow"}"#,
        br#"{"defaultAction":"Deny","rules":[{"match":{"host":"a.test"},"action":{"type":"Deny","type":"Allow"}}]}"#,
        br#"{"defaultAction":"Deny"} x"#,
        br#"["Allow",null,null,null,null]"#,
        br#"{"defaultAction":"Deny","hostRules":[["a.test","Allow",null,null,null]]}"#,
    ];
    for bytes in cases {
        assert!(Policy::parse(bytes).is_err(), "{}", String::from_utf8_lossy(bytes));
    }
    let deep = "[".repeat(POLICY_BYTES_MAX);
    assert!(Policy::parse(deep.as_bytes()).is_err());
}

#[test]
fn f11_a_policy_over_a_limit_is_refused_whole() {
    let host = |index: usize| json!({"pattern": format!("h{index}.a.test"), "action": "Allow"});
    let rule = |index: usize| json!({"match": {"host": format!("h{index}.a.test")}, "action": {"type": "Deny"}});
    let cidr = |_| json!({"cidr": "10.0.0.0/8", "protocol": "tcp", "action": "Allow"});
    let policy = |rules: usize, hosts: usize, cidrs: usize| {
        json!({
            "defaultAction": "Deny",
            "rules": (0..rules).map(rule).collect::<Vec<_>>(),
            "hostRules": (0..hosts).map(host).collect::<Vec<_>>(),
            "cidrRules": (0..cidrs).map(cidr).collect::<Vec<_>>(),
        })
    };
    assert!(parse(&policy(RULES_MAX, 0, CIDR_RULES_MAX)).is_ok());
    assert!(parse(&policy(0, HOST_RULES_MAX, 0)).is_ok());
    let cases = [
        (policy(RULES_MAX + 1, 0, 0), "rules: has 513 entries"),
        (policy(0, HOST_RULES_MAX + 1, 0), "hostRules: has 1025 entries"),
        (policy(0, 0, CIDR_RULES_MAX + 1), "cidrRules: has 257 entries"),
        (policy(10_000, 0, 0), "is longer than 131072 bytes"),
    ];
    for (policy, start) in cases {
        let text = parse(&policy).unwrap_err().to_string();
        assert!(text.starts_with(start), "{text}");
    }
    let value = json!({"operation": "Set", "name": "X", "value": "v".repeat(8000)});
    let text = parse(&with_action(json!({"type": "Transform", "headers": vec![value; 9]})));
    let text = text.unwrap_err().to_string();
    assert!(text.starts_with("headers of all rules: is longer than 65536 bytes"), "{text}");
}

#[test]
fn a_policy_within_another_text_is_read_with_the_same_strictness() {
    let read = |text: &str| serde_json::from_str::<Policy>(text).map_err(|error| error.to_string());
    assert_eq!(read(&full().to_string()).unwrap(), parse(&full()).unwrap());
    let wrong = r#"{"defaultAction":"Deny","rules":[{"name":"n","match":{"host":"*.com"},"action":{"type":"Allow"}}]}"#;
    let error = read(wrong).unwrap_err();
    assert!(error.starts_with(r#"rules[0] "n": match.host: "*.com" is no pattern"#), "{error}");
    assert!(read(r#"{"defaultAction":"Deny","defaultAction":"Allow"}"#).is_err());
    let long = json!({"defaultAction": "Deny", "hostRules": vec![
        json!({"pattern": format!("{}.{}.{}.test", "a".repeat(60), "b".repeat(60), "c".repeat(60)), "action": "Deny"});
        HOST_RULES_MAX
    ]});
    assert!(read(&long.to_string()).unwrap_err().starts_with("is longer than 131072 bytes"));
}
