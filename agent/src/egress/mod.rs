//! The processes through which sandboxes talk to the outside: one `holdfast-egress` for each group
//! that has a sandbox that runs.
//!
//! What is to be is kept here, and brought to the process whenever that changes or the process is a
//! new one. A process that ends is started again and told everything before it serves anybody; one
//! that outlived an earlier agent is found by its socket. While there is none, nothing leaves.

mod asks;
mod byways;
mod decisions;
mod error;
mod link;
mod process;
mod setup;
mod supervisor;
mod told;
mod values;

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, atomic::Ordering},
};

use fs_err as fs;
use holdfast_jail::{CgroupTree, SlotNetwork, SlotSockets};
use holdfast_model::{GroupKey, SandboxId};
use holdfast_netpolicy::{Passing, Policy};
use holdfast_wire::egress::{self as wire, Credential};
use log::{info, warn};
use sha2::{Digest as _, Sha256};
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::TaskTracker;

pub(crate) use self::setup::parse_resolver;
use self::{
    asks::Ask,
    byways::{Byways, Wanted},
    process::{CGROUP_PREFIX, Place},
    setup::Setup,
    supervisor::{Gauges, Supervisor},
};
pub use self::{
    byways::Unrecorded,
    decisions::{Carried, Decided, Decisions, Report},
    error::EgressError,
    process::{EGRESS_OWN_UIDS, EGRESS_UID},
    told::sink,
};
use crate::{
    auth::hex, blocking::off_thread, config::Config, credentials::KeyError, durable::FileError,
    error_chain::error_chain, metrics::Metrics, tls::Authority,
};

/// Asks waiting for one group: as many as there may be launches under way, and policies being
/// changed, at once.
const INBOX_MAX: usize = 256;

/// Bytes of a group's digest in names of files and cgroups.
const NAME_BYTES: usize = 10;

/// By what a sandbox's flows are judged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// Grows with every change.
    pub generation: u64,
    /// JSON.
    pub policy: Vec<u8>,
    /// Which flows pass the proxy by where the policy lets them.
    pub passing: Passing,
}

/// What the processes need to know that is kept elsewhere. Calls block.
pub trait Credentials: Send + Sync {
    /// The group's CA: the same at each call.
    fn authority(&self, group: &GroupKey) -> Result<Authority, KeyError>;

    /// The values behind a policy's references, as they are now and as far as there are any.
    fn values(&self, group: &GroupKey, sandbox: &SandboxId, policy: &Policy) -> Values;
}

/// Values behind a policy's references.
#[derive(Debug, Default)]
pub struct Values {
    pub credentials: Vec<Credential>,
    /// Milliseconds since 1970, when they should be asked for again. `None`: when they are changed.
    pub renew_at_ms: Option<u64>,
}

/// How the sockets of a sandbox's slot are had.
#[derive(Debug)]
pub enum Way {
    /// They were made with it.
    Sockets(SlotSockets),
    /// An earlier agent had handed them over. Whether anybody has them still is found out: by the
    /// tap they can be made again.
    Tap(OwnedFd),
}

/// What takes decisions, off the async threads' way: it must not block.
pub type Sink = Arc<dyn Fn(&GroupKey, wire::Decisions) + Send + Sync>;

/// Every group's egress process.
pub struct Egress {
    shared: Arc<Shared>,
    byways: Arc<Byways>,
    groups: Mutex<Groups>,
    /// Of groups' CAs. They never change.
    certificates: Mutex<HashMap<GroupKey, String>>,
    supervisors: TaskTracker,
}

#[derive(Default)]
struct Groups {
    known: HashMap<GroupKey, Group>,
    /// Everything that an earlier agent left has been asked for again.
    settled: bool,
}

#[derive(Clone)]
struct Group {
    asks: mpsc::Sender<Ask>,
    gauges: Arc<Gauges>,
}

/// What every supervisor has.
struct Shared {
    program: PathBuf,
    run: PathBuf,
    cgroups: CgroupTree,
    config: crate::config::Egress,
    setup: RwLock<Setup>,
    metrics: Arc<Metrics>,
    credentials: Arc<dyn Credentials>,
    sink: Sink,
}

