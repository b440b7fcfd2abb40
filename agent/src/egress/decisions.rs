//! What was decided about the flows of sandboxes: the last of each, in memory and in the store.
//!
//! Whoever decides reports it here, at whatever rate a guest makes it decide: each sandbox has two
//! bounded rings, so that a flood of denials pushes out no flow that was allowed, and everything
//! pushed out is counted. What is new goes to the store every few seconds; an agent that is killed
//! loses that much of it.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use holdfast_model::SandboxId;
use holdfast_store::{DecisionRecord, Store, StoreError};
use log::warn;
use tokio_util::sync::CancellationToken;

use crate::{blocking::off_thread, error_chain::error_chain, metrics::Metrics};

/// Decisions kept of one sandbox: so many that allowed, and as many that denied.
const KEPT_MAX: usize = 512;

/// Bytes of all decisions kept. Over that a sandbox keeps fewer than it could.
const BYTES_MAX: usize = 64 * 1024 * 1024;

/// Decisions of each kind that a sandbox keeps however little room there is.
const KEPT_MIN: usize = 16;

/// How often what is new is written.
const WRITE_EVERY: Duration = Duration::from_secs(2);

/// Bytes of a path that are kept. What a guest writes there is its own affair; that it went there
/// is ours.
const PATH_BYTES_MAX: usize = 512;
const HOST_BYTES_MAX: usize = 253;
const WORD_BYTES_MAX: usize = 32;
const RULE_BYTES_MAX: usize = 200;

/// One decision as it is reported. Its texts may hold whatever a guest sent.
#[derive(Debug, Clone, Default)]
pub struct Decided {
    /// Milliseconds since 1970.
    pub at_ms: u64,
    pub allowed: bool,
    /// `dns`, `tls`, `http`, `https`, `tcp` or `udp`.
    pub scheme: String,
    /// A name, or an address where there was no name.
    pub host: String,
    /// Of a request its method, of a query the record type; else empty.
    pub method: String,
    pub path: String,
    /// What was dialled, if anything was.
    pub address: Option<IpAddr>,
    pub port: Option<u16>,
    /// As [`holdfast_netpolicy::RuleRef`] prints itself.
    pub rule: String,
    /// As [`holdfast_netpolicy::Reason`] or whoever refused names it.
    pub reason: String,
    /// Of the policy that it was made under.
    pub generation: u64,
    /// By which its end is told, by whoever made it. 0: that is not told.
    pub flow: u64,
}

/// The end of a flow that was allowed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Carried {
    pub flow: u64,
    pub sent_bytes: u64,
    pub received_bytes: u64,
}

impl Decided {
    /// Fit to be kept: bounded, without queries, and with nothing that a terminal would obey.
    fn into_record(self, sandbox: &SandboxId, sequence: u64) -> DecisionRecord {
        let path = self.path.split(['?', '#']).next().unwrap_or_default();
        DecisionRecord {
            sandbox: sandbox.clone(),
            sequence,
            at_ms: self.at_ms,
            allowed: self.allowed,
            scheme: clean(&self.scheme, WORD_BYTES_MAX),
            host: clean(&self.host, HOST_BYTES_MAX),
            method: clean(&self.method, WORD_BYTES_MAX),
            path: clean(path, PATH_BYTES_MAX),
            address: self.address,
            port: self.port,
            rule: clean(&self.rule, RULE_BYTES_MAX),
            reason: clean(&self.reason, WORD_BYTES_MAX * 2),
            generation: self.generation,
            // Known when it ends.
            sent_bytes: 0,
            received_bytes: 0,
        }
    }
}

