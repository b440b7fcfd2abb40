//! Rows B of the attack list that are not about one question and its answer: other ways to ask,
//! answers of strangers, and what comes of connections when names move on.

use std::{
    net::{IpAddr, Ipv4Addr, UdpSocket},
    sync::{Arc, Mutex},
    time::Duration,
};

use holdfast_wire::egress::Resolver;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};

use crate::rig::{
    ALLOWED, Answer, BY_NAME, EVERYTHING, EVIL, PROXY, REFERENCE, Rig, WILD,
    client::{A, GATEWAY, client_hello, dig, send_raw, tls},
};

#[test]
fn b4_questions_by_tls_by_https_and_by_quic_go_to_nobody() {
    let open = Rig::new(EVERYTHING);
    open.guest(async {
        let mut stream = TcpStream::connect((EVIL, 853)).await.unwrap();
        stream.write_all(&client_hello("evil.test")).await.unwrap();
        let _ = timeout(Duration::from_secs(1), stream.read(&mut [0])).await;
    });
    assert_eq!(open.outside.seen(EVIL, 853).bytes.first(), Some(&22));

    let rig = Rig::new(REFERENCE);
    for bytes in [client_hello("dns.google"), b"\0\x1d\x12\x34\x01\0".to_vec()] {
        let _ = rig.guest(send_raw(EVIL, 853, &bytes));
    }
    // DoH by name, and to an address that everybody knows.
    for name in ["dns.google", "cloudflare-dns.com", "one.one.one.one"] {
        let roots = rig.ca.roots();
        assert!(rig.guest(tls(EVIL, name, roots)).is_err(), "{name}");
        assert_eq!(rig.guest(dig(GATEWAY, name, A)).unwrap().code, crate::rig::client::REFUSED);
    }
    rig.guest(async {
        let socket = tokio::net::UdpSocket::bind("0.0.0.0:0").await.unwrap();
        for port in [443, 784, 853, 8853] {
            let _ = socket.send_to(&[0xc0; 1200], (EVIL, port)).await;
        }
    });
    rig.outside.evil_saw_nothing();
    assert!(rig.outside.asked().is_empty());
    rig.denial("dns.google");
}

/// A resolver that is slower than a stranger who answers in its place. The stranger does not see the
/// question, but knows when it comes and which name it is about.
fn slow_resolver(rig: &Rig, seen: Arc<Mutex<Vec<(u16, u16)>>>) {
    let socket = rig.in_outside(|| UdpSocket::bind((PROXY, 5353)).unwrap());
    let stranger = rig.in_outside(|| UdpSocket::bind((EVIL, 5353)).unwrap());
    std::thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((count, from)) = socket.recv_from(&mut buffer) {
            // What it says of itself behind its question is not given back.
            let name = buffer[12..count].iter().position(|byte| *byte == 0).unwrap();
            let question = &buffer[..12 + name + 5];
            seen.lock()
                .unwrap()
                .push((from.port(), u16::from_be_bytes([question[0], question[1]])));
            let answer = |id: [u8; 2], question: &[u8], address: Ipv4Addr| {
                let mut answer = [&id[..], &[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]].concat();
                answer.extend(&question[12..]);
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
                answer.extend(address.octets());
                answer
            };
            let own = [question[0], question[1]];
            // From another address with all it asks for; then from the resolver's own, as who can
            // forge that, with another number, and with the name in one case.
            let _ = stranger.send_to(&answer(own, question, EVIL), from);
            let _ = socket.send_to(&answer([own[0], !own[1]], question, EVIL), from);
            let other = [&question[..12], &question[12..].to_ascii_lowercase()].concat();
            if other != question {
                let _ = socket.send_to(&answer([!own[0], own[1]], &other, EVIL), from);
            }
            let _ = socket.send_to(&answer(own, question, ALLOWED), from);
        }
    });
}

#[test]
fn b13_an_answer_that_is_not_the_resolvers_to_this_question_is_none() {
    let rig = Rig::with(REFERENCE, |configure| {
        configure.resolvers = vec![Resolver { address: PROXY.into(), port: 5353 }];
    });
    let seen = Arc::<Mutex<Vec<(u16, u16)>>>::default();
    slow_resolver(&rig, seen.clone());
    for number in 0..20 {
        let name = format!("n{number}.wild.test");
        let reply = rig.guest(dig(GATEWAY, &name, A)).unwrap();
        assert_eq!(reply.addresses, [IpAddr::from(ALLOWED)], "{name}");
    }
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 20);
    // Whoever guesses needs both numbers, which are drawn anew each time.
    for of in [|it: &(u16, u16)| it.0, |it: &(u16, u16)| it.1] {
        let mut numbers: Vec<_> = seen.iter().map(of).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert!(numbers.len() > 15, "{seen:?}");
    }
}

#[test]
fn b20_a_connection_outlives_what_its_name_was_and_a_new_one_goes_where_it_is() {
    let rig = Rig::new(BY_NAME);
    let before = Ipv4Addr::new(198, 51, 100, 16);
    rig.outside.address(before);
    rig.outside.echo(before, 443);
    rig.outside.ttl(0);
    rig.outside.name("moves.wild.test", Answer::Address(before.into()));
    let roots = rig.outside.authority.roots();
    rig.guest(async {
        let hello = client_hello("moves.wild.test");
        let mut stream = TcpStream::connect((before, 443)).await.unwrap();
        stream.write_all(&hello).await.unwrap();
        let mut echoed = vec![0; hello.len()];
        stream.read_exact(&mut echoed).await.unwrap();
        assert_eq!(echoed, hello);
        // More addresses than are kept of a name, and none of them the first.
        rig.outside.rename("moves.wild.test", Answer::Address([198, 51, 100, 100].into()));
        for number in 101..150 {
            rig.outside.name("moves.wild.test", Answer::Address([198, 51, 100, number].into()));
        }
        rig.outside.name("moves.wild.test", Answer::Address(WILD.into()));
        // An answer is good for 5 seconds at least.
        sleep(Duration::from_millis(5200)).await;
        let told = dig(GATEWAY, "moves.wild.test", A).await.unwrap();
        assert!(!told.addresses.contains(&before.into()), "{told:?}");
        rig.put(BY_NAME);
        stream.write_all(b"still here").await.unwrap();
        let mut echoed = [0; 10];
        stream.read_exact(&mut echoed).await.unwrap();
        assert_eq!(&echoed, b"still here");
        // The one that begins now goes where the name leads now.
        tls(WILD, "moves.wild.test", roots).await.unwrap();
    });
    assert_eq!(rig.outside.seen(before, 443).connections, 1);
    assert_eq!(rig.outside.seen(WILD, 443).connections, 1);
}