impl Way {
    fn network(&self) -> Result<SlotNetwork, EgressError> {
        Ok(match self {
            Self::Sockets(sockets) => sockets.network()?,
            Self::Tap(tap) => SlotNetwork::of_tap(tap)?,
        })
    }
}

impl Shared {
    fn setup(&self) -> Setup {
        self.setup.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads and derives off the async threads.
    async fn authority(self: &Arc<Self>, group: &GroupKey) -> Result<Authority, EgressError> {
        let (shared, of) = (Arc::clone(self), group.clone());
        let had = off_thread(move || shared.credentials.authority(&of)).await;
        had.map_err(|source| EgressError::Authority {
            group: Box::new(group.clone()),
            source: Box::new(source),
        })
    }

    fn place(&self, group: &GroupKey) -> Place {
        let name = name_of(group);
        Place {
            program: self.program.clone(),
            socket: self.run.join(format!("{name}.sock")),
            cgroups: self.cgroups.clone(),
            name: format!("{CGROUP_PREFIX}{name}"),
            user: setup::user_of(&self.config, group),
        }
    }
}

impl Egress {
    /// Ready for sandboxes. No process is started before there is one. Blocks.
    pub fn open(
        config: &Config,
        metrics: Arc<Metrics>,
        credentials: Arc<dyn Credentials>,
        sink: Sink,
    ) -> Result<Arc<Self>, EgressError> {
        let paths = &config.paths;
        remove_former(&paths.state.join("egress"))?;
        let setup = Setup::load(&config.egress)?;
        let byways = Byways::start(setup.guard(), Arc::clone(&sink), Arc::clone(&metrics));
        let sink: Sink = {
            let (byways, sink) = (Arc::clone(&byways), sink);
            Arc::new(move |group: &GroupKey, batch: wire::Decisions| {
                byways.told_of(&batch);
                sink(group, batch);
            })
        };
        let shared = Shared {
            program: paths.egress.clone(),
            run: paths.run.join("egress"),
            cgroups: CgroupTree::new(&paths.cgroups),
            config: config.egress.clone(),
            setup: RwLock::new(setup),
            metrics,
            credentials,
            sink,
        };
        Ok(Arc::new(Self {
            shared: Arc::new(shared),
            byways,
            groups: Mutex::default(),
            certificates: Mutex::default(),
            supervisors: TaskTracker::new(),
        }))
    }

    /// The certificate of a group's CA, for its guests to trust.
    pub async fn ca_pem(&self, group: &GroupKey) -> Result<String, EgressError> {
        if let Some(known) = self.certificates().get(group) {
            return Ok(known.clone());
        }
        // Some milliseconds of arithmetic, which nobody who is woken should wait for again.
        let pem = self.shared.authority(group).await?.pem().to_owned();
        self.certificates().insert(group.clone(), pem.clone());
        Ok(pem)
    }

    fn certificates(&self) -> MutexGuard<'_, HashMap<GroupKey, String>> {
        // A thread that panicked left a map that is whole.
        self.certificates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a sandbox's flows carried on, by these rules. Answers when they hold. After a failure it
    /// is tried again for as long as the sandbox is not removed; until then nothing leaves it.
    pub async fn put(
        &self,
        group: &GroupKey,
        sandbox: &SandboxId,
        way: Way,
        rules: Rules,
    ) -> Result<(), EgressError> {
        let (network, adopted) = (way.network()?, matches!(way, Way::Tap(_)));
        let wanted = self.wanted(group, &rules)?;
        let (byways, id) = (Arc::clone(&self.byways), sandbox.clone());
        let opened = off_thread(move || byways.put(&id, network, adopted, wanted));
        let sandbox = sandbox.clone();
        let served = self.ask(group, |reply| Ask::Put { sandbox, way, rules, reply });
        let (opened, served) = tokio::join!(opened, served);
        served.and(opened)
    }

