//! Rows B of the attack list: names.

use std::net::{IpAddr, Ipv4Addr};

use holdfast_wire::egress::{Kind, Verdict};

use crate::rig::{
    ALLOWED, Answer, BY_NAME, EVERYTHING, EVIL, REFERENCE, Rig, WILD,
    client::{
        A, AAAA, GATEWAY, NAME_ERROR, NO_ERROR, REFUSED, TXT, dig, dig_by_tcp, dig_class, get, http,
    },
};

const PUBLIC: Ipv4Addr = Ipv4Addr::new(8, 8, 8, 8);

#[test]
fn b1_a_denied_name_is_refused_whomever_the_guest_asks_and_goes_to_no_resolver() {
    let rig = Rig::new(EVERYTHING);
    let reply = rig.guest(dig(PUBLIC, "evil.test", A)).unwrap();
    assert_eq!((reply.code, reply.addresses), (NO_ERROR, vec![IpAddr::from(EVIL)]));
    assert!(rig.outside.asked().contains(&"evil.test".to_owned()));

    let rig = Rig::new(REFERENCE);
    for server in [GATEWAY, PUBLIC, EVIL] {
        assert_eq!(rig.guest(dig(server, "evil.test", A)).unwrap().code, REFUSED, "{server}");
        let reply = rig.guest(dig_by_tcp(server, "data.evil.test", A)).unwrap();
        assert_eq!(reply.code, REFUSED, "{server}");
    }
    assert_eq!(rig.outside.asked(), Vec::<String>::new());
    rig.outside.evil_saw_nothing();
    let denial = rig.denial("data.evil.test");
    assert_eq!((denial.kind, denial.reason.as_str()), (Kind::Dns, "name_not_allowed"));
}

#[test]
fn b3_data_in_names_under_an_allowed_wildcard_has_a_budget() {
    let rig = Rig::with(REFERENCE, |configure| configure.limits.dns_names = 3);
    for number in 0..5 {
        let name = format!("data{number}.wild.test");
        let code = rig.guest(dig(GATEWAY, &name, A)).unwrap().code;
        assert_eq!(code, if number < 3 { NAME_ERROR } else { REFUSED }, "{name}");
    }
    assert_eq!(rig.outside.asked().len(), 3);
    assert_eq!(rig.denial("data4.wild.test").reason, "dns_names_limit");
}

#[test]
fn b5_types_that_carry_what_the_zone_likes_have_no_data_unless_a_rule_adds_them() {
    let text = Answer::Text("v=1".to_owned());
    let with_text = r#"{"defaultAction": "Deny", "hostRules": [
        {"pattern": "allowed.test", "action": "Allow", "dnsTypes": ["TXT"]}]}"#;
    let rig = Rig::new(with_text);
    rig.outside.name("allowed.test", text.clone());
    let reply = rig.guest(dig(GATEWAY, "allowed.test", TXT)).unwrap();
    assert_eq!((reply.code, reply.answers), (NO_ERROR, 1));

    let rig = Rig::new(REFERENCE);
    rig.outside.name("allowed.test", text);
    // TXT, NULL, ANY, AXFR, one for private use.
    for kind in [TXT, 10, 255, 252, 65_300] {
        let reply = rig.guest(dig(GATEWAY, "allowed.test", kind)).unwrap();
        assert_eq!((reply.code, reply.answers), (NO_ERROR, 0), "type {kind}");
    }
    let reply = rig.guest(dig_class(GATEWAY, "version.bind", TXT, 3)).unwrap();
    assert_eq!((reply.code, reply.answers), (REFUSED, 0));
    assert_eq!(rig.outside.asked(), Vec::<String>::new());
}

#[test]
fn b7_an_alias_is_followed_for_the_name_that_is_allowed_and_no_further() {
    let rig = Rig::new(BY_NAME);
    rig.outside.rename("allowed.test", Answer::Alias("evil-cdn.test".into()));
    rig.outside.name("evil-cdn.test", Answer::Address(ALLOWED.into()));
    let reply = rig.guest(dig(GATEWAY, "allowed.test", A)).unwrap();
    assert_eq!((reply.answers, reply.addresses), (2, vec![IpAddr::from(ALLOWED)]));
    assert_eq!(rig.guest(dig(GATEWAY, "evil-cdn.test", A)).unwrap().code, REFUSED);
    let (status, _) = rig.guest(http(ALLOWED, &get("evil-cdn.test", "/"))).unwrap();
    assert_eq!(status, 403);
}

