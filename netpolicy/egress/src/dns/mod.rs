//! Names: what they are for one sandbox, and who said so. What the guest was told and what we dial
//! come from the same place.

pub(crate) mod message;
pub(crate) mod server;
mod upstream;

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use holdfast_netpolicy::{Denied, HostName};

use self::message::{Code, Data, Record, kind};
pub(crate) use self::upstream::AskError;
use crate::{
    sandbox::{
        Sandbox,
        bucket::{Bucket, Distinct},
    },
    setup::Setup,
};

/// Answers are kept and told for this long, whatever their zone says.
const TTL_SECONDS_MIN: u32 = 5;
const TTL_SECONDS_MAX: u32 = 300;
/// How long it is kept that there is nothing.
const NOTHING_SECONDS: u32 = 30;
/// How long after it was told an address still counts as the name's: programs keep what they were
/// told for longer than they should.
const PIN_SECONDS: u64 = 3600;
/// Answers kept of one sandbox, bytes of them, and names whose addresses are kept.
const CACHE_MAX: usize = 2048;
const CACHE_BYTES_MAX: usize = 4 << 20;
const PINS_MAX: usize = 4096;
/// Addresses kept of one name.
const ADDRESSES_MAX: usize = 32;
/// Steps from alias to alias.
const ALIASES_MAX: usize = 8;
/// Window in which different names are counted.
const NAMES_WINDOW: Duration = Duration::from_secs(600);
const SECOND: Duration = Duration::from_secs(1);

/// What a name was found to be.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) code: Code,
    /// Aliases first, then what was asked for, in the form we tell it.
    pub(crate) records: Arc<[Record]>,
}

impl Answer {
    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.records.iter().filter_map(|record| match record.data {
            Data::Address(address) => Some(address),
            _ => None,
        })
    }
}

/// Why a name was not found.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ResolveError {
    #[error("the sandbox asked for too many different names")]
    TooManyNames,
    #[error("every address of the name is refused")]
    Denied(#[source] Denied),
    #[error("the name has no address")]
    NoAddress,
    #[error("the name could not be looked up")]
    Ask(#[from] AskError),
}

impl ResolveError {
    /// Why, for the record.
    pub(crate) const fn reason(&self) -> &'static str {
        match self {
            Self::TooManyNames => "dns_names_limit",
            Self::Denied(_) => "rebind",
            Self::NoAddress => "no_address",
            Self::Ask(_) => "dns_failed",
        }
    }
}

/// Names of one sandbox. Nothing of it is shared with another.
#[derive(Default)]
pub(crate) struct Names(Mutex<Known>);

type Key = (HostName, u16);

#[derive(Default)]
struct Known {
    answers: HashMap<Key, (Result<Answer, Denied>, Instant)>,
    answers_bytes: usize,
    pins: HashMap<HostName, Vec<(IpAddr, Instant)>>,
    queries: Bucket,
    asked: Distinct,
    /// Questions on their way: whoever asks the same waits for the answer.
    pending: HashMap<Key, Arc<tokio::sync::Mutex<()>>>,
}

impl Names {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the guest may ask once more.
    pub(crate) fn admit_query(&self, per_second: u32, now: Instant) -> bool {
        self.known().queries.take(per_second, SECOND, now)
    }

    /// What is known already. It is pinned as what is found.
    fn kept(&self, key: &Key, now: Instant) -> Option<Result<Answer, ResolveError>> {
        let mut known = self.known();
        let (answer, until) = known.answers.get(key)?;
        if *until <= now {
            return None;
        }
        let answer = answer.clone().map_err(ResolveError::Denied);
        if let Ok(answer) = &answer {
            known.pin(&key.0, answer.addresses(), now);
        }
        Some(answer)
    }

    /// Whether this sandbox was told that `address` is one of `name`'s.
    pub(crate) fn is_pinned(&self, name: &HostName, address: IpAddr, now: Instant) -> bool {
        let known = self.known();
        let pins = known.pins.get(name).into_iter().flatten();
        pins.into_iter().any(|(pinned, until)| *pinned == address && *until > now)
    }
}

/// A question on its way: gone from the list when it is over, however it ends.
struct Asking<'a> {
    names: &'a Names,
    key: &'a Key,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.names.known().pending.remove(self.key);
    }
}

