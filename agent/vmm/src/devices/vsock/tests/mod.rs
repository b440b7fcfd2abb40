//! Connections between a host client and a guest made of packets.

use std::{
    io::{Read, Write},
    net::Shutdown,
};

mod guest;

use guest::*;
use holdfast_wire::vmm::READY_PORT;
use proptest::prelude::*;

use super::packet::{Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};
use crate::{
    devices::testing::*,
    event::Event,
    limits::vsock::{CONNECTIONS_MAX, REFUSALS_MAX, ROOM_BYTES},
};

#[test]
fn bytes_go_both_ways_and_are_counted() {
    let mut guest = Guest::new();
    let (mut client, ours) = guest.connected(ROOM_BYTES);
    client.write_all(b"ping").unwrap();
    let (header, bytes) = guest.hear();
    assert_eq!((header.op, bytes.as_slice()), (op::DATA, &b"ping"[..]));
    guest.say(data(ours, b"pong!"), b"pong!");
    assert_eq!(read(&mut client, 5), b"pong!");
    let stats = guest.rig.devices.stats();
    let (received, sent) = (stats.vsock_rx_bytes, stats.vsock_tx_bytes);
    assert_eq!((received, sent), (5, 4));
}

#[test]
fn data_in_several_pieces_is_one_packet() {
    let mut guest = Guest::new();
    let (mut client, ours) = guest.connected(ROOM_BYTES);
    guest.rig.store(SEND, &data(ours, b"abcdefgh").to_bytes());
    guest.rig.store(SEND + 0x1000, b"abcdefgh");
    let pieces = [(SEND, 20, 0), (SEND + 20, 24, 0), (SEND + 0x1000, 3, 0), (SEND + 0x1003, 5, 0)];
    guest.send.ask(&pieces);
    assert_eq!(read(&mut client, 8), b"abcdefgh");
}

#[test]
fn the_knock_of_pid_1_is_reported_once_and_reset() {
    let mut guest = Guest::new();
    for _ in 0..2 {
        guest.say(Header { op: op::REQUEST, ..packet(READY_PORT, ROOM_BYTES) }, b"");
        let (answer, _) = guest.hear();
        assert_eq!((answer.op, answer.source_port), (op::RESET, READY_PORT));
    }
    assert_eq!(guest.rig.event(), Event::GuestReady);
}

#[test]
fn a_driver_that_resets_the_device_and_knocks_again_is_not_reported_again() {
    let mut guest = Guest::new();
    for _ in 0..3 {
        guest.say(Header { op: op::REQUEST, ..packet(READY_PORT, ROOM_BYTES) }, b"");
        assert_eq!(guest.hear().0.op, op::RESET);
        guest = Guest::start(guest.rig);
        guest.offer(8);
    }
    assert_eq!(guest.rig.event(), Event::GuestReady);
}

#[test]
fn a_guest_reaches_no_other_port_of_the_host() {
    let mut guest = Guest::new();
    for port in [0, 1, READY_PORT + 1, 1 << 30, u32::MAX] {
        guest.say(Header { op: op::REQUEST, ..packet(port, ROOM_BYTES) }, b"");
        let (answer, _) = guest.hear();
        assert_eq!((answer.op, answer.source_port, answer.target_port), (op::RESET, port, PORT));
    }
}

#[test]
fn packets_of_no_connection_get_a_reset_and_resets_nothing() {
    let mut guest = Guest::new();
    guest.say(Header { op: op::RESET, ..packet(77, 0) }, b"");
    guest.say(Header { op: op::CREDIT_UPDATE, source_cid: 9, ..packet(77, 0) }, b"");
    guest.say(Header { op: op::CREDIT_UPDATE, target_cid: 9, ..packet(77, 0) }, b"");
    for op in [op::DATA, op::RESPONSE, op::SHUTDOWN, op::CREDIT_UPDATE, 0, u16::MAX] {
        guest.say(Header { op, ..packet(78, 0) }, b"");
        let (answer, _) = guest.hear();
        assert_eq!((answer.op, answer.source_port), (op::RESET, 78), "op {op}");
    }
}

