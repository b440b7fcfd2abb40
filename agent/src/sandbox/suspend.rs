//! Suspend and resume of one sandbox, by its driver.
//!
//! The order is what makes it safe: stand still, copy, make durable, only then let the microVM go.
//! Until then every failure has it go on as if nothing had been. A resume leaves the snapshot as it
//! is, so that it can be tried again.

use std::sync::Arc;

use holdfast_model::{Event, SnapshotId, State, StopReason};
use holdfast_store::{SandboxRecord, Saved};
use holdfast_wire::vmm::{Reply, ToVmm};
use log::{info, warn};

use super::{
    SuspendError, boot,
    driver::{Booting, Driver, Parted, Wake, ending},
    launch::{self, Lent, Machine, ms_since, us_since},
    memory::{self, GuestMemory},
    now_ms,
    snapshots::{Copied, Pin},
    status::Live,
};
use crate::{
    blocking::off_thread,
    error_chain::error_chain,
    fault::{self, Point},
    random::random_id,
};

/// A guest that stands still, copied.
struct Still {
    copied: Copied,
    state: Vec<u8>,
}

/// What a sandbox was at one instant.
pub(super) struct Kept {
    /// Keeps it from being removed until something names it that is durable.
    pub(super) pin: Pin,
    /// On disk, what it shares with others included.
    pub(super) bytes: u64,
    /// The sandbox.
    pub(super) of: SandboxRecord,
}

impl Driver {
    /// Whether it is suspended now. If not, it runs on.
    pub(super) async fn suspend(
        &mut self,
        machine: &Machine,
        live: &Arc<Live>,
        reason: StopReason,
    ) -> bool {
        let began = std::time::Instant::now();
        // First of all: whoever comes from here on waits for the end of this, and wakes it again.
        self.change(Event::Suspend, None).await;
        fault::at(Point::SuspendAccepted);
        match self.save(machine, live, reason).await {
            Ok(saved) => {
                let older = self.record.saved.replace(saved);
                // The commit: from here on it is Suspended, whatever happens to the microVM.
                self.change(Event::Saved, None).await;
                fault::at(Point::SuspendCommitted);
                self.node.metrics.suspended();
                info!(id:% = self.record.id, reason:?, ms = ms_since(began); "sandbox suspended");
                self.forget(older);
                true
            }
            Err(error) => {
                let why = format!("it was not suspended: {}", error_chain(&error));
                warn!(id:% = self.record.id, reason:% = why; "sandbox goes on");
                self.node.metrics.suspend_failed();
                // A VMM that does not answer this is found out by its events, or by the next call.
                let _ = live.control.demand(ToVmm::Resume).await;
                self.status.send_modify(|status| {
                    status.live = Some(Arc::clone(live));
                    status.refusals.add(why);
                });
                self.change(Event::NotSaved, None).await;
                false
            }
        }
    }

    async fn save(
        &self,
        machine: &Machine,
        live: &Live,
        reason: StopReason,
    ) -> Result<Saved, SuspendError> {
        let still = self.copy(machine, live).await?;
        fault::at(Point::SuspendCopied);
        let snapshot = self.commit(still).await?;
        fault::at(Point::SuspendDurable);
        Ok(Saved { snapshot, at_ms: now_ms(), reason, of_another: false })
    }

    /// Has the guest stand still and copies all of it. It stands still after that, whatever came of
    /// it.
    async fn copy(&self, machine: &Machine, live: &Live) -> Result<Still, SuspendError> {
        let snapshot = SnapshotId::from_random(random_id().map_err(SuspendError::Random)?);
        // What is missing of its memory is in no copy of it.
        machine.filled().await.map_err(|reason| SuspendError::Refused { reason })?;
        let state = stand_still(live).await?;
        let node = Arc::clone(&self.node);
        let (pid, record) = (machine.vmm_pid(), self.record.clone());
        off_thread(move || {
            let memory = GuestMemory::of(pid, record.spec.resources.memory.bytes());
            let memory = memory.map_err(SuspendError::Memory)?;
            let parent = record.saved.as_ref().map(|saved| &saved.snapshot);
            let disk = node.disks.path(&record.id);
            let copied = node.snapshots.copy(snapshot, parent, &memory, &disk)?;
            Ok(Still { copied, state })
        })
        .await
    }