    /// Has a sandbox's flows judged by other rules. Answers when they hold everywhere: no byte of a
    /// flow that they do not allow passes after that. After a failure the rules are as they were.
    pub async fn change(
        &self,
        group: &GroupKey,
        sandbox: &SandboxId,
        rules: Rules,
    ) -> Result<(), EgressError> {
        let wanted = self.wanted(group, &rules)?;
        let (byways, id, sandbox) = (Arc::clone(&self.byways), sandbox.clone(), sandbox.clone());
        let served = self.ask(group, |reply| Ask::Change { sandbox, rules, reply }).await;
        if let Err(EgressError::Refused { .. } | EgressError::NotHeld { .. }) = served {
            return served;
        }
        // Also when the process cannot be told now: what is not allowed any more ends here.
        served.and(off_thread(move || byways.change(&id, wanted)).await)
    }

    fn wanted(&self, group: &GroupKey, rules: &Rules) -> Result<Wanted, EgressError> {
        let policy = Policy::parse(&rules.policy)
            .map_err(|error| EgressError::Refused { reason: error.to_string() })?;
        let lifted = self.shared.setup().lifted(group);
        let (group, generation, passing) = (group.clone(), rules.generation, rules.passing);
        Ok(Wanted { group, generation, policy, passing, lifted })
    }

    /// Has all policies of a group refer to the values that there are now. Answers when these hold:
    /// no request is sent with another after that, and one whose value is gone is denied.
    pub async fn revalue(&self, group: &GroupKey) -> Result<(), EgressError> {
        // Of a group that nobody asked anything of nobody has any.
        if !self.groups().known.contains_key(group) {
            return Ok(());
        }
        self.ask(group, |reply| Ask::Revalue { reply }).await
    }

    /// The group is no more: what is known of it is let go of. It has no sandbox.
    pub async fn forget(&self, group: &GroupKey) {
        let known = self.groups().known.get(group).cloned();
        if let Some(known) = known {
            let _ = known.asks.send(Ask::Forget).await;
        }
    }

    /// Ends a sandbox's flows. Answers when its sockets are closed.
    pub async fn remove(&self, group: &GroupKey, sandbox: &SandboxId) {
        let (byways, id) = (Arc::clone(&self.byways), sandbox.clone());
        off_thread(move || byways.remove(&id)).await;
        // Of a group that nobody asked anything of there is nothing to remove.
        if !self.groups().known.contains_key(group) {
            return;
        }
        let sandbox = sandbox.clone();
        if let Err(error) = self.ask(group, |reply| Ask::Remove { sandbox, reply }).await {
            // It goes with its process, or when that is found again.
            warn!(error:% = error_chain(&error); "a sandbox's egress is not removed yet");
        }
    }

    /// Everything that an earlier agent left was asked for again: what is there beside it goes.
    pub async fn settle(&self) {
        let asks: Vec<_> = {
            let mut groups = self.groups();
            groups.settled = true;
            groups.known.values().map(|group| group.asks.clone()).collect()
        };
        for asks in asks {
            let _ = asks.send(Ask::Settled).await;
        }
        let byways = Arc::clone(&self.byways);
        off_thread(move || byways.settle()).await;
        let known: Vec<String> = self.groups().known.keys().map(name_of).collect();
        let shared = Arc::clone(&self.shared);
        let swept = off_thread(move || sweep(&shared, &known)).await;
        if let Err(error) = swept {
            warn!(error:% = error_chain(&error); "egress processes without a group are left");
        }
    }

    /// Tells the processes when the node's addresses or its name servers are others now.
    pub async fn refresh(&self) {
        let config = self.shared.config.clone();
        let byways = Arc::clone(&self.byways);
        let load = move || {
            let now = Setup::load(&config)?;
            byways.guard(now.guard());
            Ok::<_, EgressError>(now)
        };
        let now = match off_thread(load).await {
            Ok(now) => now,
            Err(error) => {
                warn!(error:% = error_chain(&error); "egress is configured as it was");
                return;
            }
        };
        let asks: Vec<_> = {
            let mut setup = self.shared.setup.write().unwrap_or_else(PoisonError::into_inner);
            if !now.differs(&setup) {
                return;
            }
            *setup = now;
            self.groups().known.values().map(|group| group.asks.clone()).collect()
        };
        info!("addresses or name servers of the node are others");
        for asks in asks {
            let _ = asks.send(Ask::Configure).await;
        }
    }

