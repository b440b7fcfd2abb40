//! What policies make of flows, case by case. Names of tests begin with the attack they are about.

use holdfast_netpolicy::{
    DnsType, Flow, HostName, Method, Opening, Outcome, Policy, Protocol, Reason, Scheme, Target,
    Verdict, decide, refused_address,
};
use serde_json::{Value, json};

fn policy(value: &Value) -> Policy {
    Policy::parse(value.to_string().as_bytes()).unwrap()
}

fn name(text: &str) -> HostName {
    HostName::of_wire(text).unwrap()
}

/// The reference policy of the list of attacks.
fn reference() -> Value {
    json!({
        "defaultAction": "Deny",
        "trafficInspection": "Full",
        "rules": [
            {"name": "no admin", "match": {"host": "allowed.test", "path": "/admin*"}, "action": {"type": "Deny"}},
            {"name": "key", "match": {"host": "api.test"}, "action": {"type": "Transform", "headers": [
                {"operation": "Set", "name": "Authorization", "valueRef": {"secretRef": {"secretId": "s", "format": "Bearer {value}"}}}
            ]}}
        ],
        "hostRules": [
            {"pattern": "allowed.test", "action": "Allow"},
            {"pattern": "*.wild.test", "action": "Allow"}
        ],
        "cidrRules": [{"cidr": "203.0.113.7/32", "protocol": "tcp", "ports": [5432], "action": "Allow"}]
    })
}

fn in_mode(mode: &str) -> Policy {
    let mut value = reference();
    value["trafficInspection"] = json!(mode);
    policy(&value)
}

fn dns<'p>(policy: &'p Policy, host: &str, kind: DnsType) -> Verdict<'p> {
    decide(policy, &Flow::Dns { name: &name(host), kind })
}

fn tls<'p>(policy: &'p Policy, host: &str, port: u16) -> Verdict<'p> {
    decide(policy, &Flow::Tls { name: &name(host), port })
}

fn request<'p>(policy: &'p Policy, method: &str, url: &str) -> Verdict<'p> {
    let (scheme, rest) = url.split_once("://").unwrap();
    let (authority, path) = rest.split_once('/').unwrap();
    let scheme = if scheme == "https" { Scheme::Https } else { Scheme::Http };
    let (host, port) = match authority.split_once(':') {
        Some((host, port)) => (host, port.parse().unwrap()),
        None => (authority, scheme.default_port()),
    };
    let flow = Flow::Http {
        scheme,
        host: &name(host),
        port,
        method: &Method::parse(method).unwrap(),
        target: &Target::parse(format!("/{path}").as_bytes()).unwrap(),
    };
    decide(policy, &flow)
}

fn raw<'p>(policy: &'p Policy, protocol: Protocol, address: &str, port: u16) -> Verdict<'p> {
    decide(policy, &Flow::Raw { protocol, address: address.parse().unwrap(), port })
}

/// The verdict in one line: outcome, rule, reason.
fn line(verdict: &Verdict<'_>) -> String {
    let outcome = match verdict.outcome {
        Outcome::Allow => "allow",
        Outcome::Deny => "deny",
        Outcome::Open(Opening::Full) => "open",
        Outcome::Open(Opening::Partial) => "open partly",
        Outcome::Transform(_) => "transform",
        Outcome::Rewrite(_) => "rewrite",
    };
    format!("{outcome}, {}, {}", verdict.rule, verdict.reason.as_str())
}

#[test]
fn a_request_is_judged_by_the_first_rule_that_matches_it() {
    let policy = policy(&reference());
    let cases = [
        ("GET", "https://allowed.test/", "allow, hostRules[0], rule"),
        ("GET", "http://allowed.test/", "allow, hostRules[0], rule"),
        ("GET", "https://allowed.test/admin/x", "deny, rules[0] \"no admin\", rule"),
        ("GET", "https://allowed.test/x/%2e%2e/admin", "deny, rules[0] \"no admin\", rule"),
        ("GET", "https://allowed.test/x/..%2fadmin", "deny, rules[0] \"no admin\", rule"),
        ("GET", "https://evil.test/", "deny, default, default_action"),
        ("GET", "https://a.b.wild.test/", "allow, hostRules[1], rule"),
        ("GET", "https://wild.test/", "deny, default, default_action"),
        ("POST", "https://api.test/v1", "transform, rules[1] \"key\", rule"),
    ];
    for (method, url, expected) in cases {
        assert_eq!(line(&request(&policy, method, url)), expected, "{method} {url}");
    }
}

