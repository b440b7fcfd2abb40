//! Every sandbox of this node, by id: makes them, finds them, hands calls to them.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures_util::{StreamExt, stream};
use holdfast_jail::{JailError, Usage, cgroup_usage};
use holdfast_model::{
    Event, GroupKey, Mib, SandboxId, SandboxSpec, SnapshotId, State, StopReason, SuspendMode,
    sandbox::{ImageSource, NewSandbox},
};
use holdfast_scheduler::{Capacity, Refusals, Reservation, Scheduler};
use holdfast_store::{DiskImageState, Intent, Operation, Put, SandboxRecord, Saved, StoreError};
use holdfast_wire::{
    guest::{Exec, ExecKey, Info},
    vmm::{self, Reply, ToVmm},
};
use tokio::{
    io::AsyncRead,
    sync::{mpsc, watch},
    time::timeout,
};
use tokio_util::task::TaskTracker;

use super::{
    BootPhases, CreateError, DeleteError, ExecError, ExecSession, FileReader, ResumeReport,
    StartError,
    asks::{Ask, Beginning, Ending, INBOX_MAX, Launch},
    driver::Driver,
    limits::{self, DiskBound},
    node::Node,
    now_ms,
    recover::{self, Recovered},
    status::{Live, Status},
};
use crate::{
    blocking::off_thread,
    egress::{Decisions, Egress},
    error_chain::error_chain,
    fault::{self, Point},
    images::Located,
    random::random_id,
};

/// How long a create waits for the sandbox to run before it answers Creating.
const CREATE_PATIENCE: Duration = Duration::from_secs(2);

/// How long a delete waits until nothing is left.
const DELETE_PATIENCE: Duration = Duration::from_secs(30);

/// VMMs that are asked for their counters at once.
const COUNTED_AT_ONCE: usize = 16;

/// How often VMMs are asked at most, however often somebody looks at the metrics.
const COUNT_EVERY: Duration = Duration::from_secs(5);

/// One sandbox as the registry knows it.
#[derive(Debug, Clone)]
pub(super) struct Handle {
    pub(super) inbox: mpsc::Sender<Ask>,
    pub(super) status: watch::Receiver<Status>,
}

#[derive(Debug, Default)]
pub(super) struct Table {
    handles: HashMap<SandboxId, Handle>,
    /// No new ones any more.
    pub(super) stopping: bool,
}

pub struct Registry {
    pub(super) node: Arc<Node>,
    pub(super) scheduler: Arc<Scheduler>,
    pub(super) table: Arc<Mutex<Table>>,
    pub(super) drivers: TaskTracker,
    pub(super) state_folder: PathBuf,
    pub(super) snapshots_max: u32,
    /// When the VMMs were last asked for their counters.
    pub(super) last_count: tokio::sync::Mutex<Option<Instant>>,
}

/// A sandbox that is to be.
pub(super) struct Draft {
    pub(super) group: GroupKey,
    pub(super) spec: SandboxSpec,
    pub(super) image: Located,
    pub(super) origin: Option<Origin>,
    pub(super) request_id: Option<String>,
}

/// Where a clone comes from.
pub(super) struct Origin {
    /// The one that the client named, if it did.
    pub(super) snapshot: Option<SnapshotId>,
    /// What it is kept as.
    pub(super) data: SnapshotId,
}

/// What a sandbox uses right now. Parts that could not be had are `None`.
#[derive(Debug, Clone)]
pub struct RuntimeDetails {
    pub vmm_pid: u32,
    pub vmm: Option<vmm::Stats>,
    pub guest: Option<Info>,
    pub cgroup: Usage,
    pub phases: BootPhases,
    /// Of one that went on from something that was kept.
    pub report: Option<ResumeReport>,
}

