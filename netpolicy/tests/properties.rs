//! What holds for every policy and every flow. The oracles go over the JSON by hand, rule by rule.

use holdfast_netpolicy::{
    Byway, DnsType, Flow, HostName, HostPattern, List, Method, Outcome, Passing, Policy, Protocol,
    RuleRef, Scheme, Target, Verdict, decide,
};
use proptest::{collection::vec, option, prelude::*, sample::select};
use serde_json::{Value, json};

/// Few labels, so that patterns and names meet.
fn host() -> impl Strategy<Value = String> {
    vec(select(vec!["a", "b", "xn--bcher-kva", "_x", "a-b"]), 1..4)
        .prop_map(|labels| format!("{}.test", labels.join(".")))
}

fn pattern() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => host(),
        3 => host().prop_map(|host| format!("*.{host}")),
        1 => Just("*".to_owned()),
    ]
}

fn path() -> impl Strategy<Value = String> {
    vec(select(vec!["a", "b", "ab"]), 0..4).prop_map(|parts| format!("/{}", parts.join("/")))
}

fn path_pattern() -> impl Strategy<Value = String> {
    (path(), select(vec!["", "*", "/*", "*/b", "*b*"])).prop_map(|(path, end)| {
        // `//` is another path.
        format!("{path}{end}").replace("//", "/")
    })
}

fn ports() -> impl Strategy<Value = Vec<u16>> {
    vec(select(vec![80u16, 443, 8443]), 0..3)
}

fn methods() -> impl Strategy<Value = Vec<&'static str>> {
    vec(select(vec!["GET", "POST", "TRACE"]), 0..3)
}

fn action() -> impl Strategy<Value = Value> {
    let headers = json!([{"operation": "Set", "name": "X", "value": "y"}]);
    let of = |action: Value| Just(action);
    prop_oneof![
        3 => of(json!({"type": "Allow"})),
        3 => of(json!({"type": "Deny"})),
        1 => of(json!({"type": "Transform", "headers": headers})),
        1 => of(json!({"type": "Transform", "headers": headers, "allowPlainHttp": true})),
        1 => of(json!({"type": "Rewrite", "host": "other.test"})),
        1 => of(json!({"type": "Rewrite", "path": "/x", "headers": headers})),
        1 => of(json!({"type": "Rewrite", "scheme": "https", "headers": headers})),
    ]
}

fn without_nulls(mut value: Value) -> Value {
    if let Some(fields) = value.as_object_mut() {
        fields.retain(|_, field| !field.is_null() && *field != json!([]));
        fields.values_mut().for_each(|field| *field = without_nulls(field.take()));
    }
    value
}

prop_compose! {
    fn rule()(
        name in option::of("[a-z \"]{1,5}"), host in pattern(), path in option::of(path_pattern()),
        methods in methods(), ports in ports(), action in action(),
        tls in option::weighted(0.2, Just("Open")), passthrough in any::<bool>(),
        types in vec(select(vec!["TXT", "MX"]), 0..2),
    ) -> Value {
        let plain = path.is_none() && methods.is_empty() && action["type"] == "Allow";
        let denies = action["type"] == "Deny";
        let tls = tls.filter(|_| !denies).map(|o| if plain && passthrough { "Passthrough" } else { o });
        let types = if denies { Vec::new() } else { types };
        without_nulls(json!({
            "name": name,
            "match": {"host": host, "path": path, "methods": methods, "ports": ports},
            "action": action, "tls": tls, "dnsTypes": types,
        }))
    }
}

prop_compose! {
    fn host_rule()(pattern in pattern(), action in select(vec!["Allow", "Deny"]), ports in ports()) -> Value {
        without_nulls(json!({"pattern": pattern, "action": action, "ports": ports}))
    }
}

prop_compose! {
    fn policy_json()(
        default in select(vec!["Allow", "Deny"]),
        mode in option::of(select(vec!["Legacy", "Full", "Partial", "None"])),
        rules in vec(rule(), 0..6), host_rules in vec(host_rule(), 0..4),
    ) -> Value {
        without_nulls(json!({
            "defaultAction": default, "trafficInspection": mode, "rules": rules,
            "hostRules": host_rules,
        }))
    }
}

