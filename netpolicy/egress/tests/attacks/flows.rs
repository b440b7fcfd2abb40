//! Flows that go by address, through proxies of the site, and in numbers.

use std::{net::Ipv4Addr, time::Duration};

use holdfast_wire::egress::{Kind, ProxyKind, Verdict};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::rig::{
    ALLOWED, Answer, BY_NAME, DATABASE, EVERYTHING, PROXY, REFERENCE, Rig, WILD,
    client::{https_get, send_raw},
    through,
};

/// Sends, ends its side, and reads what comes back.
async fn echo(address: Ipv4Addr, port: u16, bytes: Vec<u8>) -> std::io::Result<Vec<u8>> {
    let stream = TcpStream::connect((address, port)).await?;
    let (mut read, mut write) = stream.into_split();
    let expected = bytes.len();
    let sending = tokio::spawn(async move {
        write.write_all(&bytes).await?;
        Ok::<_, std::io::Error>(write)
    });
    let mut answer = vec![0; expected];
    read.read_exact(&mut answer).await?;
    drop(sending.await.unwrap()?);
    Ok(answer)
}

#[test]
fn a_cidr_rule_lets_its_address_and_port_pass_and_no_other() {
    let rig = Rig::new(REFERENCE);
    rig.outside.echo(DATABASE, 5433);
    rig.outside.echo(WILD, 5432);
    // More than what is copied before it is spliced.
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[n as usize % 4]).collect();
    let answer = rig.guest(echo(DATABASE, 5432, bytes.clone())).unwrap();
    assert!(answer == bytes, "the bytes that come back are those that were sent");
    let allowed = rig.decision("allows it", |it| it.verdict == Verdict::Allowed);
    assert_eq!((allowed.kind, allowed.host.as_str()), (Kind::Tcp, "203.0.113.7"));
    assert_eq!(allowed.rule.as_deref(), Some("cidrRules[0]"));
    let ended = rig.end_of(allowed.flow);
    assert_eq!((ended.sent_bytes, ended.received_bytes), (3_000_000, 3_000_000));

    for (address, port) in [(DATABASE, 5433), (WILD, 5432)] {
        assert!(rig.guest(send_raw(address, port, b"\0\0\0\x08\x04\xd2\x16\x2f")).is_err());
        assert_eq!(rig.outside.seen(address, port).connections, 0);
    }
}

#[test]
fn c22_a_server_that_speaks_first_is_heard_where_a_rule_or_the_default_lets_it() {
    let policy = r#"{"defaultAction": "Deny", "cidrRules": [
        {"cidr": "203.0.113.7/32", "protocol": "tcp", "ports": [3306], "action": "Allow"}]}"#;
    for policy in [policy, EVERYTHING] {
        let rig = Rig::new(policy);
        rig.outside.greeter(DATABASE, 3306);
        let greeting = rig.guest(async {
            let mut stream = TcpStream::connect((DATABASE, 3306)).await.unwrap();
            let mut greeting = [0; 11];
            stream.read_exact(&mut greeting).await.unwrap();
            greeting
        });
        assert_eq!(&greeting, b"220 hello\r\n");
    }
    let rig = Rig::new(REFERENCE);
    rig.outside.greeter(DATABASE, 3306);
    let ended = rig.guest(async {
        let mut stream = TcpStream::connect((DATABASE, 3306)).await.unwrap();
        stream.read(&mut [0; 9]).await
    });
    assert!(ended.is_err());
    assert_eq!(rig.outside.seen(DATABASE, 3306).connections, 0);
}

#[test]
fn a28_a_sandbox_has_so_many_connections_and_another_has_its_own() {
    let mut rig = Rig::with(REFERENCE, |configure| configure.limits.connections = 4);
    rig.add("bbbbbbbbbbbbbbbbbbbb", REFERENCE);
    let (held, more) = rig.guest(async {
        let mut held = Vec::new();
        for _ in 0..4 {
            let mut stream = TcpStream::connect((DATABASE, 5432)).await.unwrap();
            stream.write_all(b"x").await.unwrap();
            stream.read_exact(&mut [0]).await.unwrap();
            held.push(stream);
        }
        (held, send_raw(DATABASE, 5432, b"x").await)
    });
    assert!(more.is_err(), "{more:?}");
    assert_eq!(rig.stats().connections, 4);
    assert_eq!(rig.stats().limited, 1);
    assert_eq!(rig.guest_of(1, echo(DATABASE, 5432, b"x".to_vec())).unwrap(), b"x");
    drop(held);
    crate::rig::until("the connections are over", || rig.stats().connections == 0);
    assert_eq!(rig.guest(echo(DATABASE, 5432, b"y".to_vec())).unwrap(), b"y");
}

