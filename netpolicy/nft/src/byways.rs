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
    BYWAY_TABLES, BYWAY_TABLES_COUNT, Nft, NftError,
    expression::{
        Original, destination, is_in, load, mark, not_over, ports, protocol, verdict, verdict_data,
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

    /// Of the table that its chain is in.
    fn table(self) -> String {
        format!("{BYWAY_TABLES}{}", self.0 % BYWAY_TABLES_COUNT)
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
        let mut chain = Chain {
            table: number.table(),
            name: number.to_string(),
            batch: Batch::new(),
            marks: None,
            sets: 0,
        };
        chain
            .batch
            .create(NfTablesMessage::NewChain(ChainMessage { attributes: chain.own_attributes() }));
        chain.batch.delete(NfTablesMessage::DeleteRule(rules_of(number)));
        // Nobody else's, neither from there nor to there.
        for to_sandbox in [false, true] {
            chain.rule(not_over(&number.to_string(), to_sandbox), []);
        }
        let lifted = lifted.iter().filter(|range| range.network().is_ipv4());
        let mut closed: Vec<_> =
            lifted.flat_map(|range| destination(Operator::NotEqual, range)).collect();
        closed.push(load(Original::Destination));
        closed.push(is_in(DENIED_RANGES, None));
        chain.rule(closed, mark(mark_of(Action::Deny)));
        for rule in &byway.rules {
            chain.policy_rule(rule);
        }
        chain.otherwise(byway.otherwise);
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
        batch.delete(NfTablesMessage::DeleteRule(rules_of(number)));
        batch.delete(NfTablesMessage::DeleteChain(ChainMessage {
            attributes: vec![ChainAttribute::Table(number.table()), ChainAttribute::Name(name)],
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
            let number = attributes.iter().find_map(|it| match it {
                ChainAttribute::Name(name) => BywayNumber::of_name(name),
                _ => None,
            })?;
            attributes.contains(&ChainAttribute::Table(number.table())).then_some(number)
        };
        Ok(listed.into_iter().filter_map(number).collect())
    }
}

/// A chain that is being written.
struct Chain {
    table: String,
    name: String,
    batch: Batch,
    /// What its last rule leaves on packets that no rule before has decided.
    marks: Option<Action>,
    /// Sets without names so far.
    sets: u32,
}

/// Runs of ports of one rule that are compared one by one. More are put into a set: the kernel goes
/// over all sets of the table whenever one is made or looked for, be it another sandbox's.
const PORT_RUNS_MAX: usize = 4;

const fn mark_of(action: Action) -> u32 {
    match action {
        Action::Allow => ALLOWED_MARK,
        Action::Deny => DENIED_MARK,
    }
}

/// First and last of ports that follow each other.
fn runs(ports: &[u16]) -> Vec<(u16, u16)> {
    let mut ports = ports.to_vec();
    ports.sort_unstable();
    let mut runs: Vec<(u16, u16)> = Vec::new();
    for port in ports {
        match runs.last_mut() {
            Some((_, last)) if port <= last.saturating_add(1) => *last = port,
            _ => runs.push((port, port)),
        }
    }
    runs
}

impl Chain {
    fn own_attributes(&self) -> Vec<ChainAttribute> {
        vec![ChainAttribute::Table(self.table.clone()), ChainAttribute::Name(self.name.clone())]
    }

    /// Leaves it at what is on the packet, and what `end` puts there, where all conditions hold.
    fn rule(
        &mut self,
        conditions: impl IntoIterator<Item = Expressions>,
        end: impl IntoIterator<Item = Expressions>,
    ) {
        let leave = verdict(Verdict::Return, None);
        self.append(conditions.into_iter().chain(end).chain([leave]));
    }

    /// Has what no rule has decided so far be allowed or denied, unless a later one says otherwise.
    /// Once for all rules that say the same: at each change the kernel goes over every rule of
    /// every chain, and by far the most of the time goes there.
    fn otherwise(&mut self, action: Action) {
        if self.marks.replace(action) != Some(action) {
            self.append(mark(mark_of(action)));
        }
    }

    fn append(&mut self, expressions: impl IntoIterator<Item = Expressions>) {
        let expressions = expressions.into_iter().map(ListAttribute::from).collect();
        self.batch.append(NfTablesMessage::NewRule(RuleMessage {
            attributes: vec![
                RuleAttribute::Table(self.table.clone()),
                RuleAttribute::Chain(self.name.clone()),
                RuleAttribute::Expressions(expressions),
            ],
        }));
    }

    fn policy_rule(&mut self, rule: &BywayRule<'_>) {
        self.otherwise(rule.action);
        let mut conditions = Vec::new();
        if let Some(of) = rule.protocol {
            conditions.extend(protocol(of));
        }
        if rule.range.prefix() > 0 {
            conditions.extend(destination(Operator::Equal, &rule.range));
        }
        let runs = runs(rule.ports);
        if runs.is_empty() {
            return self.rule(conditions, []);
        }
        if runs.len() > PORT_RUNS_MAX {
            let (set, id) = self.set_of(rule.ports);
            conditions.extend([load(Original::Port), is_in(&set, Some(id))]);
            return self.rule(conditions, []);
        }
        for (first, last) in runs {
            self.rule(conditions.clone(), ports(first, last));
        }
    }

    /// A set that lives as long as the rule that looks into it.
    fn set_of(&mut self, ports: &[u16]) -> (String, u32) {
        self.sets += 1;
        // The kernel puts a number in, and knows it by its id until then.
        let (name, id) = ("__set%d".to_owned(), self.sets);
        self.batch.create(NfTablesMessage::NewSet(SetMessage {
            attributes: vec![
                SetAttribute::Table(self.table.clone()),
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
                SetElementList::Table(self.table.clone()),
                SetElementList::Set(name.clone()),
                SetElementList::SetId(id),
                SetElementList::Elements(ports.into_iter().map(element).collect()),
            ],
        }));
        (name, id)
    }
}

fn rules_of(number: BywayNumber) -> RuleMessage {
    RuleMessage {
        attributes: vec![
            RuleAttribute::Table(number.table()),
            RuleAttribute::Chain(number.to_string()),
        ],
    }
}

fn map_element(number: BywayNumber, data: Option<SetElementAttribute>) -> SetElementMessage {
    let key = number.address().octets().to_vec();
    let mut element = vec![SetElementAttribute::Key(DataAttribute::Value(key))];
    element.extend(data);
    SetElementMessage {
        attributes: vec![
            SetElementList::Table(number.table()),
            SetElementList::Set(MAP.to_owned()),
            SetElementList::Elements(vec![ListAttribute::Element(element)]),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_that_follow_each_other_are_one_run() {
        assert_eq!(runs(&[]), []);
        assert_eq!(runs(&[53]), [(53, 53)]);
        assert_eq!(runs(&[443, 80, 81, 80, 82]), [(80, 82), (443, 443)]);
        assert_eq!(runs(&[65535, 65534, 0]), [(0, 0), (65534, 65535)]);
    }

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
