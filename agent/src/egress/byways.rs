//! Ways past the proxies, for sandboxes whose policies let flows take them: a link of the slot, and
//! a chain of the host's rules that judges every packet on it.
//!
//! What is to be is kept here, and looked at once a second: rules that somebody took away are put
//! back. Until then nothing passes.

use std::{
    collections::HashMap,
    io::Write as _,
    process::{Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use holdfast_jail::{BywayPlan, HostPlan, SlotNetwork, prepare_host};
use holdfast_model::{GroupKey, SandboxId};
use holdfast_netpolicy::{
    BYWAY_RULESET, Byway, Cidr, HOST_RULESET, Passing, Policy, Protocol, Verdict as Ruling,
};
use holdfast_nft::{
    BYWAY_MARK, BYWAY_RANGE, BYWAYS_MAX, BywayNumber, Heard, Listener, Nft, Said, Traffic,
};
use holdfast_wire::egress::{Decision, Decisions, Kind, Verdict};
use log::{error, info, warn};

use super::{EgressError, Sink, setup::Guard};
use crate::{error_chain::error_chain, metrics::Metrics};

/// How often is looked whether the rules are there.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How often what slots let past is compared with what is on record.
const RECONCILE_EVERY: Duration = Duration::from_secs(60);

/// What a policy asks of the way past a proxy.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub(super) group: GroupKey,
    pub(super) generation: u64,
    pub(super) policy: Policy,
    pub(super) passing: Passing,
    /// Of the deny-set, for the group.
    pub(super) lifted: Vec<Cidr>,
}

pub(super) struct Byways {
    table: Mutex<Table>,
    sink: Sink,
    metrics: Arc<Metrics>,
    /// Questions to name servers that egress processes told decisions about.
    questions_told: AtomicU64,
}

#[derive(Default)]
struct Table {
    nft: Option<Nft>,
    known: HashMap<SandboxId, Known>,
    /// The last that was given.
    last: Option<BywayNumber>,
    prepared: bool,
    guard: Guard,
    /// The rules were there once: they are put back when they are gone.
    had_rules: bool,
    /// Of the ruleset when it was looked at last.
    generation: Option<u32>,
    /// Of all slots there were.
    passed: Passed,
    /// What the host's rules have judged, since the agent started, and as they had it last.
    judged: u64,
    judged_last: Option<u64>,
    unrecorded: Unrecorded,
}

struct Known {
    network: Arc<SlotNetwork>,
    wanted: Wanted,
    open: Option<BywayNumber>,
    /// What its slot had counted when it was looked at last.
    counted: Passed,
}

/// Packets that the rules of slots let past.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Passed {
    questions: u64,
    by: u64,
}

impl Passed {
    fn of(network: &SlotNetwork) -> Result<Self, EgressError> {
        let counters = network.visit(|| Nft::open().and_then(|nft| nft.counters()))??;
        let packets = |name: &str| counters.get(name).copied().unwrap_or(0);
        Ok(Self { questions: packets("passed_dns"), by: packets("passed_by") })
    }

    fn add(&mut self, more: Self, since: Self) {
        self.questions += more.questions.saturating_sub(since.questions);
        self.by += more.by.saturating_sub(since.by);
    }
}

/// What of the packets that slots let past is nowhere on record. Below 0: more is on record.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unrecorded {
    /// Questions to name servers without a decision: over a limit, or none that can be read.
    pub questions: i64,
    /// Packets on ways past proxies that the host's rules have neither let through nor denied.
    pub by: i64,
}

