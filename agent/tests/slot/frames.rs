//! Ethernet frames as a guest writes them: right ones, and every wrong one that a test asks for.

use std::net::Ipv4Addr;

use holdfast_model::link::{GATEWAY_ADDRESS, GATEWAY_MAC, GUEST_ADDRESS, GUEST_MAC};

pub(super) const ARP: u16 = 0x0806;
pub(super) const IPV4: u16 = 0x0800;
pub(super) const IPV6: u16 = 0x86dd;
pub(super) const VLAN: u16 = 0x8100;

pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;

pub(super) const SYN: u8 = 2;
pub(super) const RST: u8 = 4;
pub(super) const ACK: u8 = 16;

/// Somebody outside.
pub(super) const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);

pub(super) fn ethernet(to: [u8; 6], from: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), payload].concat()
}

/// From the guest to its gateway, as it should be.
pub(super) fn to_gateway(packet: &[u8]) -> Vec<u8> {
    ethernet(GATEWAY_MAC, GUEST_MAC, IPV4, packet)
}

/// RFC 826. Operation 1 asks, 2 answers.
pub(super) fn arp(operation: u16, from: ([u8; 6], Ipv4Addr), about: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0, 1, 0x08, 0, 6, 4];
    packet.extend(operation.to_be_bytes());
    packet.extend(from.0);
    packet.extend(from.1.octets());
    packet.extend([0; 6]);
    packet.extend(about.octets());
    packet
}

/// Who has the gateway's address? As it should be asked.
pub(super) fn question() -> Vec<u8> {
    let packet = arp(1, (GUEST_MAC, GUEST_ADDRESS), GATEWAY_ADDRESS);
    ethernet([0xff; 6], GUEST_MAC, ARP, &packet)
}

/// An IPv4 packet (RFC 791); its fields can be changed before it is built.
#[derive(Clone)]
pub(super) struct Packet {
    pub(super) from: Ipv4Addr,
    pub(super) to: Ipv4Addr,
    pub(super) protocol: u8,
    /// Flags and offset.
    pub(super) fragment: u16,
    /// Whole words.
    pub(super) options: Vec<u8>,
    pub(super) payload: Vec<u8>,
}

impl Packet {
    pub(super) fn new(to: Ipv4Addr, protocol: u8, payload: &[u8]) -> Self {
        let payload = payload.to_vec();
        Self { from: GUEST_ADDRESS, to, protocol, fragment: 0, options: Vec::new(), payload }
    }

    pub(super) fn udp(to: Ipv4Addr, port: u16, payload: &[u8]) -> Self {
        let length = u16::try_from(8 + payload.len()).unwrap();
        let mut datagram = 4000_u16.to_be_bytes().to_vec();
        datagram.extend(port.to_be_bytes());
        datagram.extend(length.to_be_bytes());
        // Without a checksum, which IPv4 allows.
        datagram.extend([0; 2]);
        datagram.extend(payload);
        Self::new(to, UDP, &datagram)
    }

    pub(super) fn tcp(to: Ipv4Addr, ports: (u16, u16), flags: u8, numbers: (u32, u32)) -> Self {
        let mut segment = ports.0.to_be_bytes().to_vec();
        segment.extend(ports.1.to_be_bytes());
        segment.extend(numbers.0.to_be_bytes());
        segment.extend(numbers.1.to_be_bytes());
        segment.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
        Self::new(to, TCP, &segment)
    }

    /// An echo request (RFC 792).
    pub(super) fn ping(to: Ipv4Addr) -> Self {
        let mut echo = vec![8, 0, 0, 0, 0, 1, 0, 1];
        let checksum = checksum(&[&echo]);
        echo[2..4].copy_from_slice(&checksum.to_be_bytes());
        Self::new(to, ICMP, &echo)
    }

    pub(super) fn build(mut self) -> Vec<u8> {
        if self.protocol == TCP {
            self.payload[16..18].fill(0);
            let length = u16::try_from(self.payload.len()).unwrap().to_be_bytes();
            let (from, to) = (self.from.octets(), self.to.octets());
            let sum = checksum(&[&from, &to, &[0, TCP], &length, &self.payload]);
            self.payload[16..18].copy_from_slice(&sum.to_be_bytes());
        }
        let words = u8::try_from(5 + self.options.len() / 4).unwrap();
        let length = u16::try_from(20 + self.options.len() + self.payload.len()).unwrap();
        let mut header = vec![0x40 | words, 0];
        header.extend(length.to_be_bytes());
        header.extend([0, 7]);
        header.extend(self.fragment.to_be_bytes());
        header.extend([64, self.protocol, 0, 0]);
        header.extend(self.from.octets());
        header.extend(self.to.octets());
        header.extend(&self.options);
        let sum = checksum(&[&header]);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        header.extend(self.payload);
        header
    }

    /// In a frame as it should be.
    pub(super) fn frame(self) -> Vec<u8> {
        to_gateway(&self.build())
    }
}

/// RFC 1071, of parts of even length except the last.
fn checksum(parts: &[&[u8]]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    let mut sum: u32 = parts.iter().flat_map(|part| part.chunks(2)).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

/// What the guest receives, taken apart.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) kind: u16,
    pub(super) to: [u8; 6],
    /// Of ARP what it says, of IPv4 the packet.
    pub(super) payload: Vec<u8>,
}

impl Received {
    pub(super) fn parse(frame: &[u8]) -> Self {
        Self {
            to: frame[..6].try_into().unwrap(),
            kind: u16::from_be_bytes([frame[12], frame[13]]),
            payload: frame[14..].to_vec(),
        }
    }

    pub(super) fn is(&self, protocol: u8) -> bool {
        self.kind == IPV4 && self.payload[9] == protocol
    }

    pub(super) fn from(&self) -> Ipv4Addr {
        Ipv4Addr::from_octets(self.payload[12..16].try_into().unwrap())
    }

    /// What is behind the IPv4 header.
    pub(super) fn inner(&self) -> &[u8] {
        &self.payload[20..]
    }

    pub(super) fn ports(&self) -> (u16, u16) {
        let inner = self.inner();
        (u16::from_be_bytes([inner[0], inner[1]]), u16::from_be_bytes([inner[2], inner[3]]))
    }

    /// Flags and sequence number of a TCP segment.
    pub(super) fn segment(&self) -> (u8, u32) {
        let inner = self.inner();
        (inner[13], u32::from_be_bytes(inner[4..8].try_into().unwrap()))
    }
}
