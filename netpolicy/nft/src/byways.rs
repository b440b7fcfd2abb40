//! The chains of sandboxes whose policies let flows pass their proxies by, and the map that leads to
//! them from the addresses of these sandboxes.

use std::{fmt, net::Ipv4Addr};

use holdfast_netpolicy::{Action, Byway, BywayRule, Cidr};
use netlink_packet_netfilter::{
    NetfilterMessage, NetfilterMessageInner,
    nftables::{
        ChainAttribute, ChainMessage, DataAttribute, Expressions, ListAttribute, NfTablesMessage,
        Operator, RuleAttribute, RuleMessage, SetAttribute, SetElementAttribute, SetElementList,
        SetElementMessage, SetFlags, SetMessage, Verdict,
    },
};

use crate::{
    Nft, NftError, TABLE,
    expression::{
        Original, compare, destination, is_in, load, mark, not_over, protocol, verdict,
        verdict_data,
    },
    kernel::{Batch, pass_every_cpu},
};

/// Ways past proxies at a time. Each has an address of its own.
pub const BYWAYS_MAX: u16 = 16_383;

/// What the host's ruleset marks packets with that come over a way past a proxy. Without it they are
/// led nowhere.
pub const BYWAY_MARK: u32 = 0x4846_5f62;

/// The range that sandboxes have their addresses behind their own source translation of: address
/// and bits.
pub const BYWAY_RANGE: (Ipv4Addr, u8) = (Ipv4Addr::new(198, 19, 0, 0), 16);

/// The map from links to chains.
const MAP: &str = "byways";

/// What names of links and chains begin with.
const PREFIX: &str = "byway";

/// What a chain leaves on packets that the policy allows, or denies. Without either they are dropped
/// without a word.
const ALLOWED_MARK: u32 = 0x4846_5f61;
const DENIED_MARK: u32 = 0x4846_5f64;

/// What no policy opens.
const DENIED_RANGES: &str = "denied4";

/// nft's number for the type of ports, for whoever lists the ruleset.
const INET_SERVICE: u32 = 13;

/// Which way past a proxy: 1 to [`BYWAYS_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BywayNumber(u16);

impl BywayNumber {
    pub fn new(number: u16) -> Result<Self, NftError> {
        if (1..=BYWAYS_MAX).contains(&number) {
            Ok(Self(number))
        } else {
            Err(NftError::Number(number))
        }
    }

    /// Of the name of a link or chain.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::new(name.strip_prefix(PREFIX)?.parse().ok()?).ok()
    }

    pub const fn get(self) -> u16 {
        self.0
    }

    /// What the sandbox has behind its own source translation, and nobody else: of the range for
    /// benchmarks of RFC 2544, which no policy opens.
    pub fn address(self) -> Ipv4Addr {
        let [high, low] = self.0.to_be_bytes();
        Ipv4Addr::new(198, 19, high, low)
    }

    /// As [`Self::address`] gives it.
    pub fn of_address(address: Ipv4Addr) -> Option<Self> {
        match address.octets() {
            [198, 19, high, low] => Self::new(u16::from_be_bytes([high, low])).ok(),
            _ => None,
        }
    }

    /// The next one, and the first behind the last.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 % BYWAYS_MAX + 1)
    }
}

/// The name of its link, which is that of its chain.
impl fmt::Display for BywayNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.0)
    }
}

