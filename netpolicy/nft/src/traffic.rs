//! How much passed the proxies by.

use std::{collections::BTreeMap, net::Ipv4Addr};

use netlink_packet_core::{DecodeError, NetlinkDeserializable, NetlinkHeader, NlasIterator};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterProtoFamily,
    nftables::{NfTablesMessage, SetElementList, SetElementMessage},
};

use crate::{BywayNumber, Nft, NftError, TABLE};

/// What was let through over one way past a proxy since there is one of this number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// From the sandbox, headers of IP included.
    pub sent_bytes: u64,
    pub sent_packets: u64,
    /// To it.
    pub received_bytes: u64,
    pub received_packets: u64,
}

/// Of `linux/netfilter/nf_tables.h`.
const ELEMENTS: u16 = 3;
const ELEMENT: u16 = 1;
const KEY: u16 = 1;
const KEY_VALUE: u16 = 1;
const EXPRESSION: u16 = 7;
const EXPRESSION_DATA: u16 = 2;
const OBJECT_NAME: u16 = 2;
const OBJECT_DATA: u16 = 4;
const COUNTER_BYTES: u16 = 1;
const COUNTER_PACKETS: u16 = 2;

/// Bytes in front of the attributes of any message of netfilter's.
const HEADER_BYTES: usize = 4;

/// A message as it came: of an element with a counter the crate that reads the others knows the name
/// of the counter alone.
struct Raw(Vec<u8>);

impl NetlinkDeserializable for Raw {
    type Error = DecodeError;

    fn deserialize(_: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        Ok(Self(payload.to_vec()))
    }
}

impl Nft {
    /// Of each number that something was let through for.
    pub fn traffic(&self) -> Result<BTreeMap<BywayNumber, Traffic>, NftError> {
        let mut traffic = BTreeMap::<_, Traffic>::new();
        for (number, bytes, packets) in self.counted("byway_sent")? {
            let of = traffic.entry(number).or_default();
            (of.sent_bytes, of.sent_packets) = (bytes, packets);
        }
        for (number, bytes, packets) in self.counted("byway_received")? {
            let of = traffic.entry(number).or_default();
            (of.received_bytes, of.received_packets) = (bytes, packets);
        }
        Ok(traffic)
    }

    /// Packets by the names of the counters that rules have, in every table of this network.
    pub fn counters(&self) -> Result<BTreeMap<String, u64>, NftError> {
        let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, 0);
        let ask = NetfilterMessage::new(header, NfTablesMessage::GetObject(Vec::new()));
        let mut counters = BTreeMap::new();
        for Raw(message) in self.list_message("to list counters", ask)? {
            let attributes = message.get(HEADER_BYTES..).ok_or(NftError::Answer)?;
            let (Some(name), Some(counter)) =
                (value(attributes, OBJECT_NAME), value(attributes, OBJECT_DATA))
            else {
                continue;
            };
            let name = String::from_utf8_lossy(&name).trim_end_matches('\0').to_owned();
            let packets = value(&counter, COUNTER_PACKETS).and_then(|it| it.try_into().ok());
            counters.insert(name, packets.map_or(0, u64::from_be_bytes));
        }
        Ok(counters)
    }

    fn counted(&self, set: &str) -> Result<Vec<(BywayNumber, u64, u64)>, NftError> {
        let ask = NfTablesMessage::GetSetElement(SetElementMessage {
            attributes: vec![
                SetElementList::Table(TABLE.to_owned()),
                SetElementList::Set(set.to_owned()),
            ],
        });
        let mut counted = Vec::new();
        for Raw(message) in self.list("to list what passed proxies by", ask)? {
            let attributes = message.get(HEADER_BYTES..).ok_or(NftError::Answer)?;
            for elements in values(attributes, ELEMENTS) {
                counted.extend(values(&elements, ELEMENT).iter().filter_map(|it| element(it)));
            }
        }
        Ok(counted)
    }
}

fn element(element: &[u8]) -> Option<(BywayNumber, u64, u64)> {
    let address: [u8; 4] = value(&value(element, KEY)?, KEY_VALUE)?.try_into().ok()?;
    let counter = value(&value(element, EXPRESSION)?, EXPRESSION_DATA)?;
    let number = |kind| Some(u64::from_be_bytes(value(&counter, kind)?.try_into().ok()?));
    let of = BywayNumber::of_address(Ipv4Addr::from(address))?;
    Some((of, number(COUNTER_BYTES)?, number(COUNTER_PACKETS)?))
}

/// What the attributes of one kind hold.
fn values(attributes: &[u8], kind: u16) -> Vec<Vec<u8>> {
    let attributes = NlasIterator::new(attributes).filter_map(Result::ok);
    attributes.filter(|it| it.kind() == kind).map(|it| it.value().to_vec()).collect()
}

fn value(attributes: &[u8], kind: u16) -> Option<Vec<u8>> {
    values(attributes, kind).into_iter().next()
}
