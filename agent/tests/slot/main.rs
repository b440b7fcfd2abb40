//! A sandbox's network namespace in the kernel. Needs root.
//!
//! In the place of a guest stands this test, which writes frames to the tap and reads what comes
//! back; in the place of the proxy as well, which has the slot's two sockets.
#![allow(clippy::similar_names, reason = "to and tcp and the like")]

mod attacks;
mod frames;
mod guest;
mod sys;

use std::{
    os::fd::OwnedFd,
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use holdfast_jail::{Confinement, Handover, Slot, SlotSockets, Slots, confine};
use holdfast_model::link::{GATEWAY_ADDRESS, GATEWAY_MAC, GUEST_ADDRESS, GUEST_MAC, PREFIX_BITS};
use holdfast_netpolicy::SANDBOX_RULESET;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::{
    frames::{ACK, ARP, OUTSIDE, Packet, RST, TCP, UDP, question},
    guest::{Guest, PATIENCE},
};

#[test]
fn the_gateway_is_found_and_has_the_one_address() {
    let guest = Guest::in_a_slot(SANDBOX_RULESET);
    guest.send(&question());
    let answer = guest.receive(|it| it.kind == ARP).expect("no answer");
    assert_eq!(answer.to, GUEST_MAC);
    assert_eq!(answer.payload[6..8], [0, 2], "no answer");
    assert_eq!(answer.payload[8..14], GATEWAY_MAC);
    assert_eq!(answer.payload[14..18], GATEWAY_ADDRESS.octets());
}

#[test]
fn a_connection_arrives_with_the_address_it_was_for() {
    let guest = Guest::in_a_slot(SANDBOX_RULESET);
    // One port of the guest's to several destinations at once, and to one host's several ports.
    let destinations = [
        (OUTSIDE, 4433),
        (OUTSIDE, 53),
        ([198, 51, 100, 10].into(), 4433),
        ([10, 0, 0, 1].into(), 22),
        ([169, 254, 169, 254].into(), 80),
    ];
    for to in destinations {
        assert!(guest.reaches(to, 4000), "{to:?}");
    }
}

#[test]
fn bytes_go_both_ways_over_a_connection_to_somebody_who_is_not_there() {
    let guest = Guest::in_a_slot(SANDBOX_RULESET);
    let (_, number) = guest.connect((OUTSIDE, 4433), 4000).unwrap().segment();
    let (connection, local, peer) = guest.accepted().unwrap();
    assert_eq!(local, (OUTSIDE, 4433).into());
    assert_eq!(peer, (GUEST_ADDRESS, 4000).into());

    rustix::io::write(&connection, b"from outside").unwrap();
    let data = |it: &frames::Received| it.is(TCP) && it.payload.ends_with(b"from outside");
    let received = guest.receive(data).expect("nothing came");
    assert_eq!(received.from(), OUTSIDE);

    let mut segment = Packet::tcp(OUTSIDE, (4000, 4433), ACK, (101, number.wrapping_add(13)));
    segment.payload.extend(b"from the guest");
    guest.send(&segment.frame());
    let end = Instant::now() + PATIENCE;
    let mut bytes = [0; 64];
    let count = loop {
        match rustix::io::read(&connection, &mut bytes) {
            Ok(count) => break count,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
    };
    assert_eq!(&bytes[..count], b"from the guest");
}

#[test]
fn a_question_to_any_name_server_is_ours_and_is_answered_as_from_it() {
    let guest = Guest::in_a_slot(SANDBOX_RULESET);
    for server in [GATEWAY_ADDRESS, [8, 8, 8, 8].into(), OUTSIDE] {
        guest.send(&Packet::udp(server, 53, b"who?").frame());
        let (bytes, to) = guest.asked().expect("it did not arrive");
        assert_eq!((&bytes[..], to), (&b"who?"[..], (server, 53).into()));

        sys::send_from(&guest.sockets.dns, server, (GUEST_ADDRESS, 4000), b"nobody").unwrap();
        let answer = guest.receive(|it| it.is(UDP)).expect("no answer");
        assert_eq!((answer.from(), answer.ports()), (server, (53, 4000)));
        assert_eq!(&answer.inner()[8..], b"nobody");
    }
}

#[test]
fn f4_without_the_sockets_nothing_is_answered_and_others_can_take_their_place() {
    let Guest { tap, sockets } = Guest::in_a_slot(SANDBOX_RULESET);
    let taken = SlotSockets::reopen(&tap).unwrap_err();
    let reason = std::error::Error::source(&taken).unwrap().to_string();
    assert!(reason.contains("in use"), "two had them at once: {reason}");
    let guest = Guest { tap, sockets };
    assert!(guest.reaches((OUTSIDE, 4433), 4000));

    // As when their owner is killed in the middle of a connection. The test's own are of another.
    let elsewhere = Slot::make(SANDBOX_RULESET).unwrap().sockets;
    let silent = Guest { tap: guest.tap, sockets: elsewhere };
    drop(guest.sockets);
    assert!(silent.connect((OUTSIDE, 4433), 4001).is_none(), "somebody answered");
    silent.send(&Packet::udp(OUTSIDE, 53, b"who?").frame());
    // The connection from before is still being ended.
    assert!(silent.receive(|it| !it.is(TCP)).is_none(), "somebody answered");

    let sockets = SlotSockets::reopen(&silent.tap).unwrap();
    let guest = Guest { tap: silent.tap, sockets };
    assert!(guest.reaches((OUTSIDE, 4433), 4002));
    guest.send(&Packet::udp(OUTSIDE, 53, b"who?").frame());
    assert_eq!(guest.asked().unwrap().1, (OUTSIDE, 53).into());
}

#[test]
fn an_agent_that_comes_later_finds_the_slot_by_the_process_that_holds_the_tap() {
    let Slot { tap, sockets } = Slot::make(SANDBOX_RULESET).unwrap();
    let inode = |tap: &OwnedFd| rustix::fs::fstat(sys::network_of(tap).unwrap()).unwrap().st_ino;
    let (mut holder, mut other) = (Command::new("sleep"), Command::new("sleep"));
    let mut handover = Handover::default();
    handover.give(&tap).unwrap();
    confine(&mut holder, Confinement::new(handover, None));
    let mut holder = holder.arg("60").spawn().unwrap();
    let mut other = other.arg("60").spawn().unwrap();
    let found = |child: &Child| {
        let pid = Pid::from_child(child);
        holdfast_jail::tap_of(pidfd_open(pid, PidfdFlags::empty()).unwrap(), child.id())
    };
    let wanted = inode(&tap);
    drop((tap, sockets));
    let tap = found(&holder);
    let none = found(&other);
    for child in [&mut holder, &mut other] {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let tap = tap.unwrap();
    assert!(none.is_err());
    assert_eq!(inode(&tap), wanted);
    let sockets = SlotSockets::reopen(&tap).unwrap();
    assert!(Guest { tap, sockets }.reaches((OUTSIDE, 4433), 4000));
}

#[test]
fn the_rules_and_the_links_are_of_the_same_addresses() {
    let mac = |bytes: [u8; 6]| bytes.map(|byte| format!("{byte:02x}")).join(":");
    for (name, value) in [
        ("guest_mac", mac(GUEST_MAC)),
        ("gateway_mac", mac(GATEWAY_MAC)),
        ("guest", GUEST_ADDRESS.to_string()),
        ("gateway", GATEWAY_ADDRESS.to_string()),
    ] {
        assert!(SANDBOX_RULESET.contains(&format!("define {name} = {value}\n")), "{name}");
    }
}

#[test]
fn f8_a_connection_that_nobody_knows_any_more_is_reset() {
    let guest = Guest::in_a_slot(SANDBOX_RULESET);
    guest.send(&Packet::tcp(OUTSIDE, (4000, 443), ACK, (7, 9)).frame());
    let answer = guest.receive(|it| it.is(TCP)).expect("the guest would wait for long");
    assert_eq!(answer.segment().0 & RST, RST);
    assert_eq!(answer.from(), OUTSIDE);
}

#[test]
fn f5_flushed_rules_open_nothing() {
    let guest = Guest::in_a_slot(SANDBOX_RULESET);
    guest.inside("nft flush ruleset");
    assert!(guest.connect((OUTSIDE, 4433), 4000).is_none());
    guest.send(&Packet::udp([8, 8, 8, 8].into(), 53, b"who?").frame());
    assert!(guest.asked().is_none());
}

#[test]
fn a_slot_has_a_tap_and_no_way_out() {
    let guest = Guest::in_a_slot(SANDBOX_RULESET);
    let links = guest.inside("ip -o link");
    let names: Vec<&str> = links.lines().filter_map(|line| line.split(": ").nth(1)).collect();
    assert_eq!(names, ["lo", "tap0"]);
    assert!(links.contains("tap0: <BROADCAST,UP,LOWER_UP> mtu 1500"), "{links}");
    assert!(links.contains("02:48:46:00:00:01"), "{links}");
    let addresses = guest.inside("ip -4 -o address show dev tap0");
    assert!(addresses.contains(&format!(" {GATEWAY_ADDRESS}/{PREFIX_BITS} ")), "{addresses}");
    assert_eq!(guest.inside("ip -6 address"), "");
    assert_eq!(guest.inside("ip -6 route show table all"), "");
    let routes = guest.inside("ip -4 route show table main");
    assert_eq!(
        routes.trim(),
        "192.168.127.0/30 dev tap0 proto kernel scope link src 192.168.127.1"
    );
    assert_eq!(guest.inside("cat /proc/sys/net/ipv4/ip_forward").trim(), "0");
    assert_eq!(
        guest.inside("ip -4 route get 8.8.8.8 2>&1 || true").trim(),
        "RTNETLINK answers: Network is unreachable"
    );
}

#[test]
fn the_kernel_says_nothing_of_its_own_accord() {
    let guest = Guest::in_a_slot(SANDBOX_RULESET);
    thread::sleep(Duration::from_secs(1));
    assert!(guest.receive(|_| true).is_none());
    assert_eq!(guest.counted("not_to_guest"), 0);
    // Nor when a program in there does: only what belongs to the guest's own flows is let through.
    let socket = guest::socket_inside(&guest.tap);
    let to = std::net::SocketAddr::from((GUEST_ADDRESS, 9));
    let _ = rustix::net::sendto(&socket, b"hello", rustix::net::SendFlags::empty(), &to);
    assert!(guest.receive(|_| true).is_none());
}

#[test]
fn rules_that_nft_refuses_make_no_slot() {
    let refused = Slot::make("table netdev sandbox { chain of { nonsense } }").unwrap_err();
    let said = std::error::Error::source(&refused).unwrap().to_string();
    assert!(said.contains("nft: ") && said.contains("nonsense"), "{said}");
}

#[test]
fn f9_no_two_slots_see_each_other() {
    let (one, two) = (Guest::in_a_slot(SANDBOX_RULESET), Guest::in_a_slot(SANDBOX_RULESET));
    let inode =
        |guest: &Guest| rustix::fs::fstat(sys::network_of(&guest.tap).unwrap()).unwrap().st_ino;
    assert_ne!(inode(&one), inode(&two));
    one.send(&Packet::udp(OUTSIDE, 53, b"who?").frame());
    assert!(two.asked().is_none());
    assert!(one.asked().is_some());
    // Both with the same addresses and ports, at once.
    assert!(one.reaches((OUTSIDE, 4433), 4000) && two.reaches((OUTSIDE, 4433), 4000));
}

#[test]
fn a_stock_of_slots_is_filled_again_and_gives_each_out_once() {
    let slots = Slots::start(SANDBOX_RULESET);
    let full = || {
        let end = Instant::now() + Duration::from_secs(60);
        let mut ready = slots.ready();
        loop {
            thread::sleep(PATIENCE);
            match slots.ready() {
                now if now > 1 && now == ready => return now,
                now => ready = now,
            }
            assert!(Instant::now() < end, "{ready} are ready");
        }
    };
    let stock = full();
    // More than there are: the rest are made when they are asked for.
    let taken: Vec<Slot> = (0..=stock).map(|_| slots.take().unwrap()).collect();
    let mut inodes: Vec<_> = taken
        .iter()
        .map(|slot| rustix::fs::fstat(sys::network_of(&slot.tap).unwrap()).unwrap().st_ino)
        .collect();
    inodes.sort_unstable();
    inodes.dedup();
    assert_eq!(inodes.len(), stock + 1);
    for slot in &taken {
        guest::inside(&slot.tap, "nft list chain netdev sandbox from_guest");
    }
    assert_eq!(full(), stock);
}
