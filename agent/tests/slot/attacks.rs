//! What a guest may try on its link, each first without the one defence against it.
//!
//! A witness counts the frames that got behind the first wall. Whatever is shown to get there
//! without a rule must not with it, and the rule's own counter must say so.

use std::net::Ipv4Addr;

use holdfast_model::link::{GATEWAY_ADDRESS, GATEWAY_MAC, GUEST_ADDRESS, GUEST_MAC};
use holdfast_netpolicy::SANDBOX_RULESET;

use crate::{
    frames::{
        ARP, ICMP, IPV4, IPV6, OUTSIDE, Packet, RST, SYN, TCP, VLAN, arp, ethernet, to_gateway,
    },
    guest::Guest,
};

const WITNESS: &str = "
table netdev witness {
    counter seen { }
    chain behind {
        type filter hook ingress device \"tap0\" priority 500; policy accept;
        counter name \"seen\"
    }
}
";

/// The ruleset without the rules that count by one of these names, and with nothing that would stop
/// in the end what they let through.
fn without(names: &[&str]) -> String {
    let named =
        |line: &&str| !names.iter().any(|name| line.contains(&format!("counter name \"{name}\"")));
    let kept: Vec<&str> = SANDBOX_RULESET.lines().filter(named).collect();
    let kept = kept.join("\n");
    let begin = "hook ingress device \"tap0\" priority filter; policy drop;";
    assert_eq!(kept.matches(begin).count(), 1);
    kept.replace(begin, "hook ingress device \"tap0\" priority filter; policy accept;")
}

/// The frame, with and without the rules of these names; the first is the one that must catch it.
fn is_caught(attack: &str, frame: &[u8], rules: &[&str]) {
    let open = Guest::in_a_slot(&format!("{}{WITNESS}", without(rules)));
    open.send(frame);
    assert_eq!(open.counted("seen"), 1, "{attack}: the test does not see it arrive");

    let closed = Guest::in_a_slot(&format!("{SANDBOX_RULESET}{WITNESS}"));
    closed.send(frame);
    assert_eq!(closed.counted("seen"), 0, "{attack} got behind the wall");
    assert_eq!(closed.counted(rules[0]), 1, "{attack} was not counted as {}", rules[0]);
}

/// Counts what no wall has stopped.
const LATE_WITNESS: &str = "
table ip witness {
    counter seen { }
    chain behind {
        type filter hook prerouting priority 500; policy accept;
        counter name \"seen\"
    }
}
";

/// The frame, which the first wall counts and the second answers, with and without both. Gives the
/// guest that sent it.
fn is_refused(attack: &str, frame: &[u8], rules: &[&str]) -> Guest {
    let open = without(rules);
    let kept: Vec<_> = open.lines().filter(|line| !line.contains("reject with")).collect();
    let begin = "hook prerouting priority mangle; policy drop;";
    let open = kept.join("\n").replace(begin, "hook prerouting priority mangle; policy accept;");
    let open = Guest::in_a_slot(&format!("{open}{LATE_WITNESS}"));
    open.send(frame);
    assert_eq!(open.counted("seen"), 1, "{attack}: the test does not see it arrive");

    let closed = Guest::in_a_slot(&format!("{SANDBOX_RULESET}{LATE_WITNESS}"));
    closed.send(frame);
    assert_eq!(closed.counted("seen"), 0, "{attack} got behind the walls");
    assert_eq!(closed.counted(rules[0]), 1, "{attack} was not counted as {}", rules[0]);
    closed
}

fn syn(to: Ipv4Addr) -> Packet {
    Packet::tcp(to, (4000, 443), SYN, (1, 0))
}

#[test]
fn a11_a_packet_with_a_source_that_is_not_the_guests() {
    for source in [[192, 168, 127, 1], [10, 0, 0, 7], [198, 51, 100, 10], [127, 0, 0, 1], [0; 4]] {
        let from = source.into();
        is_caught("spoofed TCP", &Packet { from, ..syn(OUTSIDE) }.frame(), &["bad_source"]);
        let question = Packet { from, ..Packet::udp(OUTSIDE, 53, b"?") };
        is_caught("spoofed DNS", &question.frame(), &["bad_source"]);
    }
}

