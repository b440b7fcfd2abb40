//! Suspend and resume of one sandbox, by its driver.
//!
//! The order is what makes it safe: stand still, copy, make durable, only then let the microVM go.
//! Until then every failure has it go on as if nothing had been. A resume leaves the snapshot as it
//! is, so that it can be tried again.

use std::sync::Arc;

use holdfast_model::{Event, SnapshotId, State, StopReason};
use holdfast_store::Saved;
use holdfast_wire::vmm::{Reply, ToVmm};
use log::{info, warn};

use super::{
    SuspendError,
    driver::{Booting, Driver, Parted, Wake, ending},
    launch::{self, Lent, Machine, ms_since},
    memory::GuestMemory,
    now_ms,
    snapshots::TakenUp,
    status::Live,
};
use crate::{
    blocking::off_thread,
    error_chain::error_chain,
    fault::{self, Point},
    random::random_id,
};

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
        let snapshot = SnapshotId::from_random(random_id().map_err(SuspendError::Random)?);
        let refused = |reason| SuspendError::Refused { reason };
        live.control.demand(ToVmm::Pause).await?.map_err(refused)?;
        let state = match live.control.ask(ToVmm::Save).await? {
            Reply::Saved { state } => state,
            Reply::Refused { reason } => return Err(refused(reason)),
            other => return Err(refused(format!("it answered {other:?} to Save"))),
        };
        fault::at(Point::SuspendPaused);
        let node = Arc::clone(&self.node);
        let (pid, record, id) = (machine.vmm_pid(), self.record.clone(), snapshot.clone());
        off_thread(move || {
            let memory = GuestMemory::of(pid, record.spec.resources.memory.bytes());
            let memory = memory.map_err(SuspendError::Memory)?;
            let parent = record.saved.as_ref().map(|saved| &saved.snapshot);
            let disk = node.disks.path(&record.id);
            let copied = node.snapshots.copy(id, parent, &memory, &disk)?;
            fault::at(Point::SuspendCopied);
            node.snapshots.commit(&record.group, copied, &state, now_ms())?;
            fault::at(Point::SuspendDurable);
            Ok::<_, SuspendError>(())
        })
        .await?;
        Ok(Saved { snapshot, at_ms: now_ms(), reason })
    }

    /// Removes a snapshot that was replaced, behind everybody's back.
    fn forget(&self, older: Option<Saved>) {
        let Some(older) = older else { return };
        let (node, id) = (Arc::clone(&self.node), self.record.id.clone());
        tokio::task::spawn_blocking(move || node.snapshots.removed_or_logged(&id, &older.snapshot));
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
                let taken: TakenUp = node.snapshots.take_up(&record.group, &saved.snapshot)?;
                Ok::<_, SuspendError>(Machine::prepare(&node, &record, &image, lent, Some(taken))?)
            })
            .await
        };
        phases.prepare_ms = ms_since(began);
        let mut machine = match prepared {
            Ok(machine) => machine,
            Err(error) => {
                self.not_resumed(error_chain(&error)).await;
                return Parted::Ended;
            }
        };
        fault::at(Point::ResumeSpawned);
        let parted = match self.restore(&mut machine, &mut phases).await {
            Booting::Booted(booted) => self.serve(&mut machine, booted, phases).await,
            Booting::Failed => Parted::Ended,
            Booting::Asked(ask) => Parted::Asked(ask),
        };
        self.part(machine, parted).await
    }

    async fn restore(&mut self, machine: &mut Machine, phases: &mut launch::BootPhases) -> Booting {
        let cpu = self.record.spec.resources.cpu;
        let restored = tokio::select! {
            restored = launch::restore(machine, cpu, phases) => restored,
            ask = ending(&mut self.inbox) => return Booting::Asked(ask),
        };
        match restored {
            Ok(booted) => {
                fault::at(Point::ResumeRestored);
                return Booting::Booted(booted);
            }
            Err(launch::BootError::Failed(error)) => self.not_resumed(error_chain(&error)).await,
            Err(launch::BootError::Ended(last_word)) => {
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