#[test]
fn b8_b9_a_name_that_leads_inside_does_not_exist_and_the_proxy_does_not_go_there_either() {
    let rig = Rig::new(REFERENCE);
    let reply = rig.guest(dig(GATEWAY, "a.wild.test", A)).unwrap();
    assert_eq!(reply.addresses, [IpAddr::from(WILD)]);
    assert_eq!(rig.guest(http(WILD, &get("a.wild.test", "/"))).unwrap().0, 200);

    rig.outside.name("metadata.alias.test", Answer::Address([169, 254, 169, 254].into()));
    rig.outside.name("alias.wild.test", Answer::Alias("metadata.alias.test".into()));
    let inside = [
        "127.0.0.1",
        "10.0.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "192.168.0.1",
        "::1",
        "fe80::1",
        "fc00::1",
        "::ffff:10.0.0.1",
        "64:ff9b::a00:1",
    ];
    for (number, address) in inside.iter().enumerate() {
        let address: IpAddr = address.parse().unwrap();
        rig.outside.name(&format!("in{number}.wild.test"), Answer::Address(address));
    }
    let names: Vec<_> = (0..inside.len()).map(|number| format!("in{number}.wild.test")).collect();
    for name in names.iter().map(String::as_str).chain(["alias.wild.test"]) {
        let v4 = rig.guest(dig(GATEWAY, name, A)).unwrap();
        let v6 = rig.guest(dig(GATEWAY, name, AAAA)).unwrap();
        assert!(v4.addresses.is_empty() && v6.addresses.is_empty(), "{name}");
        assert!([v4.code, v6.code].contains(&NAME_ERROR), "{name}: {v4:?} {v6:?}");
        assert_eq!(rig.denial(name).reason, "rebind", "{name}");
        let (status, body) = rig.guest(http(WILD, &get(name, "/"))).unwrap();
        assert_eq!(status, 403, "{name}: {body}");
    }
}

#[test]
fn b15_an_answer_that_is_too_long_for_udp_comes_by_tcp() {
    let rig = Rig::new(REFERENCE);
    for number in 1..=100 {
        rig.outside.name("big.wild.test", Answer::Address([198, 51, 100, number].into()));
    }
    let reply = rig.guest(dig(GATEWAY, "big.wild.test", A)).unwrap();
    assert!(reply.truncated && reply.addresses.len() < 100, "{reply:?}");
    let reply = rig.guest(dig_by_tcp(GATEWAY, "big.wild.test", A)).unwrap();
    assert_eq!((reply.truncated, reply.addresses.len()), (false, 100));
}

#[test]
fn b16_case_and_the_dot_at_the_end_make_no_other_name() {
    let rig = Rig::new(REFERENCE);
    for name in ["ALLOWED.TEST", "allowed.test.", "AlLoWeD.tEsT"] {
        let reply = rig.guest(dig(GATEWAY, name, A)).unwrap();
        assert_eq!(reply.addresses, [IpAddr::from(ALLOWED)], "{name}");
    }
    let allowed = rig.decision("allows the name", |it| it.verdict == Verdict::Allowed);
    assert_eq!((allowed.host.as_str(), allowed.address), ("allowed.test", Some(ALLOWED.into())));
}

#[test]
fn b18_a_flood_of_questions_is_cut_and_another_sandbox_does_not_feel_it() {
    let mut rig = Rig::with(REFERENCE, |configure| configure.limits.dns_per_second = 20);
    rig.add("bbbbbbbbbbbbbbbbbbbb", REFERENCE);
    rig.guest(async {
        let socket = tokio::net::UdpSocket::bind("0.0.0.0:0").await.unwrap();
        socket.connect((GATEWAY, 53)).await.unwrap();
        for _ in 0..500 {
            let _ = socket
                .send(b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x07allowed\x04test\0\0\x01\0\x01")
                .await;
        }
    });
    let reply = rig.guest_of(1, dig(GATEWAY, "allowed.test", A)).unwrap();
    assert_eq!(reply.addresses, [IpAddr::from(ALLOWED)]);
    crate::rig::until("the flood is cut", || rig.stats().limited >= 100);
    // They were all the same question, which is asked once.
    assert_eq!(rig.stats().dns_upstream, 1);
}

#[test]
fn b22_names_of_the_machine_and_its_network_are_not_asked_outside() {
    let rig = Rig::new(EVERYTHING);
    for name in ["localhost", "db", "host.internal", "4.3.2.1.in-addr.arpa", "printer.local"] {
        assert_eq!(rig.guest(dig(GATEWAY, name, A)).unwrap().code, NAME_ERROR, "{name}");
    }
    assert_eq!(rig.outside.asked(), Vec::<String>::new());
}

#[test]
fn a_name_is_told_for_5_to_300_seconds_and_asked_for_once() {
    let rig = Rig::new(REFERENCE);
    rig.outside.ttl(86_400);
    for _ in 0..3 {
        assert_eq!(rig.guest(dig(GATEWAY, "allowed.test", A)).unwrap().ttl, Some(300));
    }
    rig.outside.ttl(0);
    assert_eq!(rig.guest(dig(GATEWAY, "a.wild.test", A)).unwrap().ttl, Some(5));
    assert_eq!(rig.outside.asked().len(), 2);
}
