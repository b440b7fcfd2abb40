//! A network as its driver sees it, on a real tap in a network namespace of its own. Needs root.

use std::{
    net::UdpSocket,
    os::fd::{IntoRawFd, OwnedFd},
    process::Command,
    time::Duration,
};

use holdfast_wire::vmm::{IoLimits, Network, Rate};
use virtio_bindings::virtio_net::*;

use super::{
    header::HEADER_BYTES,
    stand::{self as sys, FLAGS},
    tap::{Tap, TapError},
};
use crate::devices::testing::*;

/// With no disks, rng and vsock come first.
const NET: usize = 2;
const RECEIVE: usize = 0;
const SEND: usize = 1;
const CONFIG: u32 = 0x100;
const OUT: u64 = BUFFERS;
const IN: u64 = BUFFERS + (1 << 20);
const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PORT: u16 = 7777;
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const CHECKSUM: u64 = 1 << VIRTIO_NET_F_CSUM;

fn run(command: &str) {
    let status = Command::new("/bin/busybox").args(["sh", "-c", command]).status().unwrap();
    assert!(status.success(), "{command}");
}

/// A tap that is up, at 10.0.0.1, with the guest at 10.0.0.2 known, and nothing that talks by
/// itself.
fn tap() -> OwnedFd {
    assert!(rustix::process::geteuid().is_root(), "this test makes a network namespace");
    sys::leave_network().unwrap();
    let tap = sys::tap("tap0", FLAGS).unwrap();
    run("echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6
         busybox ifconfig tap0 hw ether 02:00:00:00:00:01
         busybox ifconfig tap0 10.0.0.1 netmask 255.255.255.0 mtu 9000 up
         busybox arp -s 10.0.0.2 02:00:00:00:00:02");
    tap
}

fn network(tap: OwnedFd) -> Network {
    let free = IoLimits::default();
    let tap_fd = tap.into_raw_fd();
    Network { tap_fd, mac: GUEST_MAC, mtu: 9000, to_guest: free, from_guest: free }
}

/// A started network, with a socket of the host's behind its tap.
struct Station {
    rig: Rig,
    queues: Vec<DriverQueue>,
    host: UdpSocket,
}

impl Station {
    fn new(features: u64) -> Self {
        Self::limited(features, IoLimits::default(), IoLimits::default())
    }

    fn limited(features: u64, to_guest: IoLimits, from_guest: IoLimits) -> Self {
        let network = Network { to_guest, from_guest, ..network(tap()) };
        let host = UdpSocket::bind(("10.0.0.1", PORT)).unwrap();
        host.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let rig = Rig::with(Vec::new(), vec![network], false);
        let queues = rig.start(NET, VERSION_1 | features);
        Self { rig, queues, host }
    }

    fn say(&self, text: &[u8]) {
        self.host.send_to(text, ("10.0.0.2", PORT)).unwrap();
    }

    /// Puts header and frame into guest memory; returns their length.
    fn put(&self, header: [u8; HEADER_BYTES], frame: &[u8]) -> u32 {
        self.rig.store(OUT, &header);
        self.rig.store(OUT + HEADER_BYTES as u64, frame);
        u32::try_from(HEADER_BYTES + frame.len()).unwrap()
    }

    fn hear(&self) -> Vec<u8> {
        let mut bytes = [0; 10_000];
        let count = self.host.recv(&mut bytes).unwrap();
        bytes[..count].to_vec()
    }

    fn dropped(&self) -> u64 {
        self.rig.devices.stats().networks[0].dropped_frames
    }

    /// Offers a chain on the queue for sending, and returns why the device stopped.
    fn breaks(mut self, queue: usize, pieces: &[Piece]) -> String {
        self.queues[queue].offer(pieces);
        self.queues[queue].kick();
        self.rig.stopped(NET)
    }
}

/// Ones' complement sum of big-endian words.
fn sum(bytes: &[u8]) -> u32 {
    let mut sum = bytes
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)))
        .sum::<u32>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum
}

/// A datagram from the guest to the host; its UDP checksum is `Some`, or left to be finished.
fn datagram(text: &[u8], checksum: Option<u16>) -> Vec<u8> {
    let udp_bytes = u16::try_from(8 + text.len()).unwrap();
    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp_bytes).to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1]);
    let whole = u16::try_from(!sum(&ip) & 0xffff).unwrap();
    ip[10..12].copy_from_slice(&whole.to_be_bytes());
    let mut pseudo = ip[12..20].to_vec();
    pseudo.extend([0, 17]);
    pseudo.extend(udp_bytes.to_be_bytes());
    let unfinished = u16::try_from(sum(&pseudo)).unwrap();
    let mut frame = [HOST_MAC, GUEST_MAC].concat();
    frame.extend([8, 0]);
    frame.extend(ip);
    for word in [PORT, PORT, udp_bytes, checksum.unwrap_or(unfinished)] {
        frame.extend(word.to_be_bytes());
    }
    frame.extend(text);
    frame
}