#[derive(Debug, Clone)]
struct Asked {
    scheme: Scheme,
    host: String,
    port: u16,
    method: &'static str,
    path: String,
}

prop_compose! {
    fn asked()(
        tls in any::<bool>(), host in host(), port in select(vec![80u16, 443, 8443, 22]),
        method in select(vec!["GET", "POST", "TRACE", "get"]), path in path(),
    ) -> Asked {
        let scheme = if tls { Scheme::Https } else { Scheme::Http };
        Asked { scheme, host, port, method, path }
    }
}

fn parse(value: &Value) -> Policy {
    Policy::parse(value.to_string().as_bytes()).unwrap_or_else(|error| panic!("{error}: {value}"))
}

fn request<'p>(policy: &'p Policy, asked: &Asked) -> Verdict<'p> {
    let flow = Flow::Http {
        scheme: asked.scheme,
        host: &HostName::of_wire(&asked.host).unwrap(),
        port: asked.port,
        method: &Method::parse(asked.method).unwrap(),
        target: &Target::parse(asked.path.as_bytes()).unwrap(),
    };
    decide(policy, &flow)
}

fn naive_host(pattern: &str, host: &str) -> bool {
    match pattern.split('.').collect::<Vec<_>>()[..] {
        ["*"] => true,
        ["*", ref parent @ ..] => {
            let labels: Vec<&str> = host.split('.').collect();
            labels.len() > parent.len() && &labels[labels.len() - parent.len()..] == parent
        }
        _ => pattern == host,
    }
}

fn naive_glob(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern, text) {
        ([], []) => true,
        ([b'*', rest @ ..], _) => {
            naive_glob(rest, text) || !text.is_empty() && naive_glob(pattern, &text[1..])
        }
        ([p, pattern @ ..], [t, text @ ..]) => p == t && naive_glob(pattern, text),
        _ => false,
    }
}

fn list<'v>(value: &'v Value, name: &str) -> &'v [Value] {
    value.get(name).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// List and index of the rule that matches first, and what comes of it; `None` is the default.
fn naive(policy: &Value, asked: &Asked) -> (Option<(List, usize)>, String) {
    let mode_none = policy.get("trafficInspection") == Some(&json!("None"));
    let rules = list(policy, "rules").iter().enumerate().map(|(i, rule)| {
        (
            List::Rules,
            i,
            rule["match"]["host"].clone(),
            rule["match"].clone(),
            rule["action"].clone(),
        )
    });
    let hosts = list(policy, "hostRules").iter().enumerate().map(|(i, rule)| {
        (List::HostRules, i, rule["pattern"].clone(), rule.clone(), json!({"type": rule["action"]}))
    });
    for (which, index, pattern, conditions, action) in rules.chain(hosts) {
        let denies = action["type"] == "Deny";
        let ports = list(&conditions, "ports");
        let port = if ports.is_empty() {
            denies || asked.port == 80 || asked.port == 443
        } else {
            ports.contains(&json!(asked.port))
        };
        let methods = list(&conditions, "methods");
        let method = methods.is_empty() || methods.contains(&json!(asked.method));
        let path = conditions["path"]
            .as_str()
            .is_none_or(|pattern| naive_glob(pattern.as_bytes(), asked.path.as_bytes()));
        let host = naive_host(pattern.as_str().unwrap(), &asked.host);
        if mode_none || !(port && method && path && host) {
            continue;
        }
        let scheme = action["scheme"].as_str().unwrap_or(asked.scheme.as_str());
        let unsafe_headers = !list(&action, "headers").is_empty()
            && (asked.method == "TRACE"
                || scheme == "http" && action["allowPlainHttp"] != json!(true));
        let kind = if unsafe_headers { "Deny" } else { action["type"].as_str().unwrap() };
        return (Some((which, index)), kind.to_owned());
    }
    (None, policy["defaultAction"].as_str().unwrap().to_owned())
}

