//! Rows B and C of the attack list: TLS, by its server name.

use std::time::Duration;

use holdfast_wire::egress::{Kind, Verdict};
use rustls::AlertDescription;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::rig::{
    ALLOWED, Answer, BY_NAME, EVERYTHING, EVIL, REFERENCE, Rig, WILD, allow_hosts,
    client::{alert, client_hello, exchange, get, https_get, send_raw, tls, tls_with},
};

/// Alert, fatal.
const ALERT: [u8; 6] = [21, 3, 3, 0, 2, 2];

#[test]
fn b11_c1_a_name_is_dialled_where_we_find_it_whatever_address_the_guest_chose() {
    // Where the name that leads there is allowed, the attacker is reached.
    let rig = Rig::new(EVERYTHING);
    let roots = rig.outside.authority.roots();
    let _ = rig.guest(async {
        tokio::time::timeout(Duration::from_secs(2), tls(EVIL, "evil.test", roots)).await
    });
    assert!(rig.outside.seen(EVIL, 443).connections > 0);

    for policy in [BY_NAME, REFERENCE] {
        let rig = Rig::new(policy);
        let opened = policy == REFERENCE;
        let roots = if opened { rig.ca.roots() } else { rig.outside.authority.roots() };
        let (status, body) = rig.guest(https_get(EVIL, "allowed.test", "/x", roots)).unwrap();
        assert_eq!(status, 200, "{body}");
        assert!(body.ends_with("you asked /x"), "{body}");
        assert_eq!(rig.outside.seen(ALLOWED, 443).requests.len(), 1);
        rig.outside.evil_saw_nothing();
        let decision = rig.decision("allows it", |it| {
            it.verdict == Verdict::Allowed && it.host == "allowed.test"
        });
        assert_eq!(decision.address, Some(ALLOWED.into()));
    }
}

#[test]
fn c2_a_denied_name_gets_an_alert_at_an_allowed_address_too() {
    for policy in [BY_NAME, REFERENCE] {
        let rig = Rig::new(policy);
        let roots = rig.ca.roots();
        let error = rig.guest(tls(ALLOWED, "evil.test", roots)).unwrap_err();
        assert_eq!(alert(&error), Some(AlertDescription::AccessDenied), "{error}");
        assert_eq!(rig.outside.seen(ALLOWED, 443).connections, 0);
        rig.outside.evil_saw_nothing();
        let denial = rig.denial("evil.test");
        assert_eq!((denial.kind, denial.port), (Kind::Tls, 443));
        assert_eq!(denial.address, Some(ALLOWED.into()));
    }
}

#[test]
fn a1_a2_c6_without_a_name_only_the_address_counts() {
    let without_name = {
        // The server's own name is an address, which is not sent.
        let bytes = client_hello("198.51.100.66");
        assert!(!bytes.windows(4).any(|it| it == b"evil"));
        bytes
    };
    let rig = Rig::new(EVERYTHING);
    let bytes = without_name.clone();
    let _ = rig.guest(async move {
        let mut stream = TcpStream::connect((EVIL, 443)).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        tokio::time::timeout(Duration::from_secs(1), stream.read(&mut [0; 9])).await
    });
    assert!(rig.outside.seen(EVIL, 443).bytes.starts_with(&[22, 3]));

    let rig = Rig::new(BY_NAME);
    for address in [EVIL, ALLOWED] {
        let answer = rig.guest(send_raw(address, 443, &without_name)).unwrap();
        assert!(answer.starts_with(&ALERT), "{answer:?}");
        assert_eq!(rig.denial(&address.to_string()).reason, "no_name");
    }
    assert_eq!(rig.outside.seen(ALLOWED, 443).connections, 0);
    rig.outside.evil_saw_nothing();
}