#[test]
fn a1_a2_an_address_without_a_name_passes_by_a_cidr_rule_only() {
    let policy = policy(&reference());
    let cases = [
        ("198.51.100.66", 443, "deny, default, default_action"),
        ("198.51.100.10", 443, "deny, default, default_action"),
        ("203.0.113.7", 5432, "allow, cidrRules[0], rule"),
        ("203.0.113.7", 443, "deny, default, default_action"),
        ("203.0.113.8", 5432, "deny, default, default_action"),
    ];
    for (address, port, expected) in cases {
        assert_eq!(line(&raw(&policy, Protocol::Tcp, address, port)), expected, "{address}:{port}");
    }
    assert!(raw(&policy, Protocol::Udp, "203.0.113.7", 5432).is_deny());
}

#[test]
fn a3_a_name_is_allowed_on_the_ports_of_the_web_only_unless_its_rule_has_ports() {
    let mut value = reference();
    let reference = policy(&value);
    for port in [22, 25, 8443] {
        assert!(tls(&reference, "allowed.test", port).is_deny(), "{port}");
        let url = format!("https://allowed.test:{port}/");
        assert!(request(&reference, "GET", &url).is_deny(), "{port}");
    }
    value["hostRules"][0]["ports"] = json!([8443]);
    let with_port = policy(&value);
    assert!(!tls(&with_port, "allowed.test", 8443).is_deny());
    assert!(tls(&with_port, "allowed.test", 443).is_deny());
}

#[test]
fn a_rule_that_denies_is_for_every_port_unless_it_has_ports() {
    let policy = policy(&json!({
        "defaultAction": "Allow",
        "hostRules": [{"pattern": "evil.test", "action": "Deny"}, {"pattern": "b.test", "action": "Deny", "ports": [25]}]
    }));
    for port in [80, 443, 8443] {
        assert!(tls(&policy, "evil.test", port).is_deny(), "{port}");
        assert!(!tls(&policy, "b.test", port).is_deny(), "{port}");
    }
    assert!(tls(&policy, "b.test", 25).is_deny());
}

#[test]
fn a4_a5_udp_passes_by_a_cidr_rule_only_even_where_the_default_is_to_allow() {
    let policy = policy(&json!({
        "defaultAction": "Allow",
        "trafficInspection": "None",
        "cidrRules": [{"cidr": "198.51.100.0/24", "protocol": "udp", "ports": [123], "action": "Allow"}]
    }));
    let quic = raw(&policy, Protocol::Udp, "198.51.100.10", 443);
    assert_eq!(line(&quic), "deny, default, udp_needs_cidr_rule");
    assert_eq!(
        line(&raw(&policy, Protocol::Udp, "198.51.100.10", 123)),
        "allow, cidrRules[0], rule"
    );
}

#[test]
fn b1_b5_a_query_leaves_only_for_a_name_and_a_type_that_a_rule_could_allow() {
    let mut value = reference();
    value["hostRules"][1]["dnsTypes"] = json!(["TXT"]);
    let policy = policy(&value);
    let cases = [
        ("evil.test", DnsType::A, "deny, default, name_not_allowed"),
        ("evil.test", DnsType::Txt, "deny, default, name_not_allowed"),
        ("allowed.test", DnsType::A, "allow, hostRules[0], rule"),
        ("allowed.test", DnsType::Aaaa, "allow, hostRules[0], rule"),
        ("allowed.test", DnsType::Https, "allow, hostRules[0], rule"),
        ("allowed.test", DnsType::Txt, "deny, hostRules[0], record_type"),
        ("allowed.test", DnsType::Other(255), "deny, hostRules[0], record_type"),
        ("a.wild.test", DnsType::Txt, "allow, hostRules[1], rule"),
        ("a.wild.test", DnsType::Other(252), "deny, hostRules[1], record_type"),
        ("api.test", DnsType::A, "allow, rules[1] \"key\", rule"),
        ("localhost", DnsType::A, "deny, default, local_name"),
        ("1.0.0.127.in-addr.arpa", DnsType::Other(12), "deny, default, local_name"),
    ];
    for (host, kind, expected) in cases {
        assert_eq!(line(&dns(&policy, host, kind)), expected, "{host} {kind:?}");
    }
}