#[test]
fn a12_a_frame_with_another_mac_and_arp_that_is_no_question_for_the_gateway() {
    let other = [2, 0, 0, 0, 0, 9];
    let packet = syn(OUTSIDE).build();
    is_caught("spoofed MAC", &ethernet(GATEWAY_MAC, other, IPV4, &packet), &["bad_mac"]);
    is_caught("as the gateway", &ethernet(GATEWAY_MAC, GATEWAY_MAC, IPV4, &packet), &["bad_mac"]);

    let guest = (GUEST_MAC, GUEST_ADDRESS);
    let questions = [
        ("gratuitous for the gateway", arp(1, (GUEST_MAC, GATEWAY_ADDRESS), GATEWAY_ADDRESS)),
        ("gratuitous for itself", arp(1, guest, GUEST_ADDRESS)),
        ("probe", arp(1, (GUEST_MAC, Ipv4Addr::UNSPECIFIED), GATEWAY_ADDRESS)),
        ("answer nobody asked for", arp(2, guest, GATEWAY_ADDRESS)),
        ("answer for the gateway", arp(2, (GUEST_MAC, GATEWAY_ADDRESS), GUEST_ADDRESS)),
        ("other MAC inside", arp(1, (other, GUEST_ADDRESS), GATEWAY_ADDRESS)),
        ("about a neighbour", arp(1, guest, [192, 168, 127, 6].into())),
        ("about the outside", arp(1, guest, OUTSIDE)),
    ];
    for (attack, packet) in questions {
        let frame = ethernet([0xff; 6], GUEST_MAC, ARP, &packet);
        is_caught(attack, &frame, &["bad_arp"]);
    }
}

#[test]
fn a12_the_guests_place_in_the_neighbour_table_is_fixed() {
    let guest = Guest::in_a_slot(SANDBOX_RULESET);
    let before = guest.inside("ip neigh");
    assert_eq!(before.trim(), "192.168.127.2 dev tap0 lladdr 02:48:46:00:00:02 PERMANENT");
    // Without the first wall the kernel hears it, and stays with what it knows.
    guest.inside("nft delete table netdev sandbox");
    let packet = arp(2, ([2, 0, 0, 0, 0, 9], GUEST_ADDRESS), GATEWAY_ADDRESS);
    guest.send(&ethernet(GATEWAY_MAC, GUEST_MAC, ARP, &packet));
    assert_eq!(guest.inside("ip neigh"), before);
}

#[test]
fn a13_a14_a_frame_that_is_not_for_the_gateway_or_not_ipv4() {
    let packet = Packet::udp([255; 4].into(), 67, b"offer").build();
    let rest = ["bad_destination", "refused_udp", "bad_protocol"];
    let rules = [&["bad_mac"][..], &rest].concat();
    is_caught("broadcast", &ethernet([0xff; 6], GUEST_MAC, IPV4, &packet), &rules);
    for (port, group) in
        [(5353, [224, 0, 0, 251]), (5355, [224, 0, 0, 252]), (1900, [239, 255, 255, 250])]
    {
        let packet = Packet::udp(group.into(), port, b"who").build();
        let to = [0x01, 0x00, 0x5e, group[1] & 0x7f, group[2], group[3]];
        is_caught("multicast", &ethernet(to, GUEST_MAC, IPV4, &packet), &rules);
        is_caught("multicast to one", &to_gateway(&packet), &rest);
    }
    let tagged = [&[0, 5, 0x08, 0][..], &syn(OUTSIDE).build()].concat();
    let untagged = [&[0, 0, 0x08, 0][..], &syn(OUTSIDE).build()].concat();
    let others = [
        ("IPv6", IPV6, vec![0x60; 60]),
        ("a VLAN", VLAN, tagged),
        ("a priority", VLAN, untagged),
        ("PPPoE", 0x8863, vec![0; 60]),
        ("LLDP", 0x88cc, vec![0; 60]),
        ("MPLS", 0x8847, vec![0; 60]),
    ];
    for (attack, kind, payload) in others {
        let frame = ethernet(GATEWAY_MAC, GUEST_MAC, kind, &payload);
        is_caught(attack, &frame, &["bad_ethertype", "bad_protocol"]);
    }
}