impl Byways {
    /// Without any. Looks after them on a thread of its own, as long as they are there. Blocks.
    pub(super) fn start(guard: Guard, sink: Sink, metrics: Arc<Metrics>) -> Arc<Self> {
        let byways = Arc::new(Self {
            table: Mutex::default(),
            sink,
            metrics,
            questions_told: AtomicU64::new(0),
        });
        byways.guard(guard);
        let theirs = Arc::downgrade(&byways);
        let keeper = thread::Builder::new().name("byways".to_owned());
        if let Err(error) = keeper.spawn(move || keep(&theirs)) {
            warn!(error:%; "nobody looks after the host's rules: no thread for it");
        }
        byways
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // A thread that panicked left what is to be, and the next look brings it about.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where egress processes may go, from now on. Blocks.
    pub(super) fn guard(&self, guard: Guard) {
        let mut table = self.table();
        table.guard = guard;
        match table.put_guard() {
            Ok(()) => {
                table.had_rules = true;
                table.count_judged();
            }
            Err(error) => {
                let hint = error.hint();
                warn!(error:% = error_chain(&error), hint; "the host's rules do not hold egress processes");
            }
        }
    }

    /// A sandbox's slot, and what its policy wants of it. Blocks.
    pub(super) fn put(
        &self,
        id: &SandboxId,
        network: SlotNetwork,
        adopted: bool,
        wanted: Wanted,
    ) -> Result<(), EgressError> {
        let mut table = self.table();
        table.drop_known(id);
        let network = Arc::new(network);
        let counted = if adopted { Passed::of(&network)? } else { Passed::default() };
        // A new slot has none; that of an earlier agent's may.
        let open = if adopted { network.byway()? } else { None };
        let open = open.as_deref().and_then(BywayNumber::of_name);
        table.known.insert(id.clone(), Known { network, wanted, open, counted });
        table.bring(id)
    }

    /// Another policy. After a failure nothing passes until it is tried again. Blocks.
    pub(super) fn change(&self, id: &SandboxId, wanted: Wanted) -> Result<(), EgressError> {
        let mut table = self.table();
        let Some(known) = table.known.get_mut(id) else { return Ok(()) };
        known.wanted = wanted;
        table.bring(id)
    }

    /// The sandbox goes. Blocks.
    pub(super) fn remove(&self, id: &SandboxId) {
        self.table().drop_known(id);
    }

    /// What an earlier agent left and nobody has put goes. Blocks.
    pub(super) fn settle(&self) {
        let mut table = self.table();
        if !table.had_rules {
            return;
        }
        let open: Vec<_> = table.known.values().filter_map(|known| known.open).collect();
        let swept = table.nft().and_then(|nft| {
            for number in nft.byways()?.into_iter().filter(|number| !open.contains(number)) {
                nft.remove_byway(number)?;
                nft.forget_connections(number)?;
            }
            Ok(())
        });
        if let Err(error) = swept {
            warn!(error:% = error_chain(&error); "chains of ways past proxies are left");
        }
    }

    /// Leaves everything as it is, for the next agent.
    pub(super) fn detach(&self) {
        self.table().known.clear();
    }

    /// What egress processes have told.
    pub(super) fn told_of(&self, batch: &Decisions) {
        let of_dns = |decision: &&Decision| decision.kind == Kind::Dns;
        let count = u64::try_from(batch.entries.iter().filter(of_dns).count()).unwrap_or(0);
        self.questions_told.fetch_add(count, Ordering::Relaxed);
    }

    /// As it was found last, within a minute.
    pub(super) fn unrecorded(&self) -> Unrecorded {
        self.table().unrecorded
    }

    /// Bytes from sandboxes and to them that passed proxies by, since the host's rules were loaded.
    pub(super) fn traffic(&self) -> (u64, u64) {
        let mut table = self.table();
        if !table.had_rules {
            return (0, 0);
        }
        let traffic = table.nft().and_then(|nft| Ok(nft.traffic()?));
        let traffic = traffic.unwrap_or_default();
        let sum = |of: fn(&Traffic) -> u64| traffic.values().map(of).sum();
        (sum(|it| it.sent_bytes), sum(|it| it.received_bytes))
    }

    /// Compares what slots let past with what is on record of it.
    pub(super) fn reconcile(&self) {
        // Not under the lock: it takes a third of a millisecond for each.
        let known: Vec<_> = {
            let table = self.table();
            table.known.iter().map(|(id, known)| (id.clone(), Arc::clone(&known.network))).collect()
        };
        for (id, network) in known {
            // One that is being taken away is counted then.
            let Ok(now) = Passed::of(&network) else { continue };
            let mut table = self.table();
            let Table { known, passed, .. } = &mut *table;
            let Some(known) = known.get_mut(&id) else { continue };
            if Arc::ptr_eq(&known.network, &network) {
                passed.add(now, known.counted);
                known.counted = now;
            }
        }
        let told = self.questions_told.load(Ordering::Relaxed);
        let mut table = self.table();
        let passed = table.passed;
        table.count_judged();
        let judged = table.judged;
        let difference = |passed: u64, recorded: u64| {
            let signed = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
            signed(passed) - signed(recorded)
        };
        table.unrecorded = Unrecorded {
            questions: difference(passed.questions, told),
            by: difference(passed.by, judged),
        };
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.table().known.values().filter(|known| known.open.is_some()).count()
    }

    /// Brings about what is to be, where it is not.
    fn look(&self) {
        let mut table = self.table();
        if let Err(error) = table.look() {
            let hint = error.hint();
            error!(error:% = error_chain(&error), hint; "the host's rules are not what they should be");
        }
    }

    fn told(&self, heard: Vec<Heard>) {
        let table = self.table();
        let of = |heard: Heard| {
            let own = |known: &&SandboxId| table.known[*known].open == Some(heard.number);
            let id = table.known.keys().find(own)?;
            Some((id.clone(), table.known[id].wanted.clone(), heard))
        };
        let told: Vec<_> = heard.into_iter().filter_map(of).collect();
        drop(table);
        for (id, wanted, heard) in told {
            let entries = vec![decision(&id, &wanted, heard)];
            (self.sink)(&wanted.group, Decisions { entries, ..Decisions::default() });
        }
    }
}

impl Table {
    fn nft(&mut self) -> Result<&Nft, EgressError> {
        if self.nft.is_none() {
            self.nft = Some(Nft::open()?);
        }
        self.nft.as_ref().ok_or(EgressError::Unexpected)
    }

