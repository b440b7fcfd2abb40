//! Rows D of the attack list: requests.

use std::time::{Duration, Instant};

use holdfast_wire::egress::{Kind, Verdict};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
};

use crate::rig::{
    ALLOWED, BY_NAME, EVIL, REFERENCE, Rig, WILD, allow_hosts,
    client::{exchange, get, http, https_get, tls},
};

#[test]
fn d1_d2_the_host_decides_and_not_the_address() {
    let rig = Rig::new(REFERENCE);
    let (status, body) = rig.guest(http(EVIL, &get("allowed.test", "/a?b=c"))).unwrap();
    assert_eq!(status, 200);
    assert!(body.ends_with("you asked /a?b=c"), "{body}");
    let (status, body) = rig.guest(http(ALLOWED, &get("evil.test", "/secret?x=y"))).unwrap();
    assert_eq!(status, 403);
    assert!(body.contains(r#""code":"EgressDenied""#) && body.contains("default"), "{body}");
    rig.outside.evil_saw_nothing();
    assert_eq!(rig.outside.seen(ALLOWED, 80).requests.len(), 1);
    let denial = rig.denial("evil.test");
    assert_eq!(
        (denial.kind, denial.method.as_str(), denial.path.as_str()),
        (Kind::Http, "GET", "/secret")
    );
    assert_eq!((denial.scheme.as_str(), denial.port), ("http", 80));
    let allowed = rig.decision("allows", |it| it.verdict == Verdict::Allowed);
    assert_eq!(allowed.rule.as_deref(), Some(r#"rules[1] "allowed""#));
    let ended = rig.end_of(allowed.flow);
    assert_eq!((ended.sent_bytes, ended.received_bytes), (0, 16));
}

#[test]
fn d3_d5_d9_what_two_readers_could_read_differently_is_refused() {
    let rig = Rig::new(REFERENCE);
    assert_eq!(rig.guest(http(ALLOWED, &get("allowed.test", "/"))).unwrap().0, 200);
    let connections = rig.outside.seen(ALLOWED, 80).connections;
    let host = "Host: allowed.test\r\n";
    for (request, expected) in [
        (format!("GET / HTTP/1.1\r\n{host}Host: evil.test\r\n\r\n"), 400),
        (format!("GET / HTTP/1.1\r\n{host}{host}\r\n"), 400),
        ("GET / HTTP/1.1\r\nHost: allowed.test, evil.test\r\n\r\n".into(), 400),
        ("GET / HTTP/1.1\r\nHost: allowed.test@evil.test\r\n\r\n".into(), 400),
        ("GET / HTTP/1.1\r\nHost: allowed.test:22\r\n\r\n".into(), 400),
        ("GET / HTTP/1.1\r\n Host : allowed.test\r\n\r\n".into(), 400),
        ("GET / HTTP/1.1\r\nHost : allowed.test\r\n\r\n".into(), 400),
        ("GET / HTTP/1.1\r\n\r\n".into(), 400),
        ("GET / HTTP/1.0\r\n\r\n".into(), 400),
        (format!("GET http://evil.test/ HTTP/1.1\r\n{host}\r\n"), 400),
        (format!("CONNECT evil.test:443 HTTP/1.1\r\n{host}\r\n"), 405),
        ("CONNECT evil.test:443 HTTP/1.1\r\nHost: evil.test:443\r\n\r\n".into(), 405),
        // Closed without an answer.
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into(), 0),
        (
            format!("POST / HTTP/1.1\r\n{host}Content-Length: 3\r\nContent-Length: 30\r\n\r\nabc"),
            400,
        ),
        (
            format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding: identity, chunked, gzip\r\n\r\n"),
            400,
        ),
        (format!("GET /a\tb HTTP/1.1\r\n{host}\r\n"), 400),
        (format!("GET /% HTTP/1.1\r\n{host}\r\n"), 400),
        (format!("GET /%00 HTTP/1.1\r\n{host}\r\n"), 400),
        (format!("OPTIONS * HTTP/1.1\r\n{host}\r\n"), 400),
        (format!("{} / HTTP/1.1\r\n{host}\r\n", "M".repeat(33)), 0),
        (format!("GET / HTTP/1.1\r\n{host}X: {}\r\n\r\n", "x".repeat(70_000)), 431),
        (format!("GET / HTTP/1.1\r\n{host}{}\r\n", "X: x\r\n".repeat(200)), 431),
        (format!("GET /{} HTTP/1.1\r\n{host}\r\n", "x".repeat(66_000)), 414),
    ] {
        let status = rig.guest(http(ALLOWED, &request)).map_or(0, |(status, _)| status);
        let head: String = request.chars().take(80).collect();
        // An answer before all of it was sent may be lost in the reset that follows.
        let long = expected >= 414 && [0, 400, 414, 431].contains(&status);
        let fits = status == expected || long;
        assert!(fits, "{status}, not {expected}: {head:?}");
    }
    assert_eq!(rig.outside.seen(ALLOWED, 80).connections, connections);
    rig.outside.evil_saw_nothing();
}

#[test]
fn a_body_framed_in_two_ways_is_sent_on_framed_in_one() {
    let rig = Rig::new(REFERENCE);
    // What follows the last chunk is another request to whoever goes by the chunks, and part of the
    // body to whoever goes by the length.
    let request = "POST /one HTTP/1.1\r\nHost: allowed.test\r\nContent-Length: 60\r\n\
        Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n\
        GET /admin HTTP/1.1\r\nHost: allowed.test\r\n\r\n";
    let (status, _) = rig.guest(http(ALLOWED, request)).unwrap();
    assert_eq!(status, 200);
    let requests = rig.outside.seen(ALLOWED, 80).requests;
    assert_eq!(requests.len(), 1, "the other one is denied, or not read: {requests:?}");
    let framing: Vec<_> = requests[0]
        .2
        .iter()
        .filter(|(name, _)| ["content-length", "transfer-encoding"].contains(&name.as_str()))
        .collect();
    assert_eq!(framing, [&("transfer-encoding".to_owned(), "chunked".to_owned())]);
}

#[test]
fn d4_every_spelling_of_a_denied_path_is_denied_and_what_is_sent_is_what_was_judged() {
    let rig = Rig::new(REFERENCE);
    let roots = rig.ca.roots();
    let (status, _) =
        rig.guest(https_get(ALLOWED, "allowed.test", "/%61/../b%2fc", roots)).unwrap();
    assert_eq!(status, 200);
    assert_eq!(rig.outside.seen(ALLOWED, 443).requests[0].1, "/b%2Fc");
    for path in
        ["/admin", "/admin/x", "/%61dmin", "/x/../admin", "//admin", "/pub/..%2fadmin", "/;x/admin"]
    {
        let roots = rig.ca.roots();
        let (status, body) = rig.guest(https_get(ALLOWED, "allowed.test", path, roots)).unwrap();
        assert_eq!(status, 403, "{path}");
        assert!(body.contains("no admin"), "{body}");
    }
    assert_eq!(rig.outside.seen(ALLOWED, 443).requests.len(), 1);
    assert_eq!(rig.denial("allowed.test").rule.as_deref(), Some(r#"rules[0] "no admin""#));
}

#[test]
fn d9_an_upgrade_to_h2c_is_not_passed_on() {
    let rig = Rig::new(REFERENCE);
    let request = "GET / HTTP/1.1\r\nHost: allowed.test\r\nConnection: Upgrade, HTTP2-Settings\r\n\
        Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n\r\n";
    assert_eq!(rig.guest(http(ALLOWED, request)).unwrap().0, 200);
    let headers = &rig.outside.seen(ALLOWED, 80).requests[0].2;
    assert_eq!(*headers, [("host".to_owned(), "allowed.test".to_owned())]);
}

#[test]
fn d10_a_websocket_passes_where_the_host_may_and_is_closed_with_the_policy() {
    let request = |host: &str| {
        format!(
            "GET /ws HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
            Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
    };
    let rig = Rig::new(REFERENCE);
    let roots = rig.ca.roots();
    let ended = rig.guest(async {
        let mut stream = tls(ALLOWED, "allowed.test", roots).await.unwrap();
        let (status, _) = exchange(&mut stream, &request("allowed.test")).await.unwrap();
        assert_eq!(status, 101);
        stream.write_all(b"ping").await.unwrap();
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"ping");
        // A change that still allows it does nothing to it.
        rig.put(&allow_hosts(&["allowed.test"], "Full"));
        stream.write_all(b"pong").await.unwrap();
        stream.read_exact(&mut answer).await.unwrap();
        rig.put(&allow_hosts(&["*.wild.test"], "Full"));
        let _ = stream.write_all(b"late").await;
        stream.read(&mut answer).await
    });
    assert!(ended.is_err() || ended.is_ok_and(|count| count == 0));
    assert_eq!(rig.outside.seen(ALLOWED, 443).bytes, b"pingpong");
    let decision =
        rig.decision("allows it", |it| it.path == "/ws" && it.verdict == Verdict::Allowed);
    assert!(rig.end_of(decision.flow).revoked);

    let (status, _) = rig.guest(http(EVIL, &request("evil.test"))).unwrap();
    assert_eq!(status, 403);
    rig.outside.evil_saw_nothing();
}

#[test]
fn d12_methods_are_told_apart_by_case() {
    let rule = r#"{"defaultAction": "Deny", "rules": [
        {"match": {"host": "allowed.test", "methods": ["GET"]}, "action": {"type": "Allow"}}]}"#;
    let rig = Rig::new(rule);
    for (method, expected) in
        [("GET", 200), ("get", 403), ("POST", 403), ("BREW", 403), ("TRACE", 403)]
    {
        let request = format!("{method} / HTTP/1.1\r\nHost: allowed.test\r\n\r\n");
        assert_eq!(rig.guest(http(ALLOWED, &request)).unwrap().0, expected, "{method}");
    }
    assert_eq!(rig.outside.seen(ALLOWED, 80).requests.len(), 1);
}

#[test]
fn d15_bodies_stream_both_ways_without_being_gathered() {
    const MIB: usize = 1 << 20;
    const BODY_MIB: usize = 96;
    let rig = Rig::new(REFERENCE);
    let other = std::net::Ipv4Addr::new(198, 51, 100, 13);
    rig.outside.address(other);
    rig.outside.name("big.wild.test", crate::rig::Answer::Address(other.into()));
    // Sends back what it gets as it comes.
    rig.outside.custom(other, 80, |mut stream| async move {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        let length = BODY_MIB * MIB;
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n");
        stream.write_all(answer.as_bytes()).await.unwrap();
        let (mut read, mut write) = stream.split();
        tokio::io::copy(&mut read, &mut write).await.unwrap();
    });
    let resident = || {
        let status = fs_err::read_to_string(format!("/proc/{}/status", rig.program_id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap().to_owned();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap()
    };
    let before = resident();
    let after = rig.guest(async {
        let mut stream = TcpStream::connect((other, 80)).await.unwrap();
        let length = BODY_MIB * MIB;
        let head = format!(
            "POST / HTTP/1.1\r\nHost: big.wild.test\r\nContent-Length: {length}\r\n\
            Expect: 100-continue\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let (mut read, mut write) = stream.into_split();
        let sending = tokio::spawn(async move {
            let piece = vec![7; MIB];
            for _ in 0..BODY_MIB {
                write.write_all(&piece).await.unwrap();
            }
            write
        });
        let (mut got, mut buffer, mut most) = (0, vec![0; MIB], 0);
        while got < length {
            got += read.read(&mut buffer).await.unwrap();
            most = most.max(resident());
        }
        drop(sending.await.unwrap());
        most
    });
    assert!(after < before + 16 * 1024, "{before} KiB, then {after} KiB");
}

#[test]
fn d14_a_head_that_does_not_end_is_given_10_seconds_and_a_connection_at_rest_is_not_hurried() {
    let rig = Rig::new(REFERENCE);
    let roots = rig.ca.roots();
    let began = Instant::now();
    let (plain, opened, rested) = rig.guest(async move {
        let plain = TcpStream::connect((ALLOWED, 80)).await.unwrap();
        let opened = tls(ALLOWED, "allowed.test", roots.clone()).await.unwrap();
        let mut rested = tls(ALLOWED, "allowed.test", roots).await.unwrap();
        exchange(&mut rested, &get("allowed.test", "/first")).await.unwrap();
        let (plain, opened) = tokio::join!(drip(plain), drip(opened));
        (plain, opened, exchange(&mut rested, &get("allowed.test", "/second")).await.unwrap().0)
    });
    for took in [plain, opened] {
        assert!((9..20).contains(&took.as_secs()), "{took:?}");
    }
    assert!(began.elapsed() >= Duration::from_secs(10));
    assert_eq!(rested, 200, "a connection at rest was closed");
}

/// Sends a head that never ends, a byte a second: each is in time, and the head is not. How long
/// that was borne.
async fn drip(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> Duration {
    let began = Instant::now();
    let head = b"GET /drip HTTP/1.1\r\nHost: allowed.test\r\nX-Drip: ";
    stream.write_all(head).await.unwrap();
    loop {
        let mut one = [0];
        tokio::select! {
            read = stream.read(&mut one) => {
                assert!(matches!(read, Ok(0) | Err(_)), "it was answered");
                return began.elapsed();
            }
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
        }
        if stream.write_all(b"a").await.is_err() {
            return began.elapsed();
        }
    }
}

#[test]
fn d14_a_guest_that_does_not_read_stops_its_server_and_nobody_else() {
    let rig = Rig::new(BY_NAME);
    rig.outside.custom(WILD, 5000, |_| async {});
    let (status, sent) = rig.guest(async {
        let mut slow = TcpStream::connect((ALLOWED, 80)).await.unwrap();
        let body = "x".repeat(1 << 20);
        let request = format!(
            "POST / HTTP/1.1\r\nHost: allowed.test\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        slow.write_all(request.as_bytes()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        let mut other = TcpStream::connect((ALLOWED, 80)).await.unwrap();
        let answer = exchange(&mut other, &get("allowed.test", "/")).await.unwrap();
        (answer.0, slow)
    });
    drop(sent);
    assert_eq!(status, 200);
}

#[test]
fn d16_d18_what_sends_the_guest_round_us_and_what_is_meant_for_us_is_taken_out() {
    let rig = Rig::new(REFERENCE);
    let roots = rig.ca.roots();
    let answer = rig.guest(async move {
        let mut stream = tls(ALLOWED, "allowed.test", roots).await.unwrap();
        let request = "GET / HTTP/1.1\r\nHost: allowed.test\r\nProxy-Authorization: Basic x\r\n\
            Proxy-Connection: keep-alive\r\nX-Mine: 1\r\n\r\n";
        exchange(&mut stream, request).await.unwrap().1.to_ascii_lowercase()
    });
    assert!(answer.contains("x-own: 1") && !answer.contains("alt-svc"), "{answer}");
    let headers = &rig.outside.seen(ALLOWED, 443).requests[0].2;
    assert!(!headers.iter().any(|(name, _)| name.starts_with("proxy-")), "{headers:?}");
    assert!(headers.contains(&("x-mine".into(), "1".into())));
}

#[test]
fn d17_a_server_that_breaks_the_protocol_is_a_502_and_no_more() {
    let rig = Rig::new(REFERENCE);
    for (number, answer) in [
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd".to_vec(),
        b"garbage\r\n\r\n".to_vec(),
        [&b"HTTP/1.1 200 OK\r\nX: "[..], &vec![b'x'; 200_000], b"\r\n\r\n"].concat(),
        [&b"HTTP/1.1 200 OK\r\n"[..], &b"X: x\r\n".repeat(1000), b"\r\n"].concat(),
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n".to_vec(),
        b"".to_vec(),
    ]
    .into_iter()
    .enumerate()
    {
        let port_host = std::net::Ipv4Addr::new(198, 51, 100, 100 + u8::try_from(number).unwrap());
        rig.outside.address(port_host);
        let name = format!("bad{number}.wild.test");
        rig.outside.name(&name, crate::rig::Answer::Address(port_host.into()));
        rig.outside.custom(port_host, 80, move |mut stream| {
            let answer = answer.clone();
            async move {
                let _ = stream.read(&mut [0; 4096]).await;
                let _ = stream.write_all(&answer).await;
            }
        });
        let (status, body) = rig.guest(http(port_host, &get(&name, "/"))).unwrap();
        assert_eq!(status, 502, "{number}: {body}");
    }
    assert_eq!(rig.guest(http(ALLOWED, &get("allowed.test", "/"))).unwrap().0, 200);
}