#[test]
fn a17_a29_a_packet_to_where_nobody_can_be() {
    let nowhere = [
        [127, 0, 0, 1],
        [0, 0, 0, 0],
        [0, 1, 2, 3],
        [240, 0, 0, 1],
        [255, 255, 255, 255],
        // To itself (land), and to its network's own.
        [192, 168, 127, 2],
        [192, 168, 127, 0],
        [192, 168, 127, 3],
    ];
    for to in nowhere {
        is_caught("TCP", &syn(to.into()).frame(), &["bad_destination"]);
        let question = Packet::udp(to.into(), 53, b"?").frame();
        is_caught("DNS", &question, &["bad_destination"]);
    }
}

#[test]
fn a21_a22_a_packet_with_options_or_in_pieces() {
    // Loose and strict source route, record route (RFC 791).
    for kind in [131, 137, 7] {
        let options = vec![kind, 7, 4, 10, 0, 0, 1, 0];
        is_caught("options", &Packet { options, ..syn(OUTSIDE) }.frame(), &["bad_options"]);
    }
    // More to come; at offset 8, over the ports; the last piece of a large one.
    for fragment in [0x2000, 0x2001, 0x0001, 0x1fff] {
        let piece = Packet { fragment, ..syn(OUTSIDE) };
        is_caught("piece of TCP", &piece.frame(), &["bad_fragment"]);
        let piece = Packet { fragment, ..Packet::udp(OUTSIDE, 53, &[0; 64]) };
        is_caught("piece of DNS", &piece.frame(), &["bad_fragment"]);
    }
}

#[test]
fn a9_a_packet_of_another_protocol() {
    // IGMP, IP in IP, IPv6 in IP, GRE, ESP, AH, SCTP, UDP-Lite.
    for protocol in [2, 4, 41, 47, 50, 51, 132, 136, 0, 255] {
        let packet = Packet::new(OUTSIDE, protocol, &[0; 32]);
        is_caught("a protocol", &packet.frame(), &["bad_protocol"]);
    }
}

#[test]
fn a4_a5_datagrams_are_refused_aloud_and_a_flood_of_them_in_silence() {
    let rest = ["refused_udp", "bad_protocol"];
    for port in [443, 123, 3478, 51820, 67, 5353, 15001] {
        for to in [OUTSIDE, GATEWAY_ADDRESS] {
            let refused = Packet::udp(to, port, b"hello").frame();
            is_refused("a datagram", &refused, &rest);
        }
    }
    let guest = Guest::in_a_slot(SANDBOX_RULESET);
    guest.send(&Packet::udp(OUTSIDE, 443, b"hello").frame());
    let answer = guest.receive(|it| it.is(ICMP)).expect("it was not refused");
    assert_eq!(answer.inner()[..2], [3, 13], "not as prohibited");
    assert_eq!(answer.to, GUEST_MAC);

    for _ in 0..2000 {
        guest.send(&Packet::udp(OUTSIDE, 443, b"hello").frame());
    }
    let mut answers = 0;
    while guest.receive(|it| it.is(ICMP)).is_some() {
        answers += 1;
    }
    assert!(answers < 2000, "{answers} answers");
    assert_eq!(guest.counted("refused_udp"), 2001);
}

