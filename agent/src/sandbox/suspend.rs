//! Suspend and resume of one sandbox, by its driver.
//!
//! The order is what makes it safe: stand still, copy, make durable, only then let the microVM go.
//! Until then every failure has it go on as if nothing had been. A resume leaves the snapshot as it
//! is, so that it can be tried again.
//!
//! In mode Disk there is no memory to copy: the guest holds its disk still, the disk is copied, and a
//! resume boots anew from it. What the guest has not written by then is lost, so one that does not
//! hold its disk still is not suspended.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::join;
use holdfast_model::{Event, SnapshotId, State, StopReason, SuspendMode};
use holdfast_store::{SandboxRecord, Saved};
use holdfast_wire::{
    guest::Quiesce,
    vmm::{Reply, ToVmm},
};
use log::{info, warn};
use tokio::time::{sleep, timeout};

use super::{
    SuspendError,
    asks::{Arrival, Parted, Wake, ending},
    boot,
    driver::{Booting, Driver},
    launch::{self, Lent, Machine, ms_since, us_since},
    memory::{self, GuestMemory},
    now_ms, policy,
    report::{ResumePhases, ResumeReport, Warmth},
    snapshots::{Copied, Pin, TakenUp},
    status::{Live, stats},
};
use crate::{
    blocking::off_thread,
    error_chain::error_chain,
    fault::{self, Point},
    images::Located,
    random::random_id,
};

/// How long a guest that is to be copied whole may take to write what it has not written. It is
/// stopped anyway after that, and writes it when it goes on.
const WRITE_PATIENCE: Duration = Duration::from_secs(5);

/// How long a guest holds its disk still that nobody tells to go on.
const HOLD_MS: u32 = 30_000;

/// How long a node that is shut down waits for a sandbox to be suspended, the wait for its turn
/// included. holdfastd.service gives the agent longer than this and a power-off together.
const NODE_STOP_PATIENCE: Duration = Duration::from_secs(75);

/// A guest reports what it freed by itself, some two seconds later, and this is as long as that is
/// waited for. It is over when nothing came for the pause.
const GIVE_BACK_PATIENCE: Duration = Duration::from_secs(4);
const GIVE_BACK_PAUSE: Duration = Duration::from_millis(500);

/// How a sandbox is suspended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Suspend {
    pub(super) reason: StopReason,
    pub(super) mode: SuspendMode,
}

