//! The rules of a sandbox's network namespace, in the kernel. Needs root.
//!
//! In the place of a guest stands this test, which asks over the tap who has the namespace's
//! address. The kernel answers that by itself, if rules let question and answer through.
mod sys;

use std::{
    os::fd::{AsFd, OwnedFd},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use holdfast_jail::{Slots, tap_in_a_slot};
use holdfast_netpolicy::SANDBOX_RULESET;
use rustix::{
    io::Errno,
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

/// As long as nobody must have answered, and far longer than a kernel takes to.
const PATIENCE: Duration = Duration::from_millis(300);
/// Bytes of a virtio-net header before every frame; the kernel's default.
const HEADER_BYTES: usize = 10;
const ASKER: [u8; 6] = [2, 0x48, 0x46, 0, 0, 2];

/// What a command says that runs in the network namespace of `tap`.
fn inside(tap: &OwnedFd, line: &str) -> String {
    let network = sys::network_of(tap).unwrap();
    let run = || {
        move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        Command::new("sh").args(["-ec", line]).output().unwrap()
    };
    // A thread of its own, which ends there.
    let output = thread::scope(|scope| scope.spawn(run).join().unwrap());
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Who has 192.168.127.1? (RFC 826)
fn question() -> Vec<u8> {
    let mut frame = vec![0; HEADER_BYTES];
    frame.extend([0xff; 6]);
    frame.extend(ASKER);
    frame.extend([0x08, 0x06]); // ARP
    frame.extend([0, 1, 0x08, 0, 6, 4, 0, 1]); // Ethernet, IPv4, a question
    frame.extend(ASKER);
    frame.extend([192, 168, 127, 2]);
    frame.extend([0; 6]);
    frame.extend([192, 168, 127, 1]);
    frame
}

/// Whether the namespace answers on its tap. Other frames are passed over.
fn answers(tap: &OwnedFd) -> bool {
    rustix::io::write(tap, &question()).unwrap();
    let end = Instant::now() + PATIENCE;
    let mut frame = [0; 2048];
    while Instant::now() < end {
        match rustix::io::read(tap, &mut frame) {
            Ok(bytes) => {
                let ethernet = &frame[HEADER_BYTES..bytes];
                if ethernet[..6] == ASKER && ethernet[12..14] == [0x08, 0x06] {
                    return true;
                }
            }
            Err(Errno::AGAIN) => thread::sleep(Duration::from_millis(1)),
            Err(error) => panic!("{error}"),
        }
    }
    false
}

#[test]
fn a_slot_lets_no_frame_in_or_out_until_its_rules_are_gone() {
    // Each chain alone is a wall; without both the very same question is answered.
    for (first, second) in [("from_guest", "to_guest"), ("to_guest", "from_guest")] {
        let tap = tap_in_a_slot(SANDBOX_RULESET).unwrap();
        inside(&tap, "ip address add 192.168.127.1/30 dev tap0");
        assert!(!answers(&tap), "the namespace was reached");
        inside(&tap, &format!("nft delete chain netdev sandbox {first}"));
        assert!(!answers(&tap), "{second} alone let it pass");
        inside(&tap, &format!("nft delete chain netdev sandbox {second}"));
        assert!(answers(&tap), "the test cannot see an answer");
    }
}

#[test]
fn a_slot_has_a_tap_and_no_address_and_no_route() {
    let tap = tap_in_a_slot(SANDBOX_RULESET).unwrap();
    let links = inside(&tap, "ip -o link");
    let names: Vec<&str> = links.lines().filter_map(|line| line.split(": ").nth(1)).collect();
    assert_eq!(names, ["lo", "tap0"]);
    assert!(links.contains("tap0: <BROADCAST,UP,LOWER_UP>"), "{links}");
    for command in ["ip -4 address", "ip -6 address", "ip -4 route show table all"] {
        assert_eq!(inside(&tap, command), "", "{command}");
    }
    assert_eq!(inside(&tap, "ip -6 route show table all"), "");
}

#[test]
fn rules_that_nft_refuses_make_no_slot() {
    let refused = tap_in_a_slot("table netdev sandbox { chain of { nonsense } }").unwrap_err();
    let said = std::error::Error::source(&refused).unwrap().to_string();
    assert!(said.contains("nft: ") && said.contains("nonsense"), "{said}");
}

#[test]
fn no_two_slots_see_each_other() {
    let (one, two) = (tap_in_a_slot("").unwrap(), tap_in_a_slot("").unwrap());
    let inode = |tap: &OwnedFd| rustix::fs::fstat(sys::network_of(tap).unwrap()).unwrap().st_ino;
    assert_ne!(inode(&one), inode(&two));
    inside(&one, "ip address add 192.168.127.1/30 dev tap0");
    assert!(answers(&one));
    assert!(!answers(&two));
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
    let taken: Vec<OwnedFd> = (0..=stock).map(|_| slots.take().unwrap()).collect();
    let mut inodes: Vec<_> = taken
        .iter()
        .map(|tap| rustix::fs::fstat(sys::network_of(tap).unwrap()).unwrap().st_ino)
        .collect();
    inodes.sort_unstable();
    inodes.dedup();
    assert_eq!(inodes.len(), stock + 1);
    for tap in &taken {
        inside(tap, "nft list chain netdev sandbox from_guest");
    }
    assert_eq!(full(), stock);
}
