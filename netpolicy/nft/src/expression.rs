//! Parts of rules, in the form in which the kernel takes them (`linux/netfilter/nf_tables.h`).

use std::net::IpAddr;

use holdfast_netpolicy::{Cidr, Protocol};
use netlink_packet_core::DefaultNla;
use netlink_packet_netfilter::nftables::{
    Bitwise, Cmp, DataAttribute, Expressions, Immediate, Lookup, Meta, MetaKey, Operator, Register,
    Verdict, VerdictAttribute,
};

/// What of a connection is looked at: the way it was begun, whichever way this packet goes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Original {
    Destination,
    Protocol,
    Port,
}

/// Numbers of the kernel's, of `enum nft_ct_keys` and `enum nft_ct_attributes`.
const CT_DIRECTION: u32 = 1;
const CT_PROTOCOL: u32 = 10;
const CT_PROTO_DST: u32 = 12;
const CT_DST_IP: u32 = 20;
const CT_ATTRIBUTE_DREG: u16 = 1;
const CT_ATTRIBUTE_KEY: u16 = 2;
const CT_ATTRIBUTE_DIRECTION: u16 = 3;
const DIRECTION_ORIGINAL: u8 = 0;
const DIRECTION_REPLY: u8 = 1;

/// Bytes of a link's name: `IFNAMSIZ`.
const LINK_NAME_BYTES: usize = 16;

/// The one register that is used: what is loaded is compared at once.
const REGISTER: Register = Register::Reg1;

/// Loads a part of what the connection was begun as. Without a connection the rule does not apply.
pub(crate) fn load(what: Original) -> Expressions {
    let key = match what {
        Original::Destination => CT_DST_IP,
        Original::Protocol => CT_PROTOCOL,
        Original::Port => CT_PROTO_DST,
    };
    connection(key, Some(DIRECTION_ORIGINAL))
}

fn connection(key: u32, direction: Option<u8>) -> Expressions {
    let attribute = |kind, value: &[u8]| DefaultNla::new(kind, value.to_vec());
    let mut attributes = vec![
        attribute(CT_ATTRIBUTE_DREG, &u32::from(REGISTER).to_be_bytes()),
        attribute(CT_ATTRIBUTE_KEY, &key.to_be_bytes()),
    ];
    attributes.extend(direction.map(|direction| attribute(CT_ATTRIBUTE_DIRECTION, &[direction])));
    Expressions::Other { expression_type: "ct".to_owned(), attributes }
}

/// A packet from the sandbox that came over another link than this one, or one to it that goes over
/// another.
pub(crate) fn not_over(link: &str, to_sandbox: bool) -> Vec<Expressions> {
    let key = if to_sandbox { MetaKey::Oifname } else { MetaKey::Iifname };
    let direction = if to_sandbox { DIRECTION_REPLY } else { DIRECTION_ORIGINAL };
    let mut name = link.as_bytes().to_vec();
    name.resize(LINK_NAME_BYTES, 0);
    vec![
        connection(CT_DIRECTION, None),
        compare(Operator::Equal, &[direction]),
        Expressions::Meta(vec![Meta::DestinationRegister(REGISTER), Meta::Key(key)]),
        compare(Operator::NotEqual, &name),
    ]
}

/// Puts a mark on the packet.
pub(crate) fn mark(mark: u32) -> [Expressions; 2] {
    [
        Expressions::Immediate(vec![
            Immediate::DestinationRegister(REGISTER),
            Immediate::Data(DataAttribute::Value(mark.to_ne_bytes().to_vec())),
        ]),
        Expressions::Meta(vec![Meta::Key(MetaKey::Mark), Meta::SourceRegister(REGISTER)]),
    ]
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
    let whole = usize::from(range.prefix() / 8);
    if range.prefix().is_multiple_of(8) && whole > 0 {
        return vec![load(Original::Destination), compare(operator, &network.octets()[..whole])];
    }
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

/// The port that the connection was begun to is one of these.
pub(crate) fn ports(first: u16, last: u16) -> Vec<Expressions> {
    let (first, last) = (first.to_be_bytes(), last.to_be_bytes());
    let mut conditions = vec![load(Original::Port)];
    if first == last {
        conditions.push(compare(Operator::Equal, &first));
    } else {
        // Bytes are compared as they lie, and the high one lies first.
        conditions.push(compare(Operator::GreatherThanEqual, &first));
        conditions.push(compare(Operator::LessThanEqual, &last));
    }
    conditions
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