/// The text with a mark in place of every control character, cut to `bytes_max`.
fn clean(text: &str, bytes_max: usize) -> String {
    let mut cleaned = String::with_capacity(text.len().min(bytes_max));
    for character in text.chars() {
        // Also what turns the direction of writing, behind which a name can hide.
        let obeyed = character.is_control()
            || matches!(character, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        let kept = if obeyed { char::REPLACEMENT_CHARACTER } else { character };
        if cleaned.len() + kept.len_utf8() > bytes_max {
            break;
        }
        cleaned.push(kept);
    }
    cleaned
}

/// What a record takes in memory, about.
fn bytes_of(record: &DecisionRecord) -> usize {
    let texts = [&record.scheme, &record.host, &record.method, &record.path, &record.rule];
    size_of::<DecisionRecord>() + 20 + texts.into_iter().map(String::len).sum::<usize>()
}

/// What is kept of one sandbox.
#[derive(Debug, Default)]
struct Kept {
    allowed: VecDeque<DecisionRecord>,
    denied: VecDeque<DecisionRecord>,
    /// Number of the last decision.
    last: u64,
    /// Up to this number they are in the store, unless they were pushed out.
    written: u64,
    /// In the store, and to be removed from it.
    pushed_out: Vec<u64>,
    /// Flows whose end is still to be told, and the numbers of their decisions. No more of them than
    /// decisions that allowed are kept.
    going_on: HashMap<u64, u64>,
    /// In the store, and known better now.
    amended: BTreeSet<u64>,
}

impl Kept {
    /// Pushes the oldest of a kind out. Gives the bytes that are free by it.
    fn push_out(&mut self, allowed: bool) -> usize {
        let ring = if allowed { &mut self.allowed } else { &mut self.denied };
        let Some(oldest) = ring.pop_front() else { return 0 };
        if oldest.sequence <= self.written {
            self.pushed_out.push(oldest.sequence);
        }
        self.amended.remove(&oldest.sequence);
        if self.going_on.len() > self.allowed.len() {
            let first = self.allowed.front().map_or(u64::MAX, |record| record.sequence);
            self.going_on.retain(|_, sequence| *sequence >= first);
        }
        bytes_of(&oldest)
    }

    fn ring(&self, allowed: bool) -> &VecDeque<DecisionRecord> {
        if allowed { &self.allowed } else { &self.denied }
    }
}

#[derive(Debug, Default)]
struct Table {
    by_sandbox: HashMap<SandboxId, Kept>,
    /// Those with something to write.
    changed: HashSet<SandboxId>,
    bytes: usize,
}

/// What is known of a sandbox's decisions, each list in the order in which they were made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    pub allowed: Vec<DecisionRecord>,
    pub denied: Vec<DecisionRecord>,
    /// Number of the last one.
    pub last_sequence: u64,
    /// How many were made and are not kept any more.
    pub dropped: u64,
}

/// The decisions about every sandbox of the node.
pub struct Decisions {
    table: Mutex<Table>,
    store: Arc<Store>,
    metrics: Arc<Metrics>,
    bytes_max: usize,
    stop: CancellationToken,
}

impl Decisions {
    /// With what the store has. Blocks.
    pub fn open(store: Arc<Store>, metrics: Arc<Metrics>) -> Result<Arc<Self>, StoreError> {
        Self::with_room(store, metrics, BYTES_MAX)
    }

    fn with_room(
        store: Arc<Store>,
        metrics: Arc<Metrics>,
        bytes_max: usize,
    ) -> Result<Arc<Self>, StoreError> {
        let mut table = Table::default();
        for record in store.all_sandboxes()? {
            table.by_sandbox.insert(record.id, Kept::default());
        }
        for record in store.all_decisions()? {
            let Some(kept) = table.by_sandbox.get_mut(&record.sandbox) else { continue };
            kept.last = record.sequence;
            kept.written = record.sequence;
            table.bytes += bytes_of(&record);
            let ring = if record.allowed { &mut kept.allowed } else { &mut kept.denied };
            ring.push_back(record);
        }
        let table = Mutex::new(table);
        Ok(Arc::new(Self { table, store, metrics, bytes_max, stop: CancellationToken::new() }))
    }

    /// From now on decisions about this sandbox are kept.
    pub fn begin(&self, sandbox: &SandboxId) {
        self.table().by_sandbox.entry(sandbox.clone()).or_default();
    }

    /// The sandbox is gone. The store forgets its decisions with its record.
    pub fn forget(&self, sandbox: &SandboxId) {
        let mut table = self.table();
        table.changed.remove(sandbox);
        if let Some(kept) = table.by_sandbox.remove(sandbox) {
            let records = kept.allowed.iter().chain(&kept.denied);
            table.bytes -= records.map(bytes_of).sum::<usize>();
        }
    }

    /// Keeps a decision. One about a sandbox that is not known is only counted. Never waits for
    /// anything but another such call.
    pub fn record(&self, sandbox: &SandboxId, decided: Decided) {
        let allowed = decided.allowed;
        self.metrics.egress_decided(allowed);
        let mut table = self.table();
        let Table { by_sandbox, changed, bytes } = &mut *table;
        let Some(kept) = by_sandbox.get_mut(sandbox) else {
            self.metrics.egress_dropped(1);
            return;
        };
        kept.last += 1;
        if allowed && decided.flow != 0 {
            // One of the same number was of a process that is gone.
            kept.going_on.insert(decided.flow, kept.last);
        }
        let record = decided.into_record(sandbox, kept.last);
        *bytes += bytes_of(&record);
        if allowed {
            kept.allowed.push_back(record)
        } else {
            kept.denied.push_back(record)
        }
        while kept.ring(allowed).len() > KEPT_MAX
            || (*bytes > self.bytes_max && kept.ring(allowed).len() > KEPT_MIN)
        {
            *bytes -= kept.push_out(allowed);
            self.metrics.egress_dropped(1);
        }
        if !changed.contains(sandbox) {
            changed.insert(sandbox.clone());
        }
    }

