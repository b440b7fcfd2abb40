//! Parts of rules, in the form in which the kernel takes them (`linux/netfilter/nf_tables.h`).

use std::net::{IpAddr, Ipv4Addr};

use holdfast_netpolicy::{Cidr, Protocol};
use netlink_packet_core::DefaultNla;
use netlink_packet_netfilter::nftables::{
    Bitwise, Cmp, DataAttribute, Expressions, Immediate, Lookup, Operator, Register, Verdict,
    VerdictAttribute,
};

/// What of a connection is looked at: the way it was begun, whichever way this packet goes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Original {
    Source,
    Destination,
    Protocol,
    Port,
}

/// Numbers of the kernel's, of `enum nft_ct_keys` and `enum nft_ct_attributes`.
const CT_PROTOCOL: u32 = 10;
const CT_PROTO_DST: u32 = 12;
const CT_SRC_IP: u32 = 19;
const CT_DST_IP: u32 = 20;
const CT_ATTRIBUTE_DREG: u16 = 1;
const CT_ATTRIBUTE_KEY: u16 = 2;
const CT_ATTRIBUTE_DIRECTION: u16 = 3;
const DIRECTION_ORIGINAL: u8 = 0;

/// `NF_DROP`, among the verdicts that have no name of their own.
pub(crate) const DROP: Verdict = Verdict::Other(0);

/// The one register that is used: what is loaded is compared at once.
const REGISTER: Register = Register::Reg1;

/// Loads a part of what the connection was begun as. Without a connection the rule does not apply.
pub(crate) fn load(what: Original) -> Expressions {
    let key = match what {
        Original::Source => CT_SRC_IP,
        Original::Destination => CT_DST_IP,
        Original::Protocol => CT_PROTOCOL,
        Original::Port => CT_PROTO_DST,
    };
    let attribute = |kind, value: &[u8]| DefaultNla::new(kind, value.to_vec());
    Expressions::Other {
        expression_type: "ct".to_owned(),
        attributes: vec![
            attribute(CT_ATTRIBUTE_DREG, &u32::from(REGISTER).to_be_bytes()),
            attribute(CT_ATTRIBUTE_KEY, &key.to_be_bytes()),
            attribute(CT_ATTRIBUTE_DIRECTION, &[DIRECTION_ORIGINAL]),
        ],
    }
}

pub(crate) fn compare(operator: Operator, value: &[u8]) -> Expressions {
    Expressions::Cmp(vec![
        Cmp::SourceRegister(REGISTER),
        Cmp::Op(operator),
        Cmp::Data(DataAttribute::Value(value.to_vec())),
    ])
}

/// The destination is in the range, or is not.
pub(crate) fn destination(operator: Operator, range: &Cidr) -> Vec<Expressions> {
    let IpAddr::V4(network) = range.network() else {
        // There are none of these, and one that lies nowhere is right all the same.
        return vec![load(Original::Destination), compare(operator, &[0; 4])];
    };
    let mask = u32::MAX.checked_shl(32 - u32::from(range.prefix())).unwrap_or(0);
    let mask = Expressions::Bitwise(vec![
        Bitwise::SourceRegister(REGISTER),
        Bitwise::DestinationRegister(REGISTER),
        Bitwise::Length(4),
        Bitwise::Mask(DataAttribute::Value(mask.to_be_bytes().to_vec())),
        Bitwise::Xor(DataAttribute::Value(vec![0; 4])),
    ]);
    vec![load(Original::Destination), mask, compare(operator, &network.octets())]
}

pub(crate) fn protocol(protocol: Protocol) -> [Expressions; 2] {
    let number = match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
    };
    [load(Original::Protocol), compare(Operator::Equal, &[number])]
}

pub(crate) fn source_is_not(address: Ipv4Addr) -> [Expressions; 2] {
    [load(Original::Source), compare(Operator::NotEqual, &address.octets())]
}

/// What was loaded is in the set. `id`: of a set without a name that is made with the rule.
pub(crate) fn is_in(set: &str, id: Option<u32>) -> Expressions {
    let mut lookup = vec![Lookup::Set(set.to_owned()), Lookup::SourceRegister(REGISTER)];
    lookup.extend(id.map(Lookup::SetId));
    Expressions::Lookup(lookup)
}

/// The end of a rule.
pub(crate) fn verdict(verdict: Verdict, chain: Option<&str>) -> Expressions {
    Expressions::Immediate(vec![
        Immediate::DestinationRegister(Register::Verdict),
        Immediate::Data(verdict_data(verdict, chain)),
    ])
}

pub(crate) fn verdict_data(verdict: Verdict, chain: Option<&str>) -> DataAttribute {
    let mut attributes = vec![VerdictAttribute::Code(verdict)];
    attributes.extend(chain.map(|chain| VerdictAttribute::Chain(chain.to_owned())));
    DataAttribute::Verdict(attributes)
}
