//! Rows E of the attack list: headers that rules put in, and requests they send elsewhere.

use holdfast_wire::egress::{Credential, Reference, Request, Verdict};
use http_body_util::Empty;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::rig::{
    ALLOWED, API, Answer, EVIL, REFERENCE, Rig, SANDBOX, SECRET, WILD,
    client::{exchange, get, http, https_get, tls, tls_with},
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

fn credential(reference: Reference, value: &str, expires_at_ms: Option<u64>) -> Credential {
    Credential { reference, value: value.to_owned(), expires_at_ms }
}

fn secret(value: &str) -> Credential {
    credential(Reference::Secret { id: "token".into(), key: None }, value, None)
}

#[test]
fn e9_a_withdrawn_secret_is_in_no_request_of_an_open_connection_and_its_denial_says_why() {
    let rig = Rig::new(REFERENCE);
    let roots = rig.ca.roots();
    let answers = rig.guest(async {
        let mut stream = tls(API, "api.test", roots).await.unwrap();
        let first = exchange(&mut stream, &get("api.test", "/")).await.unwrap();
        rig.values(Vec::new());
        let withdrawn = exchange(&mut stream, &get("api.test", "/")).await.unwrap();
        rig.values(vec![secret("again")]);
        let again = exchange(&mut stream, &get("api.test", "/")).await.unwrap();
        [first, withdrawn, again]
    });
    assert_eq!(answers.each_ref().map(|(status, _)| *status), [200, 403, 200]);
    assert!(answers[1].1.contains("secret_missing"), "{}", answers[1].1);
    assert_eq!(authorization(&rig), [format!("Bearer {SECRET}"), "Bearer again".to_owned()]);
    let denial = rig.denial("api.test");
    assert_eq!((denial.reason.as_str(), denial.generation), ("secret_missing", 1));
    assert_eq!(rig.outside.seen(API, 443).requests.len(), 2, "one went without its header");
}

#[test]
fn e9_a_withdrawn_secret_is_in_no_later_stream_of_http2() {
    let rig = Rig::new(REFERENCE);
    let roots = rig.ca.roots();
    let statuses = rig.guest(async {
        let stream = tls_with(API, 443, "api.test", roots, &["h2"]).await.unwrap();
        let (mut sender, connection) =
            http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let mut status = async || {
            let request = hyper::Request::get("https://api.test/");
            let request = request.body(Empty::<bytes::Bytes>::new()).unwrap();
            sender.send_request(request).await.unwrap().status().as_u16()
        };
        let first = status().await;
        rig.values(Vec::new());
        let withdrawn = status().await;
        rig.values(vec![secret("again")]);
        [first, withdrawn, status().await]
    });
    assert_eq!(statuses, [200, 403, 200]);
    assert_eq!(authorization(&rig), [format!("Bearer {SECRET}"), "Bearer again".to_owned()]);
}

#[test]
fn a_websocket_that_was_opened_with_a_secret_is_closed_when_that_is_gone_and_not_when_it_is_changed()
 {
    let rig = Rig::new(REFERENCE);
    let roots = rig.ca.roots();
    let ended = rig.guest(async {
        let mut stream = tls(API, "api.test", roots).await.unwrap();
        let request = "GET /ws HTTP/1.1\r\nHost: api.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
            Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
        assert_eq!(exchange(&mut stream, request).await.unwrap().0, 101);
        let mut answer = [0; 4];
        rig.values(vec![secret("changed")]);
        stream.write_all(b"ping").await.unwrap();
        stream.read_exact(&mut answer).await.unwrap();
        rig.values(Vec::new());
        let _ = stream.write_all(b"late").await;
        stream.read(&mut answer).await
    });
    assert!(ended.is_err() || ended.is_ok_and(|count| count == 0));
    assert_eq!(rig.outside.seen(API, 443).bytes, b"ping");
    let decision = rig.decision("allows it", |it| it.path == "/ws");
    assert!(rig.end_of(decision.flow).revoked);
}

#[test]
fn a_policy_whose_secret_is_not_there_rules_all_the_same_and_denies_what_needs_it() {
    let rig = Rig::new(REFERENCE);
    let Request::Put(mut put) = rig.put_request(SANDBOX, REFERENCE, SECRET) else { panic!() };
    put.secrets.clear();
    rig.agent.done(Request::Put(put), &[]);
    let roots = rig.ca.roots();
    assert_eq!(rig.guest(https_get(API, "api.test", "/", roots)).unwrap().0, 403);
    assert_eq!(rig.denial("api.test").reason, "secret_missing");
    let roots = rig.ca.roots();
    assert_eq!(rig.guest(https_get(ALLOWED, "allowed.test", "/", roots)).unwrap().0, 200);
}

#[test]
fn a_token_is_sent_as_a_bearer_token_until_its_time_is_over() {
    let identity = serde_json::json!({"managedIdentityRef":
        {"type": "SystemAssigned", "resource": "https://api.test"}});
    let policy = serde_json::json!({"defaultAction": "Deny", "rules": [{
        "match": {"host": "api.test"},
        "action": {"type": "Transform", "headers": [
            {"operation": "Set", "name": "Authorization", "valueRef": identity}]}
    }]});
    let rig = Rig::new(&policy.to_string());
    let ask = || {
        let roots = rig.ca.roots();
        rig.guest(https_get(API, "api.test", "/", roots)).unwrap()
    };
    let (status, body) = ask();
    assert!(status == 403 && body.contains("token_missing"), "{body}");
    let reference = Reference::Identity { resource: "https://api.test".into(), identity: None };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let now_ms = u64::try_from(now.as_millis()).unwrap();
    rig.values(vec![credential(reference.clone(), "t0ken", Some(now_ms + 60_000))]);
    assert_eq!(ask().0, 200);
    rig.values(vec![credential(reference, "t0ken", Some(now_ms))]);
    let (status, body) = ask();
    assert!(status == 403 && body.contains("token_expired"), "{body}");
    assert_eq!(authorization(&rig), ["Bearer t0ken"]);
    rig.decision("says so", |it| it.reason == "token_expired");
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