#[test]
fn a16_the_gateway_serves_names_and_nothing_else() {
    for port in [22, 80, 443, 8443, 15001] {
        let packet = Packet::tcp(GATEWAY_ADDRESS, (4000, port), SYN, (1, 0));
        let guest = Guest::in_a_slot(SANDBOX_RULESET);
        guest.send(&packet.frame());
        let answer = guest.receive(|it| it.is(TCP)).expect("it was not refused");
        assert_eq!(answer.segment().0 & RST, RST);
        assert!(guest.accepted().is_none());
        assert_eq!(guest.counted("refused_gateway"), 1);

        // Without those rules a connection to the gateway's own address comes about.
        let open = SANDBOX_RULESET.lines().filter(|line| !line.contains("tcp dport != 53"));
        let open = Guest::in_a_slot(&open.collect::<Vec<_>>().join("\n"));
        assert!(open.reaches((GATEWAY_ADDRESS, port), 4000), "the test sees no connection");
    }
    let guest = Guest::in_a_slot(SANDBOX_RULESET);
    assert!(guest.reaches((GATEWAY_ADDRESS, 53), 4001), "no questions by TCP");
}

#[test]
fn a23_pings_are_refused() {
    let rest = ["refused_icmp", "bad_protocol"];
    for to in [OUTSIDE, GATEWAY_ADDRESS] {
        let guest = is_refused("a ping", &Packet::ping(to).frame(), &rest);
        let answer = guest.receive(|it| it.is(ICMP)).expect("it was not refused");
        assert_eq!(answer.inner()[..2], [3, 13]);
    }
    // A redirect, and an error about nothing: not answered, errors never are.
    for kind in [5, 3, 0] {
        let guest = Guest::in_a_slot(SANDBOX_RULESET);
        guest.send(&Packet::new(GATEWAY_ADDRESS, ICMP, &[kind, 1, 0, 0, 0, 0, 0, 0]).frame());
        assert_eq!(guest.counted("refused_icmp"), 1);
        assert!(guest.receive(|_| true).is_none());
    }
}

#[test]
fn a27_half_open_connections_keep_no_other_out() {
    let guest = Guest::in_a_slot(SANDBOX_RULESET);
    for number in 0..20_000_u32 {
        let to = Ipv4Addr::from(u32::from(OUTSIDE) + number % 64);
        let own_port = u16::try_from(1024 + number % 50_000).unwrap();
        guest.send(&Packet::tcp(to, (own_port, 443), SYN, (number, 0)).frame());
    }
    // What was answered to them is not wanted.
    while guest.receive(|_| true).is_some() {}
    assert!(guest.reaches((OUTSIDE, 4433), 60_000), "it was kept out");
}

#[test]
fn what_is_cut_short_or_long_reaches_nobody() {
    let whole = Packet::udp(OUTSIDE, 53, b"?").frame();
    let guest = Guest::in_a_slot(SANDBOX_RULESET);
    for length in 14..whole.len() {
        guest.send(&whole[..length]);
    }
    assert!(guest.asked().is_none(), "a piece was taken for the whole");
    guest.send(&whole);
    assert!(guest.asked().is_some());
}

#[test]
fn the_second_wall_holds_without_the_first() {
    let from = Ipv4Addr::new(10, 0, 0, 7);
    let spoofed = Packet { from, ..Packet::udp(OUTSIDE, 53, b"?") };
    let datagram = Packet::udp(OUTSIDE, 443, b"hello");
    let guest = Guest::in_a_slot(SANDBOX_RULESET);
    guest.inside("nft delete table netdev sandbox");
    guest.send(&spoofed.clone().frame());
    guest.send(&datagram.frame());
    assert!(guest.asked().is_none());
    guest.send(&Packet::udp(OUTSIDE, 53, b"?").frame());
    assert!(guest.asked().is_some(), "the test cannot see an arrival");

    let rule = "iifname \"tap0\" ip saddr $guest udp";
    assert!(SANDBOX_RULESET.contains(rule));
    let open = Guest::in_a_slot(&SANDBOX_RULESET.replace(rule, "iifname \"tap0\" udp"));
    open.inside("nft delete table netdev sandbox");
    open.send(&spoofed.frame());
    assert!(open.asked().is_some(), "the test cannot see a spoofed one arrive");
}
