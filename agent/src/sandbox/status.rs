//! What is known of a sandbox outside its driver, and the way into a running one.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use holdfast_model::State;
use holdfast_wire::vmm::{self, Reply, ToVmm};
use tokio::time::timeout;

use super::{
    BootPhases, ResumeReport, activity::Activity, control::Control, filling::Filling,
    guest::GuestLink,
};
use crate::metrics::Metrics;

/// How long a VMM is waited for that is asked for its counters only: it answers at once, or it is
/// asked again the next time.
const COUNT_PATIENCE: Duration = Duration::from_secs(1);

/// How often a sandbox is looked at that could be suspended, were it not in use.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// What is known of a sandbox outside its driver.
#[derive(Debug, Clone)]
pub(super) struct Status {
    pub(super) state: State,
    /// Nothing of it is left, its record included.
    pub(super) gone: bool,
    /// `Some` while it is Running.
    pub(super) live: Option<Arc<Live>>,
    /// Its VMM has ended, and what the node lent it is back.
    pub(super) returned: bool,
    pub(super) refusals: Refusals,
}

/// How often it was not suspended or not resumed, and why the last time.
#[derive(Debug, Clone, Default)]
pub(super) struct Refusals {
    pub(super) count: u64,
    reason: String,
}

impl Refusals {
    pub(super) fn add(&mut self, reason: String) {
        self.count += 1;
        self.reason = reason;
    }

    /// The last, unless there were no more than `count`.
    pub(super) fn since(&self, count: u64) -> Option<&str> {
        (self.count > count).then_some(&*self.reason)
    }
}

/// How to reach a running microVM.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) control: Control,
    pub(super) guest: GuestLink,
    /// What it was told of its link to the outside, as a digest. `None`: not by this agent.
    pub(super) network: Option<String>,
    pub(super) vmm_pid: u32,
    pub(super) cgroup: PathBuf,
    pub(super) phases: BootPhases,
    /// Of one that went on from something that was kept, once it is told.
    pub(super) report: OnceLock<ResumeReport>,
    /// Of one whose memory is brought while it runs.
    pub(super) filling: Option<Filling>,
    pub(super) activity: Arc<Activity>,
    /// What of the VMM's counters is in the metrics.
    pub(super) counted: Mutex<vmm::Stats>,
}

impl Live {
    /// Whether nobody has used it for so long, and nothing was left to run in it.
    pub(super) async fn is_idle(&self, after: Duration) -> bool {
        let unused = || self.activity.idle_for().is_some_and(|idle| idle >= after);
        // In this order: what begins while the guest is asked counts too. A guest that does not
        // answer is not taken for idle.
        unused() && self.guest.info().await.is_ok_and(|info| info.execs == 0) && unused()
    }

    /// When it is worth looking again.
    pub(super) fn next_look(&self, after: Duration) -> Duration {
        match self.activity.idle_for() {
            Some(idle) if idle < after => after - idle,
            // It is used, or could not be suspended.
            _ => after.clamp(Duration::from_millis(100), LOOK_EVERY),
        }
    }

    /// Asks the VMM for its counters and adds what is new to the metrics.
    pub(super) async fn count(&self, metrics: &Metrics) {
        let Some(now) = stats(&self.control).await else { return };
        // Counters are only read and replaced under the lock.
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        metrics.counted(&counted, &now);
        *counted = now;
    }
}

/// A VMM's counters, if it tells them in time.
pub(super) async fn stats(control: &Control) -> Option<vmm::Stats> {
    match timeout(COUNT_PATIENCE, control.ask(ToVmm::Stats)).await {
        Ok(Ok(Reply::Stats(stats))) => Some(stats),
        _ => None,
    }
}
