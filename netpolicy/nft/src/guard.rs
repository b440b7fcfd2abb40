//! Where the processes that talk to the outside for sandboxes may go, besides where everybody may.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
};

use holdfast_netpolicy::Cidr;
use netlink_packet_core::DefaultNla;
use netlink_packet_netfilter::{
    NetfilterMessage, NetfilterMessageInner,
    nftables::{
        ChainAttribute, ChainMessage, DataAttribute, ListAttribute, NfTablesMessage,
        SetElementAttribute, SetElementFlags, SetElementList, SetElementMessage,
    },
};

use crate::{BYWAY_TABLES, BYWAY_TABLES_COUNT, Nft, NftError, TABLE, kernel::Batch};

/// What ends an interval: `NFT_SET_ELEM_INTERVAL_END`.
const INTERVAL_END: u32 = 1;

/// `NFTA_DATA_VALUE`.
const DATA_VALUE: u16 = 1;

impl Nft {
    /// Whether the host's ruleset is loaded.
    pub fn has_rules(&self) -> Result<(), NftError> {
        let what = "to show the host's rules";
        let chains = self.list::<NetfilterMessage>(
            what,
            NfTablesMessage::GetChain(ChainMessage { attributes: Vec::new() }),
        )?;
        let is_there = |table: String, name: &str| {
            let (table, name) = (ChainAttribute::Table(table), ChainAttribute::Name(name.into()));
            chains.iter().any(|message| match &message.inner {
                NetfilterMessageInner::NfTables(NfTablesMessage::NewChain(chain)) => {
                    chain.attributes.contains(&table) && chain.attributes.contains(&name)
                }
                _ => false,
            })
        };
        let of_byways = |number: u16| format!("{BYWAY_TABLES}{number}");
        if is_there(TABLE.to_owned(), "from_egress")
            && (0..BYWAY_TABLES_COUNT).all(|number| is_there(of_byways(number), "forward"))
        {
            return Ok(());
        }
        Err(NftError::Refused { what, source: io::ErrorKind::NotFound.into() })
    }

    /// Lets these processes reach `servers`, wherever they are, and `lifted` of what is closed to
    /// them otherwise; those that run as a user of `lifted_of` also what is lifted for it. What they
    /// were let reach before and is not among these is closed again.
    pub fn guard(
        &self,
        servers: &[SocketAddr],
        lifted: &[Cidr],
        lifted_of: &BTreeMap<u32, Vec<Cidr>>,
    ) -> Result<(), NftError> {
        let mut batch = Batch::new();
        for v6 in [false, true] {
            let servers = servers.iter().filter(|it| it.is_ipv6() == v6).map(server).collect();
            replace(&mut batch, if v6 { "servers6" } else { "servers4" }, servers);
            let ranges = outermost(lifted, v6);
            let ends = ranges.iter().flat_map(interval).collect();
            replace(&mut batch, if v6 { "lifted6" } else { "lifted4" }, ends);
            let of_users = lifted_of.iter().flat_map(|(user, ranges)| {
                outermost(ranges, v6).into_iter().map(|range| range_of(*user, &range))
            });
            let set = if v6 { "lifted6_of" } else { "lifted4_of" };
            replace(&mut batch, set, of_users.collect());
        }
        self.commit("where egress processes may go", batch.end())
    }
}

type Element = ListAttribute<SetElementAttribute>;

fn replace(batch: &mut Batch, set: &str, mut elements: Vec<Element>) {
    let message = |elements: Vec<Element>| {
        let mut attributes =
            vec![SetElementList::Table(TABLE.to_owned()), SetElementList::Set(set.to_owned())];
        if !elements.is_empty() {
            attributes.push(SetElementList::Elements(elements));
        }
        SetElementMessage { attributes }
    };
    // Without elements: all.
    batch.delete(NfTablesMessage::DeleteSetElement(message(Vec::new())));
    elements.dedup();
    if !elements.is_empty() {
        batch.create(NfTablesMessage::NewSetElement(message(elements)));
    }
}

