//! Ways past the proxy in the kernel: the host's ruleset in a network of its own, slots with a link
//! to it, and an outside whose attacker records every packet. Needs root.
//!
//! In the place of guests stands this test, which writes frames to their taps.
#![allow(clippy::similar_names, reason = "to and tcp and the like")]

mod agent;
mod attacks;
mod failures;
#[path = "../slot/frames.rs"]
#[allow(dead_code, reason = "shared with the tests of slots")]
mod frames;
mod guard;
#[path = "../slot/guest.rs"]
#[allow(dead_code, reason = "shared with the tests of slots")]
mod guest;
#[path = "../slot/sys.rs"]
#[allow(dead_code, reason = "shared with the tests of slots")]
mod sys;
mod world;

use holdfast_netpolicy::Passing;

use crate::{
    frames::{ACK, Packet, SYN, TCP, UDP},
    world::{ALLOWED, EVIL, World, udp_to},
};

#[test]
fn udp_that_a_rule_allows_goes_out_and_what_answers_it_comes_back() {
    let world = World::new();
    let sandbox = world.sandbox(1, Passing::Udp, &udp_to(ALLOWED, &[99, 100]));
    let server = world.server(ALLOWED, 99);
    sandbox.send_udp(ALLOWED, 99, b"question");
    let (bytes, from) = world::received(&server).expect("it did not arrive");
    assert_eq!(bytes, b"question");
    assert_eq!(from.ip(), world::HOST, "it comes from the host");

    server.send_to(b"answer", from).unwrap();
    let answer = sandbox.guest.receive(|it| it.is(UDP)).expect("no answer");
    assert_eq!((answer.from(), answer.ports()), (ALLOWED, (99, 4000)));
    assert_eq!(&answer.inner()[8..], b"answer");
    let passed = world.nft().traffic().unwrap()[&sandbox.number];
    assert_eq!((passed.sent_packets, passed.sent_bytes), (1, 28 + 8));
    assert_eq!((passed.received_packets, passed.received_bytes), (1, 28 + 6));
    assert_eq!(sandbox.guest.counted("passed_by"), 1);
}