    /// Copies the memory while the guest runs and marks what it writes meanwhile. `None`: this host
    /// keeps no such marks.
    async fn copy_ahead(&self, machine: &Machine) -> Result<Option<Copied>, SuspendError> {
        let snapshot = SnapshotId::from_random(random_id().map_err(SuspendError::Random)?);
        machine.filled().await.map_err(|reason| SuspendError::Refused { reason })?;
        let node = Arc::clone(&self.node);
        let (pid, record) = (machine.vmm_pid(), self.record.clone());
        off_thread(move || {
            if !memory::mark_writes(pid).map_err(SuspendError::Memory)? {
                return Ok(None);
            }
            let memory = GuestMemory::of(pid, record.spec.resources.memory.bytes());
            let memory = memory.map_err(SuspendError::Memory)?;
            let parent = record.saved.as_ref().map(|saved| &saved.snapshot);
            Ok(Some(node.snapshots.copy_memory(snapshot, parent, &memory)?))
        })
        .await
    }

    /// Has the guest stand still and copies what of it was not yet, or has changed since. It stands
    /// still after that, whatever came of it.
    async fn copy_rest(
        &self,
        machine: &Machine,
        live: &Live,
        mut copied: Copied,
    ) -> Result<Still, SuspendError> {
        let state = stand_still(live).await?;
        let node = Arc::clone(&self.node);
        let (pid, record) = (machine.vmm_pid(), self.record.clone());
        off_thread(move || {
            let bytes = record.spec.resources.memory.bytes();
            node.snapshots.copy_memory_again(&mut copied, pid, bytes)?;
            node.snapshots.copy_disk(&mut copied, &node.disks.path(&record.id))?;
            Ok(Still { copied, state })
        })
        .await
    }

    /// Makes a copy durable. The guest may run meanwhile.
    async fn commit(&self, still: Still) -> Result<SnapshotId, SuspendError> {
        let (node, group) = (Arc::clone(&self.node), self.record.group.clone());
        let Still { copied, state } = still;
        let id = copied.id().clone();
        off_thread(move || node.snapshots.commit(&group, copied, &state, now_ms())).await?;
        Ok(id)
    }

    /// Keeps what it is now while it runs on.
    pub(super) async fn keep_running(
        &self,
        machine: &Machine,
        live: &Live,
    ) -> Result<Kept, SuspendError> {
        let kept = self.keep(machine, live).await;
        self.node.metrics.snapshot(kept.is_ok());
        kept
    }

    async fn keep(&self, machine: &Machine, live: &Live) -> Result<Kept, SuspendError> {
        let began = std::time::Instant::now();
        // Most of it while it runs: how long it stands still does not grow with its memory.
        let ahead = self.copy_ahead(machine).await?;
        let pausing = std::time::Instant::now();
        let still = match ahead {
            Some(copied) => self.copy_rest(machine, live, copied).await,
            None => self.copy(machine, live).await,
        };
        // A VMM that does not answer this is found out by its events, or by the next call.
        let goes_on = live.control.demand(ToVmm::Resume).await;
        let paused_us = us_since(pausing);
        let still = still?;
        goes_on?.map_err(|reason| SuspendError::Refused { reason })?;
        fault::at(Point::SnapshotCopied);
        let data = self.commit(still).await?;
        fault::at(Point::SnapshotDurable);
        info!(id:% = self.record.id, snapshot:% = data, paused_us, ms = ms_since(began); "sandbox saved");
        self.node.metrics.stood_still(paused_us);
        self.kept(data).await
    }

    /// What it is kept as while it is Suspended, for others to have too.
    pub(super) async fn keep_suspended(&self) -> Result<Kept, SuspendError> {
        match (&self.record.saved, self.record.state) {
            (Some(saved), State::Suspended) => self.kept(saved.snapshot.clone()).await,
            (_, state) => Err(SuspendError::NotRunning { id: self.record.id.clone(), state }),
        }
    }