#[test]
fn a3_other_ports_are_closed_unless_a_rule_names_them() {
    let rig = Rig::new(EVERYTHING);
    let _ = rig.guest(async {
        let mut stream = TcpStream::connect((EVIL, 8443)).await.unwrap();
        stream.write_all(b"hello").await.unwrap();
        tokio::time::timeout(Duration::from_secs(1), stream.read(&mut [0; 9])).await
    });
    assert_eq!(rig.outside.seen(EVIL, 8443).bytes, b"hello");

    let rig = Rig::new(BY_NAME);
    rig.outside.echo(ALLOWED, 8443);
    let error = rig.guest(send_raw(ALLOWED, 8443, &client_hello("allowed.test")));
    assert!(error.is_ok_and(|answer| answer.starts_with(&ALERT)));
    for port in [22, 853, 8443] {
        assert!(rig.guest(send_raw(EVIL, port, b"SSH-2.0-x\r\n")).is_err(), "{port}");
    }
    assert_eq!(rig.outside.seen(ALLOWED, 8443).connections, 0);
    rig.outside.evil_saw_nothing();
}

#[test]
fn c8_a_first_message_in_crumbs_is_judged_as_a_whole_one() {
    let rig = Rig::new(BY_NAME);
    let crumbs = |name: &str, records: bool| {
        let whole = client_hello(name);
        let mut bytes = Vec::new();
        if !records {
            return whole;
        }
        // A record for every 16 bytes of the message.
        for part in whole[5..].chunks(16) {
            bytes.extend([22, 3, 1, 0, u8::try_from(part.len()).unwrap()]);
            bytes.extend(part);
        }
        bytes
    };
    for records in [false, true] {
        let send = |bytes: Vec<u8>| async move {
            let mut stream = TcpStream::connect((EVIL, 443)).await.unwrap();
            stream.set_nodelay(true).unwrap();
            for byte in bytes {
                stream.write_all(&[byte]).await.unwrap();
            }
            let mut answer = vec![0; 6];
            stream.read_exact(&mut answer).await.map(|_| answer)
        };
        let answer = rig.guest(send(crumbs("evil.test", records))).unwrap();
        assert_eq!(answer, ALERT, "records: {records}");
        // A server answers with its own hello, or complains of ours in its own words.
        let answer = rig.guest(send(crumbs("allowed.test", records))).unwrap();
        assert_eq!(answer[0], 22, "records: {records}: {answer:?}");
    }
    rig.outside.evil_saw_nothing();
}

#[test]
fn c9_c10_a_first_message_may_be_15_kib_and_not_64() {
    let padded = |padding: usize| {
        // A padding extension before the end of the message, with every length made right.
        let whole = client_hello("allowed.test");
        let mut message = whole[5..].to_vec();
        let session = usize::from(message[38]);
        let ciphers = 39 + session;
        let length = usize::from(u16::from_be_bytes([message[ciphers], message[ciphers + 1]]));
        let extensions = ciphers + 2 + length + 2;
        message.extend(21_u16.to_be_bytes());
        message.extend(u16::try_from(padding).unwrap().to_be_bytes());
        message.extend(vec![0; padding]);
        let total = u16::try_from(message.len() - extensions - 2).unwrap();
        message[extensions..extensions + 2].copy_from_slice(&total.to_be_bytes());
        let total = u32::try_from(message.len() - 4).unwrap();
        message[1..4].copy_from_slice(&total.to_be_bytes()[1..]);
        let mut bytes = Vec::new();
        for part in message.chunks(16_384) {
            bytes.extend([22, 3, 1]);
            bytes.extend(u16::try_from(part.len()).unwrap().to_be_bytes());
            bytes.extend(part);
        }
        bytes
    };
    let rig = Rig::new(BY_NAME);
    let first = |bytes: Vec<u8>| async move {
        let mut stream = TcpStream::connect((ALLOWED, 443)).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        let mut answer = vec![0; 6];
        stream.read_exact(&mut answer).await.map(|_| answer)
    };
    assert_eq!(rig.guest(first(padded(15 * 1024))).unwrap()[0], 22);
    let connections = rig.outside.seen(ALLOWED, 443).connections;
    assert_eq!(rig.guest(first(padded(60_000))).unwrap(), ALERT);
    assert_eq!(rig.outside.seen(ALLOWED, 443).connections, connections);
    assert_eq!(rig.denial(&ALLOWED.to_string()).reason, "hello_too_long");
}

