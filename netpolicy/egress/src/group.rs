//! The sandboxes of the group, and what they have in common.

use std::{
    collections::HashMap,
    io,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use holdfast_netpolicy::{Identity, Policy, PolicyError, ValueRef};
use holdfast_wire::egress::{
    Configure, Credential, Held, Put, Reference, SANDBOXES_MAX, Stats, Values,
};
use rustls::pki_types::CertificateDer;
use tokio::time::sleep;
use zeroize::Zeroizing;

use crate::{
    accept,
    audit::Audit,
    dns::server::serve_udp,
    sandbox::{Guarded, Rules, Sandbox, Secrets},
    setup::{BadSetup, Setup},
    sys,
};

/// Why a request of the agent is refused. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    #[error("there is no configuration yet: send Configure first")]
    NotConfigured,
    #[error("the configuration cannot be used")]
    Setup(#[from] BadSetup),
    #[error("the policy cannot be used")]
    Policy(#[from] PolicyError),
    #[error("sandbox {sandbox} has generation {has}: {offered} is not newer")]
    Old { sandbox: String, has: u64, offered: u64 },
    #[error("sandbox {0} is not held: its first Put brings two sockets")]
    NoSockets(String),
    #[error("sandbox {0} is held: its sockets came with its first Put")]
    Sockets(String),
    #[error("sandbox {0} is not held")]
    NotHeld(String),
    #[error("{SANDBOXES_MAX} sandboxes are held: no more fit")]
    Full,
    #[error("a socket of the sandbox cannot be used")]
    Socket(#[source] io::Error),
}

/// Two sockets made in a sandbox's namespace.
pub(crate) struct Sockets {
    pub(crate) tcp: OwnedFd,
    pub(crate) udp: OwnedFd,
}

pub(crate) struct Group {
    pub(crate) audit: Audit,
    setup: RwLock<Option<Arc<Setup>>>,
    sandboxes: Mutex<HashMap<String, Arc<Sandbox>>>,
    host_roots: Vec<CertificateDer<'static>>,
    flows: AtomicU64,
    ticks: AtomicBool,
}

/// Between two ticks while connections begin: shorter than what each of them has its time for.
const TICK: Duration = Duration::from_secs(1);

impl Group {
    pub(crate) fn new(host_roots: Vec<CertificateDer<'static>>) -> Arc<Self> {
        Arc::new(Self {
            audit: Audit::default(),
            setup: RwLock::new(None),
            sandboxes: Mutex::default(),
            host_roots,
            flows: AtomicU64::new(1),
            ticks: AtomicBool::new(false),
        })
    }

    pub(crate) fn next_flow(&self) -> u64 {
        self.flows.fetch_add(1, Relaxed)
    }

    /// Something has begun that has its time. A clock that is to strike before all others wakes the
    /// runtime out of its wait, just to wait anew; there is always an earlier one as long as
    /// connections begin, so that theirs do not.
    pub(crate) fn tick(self: &Arc<Self>) {
        if self.ticks.swap(true, Relaxed) {
            return;
        }
        let group = self.clone();
        tokio::spawn(async move {
            let mut before = None;
            while before != Some(group.flows.load(Relaxed)) {
                before = Some(group.flows.load(Relaxed));
                sleep(TICK).await;
            }
            group.ticks.store(false, Relaxed);
        });
    }

    fn maybe_setup(&self) -> Option<Arc<Setup>> {
        self.setup.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The setup. Asked for by sandboxes only, of which there are none before it.
    pub(crate) fn setup(&self) -> Arc<Setup> {
        self.maybe_setup().expect("a sandbox is held only once there is a setup")
    }

    pub(crate) fn is_configured(&self) -> bool {
        self.maybe_setup().is_some()
    }

    pub(crate) fn configure(&self, configure: &Configure) -> Result<(), Refused> {
        let setup = Arc::new(Setup::new(configure, &self.host_roots)?);
        *self.setup.write().unwrap_or_else(PoisonError::into_inner) = Some(setup);
        Ok(())
    }

    fn sandbox(&self, id: &str) -> Option<Arc<Sandbox>> {
        self.sandboxes.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    pub(crate) fn held(&self) -> Vec<Held> {
        let sandboxes = self.sandboxes.lock().unwrap_or_else(PoisonError::into_inner);
        let held = |sandbox: &Arc<Sandbox>| Held {
            sandbox: sandbox.id.clone(),
            generation: sandbox.rules().generation,
        };
        sandboxes.values().map(held).collect()
    }

    pub(crate) fn stats(&self, id: &str) -> Result<Stats, Refused> {
        let sandbox = self.sandbox(id).ok_or_else(|| Refused::NotHeld(id.to_owned()))?;
        Ok(sandbox.stats())
    }

    /// Puts a policy in force. The caller has one of these at a time for a sandbox.
    pub(crate) async fn put(
        self: &Arc<Self>,
        mut put: Put,
        sockets: Option<Sockets>,
    ) -> Result<(), Refused> {
        let given = guarded(std::mem::take(&mut put.secrets));
        if !self.is_configured() {
            return Err(Refused::NotConfigured);
        }
        let policy = Policy::parse(&put.policy)?;
        let secrets = values(&policy, given);
        let rules = Rules::new(policy, put.generation, secrets);
        match (self.sandbox(&put.sandbox), sockets) {
            (Some(_), Some(_)) => Err(Refused::Sockets(put.sandbox)),
            (None, None) => Err(Refused::NoSockets(put.sandbox)),
            (Some(sandbox), None) => {
                let has = sandbox.rules().generation;
                if put.generation <= has {
                    let (sandbox, offered) = (put.sandbox, put.generation);
                    return Err(Refused::Old { sandbox, has, offered });
                }
                sandbox.put(rules).await;
                Ok(())
            }
            (None, Some(sockets)) => self.begin(put.sandbox, rules, sockets),
        }
    }

    /// Has a sandbox's policy refer to these values, and no others, from its next request on.
    pub(crate) async fn revalue(&self, mut new: Values) {
        let given = guarded(std::mem::take(&mut new.secrets));
        if let Some(sandbox) = self.sandbox(&new.sandbox) {
            sandbox.revalue(|policy| values(policy, given)).await;
        }
    }

    /// Serves a new sandbox: the policy is there before anything is accepted.
    fn begin(self: &Arc<Self>, id: String, rules: Rules, sockets: Sockets) -> Result<(), Refused> {
        rustix::io::ioctl_fionbio(&sockets.udp, true).map_err(|e| Refused::Socket(e.into()))?;
        let tcp = std::net::TcpListener::from(sockets.tcp);
        tcp.set_nonblocking(true).map_err(Refused::Socket)?;
        let tcp = tokio::net::TcpListener::from_std(tcp).map_err(Refused::Socket)?;
        let udp = sys::watch(sockets.udp).map_err(Refused::Socket)?;
        let sandbox = Arc::new(Sandbox::new(id.clone(), self.clone(), rules));
        let mut sandboxes = self.sandboxes.lock().unwrap_or_else(PoisonError::into_inner);
        if sandboxes.len() >= SANDBOXES_MAX {
            return Err(Refused::Full);
        }
        let tasks = [
            tokio::spawn(sandbox.turns.task(accept::serve(sandbox.clone(), tcp))).abort_handle(),
            tokio::spawn(sandbox.turns.task(serve_udp(sandbox.clone(), udp))).abort_handle(),
            tokio::spawn(sandbox.turns.clone().keep()).abort_handle(),
        ];
        sandbox.serve(tasks);
        sandboxes.insert(id, sandbox);
        Ok(())
    }

    pub(crate) async fn remove(&self, id: &str) {
        let sandbox = self.sandboxes.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        if let Some(sandbox) = sandbox {
            sandbox.remove().await;
        }
    }
}

/// Values that leave nothing in memory, whatever becomes of the request.
fn guarded(credentials: Vec<Credential>) -> Secrets {
    let guard = |Credential { reference, value, expires_at_ms }| {
        (reference, Guarded { text: Zeroizing::new(value), expires_at_ms })
    };
    credentials.into_iter().map(guard).collect()
}

/// The values a policy refers to, out of those that came with it; others are let go of.
fn values(policy: &Policy, mut given: Secrets) -> Secrets {
    let wanted = policy.value_refs().map(reference);
    wanted.filter_map(|reference| given.remove_entry(&reference)).collect()
}

/// How the agent names what a policy refers to.
pub(crate) fn reference(value: &ValueRef) -> Reference {
    match value {
        ValueRef::SecretRef(secret) => {
            Reference::Secret { id: secret.secret_id.clone(), key: secret.secret_key.clone() }
        }
        ValueRef::ManagedIdentityRef(identity) => Reference::Identity {
            resource: identity.resource.clone(),
            identity: match &identity.identity {
                Identity::SystemAssigned => None,
                Identity::UserAssigned { resource_id } => Some(resource_id.clone()),
            },
        },
    }
}