impl Nft {
    /// Has what comes over the link `number` and what answers it judged so, also of connections that
    /// are there. When this returns no packet is under way that was judged otherwise. Above the rules stands the deny-set, but for `lifted`.
    pub fn put_byway(
        &self,
        number: BywayNumber,
        byway: &Byway<'_>,
        lifted: &[Cidr],
    ) -> Result<(), NftError> {
        let mut chain = Chain { name: number.to_string(), batch: Batch::new(), sets: 0 };
        chain
            .batch
            .create(NfTablesMessage::NewChain(ChainMessage { attributes: chain.own_attributes() }));
        chain.batch.delete(NfTablesMessage::DeleteRule(rules_of(&chain.name)));
        // Nobody else's, neither from there nor to there.
        for to_sandbox in [false, true] {
            chain.rule(not_over(&number.to_string(), to_sandbox), None);
        }
        let lifted = lifted.iter().filter(|range| range.network().is_ipv4());
        let mut closed: Vec<_> =
            lifted.flat_map(|range| destination(Operator::NotEqual, range)).collect();
        closed.push(load(Original::Destination));
        closed.push(is_in(DENIED_RANGES, None));
        chain.rule(closed, Some(Action::Deny));
        for rule in &byway.rules {
            chain.policy_rule(rule);
        }
        chain.rule([], Some(byway.otherwise));
        let Chain { name, mut batch, .. } = chain;
        let data = SetElementAttribute::Data(verdict_data(Verdict::Jump, Some(&name)));
        batch.create(NfTablesMessage::NewSetElement(map_element(number, Some(data))));
        self.commit("the chain of a way past a proxy", batch.end())?;
        pass_every_cpu().map_err(NftError::Talk)
    }

    /// Has nothing pass over that link any more. That there was no chain is no error.
    pub fn remove_byway(&self, number: BywayNumber) -> Result<(), NftError> {
        if !self.byways()?.contains(&number) {
            return Ok(());
        }
        let name = number.to_string();
        let mut batch = Batch::new();
        batch.delete(NfTablesMessage::DeleteSetElement(map_element(number, None)));
        batch.delete(NfTablesMessage::DeleteRule(rules_of(&name)));
        batch.delete(NfTablesMessage::DeleteChain(ChainMessage {
            attributes: vec![ChainAttribute::Table(TABLE.to_owned()), ChainAttribute::Name(name)],
        }));
        self.commit("that a way past a proxy goes", batch.end())?;
        pass_every_cpu().map_err(NftError::Talk)
    }

    /// Those that have a chain.
    pub fn byways(&self) -> Result<Vec<BywayNumber>, NftError> {
        let ask = NfTablesMessage::GetChain(ChainMessage { attributes: Vec::new() });
        let listed: Vec<NetfilterMessage> = self.list("to list their chains", ask)?;
        let number = |message: NetfilterMessage| {
            let NetfilterMessageInner::NfTables(NfTablesMessage::NewChain(chain)) = message.inner
            else {
                return None;
            };
            let ChainMessage { attributes } = chain;
            let ours = attributes
                .iter()
                .any(|it| matches!(it, ChainAttribute::Table(table) if table == TABLE));
            let name = attributes.iter().find_map(|it| match it {
                ChainAttribute::Name(name) => BywayNumber::of_name(name),
                _ => None,
            });
            name.filter(|_| ours)
        };
        Ok(listed.into_iter().filter_map(number).collect())
    }
}

/// A chain that is being written.
struct Chain {
    name: String,
    batch: Batch,
    /// Sets without names so far.
    sets: u32,
}

impl Chain {
    fn own_attributes(&self) -> Vec<ChainAttribute> {
        vec![ChainAttribute::Table(TABLE.to_owned()), ChainAttribute::Name(self.name.clone())]
    }

    fn rule(&mut self, conditions: impl IntoIterator<Item = Expressions>, action: Option<Action>) {
        let mut expressions: Vec<_> = conditions.into_iter().collect();
        match action {
            Some(Action::Allow) => expressions.extend(mark(ALLOWED_MARK)),
            Some(Action::Deny) => expressions.extend(mark(DENIED_MARK)),
            None => {}
        }
        expressions.push(verdict(Verdict::Return, None));
        let expressions = expressions.into_iter().map(ListAttribute::from).collect();
        self.batch.append(NfTablesMessage::NewRule(RuleMessage {
            attributes: vec![
                RuleAttribute::Table(TABLE.to_owned()),
                RuleAttribute::Chain(self.name.clone()),
                RuleAttribute::Expressions(expressions),
            ],
        }));
    }

