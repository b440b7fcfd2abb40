//! One sandbox as this process knows it: its policy now, its flows, and what it may use.

pub(crate) mod bucket;
pub(crate) mod flow;
pub(crate) mod turns;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use holdfast_netpolicy::{Header, HeaderChange, Policy, Transform, ValueRef};
use holdfast_wire::egress::{Decision, Kind, Reference, Stats, Verdict};
use tokio::{sync::Notify, task::AbortHandle};
use zeroize::Zeroizing;

use self::{
    bucket::Bucket,
    flow::{Claim, Flow},
    turns::Turns,
};
use crate::{
    audit,
    dns::Names,
    group::{Group, reference},
};

/// A value that a rule puts into headers. It leaves nothing in memory.
pub(crate) struct Guarded {
    pub(crate) text: Zeroizing<String>,
    pub(crate) expires_at_ms: Option<u64>,
}

pub(crate) type Secrets = BTreeMap<Reference, Guarded>;

/// A policy with the values of what it refers to, as far as there are any.
pub(crate) struct Rules {
    pub(crate) policy: Arc<Policy>,
    pub(crate) generation: u64,
    /// Another with every policy and with every change of values: who took its time finds out by it
    /// that what it has decided is old.
    pub(crate) revision: u64,
    pub(crate) secrets: Secrets,
}

impl Rules {
    pub(crate) fn new(policy: Policy, generation: u64, secrets: Secrets) -> Self {
        Self { policy: Arc::new(policy), generation, revision: 0, secrets }
    }

    /// Whether there is each secret that is to be put into headers.
    fn has_secrets(&self, transform: &Transform) -> bool {
        let headers = transform.headers.iter().filter_map(HeaderChange::header);
        let mut references = headers.filter_map(|header| match header {
            Header::ValueRef(secret @ ValueRef::SecretRef(_)) => Some(reference(secret)),
            _ => None,
        });
        references.all(|secret| self.secrets.contains_key(&secret))
    }
}

pub(crate) struct Sandbox {
    pub(crate) id: String,
    pub(crate) group: Arc<Group>,
    pub(crate) names: Names,
    pub(crate) counters: Counters,
    pub(crate) turns: Arc<Turns>,
    state: Mutex<State>,
    /// A flow has ended.
    fewer: Notify,
    mints: Mutex<Bucket>,
}

struct State {
    rules: Arc<Rules>,
    flows: HashMap<u64, Entry>,
    /// Tasks that have its two sockets.
    servers: Vec<AbortHandle>,
    removed: bool,
}

struct Entry {
    flow: Weak<Flow>,
    claim: Option<Claim>,
}

impl State {
    /// Has other rules hold. Gives the flows that fall with those before.
    fn replace(&mut self, rules: Rules) -> Vec<Arc<Flow>> {
        let revision = self.rules.revision + 1;
        self.rules = Arc::new(Rules { revision, ..rules });
        let falls =
            |entry: &&Entry| entry.claim.as_ref().is_some_and(|claim| !claim.stands(&self.rules));
        let flows = self.flows.values().filter(falls);
        flows.filter_map(|entry| entry.flow.upgrade()).collect()
    }
}

#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) handshakes: AtomicU32,
    pub(crate) buffer_bytes: AtomicU64,
    pub(crate) sent_bytes: AtomicU64,
    pub(crate) received_bytes: AtomicU64,
    pub(crate) allowed: AtomicU64,
    pub(crate) denied: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) limited: AtomicU64,
    pub(crate) dns_queries: AtomicU64,
    pub(crate) dns_upstream: AtomicU64,
    pub(crate) minted: AtomicU64,
}

/// What a decision is about, beside sandbox and policy.
#[derive(Default)]
pub(crate) struct Subject {
    pub(crate) flow: u64,
    pub(crate) host: String,
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) scheme: &'static str,
    pub(crate) address: Option<std::net::IpAddr>,
    pub(crate) port: u16,
}

/// Why it was decided so, free of the policy it came from.
#[derive(Debug, Clone)]
pub(crate) struct Because {
    pub(crate) generation: u64,
    pub(crate) rule: Option<String>,
    pub(crate) reason: &'static str,
}

impl Because {
    pub(crate) fn of(rules: &Rules, verdict: &holdfast_netpolicy::Verdict<'_>) -> Self {
        let rule = match verdict.rule {
            holdfast_netpolicy::RuleRef::Default => None,
            ref rule => Some(rule.to_string()),
        };
        Self { generation: rules.generation, rule, reason: verdict.reason.as_str() }
    }

    /// The same rule, and something else that decided.
    pub(crate) fn but(&self, reason: &'static str) -> Self {
        Self { reason, ..self.clone() }
    }

    /// Nothing of the policy.
    pub(crate) fn own(generation: u64, reason: &'static str) -> Self {
        Self { generation, rule: None, reason }
    }
}

