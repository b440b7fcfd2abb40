//! A guest's end of a slot: a test that writes frames to the tap and reads what comes back.

use std::{
    net::{Ipv4Addr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use holdfast_jail::{Slot, SlotSockets};
use holdfast_model::link::GUEST_ADDRESS;
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketType, acceptfrom},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use crate::{
    frames::{ACK, Packet, Received, SYN, TCP},
    sys,
};

/// As long as nobody must have answered, and far longer than a kernel takes to.
pub(super) const PATIENCE: Duration = Duration::from_millis(300);
/// Bytes of a virtio-net header before every frame; the kernel's default.
const HEADER_BYTES: usize = 10;

pub(super) struct Guest {
    pub(super) tap: OwnedFd,
    pub(super) sockets: SlotSockets,
}

impl Guest {
    pub(super) fn in_a_slot(ruleset: &str) -> Self {
        let Slot { tap, sockets } = Slot::make(ruleset).unwrap();
        Self { tap, sockets }
    }

    pub(super) fn send(&self, frame: &[u8]) {
        let bytes = [&[0; HEADER_BYTES], frame].concat();
        assert_eq!(rustix::io::write(&self.tap, &bytes).unwrap(), bytes.len());
    }

    /// The first frame to the guest that is wanted, if it comes in time. Others are passed over.
    pub(super) fn receive(&self, wanted: impl Fn(&Received) -> bool) -> Option<Received> {
        let end = Instant::now() + PATIENCE;
        let mut bytes = [0; 70_000];
        while Instant::now() < end {
            match rustix::io::read(&self.tap, &mut bytes) {
                Ok(count) => {
                    let received = Received::parse(&bytes[HEADER_BYTES..count]);
                    if wanted(&received) {
                        return Some(received);
                    }
                }
                Err(Errno::AGAIN) => thread::sleep(Duration::from_millis(1)),
                Err(error) => panic!("{error}"),
            }
        }
        None
    }

    /// Begins a connection and carries it to its end or to no answer: what came for the SYN.
    pub(super) fn connect(&self, to: (Ipv4Addr, u16), own_port: u16) -> Option<Received> {
        let ports = (own_port, to.1);
        self.send(&Packet::tcp(to.0, ports, SYN, (100, 0)).frame());
        let mine = |it: &Received| it.is(TCP) && it.ports() == (to.1, own_port);
        let answer = self.receive(mine)?;
        let (flags, number) = answer.segment();
        if flags == SYN | ACK {
            let ack = Packet::tcp(to.0, ports, ACK, (101, number.wrapping_add(1)));
            self.send(&ack.frame());
        }
        Some(answer)
    }

    /// The next connection at the listener: its own address and the guest's.
    pub(super) fn accepted(&self) -> Option<(OwnedFd, SocketAddr, SocketAddr)> {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            match acceptfrom(&self.sockets.tcp) {
                Ok((connection, peer)) => {
                    let local = rustix::net::getsockname(&connection).unwrap();
                    let local = SocketAddr::try_from(local).unwrap();
                    return Some((connection, local, peer.unwrap().try_into().unwrap()));
                }
                Err(Errno::AGAIN) => thread::sleep(Duration::from_millis(1)),
                Err(error) => panic!("{error}"),
            }
        }
        None
    }

    /// The next datagram at the other socket: what it says and where it was sent.
    pub(super) fn asked(&self) -> Option<(Vec<u8>, SocketAddr)> {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            match sys::receive(&self.sockets.dns) {
                Ok(datagram) => return Some(datagram),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    thread::sleep(Duration::from_millis(1));
                }
                Err(error) => panic!("{error}"),
            }
        }
        None
    }

    /// What a command says that runs in the slot.
    pub(super) fn inside(&self, line: &str) -> String {
        inside(&self.tap, line)
    }

    /// Packets that the ruleset's counter of this name has seen.
    pub(super) fn counted(&self, name: &str) -> u64 {
        let counters = self.sockets.counters().unwrap();
        counters.iter().filter(|counter| counter.name == name).map(|it| it.packets).sum()
    }

    /// Whether a connection to somebody outside comes about.
    pub(super) fn reaches(&self, to: (Ipv4Addr, u16), own_port: u16) -> bool {
        let answer = self.connect(to, own_port);
        let there = answer.is_some_and(|answer| answer.segment().0 == SYN | ACK);
        let guest = SocketAddr::from((GUEST_ADDRESS, own_port));
        there && self.accepted().is_some_and(|(_, local, peer)| local == to.into() && peer == guest)
    }
}

pub(super) fn inside(tap: &OwnedFd, line: &str) -> String {
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

/// Whether anything outside of the slot can be opened from it: another socket of its namespace.
pub(super) fn socket_inside(tap: &OwnedFd) -> OwnedFd {
    let network = sys::network_of(tap).unwrap();
    let open = || {
        move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None).unwrap()
    };
    thread::scope(|scope| scope.spawn(open).join().unwrap())
}