impl Draft {
    /// The record it is to have, Creating, and its image.
    fn into_record(self) -> Result<(SandboxRecord, Located), CreateError> {
        let Self { group, spec, image, origin, request_id } = self;
        let (from_snapshot, data) = origin.map(|it| (it.snapshot, it.data)).unzip();
        let saved = data.map(|snapshot| Saved {
            snapshot,
            at_ms: now_ms(),
            reason: StopReason::Asked,
            of_another: true,
            network: None,
            // What is another's says itself what it is.
            mode: SuspendMode::default(),
        });
        let gives_policy = spec.egress_json.is_some();
        let record = SandboxRecord {
            request_id,
            saved,
            from_snapshot: from_snapshot.flatten(),
            egress_generation: u64::from(gives_policy),
            ..SandboxRecord::accepted(
                SandboxId::from_random(random_id().map_err(CreateError::Random)?),
                group,
                spec,
                image.record.digest,
                now_ms(),
            )
        };
        Ok((record, image))
    }
}

impl Registry {
    /// Every group's egress process.
    pub fn egress(&self) -> &Egress {
        &self.node.egress
    }

    /// What was decided about the sandboxes' flows.
    pub fn decisions(&self) -> &Decisions {
        &self.node.decisions
    }

    /// How many network slots are made ahead.
    pub fn slots_ready(&self) -> usize {
        self.node.slots.ready()
    }

    /// Takes over what an earlier agent left, and waits until those that run can be reached. Gives
    /// those that ran until the node was shut down.
    pub(super) async fn recover(&self) -> Result<Vec<SandboxId>, StartError> {
        let (node, scheduler) = (Arc::clone(&self.node), Arc::clone(&self.scheduler));
        let (mut taken_over, mut coming_back) = (Vec::new(), Vec::new());
        for found in off_thread(move || recover::recover(&node, &scheduler)).await? {
            match found {
                Recovered::Running(record, machine) => {
                    taken_over.push(self.drive(record, Beginning::TakeOver(machine)));
                }
                Recovered::Waiting(record) => {
                    coming_back.extend(recover::comes_back(&record).then(|| record.id.clone()));
                    self.drive(record, Beginning::Wait);
                }
                Recovered::ToMake(record) => self.make_anew(record).await?,
            }
        }
        for mut status in taken_over {
            // A VMM that does not answer is given up by its driver in time.
            let decided = |status: &Status| status.live.is_some() || status.state != State::Running;
            let _ = status.wait_for(decided).await;
        }
        Ok(coming_back)
    }

    /// Launches a sandbox that an earlier agent accepted and did not finish.
    async fn make_anew(&self, mut record: SandboxRecord) -> Result<(), StartError> {
        let intent = self.node.store.intent(&record.id)?;
        let intent = intent.unwrap_or_else(|| Intent::new(&record.id, Operation::Create));
        // It was admitted once, and has been promised.
        let reservation = self.scheduler.take_again(limits::demand(record.spec.resources));
        match self.node.images.locate(record.image).await {
            Ok(Some(image)) => {
                let launch = Launch { image, reservation, intent };
                self.drive(record, Beginning::Launch(Box::new(launch)));
            }
            missing => {
                let reason = missing.err().map_or_else(String::new, |e| error_chain(&e));
                record.failure = Some(format!("its image is not on this node any more {reason}"));
                record.state = record.state.after(Event::Lost).unwrap_or(State::Failed);
                self.node.store.put_sandbox(&record)?;
                self.drive(record, Beginning::Wait);
            }
        }
        Ok(())
    }

    /// Makes a sandbox and waits until it runs, but not long: the record may still be Creating. A
    /// request made before finds its sandbox again.
    pub async fn create(
        &self,
        group: GroupKey,
        new: impl Into<NewSandbox>,
        request_id: Option<String>,
    ) -> Result<SandboxRecord, CreateError> {
        let (id, status) = self.accept(group, new.into(), request_id).await?;
        self.settled(id, status).await
    }

    /// Waits until a new sandbox runs, but not long.
    pub(super) async fn settled(
        &self,
        id: SandboxId,
        mut status: watch::Receiver<Status>,
    ) -> Result<SandboxRecord, CreateError> {
        let settled = |status: &Status| status.gone || status.state != State::Creating;
        let _ = timeout(CREATE_PATIENCE, status.wait_for(settled)).await;
        self.node.store.sandbox(&id)?.ok_or(CreateError::Gone { id })
    }

