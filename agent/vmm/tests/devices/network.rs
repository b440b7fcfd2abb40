//! Real TCP and UDP between a Linux guest and the host's side of its tap.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpStream, UdpSocket},
    os::fd::OwnedFd,
    process::Command,
    sync::Arc,
    thread,
};

use holdfast_wire::vmm::{IoLimits, Network, NetworkStats, Reply, ToVmm};

use crate::{
    guest::{COUNT, ECHO, POUR, POURED_BYTES, pattern, rest},
    running::{LONG, booted, stats, switch_off},
    tap,
    vmm::Vmm,
};

const GUEST: &str = "10.0.0.2";
const MTU: u16 = 1500;
/// Frames with large segments are this many times larger than the MTU on average, at the least.
const SEGMENTS_MIN: u64 = 2;

/// A network of this thread's own with a tap in it, for a guest that plays `network`.
pub(crate) fn on_a_tap() -> (Arc<OwnedFd>, Network) {
    tap::leave_network().unwrap();
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let fd = Arc::new(tap::tap("tap0", flags).unwrap());
    // Else a slow machine is sent segments two at a time, for it could not take more at once.
    let up = "echo 40 > /proc/sys/net/ipv4/tcp_min_tso_segs
              ifconfig tap0 10.0.0.1 netmask 255.255.255.0 up";
    assert!(Command::new("/bin/busybox").args(["sh", "-c", up]).status().unwrap().success());
    let free = IoLimits::default();
    let mac = [2, 0, 0, 0, 0, 2];
    (fd, Network { tap_fd: 0, mac, mtu: MTU, to_guest: free, from_guest: free })
}

pub(crate) fn a_small_echo_comes_back() {
    let mut stream = client(ECHO);
    stream.write_all(b"hello").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rest(&mut stream), b"hello");
}

#[test]
fn a_linux_guest_moves_tcp_and_udp_over_its_tap() {
    let network = on_a_tap();
    let mut vmm = booted("network", |launch| launch.networks.push(network));

    println!("bytes a frame, in: {}", large_segments_go_in_whole(&mut vmm));
    println!("bytes a frame, out: {}", large_segments_come_out_whole(&mut vmm));
    both_ways_at_once_and_over_a_pause(&mut vmm);
    datagrams_come_back(&mut vmm);

    let told = network_stats(&mut vmm);
    assert_eq!(told.dropped_frames, 0, "{told:?}");
    switch_off(&mut vmm);
}

fn client(port: u32) -> TcpStream {
    let stream = TcpStream::connect((GUEST, u16::try_from(port).unwrap())).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.set_write_timeout(Some(LONG)).unwrap();
    stream
}

fn network_stats(vmm: &mut Vmm) -> NetworkStats {
    stats(vmm).networks[0]
}

/// Returns the bytes of a frame on average.
fn large_segments_go_in_whole(vmm: &mut Vmm) -> u64 {
    let before = network_stats(vmm);
    let mut stream = client(COUNT);
    stream.write_all(&pattern(POURED_BYTES)).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rest(&mut stream), format!("{POURED_BYTES} as expected").as_bytes());
    let after = network_stats(vmm);
    let bytes = after.received_bytes - before.received_bytes;
    let frames = after.received_frames - before.received_frames;
    assert!(bytes >= POURED_BYTES as u64, "{after:?}");
    assert!(bytes / frames > SEGMENTS_MIN * u64::from(MTU), "{bytes} bytes in {frames} frames");
    bytes / frames
}

/// Returns the bytes of a frame on average.
fn large_segments_come_out_whole(vmm: &mut Vmm) -> u64 {
    let before = network_stats(vmm);
    assert!(rest(&mut client(POUR)) == pattern(POURED_BYTES));
    let after = network_stats(vmm);
    let bytes = after.sent_bytes - before.sent_bytes;
    let frames = after.sent_frames - before.sent_frames;
    assert!(bytes >= POURED_BYTES as u64, "{after:?}");
    assert!(bytes / frames > SEGMENTS_MIN * u64::from(MTU), "{bytes} bytes in {frames} frames");
    bytes / frames
}

fn both_ways_at_once_and_over_a_pause(vmm: &mut Vmm) {
    let mut stream = client(ECHO);
    let mut writer = stream.try_clone().unwrap();
    let writing = thread::spawn(move || {
        writer.write_all(&pattern(POURED_BYTES)).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut echo = vec![0; POURED_BYTES / 4];
    stream.read_exact(&mut echo).unwrap();
    assert_eq!(vmm.ask(&ToVmm::Pause).unwrap(), Reply::Done);
    let paused = network_stats(vmm);
    assert_eq!(network_stats(vmm), paused);
    assert_eq!(vmm.ask(&ToVmm::Resume).unwrap(), Reply::Done);
    echo.extend(rest(&mut stream));
    writing.join().unwrap();
    assert!(echo == pattern(POURED_BYTES));
}

fn datagrams_come_back(vmm: &mut Vmm) {
    let socket = UdpSocket::bind(("10.0.0.1", 0)).unwrap();
    socket.set_read_timeout(Some(LONG)).unwrap();
    let port = u16::try_from(ECHO).unwrap();
    // The last ones are cut into fragments on either side.
    for bytes in [1, 100, 1472, 1473, 9000] {
        let text = pattern(bytes);
        socket.send_to(&text, (GUEST, port)).unwrap();
        let mut heard = [0; 10_000];
        let count = socket.recv(&mut heard).unwrap();
        assert!(heard[..count] == text, "{bytes} bytes; {:?}", network_stats(vmm));
    }
}
