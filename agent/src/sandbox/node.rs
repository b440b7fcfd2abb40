//! What the drivers of a node's sandboxes share.

use std::{path::PathBuf, sync::Arc};

use holdfast_jail::{CgroupTree, Jailer, Slots};
use holdfast_store::Store;
use tokio::sync::Semaphore;

use super::{disk::Disks, limits::Traffic, snapshots::Snapshots, templates::Templates, uid::Uids};
use crate::{
    config::Smt,
    credentials::Vault,
    egress::{Decisions, Egress},
    images::Images,
    metrics::Metrics,
};

/// What every driver shares.
pub(super) struct Node {
    pub(super) store: Arc<Store>,
    pub(super) images: Arc<Images>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) disks: Disks,
    pub(super) snapshots: Snapshots,
    pub(super) vault: Arc<Vault>,
    pub(super) decisions: Arc<Decisions>,
    pub(super) templates: Templates,
    pub(super) uids: Uids,
    /// Launches under way.
    pub(super) launches: Semaphore,
    /// Suspends under way when the node is shut down: each is a thread that copies and packs.
    pub(super) last_suspends: Semaphore,
    pub(super) cgroups: CgroupTree,
    pub(super) traffic: Traffic,
    pub(super) smt: Smt,
    /// Whether guests drop clean pages of files before they are saved.
    pub(super) drop_caches: bool,
    /// Folder of the run folders.
    pub(super) run: PathBuf,
    pub(super) vmm: PathBuf,
    pub(super) pager: PathBuf,
    pub(super) jailer: Jailer,
    pub(super) slots: Slots,
    pub(super) egress: Arc<Egress>,
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
}