#[test]
fn b22_names_of_the_machine_and_its_network_need_a_rule_that_names_them() {
    let policy = policy(&json!({
        "defaultAction": "Allow",
        "hostRules": [{"pattern": "db.corp.internal", "action": "Allow"}, {"pattern": "*", "action": "Allow"}]
    }));
    for host in ["metadata.google.internal", "localhost", "wpad", "printer.local"] {
        assert_eq!(dns(&policy, host, DnsType::A).reason, Reason::LocalName, "{host}");
    }
    assert_eq!(line(&dns(&policy, "db.corp.internal", DnsType::A)), "allow, hostRules[0], rule");
    assert_eq!(line(&dns(&policy, "a.test", DnsType::A)), "allow, hostRules[1], rule");
}

#[test]
fn a_name_of_which_only_some_requests_are_denied_is_resolved() {
    let policy = policy(&json!({
        "defaultAction": "Deny",
        "rules": [
            {"match": {"host": "a.test", "methods": ["POST"]}, "action": {"type": "Deny"}},
            {"match": {"host": "a.test"}, "action": {"type": "Allow"}},
            {"match": {"host": "b.test", "path": "/x"}, "action": {"type": "Allow"}},
            {"match": {"host": "c.test"}, "action": {"type": "Deny"}},
            {"match": {"host": "*.d.test"}, "action": {"type": "Deny"}}
        ]
    }));
    assert!(!dns(&policy, "a.test", DnsType::A).is_deny());
    assert!(!dns(&policy, "b.test", DnsType::A).is_deny());
    assert_eq!(line(&dns(&policy, "c.test", DnsType::A)), "deny, rules[3], rule");
    assert_eq!(line(&dns(&policy, "x.d.test", DnsType::A)), "deny, rules[4], rule");
}

#[test]
fn c2_tls_to_another_name_is_denied_whatever_the_mode() {
    for mode in ["Legacy", "Full", "Partial", "None"] {
        assert!(tls(&in_mode(mode), "evil.test", 443).is_deny(), "{mode}");
    }
}

#[test]
fn tls_is_opened_by_the_mode_or_where_a_rule_needs_the_request() {
    let cases = [
        ("Full", "a.wild.test", "open, hostRules[1], inspection_full"),
        ("Legacy", "a.wild.test", "open, hostRules[1], inspection_full"),
        ("Partial", "a.wild.test", "allow, hostRules[1], rule"),
        ("None", "a.wild.test", "deny, default, default_action"),
        ("Full", "allowed.test", "open, rules[0] \"no admin\", inspection_full"),
        ("Partial", "allowed.test", "open partly, rules[0] \"no admin\", rule_needs_request"),
        ("Partial", "api.test", "open partly, rules[1] \"key\", rule_needs_request"),
        ("Full", "api.test", "open, rules[1] \"key\", inspection_full"),
    ];
    for (mode, host, expected) in cases {
        assert_eq!(line(&tls(&in_mode(mode), host, 443)), expected, "{mode} {host}");
    }
}

#[test]
fn c17_c18_a_rule_may_have_tls_passed_through_or_opened_whatever_the_mode() {
    let mut value = reference();
    value["hostRules"][1]["tls"] = json!("Passthrough");
    assert_eq!(line(&tls(&policy(&value), "a.wild.test", 443)), "allow, hostRules[1], rule");
    value["trafficInspection"] = json!("Partial");
    value["hostRules"][1]["tls"] = json!("Open");
    let opened = policy(&value);
    let expected = "open partly, hostRules[1], rule_needs_request";
    assert_eq!(line(&tls(&opened, "a.wild.test", 443)), expected);
}

#[test]
fn tls_in_which_every_request_would_be_denied_is_not_opened() {
    let policy = policy(&json!({
        "defaultAction": "Deny",
        "rules": [{"match": {"host": "a.test", "path": "/x"}, "action": {"type": "Deny"}}]
    }));
    let verdict = tls(&policy, "a.test", 443);
    assert_eq!(line(&verdict), "deny, default, nothing_inside_allowed");
}