#[test]
fn a_port_nobody_serves_ends_the_client() {
    let mut guest = Guest::new();
    let mut client = guest.rig.connect();
    client.write_all(b"CONNECT 9\n").unwrap();
    let (request, _) = guest.hear();
    let refusal = Header { op: op::RESET, source_port: 9, ..packet(request.source_port, 0) };
    guest.say(refusal, b"");
    assert_eq!(read_to_end(&mut client), b"");
}

#[test]
fn a_client_that_says_something_else_is_closed() {
    let guest = Guest::new();
    let mut client = guest.rig.connect();
    client.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    // Closing with unread bytes is seen as a reset or as the end.
    assert!(matches!(client.read(&mut [0; 8]), Ok(0) | Err(_)));
}

#[test]
fn the_end_of_the_hosts_data_is_passed_on_and_answers_still_come() {
    let mut guest = Guest::new();
    let (mut client, ours) = guest.connected(ROOM_BYTES);
    client.write_all(b"last").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.hear().1, b"last");
    let (end, _) = guest.hear();
    assert_eq!((end.op, end.flags), (op::SHUTDOWN, SHUTDOWN_SEND));
    guest.say(data(ours, b"answer"), b"answer");
    assert_eq!(read(&mut client, 6), b"answer");
    drop(client);
    let (gone, _) = guest.hear();
    assert_eq!((gone.op, gone.flags), (op::SHUTDOWN, BOTH));
}

#[test]
fn the_end_of_the_guests_data_is_passed_on_and_requests_still_go() {
    let mut guest = Guest::new();
    let (mut client, ours) = guest.connected(ROOM_BYTES);
    guest.say(data(ours, b"last"), b"last");
    guest.say(Header { op: op::SHUTDOWN, flags: SHUTDOWN_SEND, ..ours }, b"");
    assert_eq!(read_to_end(&mut client), b"last");
    client.write_all(b"more").unwrap();
    assert_eq!(guest.hear().1, b"more");
    guest.say(Header { op: op::SHUTDOWN, flags: BOTH, ..ours }, b"");
    assert_eq!(guest.hear().0.op, op::RESET);
}

