//! One connection of a guest with all its sockets, and what it was allowed as. The flow ends when
//! its last socket is dropped; a flow that is revoked leaves no byte in a socket's buffer.

use std::{
    future::Future,
    io,
    net::IpAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
};

use holdfast_netpolicy::{
    self as netpolicy, HostName, Method, Outcome, Policy, Protocol, Reason, Rewrite, Scheme,
    Target, Verdict,
};
use holdfast_wire::egress::Ended;
use tokio::task::AbortHandle;

use super::{Rules, Sandbox};

/// What a tunnel was allowed as. A request is judged when it comes and then no more; bytes of these
/// pass for as long as the policy still says so.
pub(crate) enum Claim {
    /// TLS that is not opened.
    Tls {
        name: HostName,
        port: u16,
        /// Once it is dialled.
        address: Option<IpAddr>,
    },
    Raw {
        address: IpAddr,
        port: u16,
    },
    /// A request that made a tunnel of its connection.
    Request(Box<RequestClaim>),
}

pub(crate) struct RequestClaim {
    pub(crate) scheme: Scheme,
    pub(crate) host: HostName,
    pub(crate) port: u16,
    pub(crate) method: Method,
    pub(crate) target: Target,
    pub(crate) rewrite: Option<Rewrite>,
    /// Where it was sent on to.
    pub(crate) address: Option<IpAddr>,
    pub(crate) server_port: u16,
}

impl Claim {
    /// What the policy makes of it.
    pub(crate) fn judge<T>(&self, policy: &Policy, take: impl FnOnce(&Verdict<'_>) -> T) -> T {
        let (flow, address, port) = match self {
            Self::Tls { name, port, address } => {
                (netpolicy::Flow::Tls { name, port: *port }, *address, *port)
            }
            Self::Raw { address, port } => {
                let (protocol, address, port) = (Protocol::Tcp, *address, *port);
                (netpolicy::Flow::Raw { protocol, address, port }, None, port)
            }
            Self::Request(claim) => {
                let (scheme, port) = (claim.scheme, claim.port);
                let (host, method, target) = (&claim.host, &claim.method, &claim.target);
                let flow = netpolicy::Flow::Http { scheme, host, port, method, target };
                (flow, claim.address, claim.server_port)
            }
        };
        let mut verdict = netpolicy::decide(policy, &flow);
        let refuse = |address| netpolicy::refused_address(policy, Protocol::Tcp, address, port);
        if let Some(rule) = address.and_then(refuse) {
            verdict = Verdict { outcome: Outcome::Deny, rule, reason: Reason::Rule };
        }
        take(&verdict)
    }

    /// Whether these rules let it go on as it is. A tunnel that was opened with a secret falls with
    /// that: its request would be denied now.
    pub(crate) fn stands(&self, rules: &Rules) -> bool {
        self.judge(&rules.policy, |verdict| match (self, &verdict.outcome) {
            (Self::Request(claim), Outcome::Rewrite(rewrite)) => {
                claim.rewrite.as_ref() == Some(*rewrite) && rules.has_secrets(&rewrite.transform)
            }
            (Self::Request(claim), Outcome::Transform(transform)) => {
                claim.rewrite.is_none() && rules.has_secrets(transform)
            }
            (Self::Request(claim), Outcome::Allow) => claim.rewrite.is_none(),
            // TLS that would be opened now does not stand as it is.
            (_, outcome) => *outcome == Outcome::Allow,
        })
    }
}

/// Held by every socket of the flow, and by whoever serves it.
pub(crate) struct Flow {
    pub(crate) number: u64,
    pub(crate) sandbox: Arc<Sandbox>,
    revoked: AtomicBool,
    /// Whether a decision named it, so that its end is told.
    told: AtomicBool,
    pub(crate) sent: AtomicU64,
    pub(crate) received: AtomicU64,
    tasks: Mutex<Vec<AbortHandle>>,
}

impl Flow {
    pub(super) fn new(number: u64, sandbox: Arc<Sandbox>) -> Self {
        Self {
            number,
            sandbox,
            revoked: AtomicBool::new(false),
            told: AtomicBool::new(false),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            tasks: Mutex::default(),
        }
    }

    pub(crate) fn is_revoked(&self) -> bool {
        self.revoked.load(Relaxed)
    }

    /// Fails once it is revoked.
    pub(crate) fn check(&self) -> io::Result<()> {
        if self.is_revoked() { Err(io::ErrorKind::ConnectionAborted.into()) } else { Ok(()) }
    }

    /// Its decision names it: tell its end.
    pub(crate) fn tell_end(&self) {
        self.told.store(true, Relaxed);
    }

    /// Starts a task that has a socket of this flow. It is gone when the flow is revoked.
    pub(crate) fn spawn<F>(self: &Arc<Self>, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.retain(|task| !task.is_finished());
        let handle = tokio::spawn(self.sandbox.turns.task(task)).abort_handle();
        if self.is_revoked() {
            handle.abort();
        }
        tasks.push(handle);
    }

    /// No byte of it is read or written any more, and its sockets are on their way to be closed.
    pub(super) fn revoke(&self) {
        let tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        self.revoked.store(true, Relaxed);
        for task in &*tasks {
            task.abort();
        }
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        let (sent, received) = (self.sent.load(Relaxed), self.received.load(Relaxed));
        let counters = &self.sandbox.counters;
        counters.sent_bytes.fetch_add(sent, Relaxed);
        counters.received_bytes.fetch_add(received, Relaxed);
        if self.told.load(Relaxed) {
            self.sandbox.group.audit.ended(Ended {
                sandbox: self.sandbox.id.clone(),
                flow: self.number,
                sent_bytes: sent,
                received_bytes: received,
                revoked: self.is_revoked(),
            });
        }
        self.sandbox.forget(self.number);
    }
}
