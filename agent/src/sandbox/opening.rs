//! The registry of a node as it is opened: made of what the configuration says, and of what an
//! earlier agent left.

use std::{io, sync::Arc};

use holdfast_blob::Bucket;
use holdfast_jail::{BlockDevice, CgroupTree, Jailer, Slots};
use holdfast_model::Mib;
use holdfast_netpolicy::SANDBOX_RULESET;
use holdfast_scheduler::{Capacity, Factors, Scheduler};
use holdfast_store::Store;
use log::{info, warn};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use super::{
    StartError,
    disk::Disks,
    launch::launches_max,
    limits::Traffic,
    node::Node,
    registry::Registry,
    remote::keep_uploaded,
    snapshots::{Remote, SaveError, Snapshots},
    templates::Templates,
    uid::Uids,
};
use crate::{
    blocking::off_thread,
    config::Config,
    credentials::{Site, Vault},
    egress::{self, Decisions, Egress},
    error_chain::error_chain,
    images::Images,
    metrics::Metrics,
};

/// What the registry is made of.
pub struct Parts<'a> {
    pub config: &'a Config,
    pub store: Arc<Store>,
    pub images: Arc<Images>,
    pub metrics: Arc<Metrics>,
}

impl Registry {
    /// Repairs what an earlier agent left, then is ready.
    pub async fn start(parts: Parts<'_>) -> Result<Arc<Self>, StartError> {
        let paths = &parts.config.paths;
        let cgroups = CgroupTree::new(&paths.cgroups);
        if let Err(error) = cgroups.prepare() {
            // Not the end: the API, images and records work. A create says the same again.
            warn!(error:% = error_chain(&error), hint = error.hint(); "no sandbox can run");
        }
        let (state, store) = (paths.state.clone(), Arc::clone(&parts.store));
        let metrics = Arc::clone(&parts.metrics);
        let opened = Arc::clone(&store);
        let config = parts.config.clone();
        let vault = off_thread(move || Vault::open(&config, opened)).await?;
        let keys = Arc::clone(vault.keys());
        let remote = remote(parts.config)?;
        let hot_bytes_max = Mib(parts.config.snapshots.hot_mib).bytes();
        let templates_max = parts.config.snapshots.templates_max;
        let (snapshots, templates, decisions) = off_thread(move || {
            let decisions = Decisions::open(store, metrics)?;
            let snapshots = Snapshots::open(&state, keys, hot_bytes_max)?;
            let templates = Templates::open(&state, templates_max).map_err(SaveError::Folder)?;
            Ok::<_, SaveError>((snapshots.with_remote(remote), templates, decisions))
        })
        .await?;
        let egress = {
            let (config, metrics) = (parts.config.clone(), Arc::clone(&parts.metrics));
            let sink = egress::sink(Arc::clone(&decisions));
            let credentials = Arc::clone(&vault) as Arc<dyn egress::Credentials>;
            off_thread(move || Egress::open(&config, metrics, credentials, sink)).await?
        };
        let node = Arc::new(Node {
            store: parts.store,
            images: parts.images,
            metrics: parts.metrics,
            disks: Disks::new(&paths.state),
            snapshots,
            vault,
            decisions,
            templates,
            uids: Uids::default(),
            launches: Semaphore::new(launches_max()),
            last_suspends: Semaphore::new(
                std::thread::available_parallelism().map_or(1, usize::from),
            ),
            traffic: Traffic::new(&parts.config.limits, bounded_disk(parts.config, &cgroups)),
            smt: parts.config.host.smt,
            drop_caches: parts.config.snapshots.drop_caches,
            cgroups,
            run: paths.run.join("sandboxes"),
            vmm: paths.vmm.clone(),
            pager: paths.pager.clone(),
            jailer: Jailer::new(&paths.shim),
            slots: Slots::start(SANDBOX_RULESET),
            egress,
            kernel: paths.kernel.clone(),
            initramfs: paths.initramfs.clone(),
        });
        let limits = node_capacity()
            .map_err(|source| StartError::Folder {
                action: "read",
                path: "/proc/meminfo".into(),
                source,
            })?
            .offered(Mib(parts.config.capacity.host_memory_mib), factors(parts.config));
        let registry = Arc::new(Self {
            scheduler: Scheduler::new(limits, parts.config.limits.sandboxes_max),
            table: Arc::default(),
            drivers: TaskTracker::new(),
            state_folder: paths.state.clone(),
            snapshots_max: parts.config.limits.snapshots_max,
            last_count: tokio::sync::Mutex::default(),
            node: Arc::clone(&node),
        });
        let coming_back = registry.recover().await?;
        registry.node.egress.settle().await;
        if !coming_back.is_empty() {
            registry.drivers.spawn(Arc::clone(&registry).bring_back(coming_back));
        }
        registry.drivers.spawn(keep_uploaded(Arc::clone(&registry.node)));
        registry.drivers.spawn(Arc::clone(&registry.node.decisions).keep_written());
        info!(cpu:% = limits.cpu, memory:% = limits.memory; "sandboxes may use this much");
        Ok(registry)
    }
}

/// The disk whose traffic cgroups bound, or why there is none, in the log.
fn bounded_disk(config: &Config, cgroups: &CgroupTree) -> Option<BlockDevice> {
    let state = &config.paths.state;
    let reason = match BlockDevice::below(state) {
        Ok(Some(device)) if cgroups.bounds_io() => return Some(device),
        Ok(Some(_)) => "the cgroups have no io controller".to_owned(),
        Ok(None) => "the state folder is not on one disk".to_owned(),
        Err(error) => error_chain(&error),
    };
    warn!(path:% = state.display(), reason:%; "disk traffic is bounded by the VMMs alone");
    None
}

/// CPUs and memory of this machine.
fn node_capacity() -> io::Result<Capacity> {
    let cpus = std::thread::available_parallelism()?.get();
    let meminfo = fs_err::read_to_string("/proc/meminfo")?;
    let kib = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok())
        .ok_or_else(|| io::Error::other("/proc/meminfo has no MemTotal"))?;
    Ok(Capacity {
        cpu: holdfast_model::MilliCpu(u32::try_from(cpus * 1000).unwrap_or(u32::MAX)),
        memory: Mib(u32::try_from(kib / 1024).unwrap_or(u32::MAX)),
    })
}

fn factors(config: &Config) -> Factors {
    Factors {
        cpu_percent: percent(config.capacity.cpu_factor),
        memory_percent: percent(config.capacity.memory_factor),
    }
}

/// The configuration holds factors to 0.1 to 100.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped before")]
fn percent(factor: f64) -> u32 {
    (factor * 100.0).round().clamp(0.0, 1_000_000.0) as u32
}

/// The remote store, if there is to be one.
fn remote(config: &Config) -> Result<Option<Remote>, StartError> {
    let settings = &config.remote;
    let Some(site) = Site::of(settings) else { return Ok(None) };
    let runtime = tokio::runtime::Handle::current();
    let bucket = Bucket::open(&settings.location()?, &settings.secrets(), runtime)?;
    let rate = Mib(settings.upload_mib_per_second).bytes();
    let marks = config.paths.state.join("remote");
    Ok(Some(Remote::new(bucket, site, rate, marks)?))
}