#[test]
fn b12_what_one_sandbox_was_told_opens_nothing_to_another() {
    let mut rig = Rig::new(REFERENCE);
    rig.add("bbbbbbbbbbbbbbbbbbbb", REFERENCE);
    let other = Ipv4Addr::new(198, 51, 100, 14);
    rig.outside.address(other);
    rig.outside.tls(other, 443, rig.outside.authority.server(&["moving.wild.test"]));
    rig.outside.name("moving.wild.test", Answer::Address(other.into()));
    let asked = crate::rig::client::dig(crate::rig::client::GATEWAY, "moving.wild.test", 1);
    assert_eq!(rig.guest(asked).unwrap().addresses.len(), 1);
    // It moves; the first guest may still use what it was told, the second was told nothing.
    rig.outside.rename("moving.wild.test", Answer::Address(WILD.into()));
    let roots = rig.ca.roots();
    let first = rig.guest(https_get(other, "moving.wild.test", "/", roots)).unwrap();
    let roots = rig.ca.roots();
    let second = rig.guest_of(1, https_get(other, "moving.wild.test", "/", roots)).unwrap();
    assert_eq!((first.0, second.0), (200, 200));
    assert_eq!(rig.outside.seen(other, 443).connections, 1);
    assert_eq!(rig.outside.seen(WILD, 443).connections, 1);
}

#[test]
fn b19_the_first_connection_after_an_answer_is_allowed_every_time() {
    let rig = Rig::new(BY_NAME);
    rig.outside.name("fresh.wild.test", Answer::Address(ALLOWED.into()));
    rig.guest(async {
        for trial in 0..100 {
            let gateway = crate::rig::client::GATEWAY;
            let reply = crate::rig::client::dig(gateway, "fresh.wild.test", 1).await;
            if reply.is_none_or(|reply| reply.addresses.len() != 1) {
                // The budget of questions: wait for it.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            let request = crate::rig::client::get("fresh.wild.test", "/");
            let (status, _) = crate::rig::client::http(ALLOWED, &request).await.unwrap();
            assert_eq!(status, 200, "trial {trial}");
        }
    });
}

/// Speaks SOCKS5 and CONNECT, and joins to the address asked for.
async fn site_proxy<S>(mut stream: S, login_seen: std::sync::Arc<std::sync::Mutex<Vec<String>>>)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let first = stream.read_u8().await.unwrap();
    let target: std::net::SocketAddr = if first == 5 {
        let mut methods = [0; 2];
        stream.read_exact(&mut methods).await.unwrap();
        stream.write_all(&[5, methods[1]]).await.unwrap();
        let mut login = Vec::new();
        stream.read_u8().await.unwrap();
        for _ in 0..2 {
            let mut part = vec![0; stream.read_u8().await.unwrap().into()];
            stream.read_exact(&mut part).await.unwrap();
            login.push(String::from_utf8(part).unwrap());
        }
        login_seen.lock().unwrap().push(login.join(":"));
        stream.write_all(&[1, 0]).await.unwrap();
        let mut request = [0; 10];
        stream.read_exact(&mut request).await.unwrap();
        stream.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]).await.unwrap();
        let address: [u8; 4] = request[4..8].try_into().unwrap();
        (address, u16::from_be_bytes([request[8], request[9]])).into()
    } else {
        let mut head = vec![first];
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        let head = String::from_utf8(head).unwrap();
        let login = head.lines().find_map(|line| line.strip_prefix("Proxy-Authorization: "));
        login_seen.lock().unwrap().extend(login.map(str::to_owned));
        stream.write_all(b"HTTP/1.1 200 go on\r\n\r\n").await.unwrap();
        head.split(' ').nth(1).unwrap().parse().unwrap()
    };
    let mut server = TcpStream::connect(target).await.unwrap();
    let _ = tokio::io::copy_bidirectional(&mut stream, &mut server).await;
}

#[test]
fn a_site_with_a_proxy_has_everything_go_through_it_to_addresses_that_we_checked() {
    for (kind, login) in [
        (ProxyKind::Socks5, "site:open sesame"),
        (ProxyKind::Http, "Basic c2l0ZTpvcGVuIHNlc2FtZQ=="),
        (ProxyKind::Https, "Basic c2l0ZTpvcGVuIHNlc2FtZQ=="),
    ] {
        let rig = Rig::with(REFERENCE, |configure| configure.upstream_proxy = through(kind));
        let logins = std::sync::Arc::<std::sync::Mutex<Vec<String>>>::default();
        let seen = logins.clone();
        if kind == ProxyKind::Https {
            let config = rig.outside.authority.server(&["proxy.site.test"]);
            let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(config));
            rig.outside.custom(PROXY, 3128, move |stream| {
                let (acceptor, seen) = (acceptor.clone(), seen.clone());
                async move { site_proxy(acceptor.accept(stream).await.unwrap(), seen).await }
            });
        } else {
            rig.outside.custom(PROXY, 3128, move |stream| site_proxy(stream, seen.clone()));
        }
        let roots = rig.ca.roots();
        let (status, body) = rig.guest(https_get(ALLOWED, "allowed.test", "/", roots)).unwrap();
        assert_eq!(status, 200, "{kind:?}: {body}");
        let answer = rig.guest(echo(DATABASE, 5432, b"by address".to_vec())).unwrap();
        assert_eq!(answer, b"by address", "{kind:?}");
        assert_eq!(*logins.lock().unwrap(), [login, login], "{kind:?}");
        assert_eq!(rig.outside.seen(PROXY, 3128).connections, 2);
    }
}