impl Sandbox {
    pub(crate) fn new(id: String, group: Arc<Group>, rules: Rules) -> Self {
        let state = State {
            rules: Arc::new(rules),
            flows: HashMap::new(),
            servers: Vec::new(),
            removed: false,
        };
        Self {
            id,
            group,
            names: Names::default(),
            counters: Counters::default(),
            turns: Arc::default(),
            state: Mutex::new(state),
            fewer: Notify::new(),
            mints: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn rules(&self) -> Arc<Rules> {
        self.state().rules.clone()
    }

    /// Tasks that serve it, to be ended with it.
    pub(crate) fn serve(&self, tasks: impl IntoIterator<Item = AbortHandle>) {
        self.state().servers.extend(tasks);
    }

    /// A new flow. `None`: it has as many as it may, or is gone.
    pub(crate) fn open(self: &Arc<Self>, connections_max: u32) -> Option<Arc<Flow>> {
        let mut state = self.state();
        let full = u32::try_from(state.flows.len()).is_ok_and(|count| count >= connections_max);
        if full || state.removed {
            self.counters.limited.fetch_add(1, Relaxed);
            return None;
        }
        let flow = Arc::new(Flow::new(self.group.next_flow(), self.clone()));
        let entry = Entry { flow: Arc::downgrade(&flow), claim: None };
        state.flows.insert(flow.number, entry);
        Some(flow)
    }

    /// Judges under the policy of this moment. Where a claim comes of it, the flow stands or falls
    /// with it from now on: no policy can come in between.
    pub(crate) fn judge<T>(
        &self,
        flow: &Flow,
        judge: impl FnOnce(&Arc<Rules>) -> (Option<Claim>, T),
    ) -> T {
        let mut state = self.state();
        let (claim, judged) = judge(&state.rules);
        if let Some(entry) = state.flows.get_mut(&flow.number)
            && claim.is_some()
        {
            entry.claim = claim;
        }
        judged
    }

    /// The flow stands by nothing any more: its requests are judged one by one.
    pub(crate) fn release(&self, flow: &Flow) {
        if let Some(entry) = self.state().flows.get_mut(&flow.number) {
            entry.claim = None;
        }
    }

    /// Whether one more certificate may be made for it.
    pub(crate) fn admit_mint(&self, per_minute: u32, now: Instant) -> bool {
        let mut mints = self.mints.lock().unwrap_or_else(PoisonError::into_inner);
        mints.take(per_minute, Duration::from_secs(60), now)
    }

    /// Puts a policy in force, and waits until everything it does not allow is over.
    pub(crate) async fn put(&self, rules: Rules) {
        let revoked = self.state().replace(rules);
        self.end(revoked).await;
    }

    /// Puts other values in the place of those its policy has, and waits until everything is over
    /// that needs one that is gone. Requests that are not sent yet are judged anew.
    pub(crate) async fn revalue(&self, values: impl FnOnce(&Policy) -> Secrets) {
        let revoked = {
            let mut state = self.state();
            let Rules { policy, generation, revision, .. } = &*state.rules;
            let (policy, generation, revision) = (policy.clone(), *generation, *revision);
            let secrets = values(&policy);
            state.replace(Rules { policy, generation, revision, secrets })
        };
        self.end(revoked).await;
    }

    /// Ends everything of it.
    pub(crate) async fn remove(&self) {
        let (flows, servers) = {
            let mut state = self.state();
            state.removed = true;
            let flows = state.flows.values().filter_map(|entry| entry.flow.upgrade());
            (flows.collect::<Vec<_>>(), std::mem::take(&mut state.servers))
        };
        for server in &servers {
            server.abort();
        }
        while !servers.iter().all(AbortHandle::is_finished) {
            tokio::task::yield_now().await;
        }
        self.end(flows).await;
    }

    async fn end(&self, flows: Vec<Arc<Flow>>) {
        let numbers: Vec<u64> = flows.iter().map(|flow| flow.number).collect();
        for flow in flows {
            flow.revoke();
        }
        loop {
            let fewer = self.fewer.notified();
            tokio::pin!(fewer);
            fewer.as_mut().enable();
            {
                let state = self.state();
                if !numbers.iter().any(|number| state.flows.contains_key(number)) {
                    return;
                }
            }
            fewer.await;
        }
    }

    fn forget(&self, number: u64) {
        self.state().flows.remove(&number);
        self.fewer.notify_waiters();
    }

    /// Puts a decision on record.
    pub(crate) fn record(&self, kind: Kind, verdict: Verdict, because: &Because, about: Subject) {
        let counter = match verdict {
            Verdict::Allowed => &self.counters.allowed,
            Verdict::Denied => &self.counters.denied,
            Verdict::Failed => &self.counters.failed,
        };
        counter.fetch_add(1, Relaxed);
        self.group.audit.decided(Decision {
            time_us: audit::now_us(),
            sandbox: self.id.clone(),
            generation: because.generation,
            kind,
            verdict,
            flow: about.flow,
            host: about.host,
            method: about.method,
            path: about.path,
            scheme: about.scheme.to_owned(),
            address: about.address,
            port: about.port,
            rule: because.rule.clone(),
            reason: because.reason.to_owned(),
        });
    }

    pub(crate) fn stats(&self) -> Stats {
        let flows = self.state().flows.len();
        let read = |counter: &AtomicU64| counter.load(Relaxed);
        let of = &self.counters;
        Stats {
            connections: u32::try_from(flows).unwrap_or(u32::MAX),
            handshakes: of.handshakes.load(Relaxed),
            buffer_bytes: read(&of.buffer_bytes),
            sent_bytes: read(&of.sent_bytes),
            received_bytes: read(&of.received_bytes),
            allowed: read(&of.allowed),
            denied: read(&of.denied),
            failed: read(&of.failed),
            limited: read(&of.limited),
            dns_queries: read(&of.dns_queries),
            dns_upstream: read(&of.dns_upstream),
            minted: read(&of.minted),
        }
    }
}

/// A place among the connections that are not yet past their first message.
pub(crate) struct Handshake(Arc<Sandbox>);

impl Handshake {
    /// `None`: all places are taken.
    pub(crate) fn begin(sandbox: &Arc<Sandbox>, handshakes_max: u32) -> Option<Self> {
        let place = Self(sandbox.clone());
        let before = sandbox.counters.handshakes.fetch_add(1, Relaxed);
        if before >= handshakes_max {
            sandbox.counters.limited.fetch_add(1, Relaxed);
            return None;
        }
        Some(place)
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        self.0.counters.handshakes.fetch_sub(1, Relaxed);
    }
}