#[test]
fn a_guest_that_will_not_receive_makes_the_clients_writes_fail() {
    let mut guest = Guest::new();
    let (mut client, ours) = guest.connected(ROOM_BYTES);
    guest.say(Header { op: op::SHUTDOWN, flags: SHUTDOWN_RECEIVE, ..ours }, b"");
    guest.say(data(ours, b"x"), b"x");
    assert_eq!(read(&mut client, 1), b"x", "the shutdown was handled before");
    assert_eq!(client.write(b"y").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
}

#[test]
fn a_client_that_leaves_takes_nothing_from_the_guest_any_more() {
    let mut guest = Guest::new();
    let (mut client, ours) = guest.connected(ROOM_BYTES);
    client.write_all(b"bye").unwrap();
    drop(client);
    assert_eq!(guest.hear().1, b"bye");
    // The end of its data may be seen, and told, before its leaving is.
    let told = guest.hear().0;
    let gone = if told.flags == SHUTDOWN_SEND { guest.hear().0 } else { told };
    assert_eq!((gone.op, gone.flags), (op::SHUTDOWN, BOTH));
    guest.say(data(ours, b"anybody?"), b"anybody?");
    guest.say(Header { op: op::CREDIT_REQUEST, ..ours }, b"");
    let (answer, _) = guest.hear();
    assert_eq!((answer.op, answer.fwd_cnt), (op::CREDIT_UPDATE, 8), "lost, but its room is back");
}

/// What a guest that sent `sent` bytes may still send.
fn guest_room(guest: &mut Guest, ours: Header, sent: usize) -> u32 {
    guest.say(Header { op: op::CREDIT_REQUEST, ..ours }, b"");
    let told = guest.hear().0;
    told.buf_alloc - (u32::try_from(sent).unwrap() - told.fwd_cnt)
}

#[test]
fn the_last_bytes_of_a_guest_that_reset_reach_a_slow_client() {
    let mut guest = Guest::new();
    let (mut client, ours) = guest.connected(ROOM_BYTES);
    let mut expected = Vec::new();
    // Until the client's socket is full and the room behind it as well.
    let mut step = 0;
    while guest_room(&mut guest, ours, expected.len()) >= 8192 {
        let bytes = vec![step; 8192];
        guest.say(data(ours, &bytes), &bytes);
        expected.extend(&bytes);
        step += 1;
    }
    guest.say(Header { op: op::RESET, ..ours }, b"");
    assert!(read_to_end(&mut client) == expected);
}

#[test]
fn a_guest_that_sends_more_than_its_credit_is_reset() {
    let mut guest = Guest::new();
    let (client, ours) = guest.connected(ROOM_BYTES);
    let bytes = vec![7; 1 << 16];
    // The client reads nothing: its socket takes some, the backlog takes its room, no more fits.
    let answer = loop {
        guest.say(data(ours, &bytes), &bytes);
        guest.say(Header { op: op::CREDIT_REQUEST, ..ours }, b"");
        let (answer, _) = guest.hear();
        if answer.op != op::CREDIT_UPDATE {
            break answer;
        }
    };
    assert_eq!(answer.op, op::RESET);
    drop(client);
}

#[test]
fn the_guest_is_sent_no_more_than_it_has_room_for() {
    let mut guest = Guest::new();
    let (mut client, ours) = guest.connected(10);
    client.write_all(b"0123456789abcdef").unwrap();
    assert_eq!(guest.hear().1, b"0123456789");
    assert_eq!(guest.hear().0.op, op::CREDIT_REQUEST);
    guest.say(Header { op: op::CREDIT_UPDATE, fwd_cnt: 4, ..ours }, b"");
    assert_eq!(guest.hear().1, b"abcd");
    assert_eq!(guest.hear().0.op, op::CREDIT_REQUEST);
    guest.say(Header { op: op::CREDIT_UPDATE, fwd_cnt: 14, ..ours }, b"");
    assert_eq!(guest.hear().1, b"ef");
}

#[test]
fn a_packet_with_impossible_ports_or_phase_ends_its_connection_only() {
    let mut guest = Guest::new();
    let (mut client, ours) = guest.connected(ROOM_BYTES);
    let (mut other, theirs) = guest.connected(ROOM_BYTES);
    // Another guest port: not this connection.
    guest.say(Header { op: op::SHUTDOWN, flags: BOTH, source_port: 5, ..ours }, b"");
    assert_eq!((guest.hear().0.target_port), 5);
    guest.say(Header { op: op::RESPONSE, ..ours }, b"");
    assert_eq!(guest.hear().0.op, op::RESET);
    assert_eq!(read_to_end(&mut client), b"");
    guest.say(data(theirs, b"fine"), b"fine");
    assert_eq!(read(&mut other, 4), b"fine");
}

#[test]
fn a_guest_that_floods_and_does_not_listen_is_left_waiting_and_then_served() {
    let mut guest = Guest::start(Rig::new(Vec::new()));
    let packet = Header { op: op::DATA, ..packet(5, 0) };
    (0..REFUSALS_MAX).for_each(|_| guest.say(packet, b""));
    guest.say_and_forget(packet);
    // Answered after the kick was looked at.
    guest.rig.devices.pause();
    assert_eq!(guest.send.try_take(), None);
    guest.rig.devices.resume();
    guest.offer(4);
    (0..=REFUSALS_MAX).for_each(|_| assert_eq!(guest.hear().0.op, op::RESET));
}

#[test]
fn connections_over_the_limit_are_closed_and_the_others_live() {
    let mut guest = Guest::new();
    let (mut first, ours) = guest.connected(ROOM_BYTES);
    let _waiting: Vec<_> = (1..CONNECTIONS_MAX).map(|_| guest.rig.connect()).collect();
    let mut over = guest.rig.connect();
    assert_eq!(read_to_end(&mut over), b"");
    guest.say(data(ours, b"here"), b"here");
    assert_eq!(read(&mut first, 4), b"here");
}

#[test]
fn a_reset_by_the_driver_ends_all_connections_and_clients_before_a_start_are_closed() {
    let mut guest = Guest::new();
    let (mut client, _) = guest.connected(ROOM_BYTES);
    guest.rig.write(VSOCK, virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS, 0);
    assert_eq!(read_to_end(&mut client), b"");
    let mut early = guest.rig.connect();
    assert_eq!(read_to_end(&mut early), b"");
    let mut guest = Guest::start(guest.rig);
    guest.offer(8);
    guest.connected(ROOM_BYTES);
}

#[test]
fn a_pause_holds_bytes_back_and_a_resume_lets_them_go() {
    let mut guest = Guest::new();
    let (mut client, ours) = guest.connected(ROOM_BYTES);
    guest.rig.devices.pause();
    client.write_all(b"meanwhile").unwrap();
    guest.rig.devices.pause();
    assert_eq!(guest.receive.try_take(), None);
    guest.rig.devices.resume();
    assert_eq!(guest.hear().1, b"meanwhile");
    guest.say(data(ours, b"back"), b"back");
    assert_eq!(read(&mut client, 4), b"back");
}

#[test]
fn packets_and_buffers_too_short_or_the_wrong_way_stop_the_device() {
    let long = Header { len: 9, op: op::DATA, ..packet(5, 0) };
    for (pieces, reason) in [
        (vec![(SEND, 43, 0)], "a packet's header"),
        (vec![(SEND, 52, 0)], "the data its packet announces"),
        (vec![(SEND, 44, WRITE)], "wrong direction"),
    ] {
        let mut guest = Guest::new();
        guest.rig.store(SEND, &long.to_bytes());
        guest.send.offer(&pieces);
        guest.send.kick();
        let told = guest.rig.stopped(VSOCK);
        assert!(told.contains(reason), "{told}");
    }
    for (flags, len, reason) in [(WRITE, 44, "any packet with data"), (0, 4096, "wrong direction")]
    {
        let mut guest = Guest::start(Rig::new(Vec::new()));
        guest.receive.offer(&[(RECEIVE, len, flags)]);
        guest.receive.kick();
        guest.say_and_forget(Header { op: op::REQUEST, ..packet(5, 0) });
        let told = guest.rig.stopped(VSOCK);
        assert!(told.contains(reason), "{told}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn no_sequence_of_packets_ends_more_than_its_connection(
        packets in prop::collection::vec(
            (0..10u16, any::<u32>(), any::<u32>(), any::<u32>(), 0..3000usize, any::<bool>()), 1..12,
        ),
    ) {
        let mut guest = Guest::new();
        let (_client, ours) = guest.connected(ROOM_BYTES);
        for (op, flags, buf_alloc, fwd_cnt, len, known) in packets {
            let target_port = if known { ours.target_port } else { 3 };
            let header = Header { op, flags, buf_alloc, fwd_cnt, target_port, ..ours };
            guest.say(data_of(header, len), &vec![1; len]);
            while guest.receive.try_take().is_some() {
                guest.offer(1);
            }
        }
        // Another client still gets through.
        let mut client = guest.rig.connect();
        client.write_all(b"CONNECT 7\n").unwrap();
        let request = loop {
            let (header, _) = guest.hear();
            if header.op == op::REQUEST {
                break header;
            }
        };
        prop_assert_eq!(request.target_port, 7);
    }
}

fn data_of(header: Header, len: usize) -> Header {
    Header { len: u32::try_from(len).unwrap(), ..header }
}
