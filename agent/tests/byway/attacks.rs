//! What a guest may try with a way past its proxy. Each packet is first seen to arrive under a
//! policy that lets it, or without the one defence that is looked at.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Instant,
};

use holdfast_netpolicy::Passing;

use crate::{
    frames::{ACK, Packet, RST, SYN, TCP, UDP},
    guest::PATIENCE,
    world::{ALLOWED, EVIL, HOST, METADATA, PRIVATE, World, received, udp_to},
};

const ANYWHERE: &str = r#"{"defaultAction":"Deny","cidrRules":[{"cidr":"0.0.0.0/0","protocol":"udp","action":"Allow"}]}"#;

#[test]
fn a5_udp_that_no_rule_allows_reaches_nobody_and_is_refused_at_once() {
    let world = World::new();
    let sandbox = world.sandbox(1, Passing::Udp, &udp_to(EVIL, &[123, 3478]));
    for port in [123, 3478] {
        sandbox.send_udp(EVIL, port, b"x");
        assert!(world.outside.saw(EVIL), "the test does not see it arrive");
    }
    world.put(&sandbox, Passing::Udp, &udp_to(ALLOWED, &[123]));
    world.outside.forget();
    for port in [123, 3478, 51820, 443] {
        sandbox.send_udp(EVIL, port, b"x");
        assert!(sandbox.is_refused(), "port {port}");
    }
    // The right address on another port.
    sandbox.send_udp(ALLOWED, 124, b"x");
    assert!(sandbox.is_refused());
    assert_eq!((world.outside.count(EVIL), world.outside.count(ALLOWED)), (0, 0));
}