    async fn kept(&self, data: SnapshotId) -> Result<Kept, SuspendError> {
        let (node, of) = (Arc::clone(&self.node), self.record.clone());
        // Before anything else can happen to the sandbox, and with it to its data.
        let pin = node.snapshots.pin(&data);
        let bytes = off_thread(move || node.snapshots.bytes(&of.group, &data)).await?;
        Ok(Kept { pin, bytes, of: self.record.clone() })
    }

    /// Removes a snapshot that was replaced, unless it is needed, behind everybody's back.
    fn forget(&self, older: Option<Saved>) {
        let Some(older) = older else { return };
        let node = Arc::clone(&self.node);
        tokio::task::spawn_blocking(move || node.snapshots.released_or_logged(&older.snapshot));
    }

    /// From a snapshot to the end of what runs then.
    pub(super) async fn resume(&mut self, wake: Wake) -> Parted {
        let Some(saved) = self.record.saved.clone() else { return Parted::Ended };
        let Wake { image, reservation } = wake;
        let lent = Lent { uid: self.node.uids.lease(), reservation };
        self.record.uid = Some(lent.uid.uid());
        self.change(Event::Resume, None).await;
        fault::at(Point::ResumeAccepted);
        let began = std::time::Instant::now();
        let mut phases = launch::BootPhases::default();
        let prepared = {
            let (node, record) = (Arc::clone(&self.node), self.record.clone());
            off_thread(move || {
                let taken = node.snapshots.take_up_lazily(&record.group, &saved.snapshot)?;
                Ok::<_, SuspendError>(Machine::prepare(&node, &record, &image, lent, Some(taken))?)
            })
            .await
        };
        phases.prepare_us = us_since(began);
        let mut machine = match prepared {
            Ok(machine) => machine,
            Err(error) => {
                self.not_resumed(error_chain(&error)).await;
                return Parted::Ended;
            }
        };
        fault::at(Point::ResumeSpawned);
        self.let_out(&mut machine).await;
        let parted = match self.restore(&mut machine, &mut phases).await {
            Booting::Booted(booted) => self.serve(&mut machine, booted, phases).await,
            Booting::Failed => Parted::Ended,
            Booting::Asked(ask) => Parted::Asked(ask),
        };
        self.part(machine, parted).await
    }

    async fn restore(&mut self, machine: &mut Machine, phases: &mut launch::BootPhases) -> Booting {
        let restored = tokio::select! {
            restored = boot::go_on(machine, &self.record, &self.node, phases) => restored,
            ask = ending(&mut self.inbox) => return Booting::Asked(ask),
        };
        match restored {
            Ok(booted) => {
                fault::at(Point::ResumeRestored);
                return Booting::Booted(booted);
            }
            Err(boot::BootError::Failed(error)) => self.not_resumed(error_chain(&error)).await,
            Err(boot::BootError::Ended(last_word)) => {
                let (_, reason) = machine.post_mortem(last_word);
                self.not_resumed(reason).await;
            }
        }
        let (serial, vmm) = machine.last_words();
        warn!(id:% = self.record.id, serial:?, vmm:?; "last words of a microVM");
        Booting::Failed
    }

    async fn not_resumed(&mut self, reason: String) {
        let why = format!("it was not resumed: {reason}");
        warn!(id:% = self.record.id, reason:% = why; "sandbox stays suspended");
        self.node.metrics.resume_failed();
        self.record.uid = None;
        self.change(Event::NotResumed, Some(why.clone())).await;
        // Behind the move: whoever reads this finds it Suspended.
        self.status.send_modify(|status| status.refusals.add(why));
    }

    /// Whether a resume may begin.
    pub(super) fn is_suspended(&self) -> bool {
        self.record.state == State::Suspended
    }
}

/// Has the guest stand still and asks for the state of its devices.
async fn stand_still(live: &Live) -> Result<Vec<u8>, SuspendError> {
    let refused = |reason| SuspendError::Refused { reason };
    live.control.demand(ToVmm::Pause).await?.map_err(refused)?;
    let state = match live.control.ask(ToVmm::Save).await? {
        Reply::Saved { state } => state,
        Reply::Refused { reason } => return Err(refused(reason)),
        other => return Err(refused(format!("it answered {other:?} to Save"))),
    };
    fault::at(Point::SuspendPaused);
    Ok(state)
}