#[test]
fn c15_a_first_message_that_does_not_end_is_given_5_seconds() {
    let rig = Rig::new(BY_NAME);
    let start = std::time::Instant::now();
    let ended = rig.guest(async {
        let mut stream = TcpStream::connect((ALLOWED, 443)).await.unwrap();
        for byte in client_hello("allowed.test").into_iter().take(3) {
            stream.write_all(&[byte]).await.unwrap();
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        stream.read(&mut [0; 9]).await
    });
    assert!(ended.is_err(), "{ended:?}");
    let taken = start.elapsed();
    assert!((4..9).contains(&taken.as_secs()), "{taken:?}");
}

#[test]
fn c19_e3_an_upstream_that_cannot_show_who_it_is_gets_no_request() {
    let rig = Rig::new(&allow_hosts(&["allowed.test", "*.wild.test"], "Full"));
    let roots = rig.ca.roots();
    let (status, _) = rig.guest(https_get(ALLOWED, "allowed.test", "/", roots)).unwrap();
    assert_eq!(status, 200);

    let stranger = crate::rig::Authority::new("stranger");
    let other = std::net::Ipv4Addr::new(198, 51, 100, 12);
    rig.outside.address(other);
    rig.outside.name("self.wild.test", Answer::Address(other.into()));
    rig.outside.name("wrong.wild.test", Answer::Address(ALLOWED.into()));
    rig.outside.tls(other, 443, stranger.server(&["self.wild.test"]));
    // Of the right authority, and once good.
    let old = std::net::Ipv4Addr::new(198, 51, 100, 13);
    rig.outside.address(old);
    rig.outside.name("old.wild.test", Answer::Address(old.into()));
    rig.outside.tls(old, 443, rig.outside.authority.expired_server(&["old.wild.test"]));
    for name in ["self.wild.test", "wrong.wild.test", "old.wild.test"] {
        let before = rig.outside.seen(ALLOWED, 443).requests.len();
        let roots = rig.ca.roots();
        let (status, body) = rig.guest(https_get(WILD, name, "/", roots)).unwrap();
        assert_eq!(status, 502, "{name}: {body}");
        assert_eq!(rig.outside.seen(ALLOWED, 443).requests.len(), before, "{name}");
        let failed = rig.decision("failed", |it| it.verdict == Verdict::Failed && it.host == name);
        assert_eq!(failed.reason, "upstream_tls");
    }
    for address in [other, old] {
        assert!(rig.outside.seen(address, 443).requests.is_empty());
    }
}

#[test]
fn c18_a_client_that_does_not_know_the_groups_ca_is_on_record() {
    let rig = Rig::new(REFERENCE);
    let stranger = crate::rig::Authority::new("stranger").roots();
    assert!(rig.guest(tls(ALLOWED, "allowed.test", stranger)).is_err());
    let failed = rig.decision("failed", |it| it.verdict == Verdict::Failed);
    assert_eq!(
        (failed.host.as_str(), failed.reason.as_str()),
        ("allowed.test", "tls_client_rejected_ca")
    );
    assert_eq!(rig.outside.seen(ALLOWED, 443).connections, 0);
}

#[test]
fn c20_certificates_have_a_budget_that_a_flood_of_names_uses_up() {
    let rig = Rig::with(REFERENCE, |configure| configure.limits.mints_per_minute = 2);
    let shake = |number: u32| {
        let roots = rig.ca.roots();
        rig.guest(async move { tls(WILD, &format!("n{number}.wild.test"), roots).await.map(drop) })
    };
    assert!(shake(0).is_ok() && shake(1).is_ok());
    assert!(shake(0).is_ok(), "it is kept");
    let error = shake(2).unwrap_err();
    assert_eq!(alert(&error), Some(AlertDescription::InternalError), "{error}");
    assert_eq!(rig.denial("n2.wild.test").reason, "mint_limit");
    assert_eq!(rig.stats().minted, 2);
}

#[test]
fn c21_what_is_not_tls_on_443_goes_nowhere_and_a_request_is_judged_as_one() {
    let rig = Rig::new(EVERYTHING);
    let _ = rig.guest(async {
        let mut stream = TcpStream::connect((EVIL, 443)).await.unwrap();
        stream.write_all(b"SSH-2.0-x\r\n").await.unwrap();
        tokio::time::timeout(Duration::from_secs(1), stream.read(&mut [0; 9])).await
    });
    assert_eq!(rig.outside.seen(EVIL, 443).bytes, b"SSH-2.0-x\r\n");

    for policy in [REFERENCE, BY_NAME] {
        let rig = Rig::new(policy);
        for bytes in [&b"SSH-2.0-x\r\n"[..], b"\x01\0\0\0wireguard", b"\x80\x2e\x01\0\x02"] {
            for address in [EVIL, ALLOWED] {
                let ended = rig.guest(send_raw(address, 443, bytes));
                assert!(ended.is_err(), "{address} {bytes:?}: {ended:?}");
            }
        }
        rig.outside.evil_saw_nothing();
        assert_eq!(rig.outside.seen(ALLOWED, 443).connections, 0);
        assert_eq!(rig.denial(&EVIL.to_string()).kind, Kind::Tcp);
    }
}

#[test]
fn c3_e2_a_host_that_is_not_the_server_name_is_misdirected_in_what_is_opened() {
    let rig = Rig::new(REFERENCE);
    let roots = rig.ca.roots();
    let answers = rig.guest(async move {
        let mut stream = tls(ALLOWED, "allowed.test", roots).await.unwrap();
        let fronted = exchange(&mut stream, &get("evil.test", "/")).await.unwrap();
        let secret = exchange(&mut stream, &get("api.test", "/")).await.unwrap();
        let own = exchange(&mut stream, &get("allowed.test", "/")).await.unwrap();
        [fronted.0, secret.0, own.0]
    });
    assert_eq!(answers, [421, 421, 200]);
    assert_eq!(rig.outside.seen(crate::rig::API, 443).connections, 0);
    rig.outside.evil_saw_nothing();
    assert_eq!(rig.denial("api.test").reason, "host_mismatch");
}

#[test]
fn c5_c3_of_http_2_too_and_streams_are_judged_one_by_one() {
    use http_body_util::Empty;
    use hyper::{Request, client::conn::http2};
    use hyper_util::rt::{TokioExecutor, TokioIo};

    let rig = Rig::new(REFERENCE);
    let roots = rig.ca.roots();
    let statuses = rig.guest(async move {
        let protocols = &["h2", "http/1.1"];
        let stream = tls_with(ALLOWED, 443, "allowed.test", roots, protocols).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        let (mut sender, connection) =
            http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let mut statuses = Vec::new();
        for (uri, host) in [
            ("https://allowed.test/a", None),
            ("https://evil.test/", None),
            ("https://allowed.test/", Some("evil.test")),
            ("https://allowed.test/admin", None),
            ("https://allowed.test/%61dmin/x", None),
            ("https://allowed.test/b", Some("allowed.test")),
        ] {
            let mut request = Request::get(uri);
            if let Some(host) = host {
                request = request.header("host", host);
            }
            let request = request.body(Empty::<bytes::Bytes>::new()).unwrap();
            statuses.push(sender.send_request(request).await.unwrap().status().as_u16());
        }
        statuses
    });
    assert_eq!(statuses, [200, 421, 400, 403, 403, 200]);
    let requests = rig.outside.seen(ALLOWED, 443).requests;
    assert_eq!(requests.len(), 2, "{requests:?}");
    assert!(requests[0].2.contains(&(":authority".into(), "allowed.test".into())));
    // Both went over one connection, found once.
    assert_eq!(rig.outside.seen(ALLOWED, 443).connections, 1);
    rig.outside.evil_saw_nothing();
}