    fn policy_rule(&mut self, rule: &BywayRule<'_>) {
        let mut conditions = Vec::new();
        if let Some(of) = rule.protocol {
            conditions.extend(protocol(of));
        }
        if rule.range.prefix() > 0 {
            conditions.extend(destination(Operator::Equal, &rule.range));
        }
        match rule.ports {
            [] => {}
            [port] => {
                conditions.push(load(Original::Port));
                conditions.push(compare(Operator::Equal, &port.to_be_bytes()));
            }
            ports => {
                let (set, id) = self.set_of(ports);
                conditions.push(load(Original::Port));
                conditions.push(is_in(&set, Some(id)));
            }
        }
        self.rule(conditions, Some(rule.action));
    }

    /// A set that lives as long as the rule that looks into it.
    fn set_of(&mut self, ports: &[u16]) -> (String, u32) {
        self.sets += 1;
        // The kernel puts a number in, and knows it by its id until then.
        let (name, id) = ("__set%d".to_owned(), self.sets);
        self.batch.create(NfTablesMessage::NewSet(SetMessage {
            attributes: vec![
                SetAttribute::Table(TABLE.to_owned()),
                SetAttribute::Name(name.clone()),
                SetAttribute::Flags(SetFlags::Anonymous | SetFlags::Constant),
                SetAttribute::KeyType(INET_SERVICE),
                SetAttribute::KeyLen(2),
                SetAttribute::Id(id),
            ],
        }));
        let mut ports = ports.to_vec();
        ports.sort_unstable();
        ports.dedup();
        let element = |port: u16| {
            let key = DataAttribute::Value(port.to_be_bytes().to_vec());
            ListAttribute::Element(vec![SetElementAttribute::Key(key)])
        };
        self.batch.create(NfTablesMessage::NewSetElement(SetElementMessage {
            attributes: vec![
                SetElementList::Table(TABLE.to_owned()),
                SetElementList::Set(name.clone()),
                SetElementList::SetId(id),
                SetElementList::Elements(ports.into_iter().map(element).collect()),
            ],
        }));
        (name, id)
    }
}

fn rules_of(chain: &str) -> RuleMessage {
    RuleMessage {
        attributes: vec![
            RuleAttribute::Table(TABLE.to_owned()),
            RuleAttribute::Chain(chain.to_owned()),
        ],
    }
}

fn map_element(number: BywayNumber, data: Option<SetElementAttribute>) -> SetElementMessage {
    let key = number.address().octets().to_vec();
    let mut element = vec![SetElementAttribute::Key(DataAttribute::Value(key))];
    element.extend(data);
    SetElementMessage {
        attributes: vec![
            SetElementList::Table(TABLE.to_owned()),
            SetElementList::Set(MAP.to_owned()),
            SetElementList::Elements(vec![ListAttribute::Element(element)]),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_number_has_a_name_and_an_address_and_is_known_by_both() {
        for number in [1, 2, 255, 256, BYWAYS_MAX] {
            let number = BywayNumber::new(number).unwrap();
            assert_eq!(BywayNumber::of_name(&number.to_string()), Some(number));
            assert_eq!(BywayNumber::of_address(number.address()), Some(number));
            assert!(number.to_string().len() < 16, "the kernel has no room for it");
        }
        assert_eq!(BywayNumber::new(1).unwrap().next().get(), 2);
        assert_eq!(BywayNumber::new(BYWAYS_MAX).unwrap().next().get(), 1);
        for name in ["byway", "byway0", "byway16384", "byway_allowed", "eth0", "byway1x"] {
            assert_eq!(BywayNumber::of_name(name), None, "{name}");
        }
        assert_eq!(BywayNumber::of_address([198, 18, 0, 1].into()), None);
        assert_eq!(BywayNumber::of_address([198, 19, 0, 0].into()), None);
    }
}
