//! The link between a guest and its host's end, which is the same for every sandbox: each lies in a
//! network of its own, and a snapshot goes on in another without a word to the guest.

use std::net::Ipv4Addr;

/// A guest's own address.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 2);

/// The host's end: the guest's default route and its resolver.
pub const GATEWAY_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 1);

/// Bits of the network that both ends share.
pub const PREFIX_BITS: u8 = 30;

/// A guest's own hardware address.
pub const GUEST_MAC: [u8; 6] = [0x02, 0x48, 0x46, 0, 0, 0x02];

/// Hardware address of the host's end.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0x48, 0x46, 0, 0, 0x01];

/// Bytes of a frame's payload that go over any link.
pub const MTU: u16 = 1500;