    /// Everything of a create that can be refused.
    async fn accept(
        &self,
        group: GroupKey,
        new: NewSandbox,
        request_id: Option<String>,
    ) -> Result<(SandboxId, watch::Receiver<Status>), CreateError> {
        if self.table().stopping {
            return Err(CreateError::Stopping);
        }
        // Until the record is written nothing else says that the image is in use.
        let _in_use = self.node.images.keep().await;
        match new {
            NewSandbox::OfImage(spec) => {
                let image = self.resolve(&group, &spec.image).await?;
                self.admit(Draft { group, spec, image, origin: None, request_id }).await
            }
            NewSandbox::OfSnapshot(clone) => self.accept_clone(group, clone, request_id).await,
        }
    }

    /// Writes the sandbox's record, if the node has room for it, and has it launched.
    pub(super) async fn admit(
        &self,
        draft: Draft,
    ) -> Result<(SandboxId, watch::Receiver<Status>), CreateError> {
        let demand = limits::demand(draft.spec.resources);
        let (record, image) = draft.into_record()?;
        if let Some(known) = self.made_before(&record.group, record.request_id.as_deref())? {
            return self.watch(&known).ok_or(CreateError::Gone { id: known });
        }
        let free = free_disk(&self.state_folder).map_err(CreateError::Disk)?;
        let reservation = self.scheduler.admit(demand, free)?;
        let (store, stored) = (Arc::clone(&self.node.store), record.clone());
        match off_thread(move || store.create_sandbox(&stored)).await? {
            Put::New => {
                fault::at(Point::CreateAccepted);
                self.node.decisions.begin(&record.id);
                Ok((record.id.clone(), self.make(record, image, reservation)))
            }
            Put::Existing(known) => self.watch(&known.id).ok_or(CreateError::Gone { id: known.id }),
        }
    }

    /// Writes the records of several sandboxes, if the node has room for all, and has them launched.
    pub(super) async fn admit_all(
        &self,
        drafts: Vec<Draft>,
    ) -> Result<Vec<(SandboxId, watch::Receiver<Status>)>, CreateError> {
        let mut admitted = Vec::with_capacity(drafts.len());
        for draft in drafts {
            let demand = limits::demand(draft.spec.resources);
            let free = free_disk(&self.state_folder).map_err(CreateError::Disk)?;
            // One that is refused gives those before it back.
            admitted.push((draft.into_record()?, self.scheduler.admit(demand, free)?));
        }
        let records: Vec<_> = admitted.iter().map(|((record, _), _)| record.clone()).collect();
        let store = Arc::clone(&self.node.store);
        off_thread(move || store.create_sandboxes(&records)).await?;
        fault::at(Point::ForkAccepted);
        let made = admitted.into_iter().map(|((record, image), reservation)| {
            (record.id.clone(), self.make(record, image, reservation))
        });
        Ok(made.collect())
    }

    /// Has a sandbox launched whose record is written.
    fn make(
        &self,
        record: SandboxRecord,
        image: Located,
        reservation: Reservation,
    ) -> watch::Receiver<Status> {
        let intent = Intent::new(&record.id, Operation::Create);
        self.drive(record, Beginning::Launch(Box::new(Launch { image, reservation, intent })))
    }

    /// A retried create must find its sandbox even on a node that is full by now.
    pub(super) fn made_before(
        &self,
        group: &GroupKey,
        request_id: Option<&str>,
    ) -> Result<Option<SandboxId>, StoreError> {
        if request_id.is_none() {
            return Ok(None);
        }
        let known = self.node.store.sandboxes(group)?;
        let same = |known: &SandboxRecord| known.request_id.as_deref() == request_id;
        Ok(known.into_iter().find(same).map(|known| known.id))
    }

    pub(super) fn watch(&self, id: &SandboxId) -> Option<(SandboxId, watch::Receiver<Status>)> {
        self.handle(id).map(|handle| (id.clone(), handle.status))
    }