    /// A flow that was allowed has ended, with so many bytes. Of one that is not kept any more, or was
    /// allowed under another agent, nothing is noted.
    pub fn ended(&self, sandbox: &SandboxId, carried: Carried) {
        let mut table = self.table();
        let Table { by_sandbox, changed, .. } = &mut *table;
        let Some(kept) = by_sandbox.get_mut(sandbox) else { return };
        let Some(sequence) = kept.going_on.remove(&carried.flow) else { return };
        let found = kept.allowed.binary_search_by_key(&sequence, |record| record.sequence);
        let Some(record) = found.ok().and_then(|index| kept.allowed.get_mut(index)) else { return };
        record.sent_bytes = carried.sent_bytes;
        record.received_bytes = carried.received_bytes;
        if sequence <= kept.written {
            kept.amended.insert(sequence);
        }
        changed.insert(sandbox.clone());
    }

    /// So many decisions were made of which nothing more is known.
    pub fn missed(&self, sandbox: &SandboxId, count: u64) {
        self.metrics.egress_dropped(count);
        if let Some(kept) = self.table().by_sandbox.get_mut(sandbox) {
            kept.last += count;
        }
    }

    /// Decisions about the sandbox with a number above `after`.
    pub fn report(&self, sandbox: &SandboxId, after: u64) -> Report {
        let table = self.table();
        let Some(kept) = table.by_sandbox.get(sandbox) else { return Report::default() };
        let above = |ring: &VecDeque<DecisionRecord>| {
            ring.iter().filter(|record| record.sequence > after).cloned().collect()
        };
        let count = u64::try_from(kept.allowed.len() + kept.denied.len()).unwrap_or(u64::MAX);
        Report {
            allowed: above(&kept.allowed),
            denied: above(&kept.denied),
            last_sequence: kept.last,
            dropped: kept.last.saturating_sub(count),
        }
    }

    /// Writes what is new until the agent stops, and once more then.
    pub async fn keep_written(self: Arc<Self>) {
        loop {
            let stopping = self.stop.is_cancelled();
            let own = Arc::clone(&self);
            if let Err(error) = off_thread(move || own.write()).await {
                let error = error_chain(&error);
                warn!(error:%; "egress decisions not written; tried again");
            }
            if stopping {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(WRITE_EVERY) => {}
                () = self.stop.cancelled() => {}
            }
        }
    }

    /// Ends [`Self::keep_written`].
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// Writes what is new. Blocks.
    pub fn write(&self) -> Result<(), StoreError> {
        let (mut new, mut old, mut before) = (Vec::new(), Vec::new(), Vec::new());
        {
            let mut table = self.table();
            let Table { by_sandbox, changed, .. } = &mut *table;
            for sandbox in changed.drain() {
                let Some(kept) = by_sandbox.get_mut(&sandbox) else { continue };
                let records = kept.allowed.iter().chain(&kept.denied);
                let amended = std::mem::take(&mut kept.amended);
                let to_write = |record: &&DecisionRecord| {
                    record.sequence > kept.written || amended.contains(&record.sequence)
                };
                new.extend(records.filter(to_write).cloned());
                let pushed_out = kept.pushed_out.drain(..);
                old.extend(pushed_out.map(|sequence| (sandbox.clone(), sequence)));
                let written = std::mem::replace(&mut kept.written, kept.last);
                before.push((sandbox, written, amended));
            }
        }
        if new.is_empty() && old.is_empty() {
            return Ok(());
        }
        let outcome = self.store.keep_decisions(&new, &old);
        if outcome.is_err() {
            self.unwritten(before, old);
        }
        outcome
    }

    /// Takes back that something was written.
    fn unwritten(&self, before: Vec<(SandboxId, u64, BTreeSet<u64>)>, old: Vec<(SandboxId, u64)>) {
        let mut table = self.table();
        for (sandbox, written, amended) in before {
            if let Some(kept) = table.by_sandbox.get_mut(&sandbox) {
                kept.written = written;
                kept.amended.extend(amended);
                table.changed.insert(sandbox);
            }
        }
        for (sandbox, sequence) in old {
            if let Some(kept) = table.by_sandbox.get_mut(&sandbox) {
                kept.pushed_out.push(sequence);
            }
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Nothing that holds the lock can panic half way through a change.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
