//! What the host's rules leave to whoever has taken an egress process over: its user, and with it
//! any socket of the host's network.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    ops::Range,
    time::Duration,
};

use holdfast_netpolicy::Cidr;
use holdfastd::egress::{EGRESS_OWN_UIDS, EGRESS_UID};
use rustix::process::{Gid, Uid};

use crate::world::{ALLOWED, HOST, METADATA, PRIVATE, World, received};

const LOOPBACK: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// Sends a datagram as a user of the host.
fn send_as(world: &World, user: u32, to: Ipv4Addr, port: u16) {
    world.as_user(user, || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        // It may be told at once that it must not.
        let _ = socket.send_to(b"x", (to, port));
    });
}

fn connects_as(world: &World, user: u32, to: Ipv4Addr, port: u16) -> bool {
    let patience = Duration::from_millis(500);
    world.as_user(user, || TcpStream::connect_timeout(&(to, port).into(), patience).is_ok())
}

fn ranges(texts: &[&str]) -> Vec<Cidr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

#[test]
fn a19_an_egress_process_that_was_taken_over_reaches_neither_the_node_nor_its_neighbours() {
    let world = World::new();
    let servers = [HOST, LOOPBACK].map(|address| (address, world.server_on_host(address, 99)));
    for user in [0, EGRESS_UID] {
        let may = user == 0;
        for (address, server) in &servers {
            send_as(&world, user, *address, 99);
            assert_eq!(received(server).is_some(), may, "user {user} to {address}");
        }
        for address in [PRIVATE, METADATA] {
            world.outside.forget();
            send_as(&world, user, address, 99);
            assert_eq!(world.outside.saw(address), may, "user {user} to {address}");
        }
        world.outside.forget();
        send_as(&world, user, ALLOWED, 99);
        assert!(world.outside.saw(ALLOWED), "user {user} has no outside");
    }
    // By TCP as well, to the API and whatever else listens here.
    let _api = world.listener_on_host(HOST, 8443);
    let _outside = world.listener(PRIVATE, 443);
    for (address, port) in [(HOST, 8443), (PRIVATE, 443)] {
        assert!(connects_as(&world, 0, address, port), "nobody is there");
        assert!(!connects_as(&world, EGRESS_UID, address, port), "{address}");
    }
}

#[test]
fn name_servers_and_what_the_operator_lifts_stay_in_reach_and_only_as_long() {
    let world = World::new();
    let resolver = world.server_on_host(LOOPBACK, 53);
    let reaches = |to: Ipv4Addr| {
        world.outside.forget();
        send_as(&world, EGRESS_UID, to, 99);
        world.outside.saw(to)
    };
    let asks = || {
        send_as(&world, EGRESS_UID, LOOPBACK, 53);
        received(&resolver).is_some()
    };
    assert!(!asks() && !reaches(PRIVATE));

    let servers: Vec<SocketAddr> =
        vec![(LOOPBACK, 53).into(), "[2001:db8::53]:53".parse().unwrap()];
    let lifted = ranges(&["10.0.0.0/8", "10.9.0.0/16", "fd00::/8", "::/1"]);
    let none = BTreeMap::new();
    world.nft().guard(&servers, &lifted, &none).unwrap();
    assert!(asks() && reaches(PRIVATE) && !reaches(METADATA));
    // The name server's port, and no other of that address.
    let other = world.server_on_host(LOOPBACK, 54);
    send_as(&world, EGRESS_UID, LOOPBACK, 54);
    assert!(received(&other).is_none());

    // Whatever is lifted, the node's own addresses are not.
    let own = world.server_on_host(HOST, 99);
    world.nft().guard(&[], &ranges(&["0.0.0.0/0", "::/0"]), &none).unwrap();
    send_as(&world, EGRESS_UID, HOST, 99);
    assert!(received(&own).is_none());
    assert!(!asks() && reaches(METADATA));

    world.nft().guard(&[], &[], &none).unwrap();
    assert!(!reaches(METADATA) && !reaches(PRIVATE) && reaches(ALLOWED));
}

#[test]
fn a19_what_is_lifted_for_one_group_is_out_of_reach_of_a_process_of_another() {
    let world = World::new();
    let Range { start: own, end } = EGRESS_OWN_UIDS;
    let lifted_of = BTreeMap::from([
        (own, ranges(&["10.0.0.0/8", "10.9.0.0/16", "fd00::/8"])),
        (own + 1, ranges(&["169.254.0.0/16", "::/0"])),
        (end - 1, ranges(&["0.0.0.0/0", "10.9.9.9/32"])),
        (own + 2, vec![]),
    ]);
    let reaches = |user: u32, to: Ipv4Addr| {
        world.outside.forget();
        send_as(&world, user, to, 99);
        world.outside.saw(to)
    };
    let who_reaches = |to: Ipv4Addr| {
        let users = [EGRESS_UID, own, own + 1, own + 2, end - 1];
        users.map(|user| reaches(user, to))
    };
    world.nft().guard(&[], &[], &lifted_of).unwrap();
    assert_eq!(who_reaches(ALLOWED), [true; 5]);
    assert_eq!(who_reaches(PRIVATE), [false, true, false, false, true]);
    assert_eq!(who_reaches(METADATA), [false, false, true, false, true]);

    // Whatever is lifted, the node's own addresses are not.
    let node = world.server_on_host(HOST, 99);
    send_as(&world, end - 1, HOST, 99);
    assert!(received(&node).is_none());

    world.nft().guard(&[], &[], &BTreeMap::new()).unwrap();
    assert_eq!(who_reaches(PRIVATE), [false; 5]);
    assert_eq!(who_reaches(METADATA), [false; 5]);
}

#[test]
fn the_rules_speak_of_the_user_that_egress_processes_are() {
    let defined = format!("define egress_uid = {EGRESS_UID}\n");
    assert!(holdfast_netpolicy::HOST_RULESET.contains(&defined));
    let Range { start, end } = EGRESS_OWN_UIDS;
    let defined = format!("define egress_own_uids = {start}-{}\n", end - 1);
    assert!(holdfast_netpolicy::HOST_RULESET.contains(&defined));
    let mark = format!("meta mark set {:#x}", holdfast_nft::BYWAY_MARK);
    assert_eq!(holdfast_netpolicy::HOST_RULESET.matches(&mark).count(), 2);
    let (address, bits) = holdfast_nft::BYWAY_RANGE;
    assert!(holdfast_netpolicy::HOST_RULESET.contains(&format!(" {address}/{bits} ")));
}

/// As an egress process: no file of anybody's, and no other group.
pub(super) fn become_user(user: u32) {
    rustix::thread::set_thread_groups(&[]).unwrap();
    let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
    rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
    rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
}