#[test]
fn c21_what_is_not_http_is_never_let_through_for_want_of_understanding() {
    for mode in ["Legacy", "Full", "Partial", "None"] {
        let strict = in_mode(mode);
        assert!(raw(&strict, Protocol::Tcp, "198.51.100.10", 443).is_deny(), "{mode}");
        let open = policy(&json!({"defaultAction": "Allow", "trafficInspection": mode}));
        let verdict = raw(&open, Protocol::Tcp, "198.51.100.10", 443);
        assert_eq!(verdict.is_deny(), mode == "Full", "{mode}");
    }
}

#[test]
fn d12_methods_are_told_apart_by_case_and_trace_is_denied_where_headers_are_put_in() {
    let mut value = reference();
    value["rules"][0] =
        json!({"match": {"host": "allowed.test", "methods": ["GET"]}, "action": {"type": "Allow"}});
    value["hostRules"].as_array_mut().unwrap().remove(0);
    let policy = policy(&value);
    assert!(!request(&policy, "GET", "https://allowed.test/").is_deny());
    assert!(request(&policy, "get", "https://allowed.test/").is_deny());
    assert!(request(&policy, "PURGE", "https://allowed.test/").is_deny());
    let verdict = request(&policy, "TRACE", "https://api.test/");
    assert_eq!(line(&verdict), "deny, rules[1] \"key\", trace_transform");
    for text in ["", "GET\t", "G ET", &"A".repeat(33), "GET\r\n"] {
        assert!(Method::parse(text).is_err(), "{text:?}");
    }
}

#[test]
fn e1_headers_are_not_put_in_over_plain_http_unless_the_rule_says_so() {
    let mut value = reference();
    let strict = policy(&value);
    let verdict = request(&strict, "GET", "http://api.test/");
    assert_eq!(line(&verdict), "deny, rules[1] \"key\", plain_http_transform");
    value["rules"][1]["action"]["allowPlainHttp"] = json!(true);
    let lenient = policy(&value);
    assert_eq!(
        line(&request(&lenient, "GET", "http://api.test/")),
        "transform, rules[1] \"key\", rule"
    );
}

#[test]
fn e11_a_rewrite_that_ends_in_plain_http_takes_no_headers_along() {
    let rule = |action: Value| {
        policy(
            &json!({"defaultAction": "Deny", "rules": [{"match": {"host": "a.test"}, "action": action}]}),
        )
    };
    let headers = json!([{"operation": "Set", "name": "X", "value": "y"}]);
    let kept = rule(json!({"type": "Rewrite", "host": "b.test", "headers": headers}));
    assert_eq!(line(&request(&kept, "GET", "https://a.test/")), "rewrite, rules[0], rule");
    assert_eq!(
        line(&request(&kept, "GET", "http://a.test/")),
        "deny, rules[0], plain_http_transform"
    );
    let raised = rule(json!({"type": "Rewrite", "scheme": "https", "headers": headers}));
    assert_eq!(line(&request(&raised, "GET", "http://a.test/")), "rewrite, rules[0], rule");
    let Outcome::Rewrite(rewrite) = request(&raised, "GET", "http://a.test/").outcome else {
        panic!()
    };
    assert_eq!((rewrite.scheme_of(Scheme::Http), rewrite.port_of(80)), (Scheme::Https, 443));
}

#[test]
fn a_cidr_rule_closes_addresses_to_names_that_are_allowed() {
    let policy = policy(&json!({
        "defaultAction": "Allow",
        "cidrRules": [
            {"cidr": "10.1.0.0/16", "protocol": "tcp", "action": "Allow"},
            {"name": "inside", "cidr": "10.0.0.0/8", "protocol": "any", "action": "Deny"}
        ]
    }));
    let refused = |address: &str| {
        let rule = refused_address(&policy, Protocol::Tcp, address.parse().unwrap(), 443);
        rule.map(|rule| rule.to_string())
    };
    assert_eq!(refused("10.1.2.3"), None);
    assert_eq!(refused("11.0.0.1"), None);
    assert_eq!(refused("10.2.0.1").as_deref(), Some("cidrRules[1] \"inside\""));
}

#[test]
fn every_reason_has_a_word_of_its_own() {
    let words: std::collections::BTreeSet<_> = Reason::ALL.iter().map(|r| r.as_str()).collect();
    assert_eq!(words.len(), Reason::ALL.len());
}