#[test]
fn the_driver_finds_address_and_mtu_and_what_the_tap_can_do() {
    let station = Station::new(0);
    let mut config = [0; 12];
    let base = station.rig.devices.windows()[NET].base;
    station.rig.devices.read(base, CONFIG.into(), &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0x28, 0x23]);
    station.rig.write(NET, 0x14, 0);
    let offered = station.rig.read(NET, 0x10);
    for feature in [VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO6] {
        assert_ne!(offered & 1 << feature, 0, "feature {feature}");
    }
}

#[test]
fn a_datagram_of_the_hosts_lies_in_the_buffer_behind_its_header() {
    let mut station = Station::new(MERGEABLE);
    station.queues[RECEIVE].offer(&[(IN, 2000, WRITE)]);
    station.queues[RECEIVE].kick();
    station.say(b"hello");
    let (_, written) = station.queues[RECEIVE].take();
    assert_eq!(written, 12 + 14 + 20 + 8 + 5);
    let bytes = station.rig.bytes(IN, 59);
    assert_eq!(bytes[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(bytes[12..18], GUEST_MAC);
    assert_eq!(&bytes[54..], b"hello");
}

#[test]
fn a_large_frame_takes_as_many_buffers_as_it_needs_and_they_come_back_together() {
    let mut station = Station::new(MERGEABLE | 1 << 29);
    for piece in 0..12 {
        station.queues[RECEIVE].offer(&[(IN + 0x1000 * piece, 1000, WRITE)]);
    }
    station.queues[RECEIVE].kick();
    let text: Vec<u8> = (0..8000u32).map(|at| (at % 251) as u8).collect();
    station.say(&text);
    let mut heard = Vec::new();
    for piece in 0..9 {
        // All of them are there once the first is.
        let (head, written) = match piece {
            0 => station.queues[RECEIVE].take(),
            _ => station.queues[RECEIVE].try_take().unwrap(),
        };
        assert_eq!(u64::from(head), piece);
        let written = usize::try_from(written).unwrap();
        heard.extend(station.rig.bytes(IN + 0x1000 * piece, written));
    }
    assert_eq!(heard[10..12], [9, 0]);
    assert_eq!(heard[12 + 42..], text);
    // Three buffers are left, and a small frame finds them.
    station.say(b"small");
    assert_eq!(station.queues[RECEIVE].take(), (9, 59));
}

#[test]
fn a_frame_without_room_waits_for_buffers_and_is_not_lost() {
    let mut station = Station::new(MERGEABLE);
    station.queues[RECEIVE].offer(&[(IN, 1000, WRITE)]);
    station.queues[RECEIVE].kick();
    station.say(&[7; 1500]);
    // What comes after it waits behind it.
    station.say(b"later");
    station.rig.devices.pause();
    station.rig.devices.resume();
    assert_eq!(station.queues[RECEIVE].try_take(), None);
    station.queues[RECEIVE].offer(&[(IN + 0x1000, 1000, WRITE)]);
    station.queues[RECEIVE].offer(&[(IN + 0x2000, 1000, WRITE)]);
    station.queues[RECEIVE].kick();
    assert_eq!(station.queues[RECEIVE].take(), (0, 1000));
    assert_eq!(station.queues[RECEIVE].take(), (1, 12 + 42 + 1500 - 1000));
    assert_eq!(station.queues[RECEIVE].take(), (2, 59));
}

#[test]
fn without_mergeable_buffers_a_frame_too_large_for_its_buffer_is_lost_alone() {
    let mut station = Station::new(0);
    for piece in 0..3 {
        station.queues[RECEIVE].offer(&[(IN + 0x1000 * piece, 1000, WRITE)]);
    }
    station.queues[RECEIVE].kick();
    station.say(&[7; 1500]);
    station.say(b"small");
    let mut lengths = Vec::new();
    while lengths.last() != Some(&59) {
        lengths.push(station.queues[RECEIVE].take().1);
    }
    assert_eq!(station.dropped(), 1);
}

#[test]
fn a_datagram_of_the_guests_reaches_the_host() {
    let mut station = Station::new(0);
    let bytes = station.put([0; HEADER_BYTES], &datagram(b"from inside", Some(0)));
    // Header and frame in pieces of their own.
    station.queues[SEND].ask(&[(OUT, 5, 0), (OUT + 5, bytes - 5, 0)]);
    assert_eq!(station.hear(), b"from inside");
    let told = station.rig.devices.stats().networks[0];
    assert_eq!((told.sent_frames, told.sent_bytes), (1, u64::from(bytes) - 12));
}

#[test]
fn a_checksum_left_to_us_is_finished() {
    let mut station = Station::new(CHECKSUM);
    // The host's kernel would drop a datagram whose checksum is wrong.
    let wrong = station.put([0; HEADER_BYTES], &datagram(b"wrong", None));
    station.queues[SEND].ask(&[(OUT, wrong, 0)]);
    let right = station.put([1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0], &datagram(b"right", None));
    station.queues[SEND].ask(&[(OUT, right, 0)]);
    assert_eq!(station.hear(), b"right");
}

#[test]
fn a_header_that_makes_no_sense_costs_its_frame_and_nothing_else() {
    let mut station = Station::new(CHECKSUM);
    for header in [[0xff; HEADER_BYTES], [1, 1, 0, 0, 1, 0, 34, 0, 6, 0, 0, 0]] {
        let bytes = station.put(header, &datagram(b"nonsense", Some(0)));
        station.queues[SEND].ask(&[(OUT, bytes, 0)]);
    }
    let bytes = station.put([0; HEADER_BYTES], &datagram(b"sense", Some(0)));
    station.queues[SEND].ask(&[(OUT, bytes, 0)]);
    assert_eq!(station.hear(), b"sense");
    assert_eq!(station.dropped(), 2);
}

#[test]
fn chains_that_hold_no_frame_stop_the_device() {
    for (queue, pieces, reason) in [
        (SEND, vec![(OUT, 11, 0)], "a chain of 11 bytes is too short for a frame's header"),
        (SEND, vec![(OUT, 25, 0)], "a chain of 13 bytes is too short for a frame"),
        (SEND, vec![(OUT, 70_000, 0)], "a chain of 69988 bytes is too long for a frame"),
        (SEND, vec![(OUT, 100, WRITE)], "a chain has buffers of the wrong direction"),
    ] {
        assert_eq!(Station::new(0).breaks(queue, &pieces), reason);
    }
    for (piece, reason) in [
        ((IN, 11, WRITE), "a chain of 11 bytes is too short for a frame's header"),
        ((IN, 100, 0), "a chain has buffers of the wrong direction"),
    ] {
        let station = Station::new(MERGEABLE);
        station.say(b"something to receive");
        assert_eq!(station.breaks(RECEIVE, &[piece]), reason);
    }
}

#[test]
fn a_reset_driver_that_agrees_on_less_starts_anew() {
    let mut station = Station::new(MERGEABLE | CHECKSUM | 1 << VIRTIO_NET_F_GUEST_CSUM);
    station.say(&[7; 1500]);
    station.queues = station.rig.start(NET, VERSION_1);
    station.queues[RECEIVE].offer(&[(IN, 2000, WRITE)]);
    station.queues[RECEIVE].kick();
    station.say(b"anew");
    let (_, written) = station.queues[RECEIVE].take();
    // The old frame may have been taken by the old driver's queue, or have waited for ours.
    assert!([58, 12 + 42 + 1500].contains(&written), "{written}");
}

#[test]
fn a_limit_delays_frames_either_way_and_loses_none() {
    let limit = IoLimits { bytes: None, operations: Some(Rate { per_second: 50, burst: 1 }) };
    let started = std::time::Instant::now();
    let mut station = Station::limited(MERGEABLE, limit, limit);
    for piece in 0..8 {
        station.queues[RECEIVE].offer(&[(IN + 0x1000 * piece, 1000, WRITE)]);
        station.say(&[u8::try_from(piece).unwrap(); 10]);
    }
    station.queues[RECEIVE].kick();
    (0..8).for_each(|piece| assert_eq!(station.queues[RECEIVE].take(), (piece, 64)));
    assert!(started.elapsed() >= Duration::from_millis(7 * 20));
    let started = std::time::Instant::now();
    let bytes = station.put([0; HEADER_BYTES], &datagram(b"outward", Some(0)));
    (0..8).for_each(|_| _ = station.queues[SEND].offer(&[(OUT, bytes, 0)]));
    station.queues[SEND].kick();
    (0..8).for_each(|_| assert_eq!(station.hear(), b"outward"));
    assert!(started.elapsed() >= Duration::from_millis(7 * 20 - 20));
}

#[test]
fn taps_that_do_not_fit_are_refused_with_their_flags() {
    sys::leave_network().unwrap();
    let plain = sys::tap("plain", libc::IFF_TAP | libc::IFF_NO_PI).unwrap();
    let refused = Tap::new(plain).err().unwrap();
    assert!(matches!(refused, TapError::Flags { found: 0x1002 }), "{refused:?}");
    let many = sys::tap("many", FLAGS | libc::IFF_MULTI_QUEUE).unwrap();
    assert!(matches!(Tap::new(many), Err(TapError::Flags { .. })));
}
