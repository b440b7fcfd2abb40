//! What the kernel remembers of a sandbox's connections.

use std::net::Ipv4Addr;

use netlink_packet_core::{DefaultNla, NLA_F_NESTED};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    NetfilterSubsystem,
};

use crate::{BywayNumber, Nft, NftError};

/// Of `linux/netfilter/nfnetlink_conntrack.h`.
const DELETE: u8 = 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_IP: u16 = 1;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_FILTER: u16 = 25;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
/// Of the tuple only this is looked at.
const FILTER_IP_SRC: u32 = 1;

impl Nft {
    /// Forgets every connection that a sandbox began over its way past the proxy, so that nobody who
    /// gets the same number later inherits one.
    pub fn forget_connections(&self, number: BywayNumber) -> Result<(), NftError> {
        let header = NetfilterHeader::new(NetfilterProtoFamily::IPv4, 0, 0);
        // The crate's own type of this message does not say that attributes lie in each other.
        let forget = NetfilterMessageInner::Other {
            subsys: NetfilterSubsystem::Conntrack,
            message_type: DELETE,
            attributes: filter(number.address()),
        };
        let message = NetfilterMessage::new(header, forget);
        self.demand(message)
            .map_err(|source| NftError::Refused { what: "to forget connections", source })
    }
}

fn filter(source: Ipv4Addr) -> Vec<DefaultNla> {
    let nested = |kind, value: Vec<u8>| DefaultNla::new(kind | NLA_F_NESTED, value);
    let address = attribute(CTA_IP_V4_SRC, &source.octets());
    let tuple = attribute(CTA_TUPLE_IP | NLA_F_NESTED, &address);
    let flags = attribute(CTA_FILTER_ORIG_FLAGS, &FILTER_IP_SRC.to_ne_bytes());
    let none = attribute(CTA_FILTER_REPLY_FLAGS, &0_u32.to_ne_bytes());
    vec![nested(CTA_TUPLE_ORIG, tuple), nested(CTA_FILTER, [flags, none].concat())]
}

/// One that lies in another, whose value is a whole number of words.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat()
}