fn given(verdict: &Verdict<'_>) -> (Option<(List, usize)>, String) {
    let rule = match verdict.rule {
        RuleRef::Rule { list, index, .. } => Some((list, index)),
        RuleRef::Default => None,
    };
    let kind = match verdict.outcome {
        Outcome::Allow => "Allow",
        Outcome::Deny => "Deny",
        Outcome::Open(_) => "Open",
        Outcome::Transform(_) => "Transform",
        Outcome::Rewrite(_) => "Rewrite",
    };
    (rule, kind.to_owned())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn a_policy_that_was_written_out_and_read_again_is_the_same(value in policy_json()) {
        let policy = parse(&value);
        let text = policy.to_json();
        prop_assert_eq!(&serde_json::from_str::<Value>(&text).unwrap(), &value);
        let again = Policy::parse(text.as_bytes()).unwrap();
        prop_assert_eq!(again.to_json(), text);
        prop_assert_eq!(again, policy);
    }

    #[test]
    fn a_pattern_matches_what_comparing_labels_by_hand_matches(pattern in pattern(), host in host()) {
        let parsed = HostPattern::parse(&pattern).unwrap();
        let name = HostName::of_wire(&host.to_ascii_uppercase()).unwrap();
        prop_assert_eq!(parsed.matches(&name), naive_host(&pattern, &host), "{} {}", pattern, host);
    }

    #[test]
    fn a_request_is_judged_by_the_first_rule_that_matches(value in policy_json(), asked in asked()) {
        let policy = parse(&value);
        prop_assert_eq!(given(&request(&policy, &asked)), naive(&value, &asked));
    }

    #[test]
    fn what_is_said_of_tls_holds_for_every_request_inside(value in policy_json(), asked in asked()) {
        let policy = parse(&value);
        let asked = Asked { scheme: Scheme::Https, ..asked };
        let name = HostName::of_wire(&asked.host).unwrap();
        let outside = decide(&policy, &Flow::Tls { name: &name, port: asked.port });
        let inside = request(&policy, &asked);
        match outside.outcome {
            Outcome::Allow => prop_assert_eq!(inside.outcome, Outcome::Allow),
            Outcome::Deny => prop_assert!(inside.is_deny()),
            outcome => prop_assert!(matches!(outcome, Outcome::Open(_)), "{:?}", outcome),
        }
    }

    #[test]
    fn a_name_to_which_a_request_may_go_is_resolved_and_no_other_is(
        value in policy_json(), asked in asked(),
    ) {
        let policy = parse(&value);
        let name = HostName::of_wire(&asked.host).unwrap();
        let resolved = !decide(&policy, &Flow::Dns { name: &name, kind: DnsType::A }).is_deny();
        let may = !request(&policy, &asked).is_deny();
        prop_assert!(resolved || !may, "a request may go to a name that is not resolved");
        // The other way round: without a rule that lets anything pass there is no query.
        let some_rule = list(&value, "rules").iter().any(|rule| {
            rule["action"]["type"] != "Deny"
                && naive_host(rule["match"]["host"].as_str().unwrap(), &asked.host)
        });
        let some_host_rule = list(&value, "hostRules").iter().any(|rule| {
            rule["action"] != "Deny" && naive_host(rule["pattern"].as_str().unwrap(), &asked.host)
        });
        let some = some_rule || some_host_rule || value["defaultAction"] == "Allow";
        prop_assert!(some || !resolved, "a query for a name that nothing could go to");
    }

    #[test]
    fn a_policy_with_one_rule_that_cannot_be_read_is_refused_whole(
        value in policy_json(), at in any::<prop::sample::Index>(),
        broken in select(vec![
            json!({"match": {"host": "*.com"}, "action": {"type": "Allow"}}),
            json!({"match": {"host": "a.test"}, "action": {"type": "allow"}}),
            json!({"match": {"host": "a.test", "path": "x"}, "action": {"type": "Allow"}}),
            json!({"match": {"hosts": "a.test"}, "action": {"type": "Allow"}}),
            json!({"match": {"host": "a.test"}}),
            json!(["a.test"]),
            json!(null),
        ]),
    ) {
        let mut value = value;
        let mut rules = list(&value, "rules").to_vec();
        let index = at.index(rules.len() + 1);
        rules.insert(index, broken);
        value["rules"] = json!(rules);
        let error = Policy::parse(value.to_string().as_bytes()).unwrap_err();
        prop_assert_eq!(error.place.rule, Some(("rules", index)), "{}", error);
    }

    #[test]
    fn bytes_that_were_changed_make_another_policy_or_none_and_never_a_wider_default(
        value in policy_json(), at in any::<prop::sample::Index>(), byte in any::<u8>(),
    ) {
        let mut bytes = value.to_string().into_bytes();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok(policy) = Policy::parse(&bytes) {
            let read: Value = serde_json::from_slice(&bytes).unwrap();
            prop_assert_eq!(json!(policy.default_action()), read["defaultAction"].clone());
            prop_assert_eq!(policy.rules().len(), list(&read, "rules").len());
            prop_assert_eq!(policy.host_rules().len(), list(&read, "hostRules").len());
        }
    }

    #[test]
    fn a_path_is_normal_once_it_was_normalised(text in "/[a-c./%0-9;\\\\*äA-F]{0,20}(\\?[a%]{0,3})?") {
        if let Ok(target) = Target::parse(text.as_bytes()) {
            let sent = target.path_and_query();
            prop_assert_eq!(Target::parse(sent.as_bytes()), Ok(target.clone()));
            prop_assert!(sent.is_ascii());
            prop_assert!(!target.path().split('/').any(|s| s == "." || s == ".."), "{}", sent);
        }
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in vec(any::<u8>(), 0..100), text in ".{0,40}") {
        let _ = (Policy::parse(&bytes), Target::parse(&bytes), HostPattern::parse(&text));
        let _ = (HostName::of_wire(&text), HostName::of_person(&text), Method::parse(&text));
    }
}