    async fn resolve(
        &self,
        group: &GroupKey,
        source: &ImageSource,
    ) -> Result<Located, CreateError> {
        let images = &self.node.images;
        let digest = match source {
            ImageSource::Public(name) => match images.get_public(name) {
                Some(public) => public.digest,
                None => return Err(CreateError::NoPublicImage { name: name.clone() }),
            },
            ImageSource::Disk(id) => {
                let record = self.node.store.disk_image(id)?.filter(|r| r.group == *group);
                let record = record.ok_or_else(|| CreateError::NoDiskImage { id: id.clone() })?;
                match (record.state, record.digest) {
                    (DiskImageState::Ready, Some(digest)) => digest,
                    (state, _) => {
                        let reason = record.message.unwrap_or_else(|| format!("it is {state:?}"));
                        return Err(CreateError::DiskImageNotReady { id: id.clone(), reason });
                    }
                }
            }
        };
        let located = images.locate(digest).await.map_err(CreateError::ImageStore)?;
        located.ok_or(CreateError::NoImage { digest })
    }

    /// Gives the sandbox a driver.
    fn drive(&self, record: SandboxRecord, beginning: Beginning) -> watch::Receiver<Status> {
        let id = record.id.clone();
        let (inbox, asks) = mpsc::channel(INBOX_MAX);
        let (driver, status) = Driver::new(Arc::clone(&self.node), record, asks);
        let handle = Handle { inbox, status: status.clone() };
        self.table().handles.insert(id.clone(), handle);
        let table = Arc::clone(&self.table);
        self.drivers.spawn(async move {
            driver.run(beginning).await;
            table.lock().unwrap_or_else(PoisonError::into_inner).handles.remove(&id);
        });
        status
    }