#[test]
fn a_sandbox_that_skips_the_proxy_has_tcp_and_asks_our_name_server_all_the_same() {
    let world = World::new();
    let sandbox = world.sandbox(1, Passing::All, r#"{"defaultAction":"Allow"}"#);
    let server = world.listener(ALLOWED, 443);
    let answer = sandbox.guest.connect((ALLOWED, 443), 4000).expect("no answer");
    assert_eq!((answer.from(), answer.segment().0), (ALLOWED, SYN | ACK));
    let (_connection, peer) = server.accept().unwrap();
    assert_eq!(peer.ip(), world::HOST);
    assert!(sandbox.guest.accepted().is_none(), "the proxy has it too");

    world.outside.forget();
    sandbox.send_udp(ALLOWED, 53, b"who?");
    assert_eq!(sandbox.guest.asked().unwrap().1, (ALLOWED, 53).into());
    assert!(sandbox.guest.reaches((ALLOWED, 53), 4001), "DNS over TCP is not ours");
    assert!(!world.outside.saw(ALLOWED), "a question went past our name server");
}

#[test]
fn a_way_that_is_closed_leaves_the_slot_as_it_was() {
    let world = World::new();
    let sandbox = world.sandbox(1, Passing::Udp, &udp_to(EVIL, &[]));
    sandbox.send_udp(EVIL, 99, b"x");
    assert!(world.outside.saw(EVIL));
    let links = |of: &world::Sandbox| of.guest.inside("ip -o link | cut -d: -f2 | cut -d@ -f1");
    assert_eq!(links(&sandbox).split_whitespace().collect::<Vec<_>>(), ["lo", "tap0", "up0"]);
    assert_eq!(sandbox.network.byway().unwrap().as_deref(), Some("byway1"));

    world.close(&sandbox);
    assert_eq!(links(&sandbox).split_whitespace().collect::<Vec<_>>(), ["lo", "tap0"]);
    assert_eq!(sandbox.network.byway().unwrap(), None);
    assert_eq!(sandbox.guest.inside("cat /proc/sys/net/ipv4/ip_forward").trim(), "0");
    let rules = sandbox.guest.inside("nft list ruleset");
    assert!(!rules.contains("elements") && !rules.contains("masquerade"), "{rules}");
    assert!(world.nft().byways().unwrap().is_empty());
    assert_eq!(world.in_host("ip -o link show type veth | grep -c byway || true").trim(), "0");
    world.outside.forget();
    sandbox.send_udp(EVIL, 99, b"x");
    assert!(!world.outside.saw(EVIL));
    // Twice is no error, and a new one can be made.
    world.close(&sandbox);
    world.open(&sandbox, Passing::Udp, &udp_to(EVIL, &[]));
    sandbox.send_udp(EVIL, 99, b"x");
    assert!(world.outside.saw(EVIL));
}

#[test]
fn a_slot_that_goes_takes_its_way_with_it() {
    let world = World::new();
    let sandbox = world.sandbox(1, Passing::Udp, &udp_to(EVIL, &[]));
    assert!(world.in_host("ip -o link").contains("byway1"));
    drop(sandbox);
    world::eventually("the link is left", || !world.in_host("ip -o link").contains("byway1"));
}

#[test]
fn an_error_on_the_way_comes_back_to_the_guest() {
    let world = World::new();
    let sandbox = world.sandbox(1, Passing::Udp, &udp_to(ALLOWED, &[]));
    // Nobody listens there: the outside says so about a packet with the host's address in it.
    sandbox.send_udp(ALLOWED, 98, b"x");
    let error = sandbox.guest.receive(|it| it.is(frames::ICMP)).expect("no error came");
    assert_eq!(error.inner()[..2], [3, 3], "port unreachable");
    assert_eq!(error.inner()[8 + 12..8 + 16], holdfast_model::link::GUEST_ADDRESS.octets());
}

#[test]
fn the_longest_policy_there_can_be_is_put_at_once() {
    let rules: Vec<String> = (0..holdfast_netpolicy::limits::CIDR_RULES_MAX)
        .map(|n| {
            let ports: Vec<String> =
                (1..=holdfast_netpolicy::limits::PORTS_MAX).map(|p| (p * 7).to_string()).collect();
            let (cidr, ports) = (format!("9.{}.0.0/17", n % 256), ports.join(","));
            format!(r#"{{"cidr":"{cidr}","protocol":"udp","ports":[{ports}],"action":"Allow"}}"#)
        })
        .collect();
    let policy = format!(r#"{{"defaultAction":"Deny","cidrRules":[{}]}}"#, rules.join(","));
    let world = World::new();
    let sandbox = world.sandbox(1, Passing::Udp, &policy);
    sandbox.send_udp(EVIL, 7 * 32, b"x");
    assert!(world.outside.saw(EVIL));
    world.outside.forget();
    sandbox.send_udp(EVIL, 7 * 33, b"x");
    assert!(!world.outside.saw(EVIL));
    // Once more over what is there.
    world.put(&sandbox, Passing::Udp, &policy);
}

#[test]
fn a_segment_of_a_connection_that_nobody_began_here_goes_nowhere() {
    let world = World::new();
    let sandbox = world.sandbox(1, Passing::All, r#"{"defaultAction":"Allow"}"#);
    sandbox.guest.send(&Packet::tcp(EVIL, (4000, 443), SYN, (1, 0)).frame());
    assert!(world.outside.saw(EVIL), "a SYN does not arrive");
    world.outside.forget();
    sandbox.guest.send(&Packet::tcp(EVIL, (4001, 443), ACK, (1, 7)).frame());
    assert!(!world.outside.saw(EVIL));
    assert!(sandbox.guest.receive(|it| it.is(TCP) && it.ports().1 == 4001).is_none());
}
