//! Addresses that no policy opens: those that lead back to this node and its neighbours, and those
//! that no honest name has.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use crate::Cidr;

/// The ranges that are refused, whatever a policy says.
pub const DENY_RANGES: &[Cidr] = &[
    Cidr::v4(0, 0, 0, 8),
    Cidr::v4(10, 0, 0, 8),
    Cidr::v4(100, 64, 0, 10),
    Cidr::v4(127, 0, 0, 8),
    Cidr::v4(169, 254, 0, 16),
    Cidr::v4(172, 16, 0, 12),
    Cidr::v4(192, 0, 0, 24),
    Cidr::v4(192, 0, 2, 24),
    Cidr::v4(192, 88, 99, 24),
    Cidr::v4(192, 168, 0, 16),
    Cidr::v4(198, 18, 0, 15),
    Cidr::v4(198, 51, 100, 24),
    Cidr::v4(203, 0, 113, 24),
    Cidr::v4(224, 0, 0, 4),
    Cidr::v4(240, 0, 0, 4),
    // ::, ::1 and the addresses that once stood for IPv4 ones.
    Cidr::v6([0, 0, 0, 0, 0, 0, 0, 0], 96),
    Cidr::v6([0, 0, 0, 0, 0, 0xffff, 0, 0], 96),
    Cidr::v6([0x64, 0xff9b, 0, 0, 0, 0, 0, 0], 96),
    Cidr::v6([0x64, 0xff9b, 1, 0, 0, 0, 0, 0], 48),
    Cidr::v6([0x100, 0, 0, 0, 0, 0, 0, 0], 64),
    // Teredo: the address of an IPv4 host is in it, and whose it is nobody checks.
    Cidr::v6([0x2001, 0, 0, 0, 0, 0, 0, 0], 32),
    Cidr::v6([0x2001, 0xdb8, 0, 0, 0, 0, 0, 0], 32),
    Cidr::v6([0x2002, 0, 0, 0, 0, 0, 0, 0], 16),
    Cidr::v6([0xfc00, 0, 0, 0, 0, 0, 0, 0], 7),
    Cidr::v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10),
    Cidr::v6([0xfec0, 0, 0, 0, 0, 0, 0, 0], 10),
    Cidr::v6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8),
];

/// Why an address is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    #[error("{0} is an address of this node or its pool")]
    Own(IpAddr),
    #[error("{address} is in {range}, which no policy opens")]
    Range { address: IpAddr, range: Cidr },
}

impl Denied {
    /// Why, for machines.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Own(_) => "own_address",
            Self::Range { .. } => "denied_range",
        }
    }
}

/// The addresses that are refused on one node for one group.
#[derive(Debug, Clone, Default)]
pub struct DenySet {
    own: HashSet<IpAddr>,
    lifted: Vec<Cidr>,
}

impl DenySet {
    /// `own`: every address of this node and its pool; no exception opens these. `lifted`: the
    /// ranges that the operator opened for the group.
    pub fn new(
        own: impl IntoIterator<Item = IpAddr>,
        lifted: impl IntoIterator<Item = Cidr>,
    ) -> Self {
        Self {
            own: own.into_iter().map(|address| address.to_canonical()).collect(),
            lifted: lifted.into_iter().collect(),
        }
    }

    /// Whether `address` may be dialled. One that stands for another is judged as both.
    pub fn check(&self, address: IpAddr) -> Result<(), Denied> {
        if self.own.contains(&address.to_canonical()) {
            return Err(Denied::Own(address));
        }
        let lifted = self.lifted.iter().any(|range| range.contains(address));
        let range = DENY_RANGES.iter().find(|range| range.contains(address));
        match (range, embedded(address)) {
            (Some(range), _) if !lifted => Err(Denied::Range { address, range: *range }),
            (_, Some(inner)) => self.check(IpAddr::V4(inner)),
            _ => Ok(()),
        }
    }
}