    fn put_guard(&mut self) -> Result<(), EgressError> {
        let guard = std::mem::take(&mut self.guard);
        let put = self
            .nft()
            .and_then(|nft| Ok(nft.guard(&guard.servers, &guard.lifted, &guard.lifted_of)?));
        self.guard = guard;
        put
    }

    fn count_judged(&mut self) {
        let Ok(now) = self.judged_now() else { return };
        // Rules that were loaded anew begin anew.
        let before = self.judged_last.replace(now);
        self.judged += before.map_or(0, |before| now.checked_sub(before).unwrap_or(now));
    }

    /// Packets from sandboxes that the host's rules have let through, denied or dropped.
    fn judged_now(&mut self) -> Result<u64, EgressError> {
        let nft = self.nft()?;
        let through: u64 = nft.traffic()?.values().map(|it| it.sent_packets).sum();
        let counters = nft.counters()?;
        let packets = |name: &str| counters.get(name).copied().unwrap_or(0);
        Ok(through + packets("byway_refused") + packets("byway_over") + packets("byway_stray"))
    }

    fn drop_known(&mut self, id: &SandboxId) {
        let Some(mut known) = self.known.remove(id) else { return };
        if let Ok(now) = Passed::of(&known.network) {
            self.passed.add(now, known.counted);
        }
        if let Err(error) = self.close(&mut known) {
            warn!(id:%, error:% = error_chain(&error); "what there is of a way past a proxy is left");
        }
    }

    /// Does what the policy wants.
    fn bring(&mut self, id: &SandboxId) -> Result<(), EgressError> {
        let Some(mut known) = self.known.remove(id) else { return Ok(()) };
        let Wanted { policy, passing, lifted, .. } = known.wanted.clone();
        let outcome = match (Byway::of(&policy, passing), known.open) {
            (None, None) => Ok(()),
            (None, Some(_)) => self.close(&mut known),
            (Some(byway), Some(number)) => {
                let put = self.nft().and_then(|nft| Ok(nft.put_byway(number, &byway, &lifted)?));
                // What could not be told the new policy must not go by the old one.
                put.inspect_err(|_| drop(self.close(&mut known)))
            }
            (Some(byway), None) => self.open(&mut known, &byway, &lifted),
        };
        self.known.insert(id.clone(), known);
        outcome
    }

    fn open(
        &mut self,
        known: &mut Known,
        byway: &Byway<'_>,
        lifted: &[Cidr],
    ) -> Result<(), EgressError> {
        let number = self.free()?;
        self.nft()?.put_byway(number, byway, lifted)?;
        if !self.prepared {
            prepare_host(&HostPlan { range: BYWAY_RANGE, mark: BYWAY_MARK })?;
            self.prepared = true;
        }
        let protocols: Vec<_> = byway.passing.protocols().iter().map(|it| it.as_str()).collect();
        let plan = BywayPlan {
            name: &number.to_string(),
            address: number.address(),
            protocols: &protocols.join(", "),
            ruleset: BYWAY_RULESET,
        };
        known.open = Some(number);
        let opened = known.network.open_byway(&plan);
        opened.map_err(EgressError::from).inspect_err(|_| drop(self.close(known)))
    }

    fn close(&mut self, known: &mut Known) -> Result<(), EgressError> {
        let Some(number) = known.open else { return Ok(()) };
        // Any of these alone stops everything; the number is free when all were done.
        let chain = self.nft().and_then(|nft| Ok(nft.remove_byway(number)?));
        let link = known.network.close_byway(&number.to_string());
        let flows = self.nft().and_then(|nft| Ok(nft.forget_connections(number)?));
        chain?;
        link?;
        flows?;
        known.open = None;
        Ok(())
    }

    fn free(&mut self) -> Result<BywayNumber, EgressError> {
        let first = BywayNumber::new(1)?;
        let mut number = self.last.map_or(first, BywayNumber::next);
        for _ in 0..BYWAYS_MAX {
            if !self.known.values().any(|known| known.open == Some(number)) {
                self.last = Some(number);
                return Ok(number);
            }
            number = number.next();
        }
        Err(EgressError::Byways)
    }