/// Few addresses, so that rules and flows meet.
fn cidr_rule() -> impl Strategy<Value = Value> {
    let ranges = ["0.0.0.0/0", "9.0.0.0/8", "9.9.0.0/16", "9.9.9.9/32", "2a00::/16"];
    let (protocols, actions) = (["tcp", "udp", "any"], ["Allow", "Deny"]);
    let ports = vec(select(vec![53_u16, 99]), 0..3);
    (select(ranges.to_vec()), select(protocols.to_vec()), ports, select(actions.to_vec()))
        .prop_map(|(cidr, protocol, ports, action)| {
            json!({"cidr": cidr, "protocol": protocol, "ports": ports, "action": action})
        })
}

proptest! {
    /// What the kernel is told is what `decide` says, and what has no way has nothing to go there.
    #[test]
    fn what_passes_the_proxy_by_is_judged_as_any_flow_to_an_address(
        rules in vec(cidr_rule(), 0..6),
        default in select(vec!["Allow", "Deny"]),
        address in select(vec![[9, 9, 9, 9], [9, 9, 9, 8], [9, 8, 0, 1], [8, 8, 8, 8]]),
        port in select(vec![53_u16, 99, 100]),
        tcp: bool,
    ) {
        let text = json!({
            "defaultAction": default, "trafficInspection": "None", "cidrRules": rules,
        });
        let policy = Policy::parse(text.to_string().as_bytes()).unwrap();
        let judged = |protocol| {
            let address = std::net::IpAddr::from(address);
            decide(&policy, &Flow::Raw { protocol, address, port })
        };
        let udp = judged(Protocol::Udp);
        match Byway::of(&policy, Passing::Udp) {
            Some(byway) => {
                let by = byway.decide(Protocol::Udp, address.into(), port);
                prop_assert_eq!((&by.outcome, by.rule), (&udp.outcome, udp.rule));
            }
            None => prop_assert!(udp.is_deny()),
        }
        // Without a proxy the default speaks of UDP as well.
        let (protocol, by_rule) = if tcp {
            (Protocol::Tcp, judged(Protocol::Tcp))
        } else {
            (Protocol::Udp, udp)
        };
        let denied = match by_rule.rule {
            RuleRef::Default => default == "Deny",
            RuleRef::Rule { .. } => by_rule.is_deny(),
        };
        let by = Byway::of(&policy, Passing::All)
            .map(|byway| byway.decide(protocol, address.into(), port));
        prop_assert_eq!(by.is_none_or(|verdict| verdict.is_deny()), denied);
    }
}
