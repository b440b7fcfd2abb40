//! The HTTP face: one file per resource, each decoding, calling one function and encoding.

mod answer;
mod body;
mod calls;
mod disk_images;
mod egress;
mod exec;
mod exec_stream;
mod files;
mod groups;
mod guard;
mod identity;
mod metrics;
mod node;
mod node_status;
mod output;
mod paging;
mod problem;
mod request;
mod router;
mod sandboxes;
mod secrets;
pub(crate) mod server;
mod snapshots;

use std::{
    sync::{Arc, atomic::AtomicBool},
    time::Instant,
};

use holdfast_api::model::GroupKey;
use holdfast_store::Store;
use tokio::sync::{Mutex, RwLock, RwLockReadGuard};
use tokio_util::sync::CancellationToken;

pub(crate) use self::{calls::Calls, groups::default_group, output::Budget, router::router};
use self::{problem::Problem, request::no_group};
use crate::{
    audit::AuditLog, auth::Tokens, config::Config, images::Images, metrics::Metrics,
    sandbox::Registry, tls::Serving,
};

/// What the handlers work with.
pub(crate) struct App {
    pub(crate) config: Config,
    pub(crate) store: Arc<Store>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) images: Arc<Images>,
    pub(crate) metrics: Arc<Metrics>,
    /// Held by whoever brings the metrics up to date.
    pub(crate) measuring: Mutex<()>,
    pub(crate) tokens: Tokens,
    pub(crate) audit: Arc<AuditLog>,
    /// The last line could not be written.
    pub(crate) audit_broken: AtomicBool,
    pub(crate) tls: Arc<Serving>,
    pub(crate) calls: Calls,
    pub(crate) output_budget: Arc<Budget>,
    /// Held while something is made in a group. Writing: the deletion of a group.
    pub(crate) making: RwLock<()>,
    pub(crate) stopping: AtomicBool,
    /// Set when streams are to be let go of: the daemon stops, and kept commands go on.
    pub(crate) halt: CancellationToken,
    pub(crate) started: Instant,
}

impl App {
    /// While this is held the group exists.
    async fn making_in(&self, group: &GroupKey) -> Result<RwLockReadGuard<'_, ()>, Problem> {
        let held = self.making.read().await;
        match self.store.group(group)? {
            Some(_) => Ok(held),
            None => Err(no_group(group)),
        }
    }
}