    fn look(&mut self) -> Result<(), EgressError> {
        let open: Vec<_> = self
            .known
            .iter()
            .filter(|(_, known)| Byway::of(&known.wanted.policy, known.wanted.passing).is_some())
            .map(|(id, known)| (id.clone(), known.open))
            .collect();
        if !self.had_rules {
            return Ok(());
        }
        let generation = self.nft()?.generation()?;
        let missing = open.iter().any(|(_, number)| number.is_none());
        if self.generation == Some(generation) && !missing {
            return Ok(());
        }
        if let Err(error) = self.nft()?.has_rules() {
            error!(error:% = error_chain(&error); "somebody took the host's rules away; they are put back");
            load_host_rules()?;
            self.put_guard()?;
        }
        let there = self.nft()?.byways()?;
        for (id, number) in open {
            if number.is_none_or(|number| !there.contains(&number)) {
                info!(id:%; "a way past a proxy is made again");
                self.bring(&id)?;
            }
        }
        self.generation = Some(self.nft()?.generation()?);
        Ok(())
    }
}

/// Until nobody has them any more.
fn keep(byways: &Weak<Byways>) {
    let listener = Listener::open(LOOK_EVERY).inspect_err(|error| {
        warn!(error:% = error_chain(error); "what passes proxies by is not in the record of decisions");
    });
    let listener = listener.ok();
    let (mut looked, mut reconciled) = (Instant::now(), None::<Instant>);
    loop {
        let said = match &listener {
            Some(listener) => listener.wait(),
            None => {
                thread::sleep(LOOK_EVERY);
                Ok(Said::Nothing)
            }
        };
        let Some(byways) = byways.upgrade() else { return };
        match said {
            Ok(Said::Flows(heard)) => byways.told(heard),
            Ok(Said::Nothing) => {}
            Ok(Said::TooMuch) => byways.metrics.egress_dropped(1),
            Err(error) => {
                warn!(error:% = error_chain(&error); "flows past a proxy are not heard of");
                thread::sleep(LOOK_EVERY);
            }
        }
        if looked.elapsed() >= LOOK_EVERY {
            byways.look();
            looked = Instant::now();
        }
        if reconciled.is_none_or(|at| at.elapsed() >= RECONCILE_EVERY) {
            byways.reconcile();
            reconciled = Some(Instant::now());
        }
    }
}

/// As at boot, and without the rules of others going.
fn load_host_rules() -> Result<(), EgressError> {
    // What is left of some table would have each of its rules twice. One that is not there cannot be
    // deleted, so it is made first.
    let tables = HOST_RULESET.lines().filter_map(|line| line.strip_suffix(" {"));
    let tables = tables.filter(|table| table.starts_with("table "));
    let anew: String = tables.map(|table| format!("{table}\ndelete {table}\n")).collect();
    let rules = HOST_RULESET.replace("flush ruleset\n", &anew);
    let failed = |source| EgressError::Rules { source };
    let mut nft = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .map_err(failed)?;
    let written = match nft.stdin.take() {
        Some(mut pipe) => pipe.write_all(rules.as_bytes()),
        None => Ok(()),
    };
    let status = nft.wait().map_err(failed)?;
    written.map_err(failed)?;
    if status.success() { Ok(()) } else { Err(failed(std::io::Error::other("nft refuses it"))) }
}

fn decision(id: &SandboxId, wanted: &Wanted, heard: Heard) -> Decision {
    let Heard { allowed, protocol, address, port, .. } = heard;
    let byway = Byway::of(&wanted.policy, wanted.passing);
    let ruling = byway.map(|byway| byway.decide(protocol, address, port));
    let agrees = |ruling: &Ruling<'_>| ruling.is_deny() != allowed;
    let (rule, reason) = match ruling.filter(agrees) {
        Some(Ruling { rule, reason, .. }) => (rule.to_string(), reason.as_str()),
        // What a rule allows is denied by what stands above it; or the policy is another by now.
        None if allowed => (String::new(), "policy_before"),
        None => (String::new(), "denied_range"),
    };
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    Decision {
        time_us: u64::try_from(now.as_micros()).unwrap_or(u64::MAX),
        sandbox: id.to_string(),
        generation: wanted.generation,
        kind: if protocol == Protocol::Udp { Kind::Udp } else { Kind::Tcp },
        verdict: if allowed { Verdict::Allowed } else { Verdict::Denied },
        flow: 0,
        host: address.to_string(),
        method: String::new(),
        path: String::new(),
        scheme: protocol.as_str().to_owned(),
        address: Some(address.into()),
        port,
        rule: (!rule.is_empty()).then_some(rule),
        reason: reason.to_owned(),
    }
}