#[test]
fn a5_tcp_that_no_rule_allows_reaches_nobody_and_is_reset_at_once() {
    let only = r#"{"defaultAction":"Deny","cidrRules":[{"cidr":"9.9.9.10/32","protocol":"tcp","ports":[443],"action":"Allow"}]}"#;
    let world = World::new();
    let _server = world.listener(EVIL, 443);
    let sandbox = world.sandbox(1, Passing::All, r#"{"defaultAction":"Allow"}"#);
    let answer = sandbox.guest.connect((EVIL, 443), 4000).unwrap();
    assert_eq!(answer.segment().0, SYN | ACK, "the test does not see it arrive");
    world.put(&sandbox, Passing::All, only);
    world.outside.forget();
    for (to, own_port) in [((EVIL, 443), 4001), ((ALLOWED, 22), 4002)] {
        let answer = sandbox.guest.connect(to, own_port).expect("it hangs");
        assert_eq!(answer.segment().0 & RST, RST, "{to:?}");
    }
    sandbox.send_udp(ALLOWED, 443, b"x");
    assert!(sandbox.is_refused(), "the rule speaks of TCP");
    assert_eq!((world.outside.count(EVIL), world.outside.count(ALLOWED)), (0, 0));
}

#[test]
fn a19_a29_the_deny_set_stands_above_every_rule_but_for_what_the_operator_lifts() {
    let world = World::new();
    let on_host = world.server_on_host(HOST, 99);
    let on_loopback = world.server_on_host([127, 0, 0, 1].into(), 99);
    let sandbox = world.sandbox(1, Passing::Udp, ANYWHERE);
    sandbox.send_udp(EVIL, 99, b"x");
    assert!(world.outside.saw(EVIL));

    world.put_lifted(&sandbox, Passing::Udp, ANYWHERE, &["10.0.0.0/8", "169.254.0.0/16"]);
    for to in [PRIVATE, METADATA] {
        sandbox.send_udp(to, 99, b"x");
        assert!(world.outside.saw(to), "the test does not see it arrive at {to}");
    }
    // Nothing lifts the host's own.
    for to in [HOST, [127, 0, 0, 1].into(), [198, 18, 0, 1].into(), [198, 19, 0, 1].into()] {
        sandbox.send_udp(to, 99, b"x");
    }
    assert!(received(&on_host).is_none() && received(&on_loopback).is_none());

    world.put_lifted(&sandbox, Passing::Udp, ANYWHERE, &["10.9.9.8/32", "fd00::/8"]);
    world.outside.forget();
    for to in [PRIVATE, METADATA] {
        sandbox.send_udp(to, 99, b"x");
        assert!(sandbox.is_refused(), "{to}");
    }
    assert_eq!(world.outside.count(PRIVATE), 0);
}

#[test]
fn a11_a_source_that_is_not_the_sandboxs_goes_nowhere() {
    let world = World::new();
    let (one, two) =
        (world.sandbox(1, Passing::Udp, ANYWHERE), world.sandbox(2, Passing::Udp, ANYWHERE));
    for source in [two.number.address(), HOST, ALLOWED] {
        let spoofed = Packet { from: source, ..Packet::udp(EVIL, 99, b"x") };
        one.guest.send(&spoofed.frame());
    }
    assert_eq!(world.outside.count(EVIL), 0);

    // Even if every rule in the slot were gone, and so its source translation: nothing reaches the
    // host's side that is from elsewhere than the address that is led there.
    one.guest.inside("nft flush ruleset");
    for source in [two.number.address(), HOST, ALLOWED, holdfast_model::link::GUEST_ADDRESS] {
        one.guest.send(&Packet { from: source, ..Packet::udp(EVIL, 99, b"x") }.frame());
    }
    assert_eq!(world.outside.count(EVIL), 0);

    // And without the host's look at where it could have come from, its rules are in the way still.
    world.in_host("echo 0 > /proc/sys/net/ipv4/conf/byway1/rp_filter");
    world.in_host("echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter");
    world.outside.forget();
    one.guest.send(&Packet { from: two.number.address(), ..Packet::udp(EVIL, 98, b"x") }.frame());
    assert_eq!(world.outside.count(EVIL), 0);
    world.in_host(
        "nft delete rule inet byways2 byway2 handle \
         $(nft -a list chain inet byways2 byway2 | sed -n 's/.*iifname != .byway2. .*# handle //p')",
    );
    one.guest.send(&Packet { from: two.number.address(), ..Packet::udp(EVIL, 97, b"x") }.frame());
    assert!(world.outside.saw(EVIL), "the test does not see it arrive without that rule");
}

#[test]
fn a20_no_sandbox_reaches_another_whatever_is_lifted() {
    let world = World::new();
    let (one, two) =
        (world.sandbox(1, Passing::Udp, ANYWHERE), world.sandbox(2, Passing::Udp, ANYWHERE));
    for sandbox in [&one, &two] {
        world.put_lifted(sandbox, Passing::Udp, ANYWHERE, &["0.0.0.0/0"]);
    }
    let arrived = || {
        two.guest.inside("ip -s -j link show up0 | sed 's/.*\"rx\":{\"bytes\":\\([0-9]*\\).*/\\1/'")
    };
    let send = || {
        one.send_udp(two.number.address(), 99, b"x");
        assert!(two.guest.receive(|it| it.is(UDP)).is_none());
    };
    let before = arrived();
    send();
    assert_eq!(arrived(), before, "something came over its link");

    let strays = world.in_host("nft list counter inet host byway_stray");
    assert!(strays.contains("packets 1 "), "{strays}");

    // Without the rule it comes as far as the other's slot, and no farther.
    world.in_host(
        "nft delete rule inet host forward handle \
         $(nft -a list chain inet host forward | sed -n 's/.*oifname .byway.* handle //p')",
    );
    send();
    assert_ne!(arrived(), before, "the test does not see it arrive");
}

#[test]
fn a27_connections_of_one_sandbox_are_bounded_and_its_neighbours_have_theirs() {
    let world = World::new();
    let one = world.sandbox(1, Passing::Udp, ANYWHERE);
    let two = world.sandbox(2, Passing::Udp, ANYWHERE);
    for port in 1000..6000 {
        one.send_udp(EVIL, port, b"x");
        if port % 64 == 0 {
            world.outside.forget();
        }
    }
    let count = |line: &str| world.in_host(line).trim().parse::<u32>().unwrap();
    let tracked = count("cat /proc/sys/net/netfilter/nf_conntrack_count");
    assert!((4000..=4200).contains(&tracked), "{tracked} connections are tracked");
    world.outside.forget();
    one.send_udp(EVIL, 7000, b"x");
    assert!(!world.outside.saw(EVIL), "it has one more");
    two.send_udp(EVIL, 7000, b"x");
    assert!(world.outside.saw(EVIL), "its neighbour has none");
}

#[test]
fn f1_no_byte_of_a_flow_passes_once_the_policy_that_ends_it_is_put() {
    let world = World::new();
    let server = world.server(EVIL, 99);
    let sandbox = world.sandbox(1, Passing::Udp, &udp_to(EVIL, &[]));
    sandbox.send_udp(EVIL, 99, b"first");
    let (_, peer) = received(&server).expect("it did not arrive");
    server.send_to(b"back", peer).unwrap();
    assert!(sandbox.guest.receive(|it| it.is(UDP)).is_some(), "no answer");

    for round in 0..20 {
        world.put(&sandbox, Passing::Udp, &udp_to(EVIL, &[]));
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    sandbox.send_udp(EVIL, 99, b"more");
                }
            });
            assert!(world.outside.saw(EVIL));
            world.put(&sandbox, Passing::Udp, &udp_to(ALLOWED, &[]));
            world.outside.forget();
            let after = world.outside.count(EVIL);
            stop.store(true, Ordering::Relaxed);
            assert_eq!(after, 0, "round {round}: packets passed after it");
        });
    }
    while sandbox.guest.receive(|_| true).is_some() {}
    // Nor do bytes to the guest.
    server.send_to(b"late", peer).unwrap();
    assert!(sandbox.guest.receive(|it| it.is(UDP)).is_none());
}