fn bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// Each part of a key that is put together takes whole words.
fn server(server: &SocketAddr) -> Element {
    let mut key = bytes(server.ip());
    key.extend(server.port().to_be_bytes());
    key.extend([0; 2]);
    ListAttribute::Element(vec![SetElementAttribute::Key(DataAttribute::Value(key))])
}

/// Ranges of one kind of address that lie in no other: a set of intervals has none twice.
fn outermost(ranges: &[Cidr], v6: bool) -> Vec<Cidr> {
    let mut ranges: Vec<_> =
        ranges.iter().filter(|it| it.network().is_ipv6() == v6).copied().collect();
    ranges.sort_by_key(Cidr::prefix);
    let mut kept: Vec<Cidr> = Vec::new();
    for range in ranges {
        if !kept.iter().any(|wider| wider.contains(range.network())) {
            kept.push(range);
        }
    }
    kept
}

/// Its first address, and the first behind it if there is one.
fn interval(range: &Cidr) -> Vec<Element> {
    let element = |address: IpAddr, end: bool| {
        let mut element = vec![SetElementAttribute::Key(DataAttribute::Value(bytes(address)))];
        if end {
            element
                .push(SetElementAttribute::Flags(SetElementFlags::from_bits_retain(INTERVAL_END)));
        }
        ListAttribute::Element(element)
    };
    let size = u32::from(range.prefix());
    let behind = match range.network() {
        IpAddr::V4(v4) => 1_u32
            .checked_shl(32 - size)
            .and_then(|size| u32::from(v4).checked_add(size))
            .map(|bits| IpAddr::V4(bits.into())),
        IpAddr::V6(v6) => 1_u128
            .checked_shl(128 - size)
            .and_then(|size| u128::from(v6).checked_add(size))
            .map(|bits| IpAddr::V6(bits.into())),
    };
    let mut ends = vec![element(range.network(), false)];
    ends.extend(behind.map(|behind| element(behind, true)));
    ends
}

/// Its first address and its last, of one user. Of keys that are put together these are in one
/// element.
fn range_of(user: u32, range: &Cidr) -> Element {
    let key = |address: IpAddr| {
        // The rules turn it round, as all that is looked for in ranges.
        let mut key = user.to_be_bytes().to_vec();
        key.extend(bytes(address));
        key
    };
    let host_bits = |width: u32| width - u32::from(range.prefix());
    let last = match range.network() {
        IpAddr::V4(v4) => {
            let hosts = u32::MAX.checked_shr(32 - host_bits(32)).unwrap_or(0);
            IpAddr::V4((u32::from(v4) | hosts).into())
        }
        IpAddr::V6(v6) => {
            let hosts = u128::MAX.checked_shr(128 - host_bits(128)).unwrap_or(0);
            IpAddr::V6((u128::from(v6) | hosts).into())
        }
    };
    ListAttribute::Element(vec![
        SetElementAttribute::Key(DataAttribute::Value(key(range.network()))),
        SetElementAttribute::KeyEnd(vec![DefaultNla::new(DATA_VALUE, key(last))]),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_ranges_that_lie_in_each_other_the_wider_one_is_kept() {
        let ranges: Vec<Cidr> =
            ["10.1.0.0/16", "10.0.0.0/8", "11.0.0.0/8", "fd00::/8", "10.0.0.0/8"]
                .map(|text| text.parse().unwrap())
                .to_vec();
        let kept = |v6| -> Vec<String> {
            outermost(&ranges, v6).iter().map(ToString::to_string).collect()
        };
        assert_eq!(kept(false), ["10.0.0.0/8", "11.0.0.0/8"]);
        assert_eq!(kept(true), ["fd00::/8"]);
    }

    #[test]
    fn a_range_up_to_the_last_address_has_no_end() {
        for (text, ends) in
            [("0.0.0.0/0", 1), ("240.0.0.0/4", 1), ("10.0.0.0/8", 2), ("::/0", 1), ("::/1", 2)]
        {
            assert_eq!(interval(&text.parse().unwrap()).len(), ends, "{text}");
        }
    }
}
