//! Rows E of the attack list: headers that rules put in, and requests they send elsewhere.

use holdfast_wire::egress::Verdict;

use crate::rig::{
    ALLOWED, API, Answer, EVIL, REFERENCE, Rig, SANDBOX, SECRET, WILD,
    client::{exchange, get, http, https_get, tls},
};

fn authorization(rig: &Rig) -> Vec<String> {
    let requests = rig.outside.seen(API, 443).requests;
    let headers = requests.into_iter().flat_map(|(_, _, headers)| headers);
    headers.filter(|(name, _)| name == "authorization").map(|(_, value)| value).collect()
}

#[test]
fn a_secret_is_put_in_in_place_of_every_header_of_its_name() {
    let rig = Rig::new(REFERENCE);
    let roots = rig.ca.roots();
    let (status, body) = rig.guest(async move {
        // By another address, too: it goes where the name leads.
        let mut stream = tls(EVIL, "api.test", roots).await.unwrap();
        let request = "GET /v1 HTTP/1.1\r\nHost: api.test\r\nAuthorization: Bearer guess\r\n\
            authorization: again\r\nConnection: authorization\r\n\r\n";
        exchange(&mut stream, request).await.unwrap()
    });
    assert_eq!(status, 200, "{body}");
    assert_eq!(authorization(&rig), [format!("Bearer {SECRET}")]);
    assert!(!body.contains(SECRET));
    rig.outside.evil_saw_nothing();
}

#[test]
fn e1_no_secret_goes_over_plain_http() {
    let rig = Rig::new(REFERENCE);
    let (status, body) = rig.guest(http(API, &get("api.test", "/"))).unwrap();
    assert_eq!(status, 403);
    assert!(body.contains("plain_http_transform"), "{body}");
    assert_eq!(rig.outside.seen(API, 80).connections, 0);
    assert_eq!(rig.denial("api.test").reason, "plain_http_transform");
}

#[test]
fn e4_a_redirect_is_the_guests_to_follow_and_carries_nothing() {
    let rig = Rig::new(REFERENCE);
    let roots = rig.ca.roots();
    let (status, head) = rig.guest(https_get(API, "api.test", "/redirect", roots)).unwrap();
    assert_eq!(status, 302);
    assert!(head.contains("https://evil.test/") && !head.contains(SECRET), "{head}");
    let roots = rig.ca.roots();
    assert!(rig.guest(tls(EVIL, "evil.test", roots)).is_err());
    rig.outside.evil_saw_nothing();
}

#[test]
fn e5_trace_would_show_what_was_put_in_and_is_denied() {
    let rig = Rig::new(REFERENCE);
    let roots = rig.ca.roots();
    let status = rig.guest(async move {
        let mut stream = tls(API, "api.test", roots).await.unwrap();
        exchange(&mut stream, "TRACE / HTTP/1.1\r\nHost: api.test\r\n\r\n").await.unwrap().0
    });
    assert_eq!(status, 403);
    assert_eq!(rig.denial("api.test").reason, "trace_transform");
    assert!(rig.outside.seen(API, 443).requests.is_empty());
}

#[test]
fn e8_a_secret_is_in_no_answer_and_no_decision() {
    let rig = Rig::new(REFERENCE);
    let roots = rig.ca.roots();
    let mut shown = rig.guest(https_get(API, "api.test", "/", roots)).unwrap().1;
    shown.push_str(&rig.guest(http(API, &get("api.test", "/"))).unwrap().1);
    rig.denial("api.test");
    shown.push_str(&format!("{:?}", rig.agent.told().decisions));
    assert!(!shown.contains(SECRET));
    // What cannot be a header is refused without being said.
    let request = rig.put_request(SANDBOX, REFERENCE, "line\r\nbreak-secret");
    rig.agent.done(request, &[]);
    let roots = rig.ca.roots();
    let (status, body) = rig.guest(https_get(API, "api.test", "/", roots)).unwrap();
    assert_eq!(status, 403);
    assert!(!body.contains("break-secret"), "{body}");
}

#[test]
fn e9_a_secret_that_is_changed_or_taken_away_is_so_for_the_next_request_of_a_connection() {
    let rig = Rig::new(REFERENCE);
    let roots = rig.ca.roots();
    let statuses = rig.guest(async {
        let mut stream = tls(API, "api.test", roots).await.unwrap();
        let first = exchange(&mut stream, &get("api.test", "/")).await.unwrap().0;
        rig.agent.done(rig.put_request(SANDBOX, REFERENCE, "rotated"), &[]);
        let second = exchange(&mut stream, &get("api.test", "/")).await.unwrap().0;
        rig.put(&crate::rig::allow_hosts(&["allowed.test"], "Full"));
        let third = exchange(&mut stream, &get("api.test", "/")).await.unwrap().0;
        [first, second, third]
    });
    assert_eq!(statuses, [200, 200, 403]);
    assert_eq!(authorization(&rig), [format!("Bearer {SECRET}"), "Bearer rotated".to_owned()]);
    assert_eq!(rig.outside.seen(API, 443).connections, 1);
}

#[test]
fn e10_e11_a_rewrite_goes_one_step_and_not_where_nothing_may_go() {
    let rule = |host: &str, to: &str| serde_json::json!({"match": {"host": host}, "action": {"type": "Rewrite", "host": to}});
    let policy = serde_json::json!({"defaultAction": "Deny", "rules": [
        rule("a.wild.test", "allowed.test"),
        rule("allowed.test", "evil.test"),
        rule("b.wild.test", "inside.test"),
        rule("c.wild.test", "169.254.169.254"),
        {"match": {"host": "d.wild.test"}, "action":
            {"type": "Rewrite", "host": "api.test", "path": "/fixed"}},
    ]});
    let rig = Rig::new(&policy.to_string());
    rig.outside.name("inside.test", Answer::Address([10, 0, 0, 1].into()));
    let roots = rig.ca.roots();
    let (status, body) = rig.guest(https_get(WILD, "a.wild.test", "/x", roots)).unwrap();
    assert_eq!(status, 200, "{body}");
    let (_, target, headers) = rig.outside.seen(ALLOWED, 443).requests[0].clone();
    assert_eq!(target, "/x");
    assert!(headers.contains(&("host".into(), "allowed.test".into())), "{headers:?}");
    let roots = rig.ca.roots();
    let (status, _) = rig.guest(https_get(WILD, "d.wild.test", "/x?y=z", roots)).unwrap();
    assert_eq!((status, rig.outside.seen(API, 443).requests[0].1.as_str()), (200, "/fixed?y=z"));
    for name in ["b.wild.test", "c.wild.test"] {
        let roots = rig.ca.roots();
        let (status, body) = rig.guest(https_get(WILD, name, "/", roots)).unwrap();
        assert_eq!(status, 403, "{body}");
        let denial = rig.decision(name, |it| it.host == name && it.verdict == Verdict::Denied);
        assert!(["rebind", "deny_set"].contains(&denial.reason.as_str()), "{denial:?}");
    }
    rig.outside.evil_saw_nothing();
}