    /// Ends the sandbox and removes everything of it. Answers when it is gone.
    pub async fn delete(&self, id: &SandboxId) -> Result<(), DeleteError> {
        let mut handle = self.handle(id).ok_or_else(|| DeleteError::NotFound { id: id.clone() })?;
        // A full inbox holds a Delete already, and a closed one is a driver that has just ended.
        let _ = handle.inbox.try_send(Ask::Delete);
        match timeout(DELETE_PATIENCE, handle.status.wait_for(|status| status.gone)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) if self.node.store.sandbox(id)?.is_none() => Ok(()),
            _ => Err(DeleteError::Slow { id: id.clone(), waited: DELETE_PATIENCE }),
        }
    }

    pub fn get(&self, id: &SandboxId) -> Result<Option<SandboxRecord>, StoreError> {
        self.node.store.sandbox(id)
    }

    /// The group's sandboxes in the order of their ids.
    pub fn list(&self, group: &GroupKey) -> Result<Vec<SandboxRecord>, StoreError> {
        self.node.store.sandboxes(group)
    }

    /// Starts a command. Dropping the session kills it, if it is not kept.
    pub async fn exec(&self, id: &SandboxId, exec: Exec) -> Result<ExecSession, ExecError> {
        let live = self.awake(id).await?;
        let busy = live.activity.begin();
        let session = live.guest.exec(exec).await;
        self.node.metrics.exec(session.is_ok());
        session.map(|session| session.using(busy))
    }

    /// Goes on with a kept command, from byte `from` of its output on.
    pub async fn attach(
        &self,
        id: &SandboxId,
        key: ExecKey,
        from: u64,
    ) -> Result<ExecSession, ExecError> {
        let live = self.awake(id).await?;
        let busy = live.activity.begin();
        live.guest.attach(key, from).await.map(|session| session.using(busy))
    }

    pub async fn read_file(&self, id: &SandboxId, path: String) -> Result<FileReader, ExecError> {
        let live = self.awake(id).await?;
        let busy = live.activity.begin();
        live.guest.read_file(path).await.map(|file| file.using(busy))
    }

    /// Writes a file: whole or not at all.
    pub async fn write_file(
        &self,
        id: &SandboxId,
        path: String,
        mode: Option<u32>,
        create_dirs: bool,
        body: impl AsyncRead + Unpin + Send,
    ) -> Result<(), ExecError> {
        let live = self.awake(id).await?;
        let _busy = live.activity.begin();
        live.guest.write_file(path, mode, create_dirs, body).await
    }

    pub async fn details(&self, id: &SandboxId) -> Result<RuntimeDetails, ExecError> {
        let live = self.live(id)?;
        let (vmm, guest) = tokio::join!(live.control.ask(ToVmm::Stats), live.guest.info());
        let vmm = match vmm {
            Ok(Reply::Stats(stats)) => Some(stats),
            _ => None,
        };
        Ok(RuntimeDetails {
            vmm_pid: live.vmm_pid,
            vmm,
            guest: guest.ok(),
            cgroup: cgroup_usage(&live.cgroup),
            phases: live.phases,
            report: live.report.get().map(|report| report.now(live.filling.as_ref())),
        })
    }

    /// What a running sandbox's cgroup has used. `None`: it does not run.
    pub fn usage(&self, id: &SandboxId) -> Option<Usage> {
        self.live(id).ok().map(|live| cgroup_usage(&live.cgroup))
    }

    /// How long the phases of a running sandbox's launch took. `None`: it does not run.
    pub fn phases(&self, id: &SandboxId) -> Option<BootPhases> {
        self.live(id).ok().map(|live| live.phases)
    }

    /// Process ids of the VMMs.
    pub fn vmm_pids(&self) -> Vec<u32> {
        self.all_live().iter().map(|live| live.vmm_pid).collect()
    }

    /// Brings the counters of every VMM into the metrics, unless that was done a moment ago.
    pub async fn count(&self) {
        let mut last = self.last_count.lock().await;
        if last.is_some_and(|last| last.elapsed() < COUNT_EVERY) {
            return;
        }
        let metrics = &self.node.metrics;
        stream::iter(self.all_live())
            .for_each_concurrent(COUNTED_AT_ONCE, async |live| live.count(metrics).await)
            .await;
        *last = Some(Instant::now());
    }

    fn all_live(&self) -> Vec<Arc<Live>> {
        self.table()
            .handles
            .values()
            .filter_map(|handle| handle.status.borrow().live.clone())
            .collect()
    }

    pub fn disk_bound(&self) -> DiskBound {
        self.node.traffic.disk_bound()
    }

    /// Whether cgroups can be made with all that sandboxes need.
    pub fn cgroups_ready(&self) -> Result<(), JailError> {
        self.node.cgroups.prepare()
    }

    /// Creates refused since the start, by what was short.
    pub fn refusals(&self) -> Refusals {
        self.scheduler.refusals()
    }

    /// What may be given away in all.
    pub fn limits(&self) -> Capacity {
        self.scheduler.limits()
    }

    /// What may still be given away.
    pub fn free(&self) -> Capacity {
        self.scheduler.free()
    }

    /// Lets every microVM go on without us, or ends it in good order. None is made any more.
    pub async fn stop(&self, ending: Ending) {
        let handles: Vec<Handle> = {
            let mut table = self.table();
            table.stopping = true;
            table.handles.values().cloned().collect()
        };
        for handle in handles {
            let _ = handle.inbox.send(Ask::Stop(ending)).await;
        }
        if let Some(remote) = self.node.snapshots.remote() {
            remote.stop();
        }
        self.node.decisions.stop();
        self.drivers.close();
        self.drivers.wait().await;
        self.node.egress.stop().await;
    }

    pub(super) fn live(&self, id: &SandboxId) -> Result<Arc<Live>, ExecError> {
        let handle = self.handle(id).ok_or_else(|| ExecError::NotFound { id: id.clone() })?;
        let status = handle.status.borrow();
        // Not by its state: the record, from which a caller may know that it is Running, says so a
        // moment earlier.
        let not_running = || ExecError::NotRunning { id: id.clone(), state: status.state };
        status.live.clone().ok_or_else(not_running)
    }

    pub(super) fn handle(&self, id: &SandboxId) -> Option<Handle> {
        self.table().handles.get(id).cloned()
    }

    pub(super) fn table(&self) -> MutexGuard<'_, Table> {
        // Nothing that holds the lock can panic half way through a change.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) fn free_disk(folder: &Path) -> io::Result<Mib> {
    let stat = rustix::fs::statvfs(folder)?;
    let mib = stat.f_bavail.saturating_mul(stat.f_frsize) / Mib(1).bytes();
    Ok(Mib(u32::try_from(mib).unwrap_or(u32::MAX)))
}