/// The IPv4 address that a translator or tunnel would send to for this one.
fn embedded(address: IpAddr) -> Option<Ipv4Addr> {
    let IpAddr::V6(v6) = address else { return None };
    let low = |v6: Ipv6Addr| {
        let [.., a, b, c, d] = v6.octets();
        Ipv4Addr::new(a, b, c, d)
    };
    match v6.segments() {
        // Compatible, mapped, NAT64 by both of its prefixes.
        [0, 0, 0, 0, 0, 0 | 0xffff, ..] | [0x64, 0xff9b, 0 | 1, ..] => Some(low(v6)),
        [0x2002, high, low, ..] => Some(Ipv4Addr::from(u32::from(high) << 16 | u32::from(low))),
        [0x2001, 0, ..] => Some(Ipv4Addr::from(!u32::from(low(v6)))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(own: &[&str], lifted: &[&str]) -> DenySet {
        DenySet::new(
            own.iter().map(|text| text.parse().unwrap()),
            lifted.iter().map(|text| text.parse().unwrap()),
        )
    }

    fn allows(set: &DenySet, address: &str) -> bool {
        set.check(address.parse().unwrap()).is_ok()
    }

    #[test]
    fn b9_no_address_that_leads_back_inside_can_be_dialled() {
        let set = set(&[], &[]);
        for address in [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "127.0.0.1",
            "127.255.0.1",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.0.2.1",
            "192.168.127.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.10",
            "203.0.113.7",
            "224.0.0.251",
            "239.255.255.250",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::a00:1",
            "::ffff:10.0.0.1",
            "::ffff:8.8.8.8",
            "64:ff9b::a00:1",
            "64:ff9b:1::1",
            "100::1",
            "2001::1",
            "2001:db8::10",
            "2002:a00:1::",
            "fc00::1",
            "fdff::1",
            "fe80::1",
            "fec0::1",
            "ff02::fb",
        ] {
            assert!(!allows(&set, address), "{address}");
        }
        for address in [
            "1.1.1.1",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "172.15.0.1",
            "172.32.0.0",
            "192.0.1.1",
            "192.169.0.1",
            "198.17.0.1",
            "198.20.0.0",
            "223.255.255.255",
            "2606:4700::1111",
            "2001:4860:4860::8888",
            "2003::1",
            "fbff::1",
        ] {
            assert!(allows(&set, address), "{address}");
        }
    }

    #[test]
    fn the_ranges_of_the_list_are_ranges() {
        for range in DENY_RANGES {
            // The list writes them by hand; a mapped one cannot be read back, by design.
            let text = range.to_string();
            let parsed = text.parse::<Cidr>();
            assert!(
                parsed == Ok(*range) || matches!(parsed, Err(crate::BadCidr::Mapped(_))),
                "{text}"
            );
        }
    }

    #[test]
    fn an_exception_opens_its_range_and_nothing_beside_it() {
        let set = set(&[], &["203.0.113.0/25", "fd00:1::/64"]);
        assert!(allows(&set, "203.0.113.7"));
        assert!(!allows(&set, "203.0.113.200"));
        assert!(allows(&set, "fd00:1::7"));
        assert!(!allows(&set, "fd00:2::7"));
        assert!(!allows(&set, "::ffff:203.0.113.7"), "it is not lifted in other clothes");
    }

    #[test]
    fn a19_an_address_of_the_node_is_refused_in_whatever_range_and_clothes() {
        let set = set(
            &["10.0.0.5", "8.8.8.8", "::ffff:9.9.9.9", "2a00::5"],
            &["10.0.0.0/8", "64:ff9b::/96", "2002::/16", "::/0"],
        );
        assert!(allows(&set, "10.0.0.6"));
        for address in [
            "10.0.0.5",
            "8.8.8.8",
            "9.9.9.9",
            "::ffff:8.8.8.8",
            "64:ff9b::808:808",
            "2002:808:808::1",
            "2a00::5",
            "::8.8.8.8",
        ] {
            assert!(!allows(&set, address), "{address}");
        }
    }

    #[test]
    fn a_lifted_translator_opens_no_inner_address_that_is_closed() {
        let set = set(&[], &["64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"]);
        for address in
            ["64:ff9b::a9fe:a9fe", "64:ff9b:1::7f00:1", "2002:a9fe:a9fe::1", "2001::f5ff:fffe"]
        {
            assert!(!allows(&set, address), "{address}");
        }
        for address in ["64:ff9b::101:101", "2002:101:101::1"] {
            assert!(allows(&set, address), "{address}");
        }
    }

    /// Addresses near the borders of the ranges as often as any others.
    fn addresses() -> impl Strategy<Value = IpAddr> {
        let near = (0..DENY_RANGES.len(), any::<u128>(), 0..4u8).prop_map(|(index, noise, how)| {
            match DENY_RANGES[index].network() {
                IpAddr::V4(v4) => {
                    let noise = u32::from_be_bytes(noise.to_be_bytes()[..4].try_into().unwrap());
                    let bits = u32::from(v4) ^ (noise >> (8 * how));
                    IpAddr::V4(bits.into())
                }
                IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) ^ (noise >> (24 * how))).into()),
            }
        });
        prop_oneof![
            near,
            any::<u32>().prop_map(|bits| IpAddr::V4(bits.into())),
            any::<u128>().prop_map(|bits| IpAddr::V6(bits.into())),
        ]
    }

    /// Bit by bit, as a person would go over the list.
    fn naive_contains(range: &Cidr, address: IpAddr) -> bool {
        let bits = |address: IpAddr| -> Vec<bool> {
            let octets = match address {
                IpAddr::V4(v4) => v4.octets().to_vec(),
                IpAddr::V6(v6) => v6.octets().to_vec(),
            };
            octets.iter().flat_map(|o| (0..8).rev().map(move |bit| o >> bit & 1 == 1)).collect()
        };
        let (network, address) = (bits(range.network()), bits(address));
        network.len() == address.len()
            && (0..usize::from(range.prefix())).all(|bit| network[bit] == address[bit])
    }

    proptest! {
        #[test]
        fn the_set_says_what_going_over_the_list_by_hand_says(
            address in addresses(),
            lifted in proptest::collection::vec((addresses(), 0..=32u8), 0..3),
            own in proptest::collection::vec(addresses(), 0..3),
        ) {
            let lifted: Vec<Cidr> = lifted
                .into_iter()
                .filter_map(|(address, prefix)| format!("{address}/{prefix}").parse().ok())
                .collect();
            let set = DenySet::new(own.clone(), lifted.clone());
            let naive = |address: IpAddr| {
                !own.iter().any(|own| own.to_canonical() == address.to_canonical())
                    && (lifted.iter().any(|range| naive_contains(range, address))
                        || !DENY_RANGES.iter().any(|range| naive_contains(range, address)))
            };
            let expected = naive(address)
                && embedded(address).is_none_or(|inner| naive(IpAddr::V4(inner)));
            prop_assert_eq!(set.check(address).is_ok(), expected);
        }
    }
}