#[test]
fn f1_an_open_connection_is_ended_by_the_policy_that_does_not_allow_it() {
    let world = World::new();
    let server = world.listener(EVIL, 443);
    let sandbox = world.sandbox(1, Passing::All, r#"{"defaultAction":"Allow"}"#);
    let (_, number) = sandbox.guest.connect((EVIL, 443), 4000).unwrap().segment();
    let (_connection, _) = server.accept().unwrap();
    let segment = |bytes: &[u8]| {
        let mut segment = Packet::tcp(EVIL, (4000, 443), ACK, (101, number.wrapping_add(1)));
        segment.payload.extend(bytes);
        segment.frame()
    };
    world.outside.forget();
    sandbox.guest.send(&segment(b"x"));
    assert!(world.outside.saw(EVIL), "the test does not see it arrive");
    world.put(
        &sandbox,
        Passing::All,
        r#"{"defaultAction":"Deny","cidrRules":[{"cidr":"9.9.9.10/32","protocol":"any","action":"Allow"}]}"#,
    );
    world.outside.forget();
    sandbox.guest.send(&segment(b"xy"));
    let told = sandbox.guest.receive(|it| it.is(TCP) && it.segment().0 & RST == RST);
    assert!(told.is_some(), "the guest is not told");
    assert!(!world.outside.saw(EVIL));
}

#[test]
fn f7_a_number_that_is_used_again_inherits_no_connection() {
    let world = World::new();
    let server = world.server(EVIL, 99);
    let first = world.sandbox(1, Passing::Udp, ANYWHERE);
    first.send_udp(EVIL, 99, b"x");
    let (_, peer) = received(&server).unwrap();
    let tracked = || world.in_host("cat /proc/sys/net/netfilter/nf_conntrack_count");
    assert_eq!(tracked().trim(), "1");
    world.close(&first);
    assert_eq!(tracked().trim(), "0");
    drop(first);
    let second = world.sandbox(1, Passing::Udp, ANYWHERE);
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        server.send_to(b"for the other", peer).unwrap();
        assert!(second.guest.receive(|it| it.is(UDP)).is_none());
    }
    assert_eq!(second.guest.counted("to_guest"), 0);
}