/// A guest that stands still, copied.
struct Still {
    copied: Copied,
    /// Empty in mode Disk.
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
        how: Suspend,
    ) -> bool {
        let Suspend { reason, mode } = how;
        let began = Instant::now();
        // First of all: whoever comes from here on waits for the end of this, and wakes it again.
        self.change(Event::Suspend, None).await;
        fault::at(Point::SuspendAccepted);
        match self.save(machine, live, how).await {
            Ok(saved) => {
                let older = self.record.saved.replace(saved);
                // The commit: from here on it is Suspended, whatever happens to the microVM.
                self.change(Event::Saved, None).await;
                fault::at(Point::SuspendCommitted);
                self.node.metrics.suspended();
                info!(id:% = self.record.id, reason:?, mode:?, ms = ms_since(began); "sandbox suspended");
                self.forget(older);
                true
            }
            Err(error) => {
                let why = format!("it was not suspended: {}", error_chain(&error));
                warn!(id:% = self.record.id, reason:% = why; "sandbox goes on");
                self.node.metrics.suspend_failed();
                // A VMM that does not answer this is found out by its events, or by the next call.
                let _ = live.control.demand(ToVmm::Resume).await;
                if mode == SuspendMode::Disk {
                    // One that does not hear it lets its disk go by itself.
                    let _ = timeout(WRITE_PATIENCE, live.guest.thaw()).await;
                }
                self.status.send_modify(|status| {
                    status.live = Some(Arc::clone(live));
                    status.refusals.add(why);
                });
                self.change(Event::NotSaved, None).await;
                false
            }
        }
    }

    /// Suspends it for the node is shut down. Whether that was done in time; if not, it runs on.
    pub(super) async fn suspend_with_the_node(
        &mut self,
        machine: &Machine,
        live: &Arc<Live>,
    ) -> bool {
        let mode = policy::suspend_mode(&self.record.spec);
        let how = Suspend { reason: StopReason::NodeStopped, mode };
        let node = Arc::clone(&self.node);
        let suspended = async {
            // The semaphore is never closed, and without a turn there is only less order.
            let _turn = node.last_suspends.acquire().await;
            self.suspend(machine, live, how).await
        };
        if let Ok(suspended) = timeout(NODE_STOP_PATIENCE, suspended).await {
            return suspended;
        }
        warn!(id:% = self.record.id; "there was no time to suspend it with the node");
        // What was written so far no record names: the next start sweeps it.
        if self.record.state == State::Stopping {
            let _ = live.control.demand(ToVmm::Resume).await;
            let _ = timeout(WRITE_PATIENCE, live.guest.thaw()).await;
            self.change(Event::NotSaved, None).await;
        }
        false
    }

    async fn save(
        &self,
        machine: &Machine,
        live: &Live,
        how: Suspend,
    ) -> Result<Saved, SuspendError> {
        let Suspend { reason, mode } = how;
        match mode {
            SuspendMode::Memory => self.have_written(live, reason).await,
            SuspendMode::Disk => self.have_held(live).await?,
        }
        fault::at(Point::SuspendQuiet);
        let still = self.copy(machine, live, mode).await?;
        fault::at(Point::SuspendCopied);
        let snapshot = self.commit(still).await?;
        fault::at(Point::SuspendDurable);
        let network = live.network.clone();
        Ok(Saved { snapshot, at_ms: now_ms(), reason, of_another: false, mode, network })
    }

    /// Has the guest write what it has not written, so that little is lost should its memory be, and
    /// drop what it has on its disks too, if it is to. It is suspended whatever comes of it.
    async fn have_written(&self, live: &Live, reason: StopReason) {
        let drop_caches = self.node.drop_caches;
        let asked = live.guest.quiesce(Quiesce { drop_caches, hold_ms: None });
        let why = match timeout(WRITE_PATIENCE, asked).await {
            Ok(Ok(())) => {
                // Whoever asked waits for it; nobody waits for one that nobody uses.
                if drop_caches && reason == StopReason::Idle {
                    give_back(live).await;
                }
                return;
            }
            Ok(Err(error)) => error_chain(&error),
            Err(_) => format!("it was not done within {} s", WRITE_PATIENCE.as_secs()),
        };
        warn!(id:% = self.record.id, reason:% = why; "the guest has not written all it has");
    }

    async fn have_held(&self, live: &Live) -> Result<(), SuspendError> {
        let held = live.guest.quiesce(Quiesce { drop_caches: false, hold_ms: Some(HOLD_MS) });
        held.await.map_err(|error| SuspendError::NotHeld { reason: error_chain(&error) })
    }

    /// Has the guest stand still and copies all of it. It stands still after that, whatever came of
    /// it.
    async fn copy(
        &self,
        machine: &Machine,
        live: &Live,
        mode: SuspendMode,
    ) -> Result<Still, SuspendError> {
        let snapshot = SnapshotId::from_random(random_id().map_err(SuspendError::Random)?);
        let refused = |reason| SuspendError::Refused { reason };
        let (node, disk) = (Arc::clone(&self.node), self.node.disks.path(&self.record.id));
        if mode == SuspendMode::Disk {
            live.control.demand(ToVmm::Pause).await?.map_err(refused)?;
            fault::at(Point::SuspendPaused);
            let copied = off_thread(move || node.snapshots.copy_disk(snapshot, &disk)).await?;
            return Ok(Still { copied, state: Vec::new() });
        }
        // What is missing of its memory is in no copy of it.
        machine.filled().await.map_err(refused)?;
        let state = stand_still(live).await?;
        fault::at(Point::SuspendPaused);
        let (pid, record) = (machine.vmm_pid(), self.record.clone());
        off_thread(move || {
            let memory = GuestMemory::of(pid, record.spec.resources.memory.bytes());
            let memory = memory.map_err(SuspendError::Memory)?;
            let parent = record.saved.as_ref().map(|saved| &saved.snapshot);
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
            copied.take_disk(&node.disks.path(&record.id))?;
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
        let began = Instant::now();
        // Most of it while it runs: how long it stands still does not grow with its memory.
        let ahead = self.copy_ahead(machine).await?;
        let pausing = Instant::now();
        let still = match ahead {
            Some(copied) => self.copy_rest(machine, live, copied).await,
            None => self.copy(machine, live, SuspendMode::Memory).await,
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

    /// Notes what its guest has touched since it went on, behind everybody's back: the next resume
    /// has that ready.
    pub(super) fn note_touched(&self, machine: &Machine) {
        let Some(saved) = self.record.saved.clone() else { return };
        let (node, pid) = (Arc::clone(&self.node), machine.vmm_pid());
        let bytes = self.record.spec.resources.memory.bytes();
        tokio::task::spawn_blocking(move || node.snapshots.look(&saved.snapshot, pid, bytes));
    }

    /// From a snapshot to the end of what runs then.
    pub(super) async fn resume(&mut self, wake: Wake) -> Parted {
        let Some(saved) = self.record.saved.clone() else { return Parted::Ended };
        let Wake { image, reservation, asked, admission_us } = wake;
        let image = Arc::new(image);
        let lent = Lent { uid: self.node.uids.lease(), reservation };
        self.record.uid = Some(lent.uid.uid());
        self.change(Event::Resume, None).await;
        fault::at(Point::ResumeAccepted);
        let began = Instant::now();
        let mut phases = launch::BootPhases::default();
        let prepared = {
            let (node, record) = (Arc::clone(&self.node), self.record.clone());
            let image = Arc::clone(&image);
            off_thread(move || {
                let began = Instant::now();
                let taken: TakenUp =
                    node.snapshots.take_up_lazily(&record.group, &saved.snapshot)?;
                let (memory_us, fetched) = (us_since(began), taken.fetched);
                let machine = Machine::prepare(&node, &record, &image, lent, Some(taken))?;
                Ok::<_, SuspendError>((machine, memory_us, fetched))
            })
            .await
        };
        phases.prepare_us = us_since(began);
        let (mut machine, memory_us, fetched) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                self.not_resumed(error_chain(&error)).await;
                return Parted::Ended;
            }
        };
        fault::at(Point::ResumeSpawned);
        let boots = fetched.warmth == Warmth::Booted;
        let image = boots.then_some(&*image);
        let parted = match self.restore(&mut machine, image, &mut phases).await {
            Booting::Booted(booted) => {
                let waited = ResumePhases { admission_us, memory_us, ..ResumePhases::default() };
                let mended = booted.mended;
                let report = ResumeReport { phases: waited, fetched, mended };
                let report = Some((asked, report.with(machine.made, &phases)));
                self.serve(&mut machine, booted, Arrival { phases, report }).await
            }
            Booting::Failed => Parted::Ended,
            Booting::Asked(ask) => Parted::Asked(ask),
        };
        self.part(machine, parted).await
    }

    /// `image`: it boots from that and its disk.
    async fn restore(
        &mut self,
        machine: &mut Machine,
        image: Option<&Located>,
        phases: &mut launch::BootPhases,
    ) -> Booting {
        let (node, record) = (Arc::clone(&self.node), self.record.clone());
        let let_out = self.let_out(machine);
        let going_on = async {
            match image {
                Some(image) => {
                    let origin = boot::Origin::Kernel(None);
                    boot::begin(machine, (&record, image), origin, &node, phases).await
                }
                None => boot::go_on(machine, &record, &node, phases).await,
            }
        };
        let restored = tokio::select! {
            (restored, ()) = join(going_on, let_out) => restored,
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
    Ok(state)
}

/// Waits until the guest has given back what it freed, or gives no more.
async fn give_back(live: &Live) {
    let given = async || {
        let stats = stats(&live.control).await.unwrap_or_default();
        stats.balloon.map_or(0, |balloon| balloon.given_back_bytes)
    };
    let before = given().await;
    let settled = async {
        let mut last = before;
        loop {
            sleep(GIVE_BACK_PAUSE).await;
            let now = given().await;
            if now == last && now != before {
                return;
            }
            last = now;
        }
    };
    let _ = timeout(GIVE_BACK_PATIENCE, settled).await;
}