impl Known {
    fn pin(&mut self, name: &HostName, addresses: impl Iterator<Item = IpAddr>, now: Instant) {
        let until = now + Duration::from_secs(PIN_SECONDS);
        if self.pins.len() >= PINS_MAX && !self.pins.contains_key(name) {
            self.pins.retain(|_, pins| pins.iter().any(|(_, until)| *until > now));
            evict(&mut self.pins, PINS_MAX);
        }
        let pins = self.pins.entry(name.clone()).or_default();
        for address in addresses {
            pins.retain(|(pinned, _)| *pinned != address);
            // The oldest is first: it goes when there are too many.
            if pins.len() >= ADDRESSES_MAX {
                pins.remove(0);
            }
            pins.push((address, until));
        }
    }

    fn keep(&mut self, key: Key, answer: Result<Answer, Denied>, seconds: u32, now: Instant) {
        let bytes = bytes_of(&answer);
        let full = |known: &Self| {
            known.answers.len() >= CACHE_MAX || known.answers_bytes + bytes > CACHE_BYTES_MAX
        };
        if full(self) {
            self.answers.retain(|_, (_, until)| *until > now);
            self.answers_bytes = self.answers.values().map(|(answer, _)| bytes_of(answer)).sum();
        }
        // Then any: the order of a map is not the guest's to choose.
        while full(self)
            && let Some(key) = self.answers.keys().next().cloned()
        {
            self.forget(&key);
        }
        let until = now + Duration::from_secs(u64::from(seconds));
        self.forget(&key);
        self.answers_bytes += bytes;
        self.answers.insert(key, (answer, until));
    }

    fn forget(&mut self, key: &Key) {
        if let Some((answer, _)) = self.answers.remove(key) {
            self.answers_bytes = self.answers_bytes.saturating_sub(bytes_of(&answer));
        }
    }
}

/// What an answer takes, about.
fn bytes_of(answer: &Result<Answer, Denied>) -> usize {
    const RECORD_BYTES: usize = 160;
    let data = |record: &Record| match &record.data {
        Data::Address(_) => 0,
        Data::Cname(name) => name.len(),
        Data::Service(service) => service.bytes(),
        Data::Other(other) => other.bytes(),
    };
    let records = answer.iter().flat_map(|answer| answer.records.iter());
    let of = |record: &Record| RECORD_BYTES + record.name.len() + data(record);
    RECORD_BYTES + records.map(of).sum::<usize>()
}

/// Makes room by dropping any one: the order of a map is not the guest's to choose.
fn evict<K: Clone + Eq + std::hash::Hash, V>(map: &mut HashMap<K, V>, max: usize) {
    if map.len() >= max
        && let Some(key) = map.keys().next().cloned()
    {
        map.remove(&key);
    }
}

/// Looks a name up for a sandbox, whose policy has allowed it. What comes back is pinned.
pub(crate) async fn look_up(
    sandbox: &Sandbox,
    setup: &Setup,
    name: &HostName,
    kind: u16,
) -> Result<Answer, ResolveError> {
    let key = (name.clone(), kind);
    if let Some(answer) = sandbox.names.kept(&key, Instant::now()) {
        return answer;
    }
    let pending = sandbox.names.known().pending.entry(key.clone()).or_default().clone();
    let _turn = pending.lock().await;
    let asking = Asking { names: &sandbox.names, key: &key };
    // Somebody else may have asked meanwhile.
    let now = Instant::now();
    if let Some(answer) = sandbox.names.kept(&key, now) {
        return answer;
    }
    let names_max = setup.limits.dns_names;
    if !sandbox.names.known().asked.admit(name.as_str(), names_max, NAMES_WINDOW, now) {
        sandbox.counters.limited.fetch_add(1, Relaxed);
        return Err(ResolveError::TooManyNames);
    }
    let (code, records) = follow(sandbox, &setup.resolvers, name, kind).await?;
    // The time that counts begins when the answer is here.
    let now = Instant::now();
    let (answer, ttl) = judge(setup, name, code, records);
    let mut known = sandbox.names.known();
    if let Ok(answer) = &answer {
        known.pin(name, answer.addresses(), now);
    }
    known.keep(key.clone(), answer.clone(), ttl, now);
    drop(known);
    drop(asking);
    answer.map_err(ResolveError::Denied)
}