    /// What of the packets that slots let past is on no record, as of the last minute.
    pub fn unrecorded(&self) -> Unrecorded {
        self.byways.unrecorded()
    }

    /// Looks at it now. Blocks.
    pub fn reconcile(&self) {
        self.byways.reconcile();
    }

    /// Bytes from and to sandboxes that passed proxies by.
    pub async fn bypassed(&self) -> (u64, u64) {
        let byways = Arc::clone(&self.byways);
        off_thread(move || byways.traffic()).await
    }

    /// How many sandboxes have a way past their proxy.
    pub fn byways(&self) -> usize {
        self.byways.count()
    }

    /// How many processes serve, and how many sandboxes are to be served.
    pub fn counts(&self) -> (usize, usize) {
        let groups = self.groups();
        let gauges = || groups.known.values().map(|group| &group.gauges);
        let serving = gauges().filter(|gauges| gauges.serves.load(Ordering::Relaxed)).count();
        (serving, gauges().map(|gauges| gauges.sandboxes.load(Ordering::Relaxed)).sum())
    }

    /// Leaves every process as it is, for the next agent. Nothing is asked of them any more.
    pub async fn stop(&self) {
        self.byways.detach();
        self.groups().known.clear();
        self.supervisors.close();
        self.supervisors.wait().await;
    }

    async fn ask(
        &self,
        group: &GroupKey,
        ask: impl FnOnce(oneshot::Sender<Result<(), EgressError>>) -> Ask,
    ) -> Result<(), EgressError> {
        let (reply, replied) = oneshot::channel();
        let asks = self.group(group).asks;
        asks.send(ask(reply)).await.map_err(|_| EgressError::Ended)?;
        replied.await.map_err(|_| EgressError::Ended)?
    }

    /// The group, with somebody who looks after its process.
    fn group(&self, key: &GroupKey) -> Group {
        let mut groups = self.groups();
        let settled = groups.settled;
        let group = groups.known.entry(key.clone()).or_insert_with(|| {
            let (asks, inbox) = mpsc::channel(INBOX_MAX);
            let (shared, gauges) = (Arc::clone(&self.shared), Arc::<Gauges>::default());
            let supervisor = Supervisor::new(shared, key.clone(), settled, Arc::clone(&gauges));
            self.supervisors.spawn(supervisor.run(inbox));
            Group { asks, gauges }
        });
        group.clone()
    }

    fn groups(&self) -> MutexGuard<'_, Groups> {
        // Nothing that holds the lock can panic half way through a change.
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// CAs were here once, with their keys as they are.
fn remove_former(folder: &Path) -> Result<(), EgressError> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(FileError::of("remove", folder)(error).into()),
        Ok(()) => {
            info!("CAs of an earlier release removed: groups have others from now on");
            Ok(())
        }
    }
}

/// A name that files and cgroups can have, and no other group has.
fn name_of(group: &GroupKey) -> String {
    hex(&Sha256::digest(group.to_string())[..NAME_BYTES])
}

/// Ends processes of groups that have no sandbox any more. Blocks.
fn sweep(shared: &Shared, known: &[String]) -> Result<(), EgressError> {
    let stray = |name: &str| !known.iter().any(|known| known == name);
    shared.cgroups.sweep(|name| name.strip_prefix(CGROUP_PREFIX).is_some_and(stray))?;
    let entries = match fs::read_dir(&shared.run) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(FileError::of("sweep", &shared.run)(error).into()),
    };
    for entry in entries {
        let entry = entry.map_err(FileError::of("sweep", &shared.run))?;
        let name = entry.file_name();
        let name = name.to_str().and_then(|name| name.strip_suffix(".sock"));
        if name.is_some_and(stray) {
            fs::remove_file(entry.path()).map_err(FileError::of("sweep", entry.path()))?;
        }
    }
    Ok(())
}