/// Asks, and asks again for what an alias leads to when the resolver did not.
async fn follow(
    sandbox: &Sandbox,
    resolvers: &[std::net::SocketAddr],
    name: &HostName,
    kind: u16,
) -> Result<(Code, Vec<Record>), ResolveError> {
    let mut chain: Vec<Record> = Vec::new();
    let mut current = name.as_str().to_owned();
    let mut aliases = 0;
    loop {
        sandbox.counters.dns_upstream.fetch_add(1, Relaxed);
        let response = upstream::ask(resolvers, &current, kind).await?;
        let before = aliases;
        // Only what the chain from the name asked for leads to is looked at, whatever else is there.
        let found = loop {
            let own = |record: &&Record| record.name == current;
            let found: Vec<_> = response
                .records
                .iter()
                .filter(own)
                .filter(|record| data_kind(&record.data) == kind)
                .cloned()
                .collect();
            if !found.is_empty() || kind == kind::CNAME {
                break found;
            }
            let alias = response.records.iter().filter(own).find_map(|record| match &record.data {
                Data::Cname(target) => Some((record.clone(), target.clone())),
                _ => None,
            });
            match alias {
                Some((record, target)) if aliases < ALIASES_MAX => {
                    aliases += 1;
                    chain.push(record);
                    current = target;
                }
                _ => break Vec::new(),
            }
        };
        let unfinished = found.is_empty() && aliases > before && response.code == Code::NoError;
        if !unfinished || aliases >= ALIASES_MAX || !has_no_more(&response.records, &current) {
            chain.extend(found);
            return Ok((response.code, chain));
        }
    }
}

/// Whether the response says nothing about `name` itself.
fn has_no_more(records: &[Record], name: &str) -> bool {
    !records.iter().any(|record| record.name == name)
}

fn data_kind(data: &Data) -> u16 {
    match data {
        Data::Address(IpAddr::V4(_)) => kind::A,
        Data::Address(IpAddr::V6(_)) => kind::AAAA,
        Data::Cname(_) => kind::CNAME,
        Data::Service(service) => service.kind(),
        Data::Other(other) => other.kind(),
    }
}

/// Takes out what may not be dialled, and says for how many seconds the rest holds.
fn judge(
    setup: &Setup,
    name: &HostName,
    code: Code,
    mut records: Vec<Record>,
) -> (Result<Answer, Denied>, u32) {
    let ttl = records.iter().map(|record| record.ttl_seconds).min().unwrap_or(NOTHING_SECONDS);
    let ttl = ttl.clamp(TTL_SECONDS_MIN, TTL_SECONDS_MAX);
    let mut denied = None;
    records.retain(|record| match record.data {
        Data::Address(address) => match setup.deny.check(address) {
            Ok(()) => true,
            Err(reason) => {
                denied = Some(reason);
                false
            }
        },
        _ => true,
    });
    let has_data = records.iter().any(|record| !matches!(record.data, Data::Cname(_)));
    if let (Some(denied), false) = (denied, has_data) {
        log::debug!(name:% = name.as_str(), denied:%; "every address of a name is refused");
        return (Err(denied), ttl);
    }
    for record in &mut records {
        record.ttl_seconds = ttl;
    }
    let code = if code == Code::NxDomain { Code::NxDomain } else { Code::NoError };
    (Ok(Answer { code, records: records.into() }), ttl)
}

/// Addresses to dial for a name, in the order to try them: the guest's own choice if it was told
/// so, else what the name is found to be now.
pub(crate) async fn addresses(
    sandbox: &Sandbox,
    setup: &Setup,
    name: &HostName,
    wanted: Option<IpAddr>,
) -> Result<Vec<IpAddr>, ResolveError> {
    if let Some(address) = wanted
        && sandbox.names.is_pinned(name, address, Instant::now())
        && setup.deny.check(address).is_ok()
    {
        return Ok(vec![address]);
    }
    let kinds = match wanted {
        Some(IpAddr::V6(_)) => [kind::AAAA, kind::A],
        _ => [kind::A, kind::AAAA],
    };
    let mut refused = None;
    for kind in kinds {
        match look_up(sandbox, setup, name, kind).await {
            Ok(answer) => {
                let found: Vec<_> = answer.addresses().collect();
                if !found.is_empty() {
                    return Ok(found);
                }
            }
            Err(ResolveError::Denied(denied)) => refused = Some(denied),
            Err(error) => return Err(error),
        }
    }
    Err(refused.map_or(ResolveError::NoAddress, ResolveError::Denied))
}

/// The address of a server of the operator's own choice: the deny-set is not asked.
pub(crate) async fn first_address(
    sandbox: &Sandbox,
    setup: &Setup,
    name: &HostName,
) -> Option<IpAddr> {
    let (_, records) = follow(sandbox, &setup.resolvers, name, kind::A).await.ok()?;
    records.iter().find_map(|record| match record.data {
        Data::Address(address) => Some(address),
        _ => None,
    })
}
