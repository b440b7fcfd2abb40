//! One task that owns one sandbox from its creation until it is gone. Others send it asks and
//! watch its status.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use holdfast_jail::{CgroupTree, Jailer};
use holdfast_model::{Event, State};
use holdfast_scheduler::Reservation;
use holdfast_store::{Intent, Operation, SandboxRecord, Step, Store, StoreError};
use holdfast_wire::vmm::{self, Exit, Reply, ToVmm};
use log::{info, warn};
use tokio::{
    sync::{Semaphore, mpsc, watch},
    time::timeout,
};

use super::{
    BootPhases,
    control::Control,
    disk::Disks,
    guest::GuestLink,
    launch::{self, BootError, Booted, Lent, Machine, ms_since},
    limits::Traffic,
    uid::Uids,
};
use crate::{
    blocking::off_thread,
    config::Smt,
    error_chain::error_chain,
    fault::{self, Point},
    images::{Images, Located},
    metrics::{End, Metrics},
};

/// Asks waiting for one sandbox. It takes few kinds, and one waiting of each would do: more means
/// it is stuck, and whoever asks again need not be queued.
pub(super) const INBOX_MAX: usize = 8;

/// How long a workload may take to end when the agent stops.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// How long the guest may take to power off after that.
const STOP_PATIENCE: Duration = Duration::from_secs(15);

/// How long to wait for the other sign of an end (wait status, last message) when one came.
const SECOND_SIGN_PATIENCE: Duration = Duration::from_millis(500);

/// How long a VMM is waited for that is asked for its counters only: it answers at once, or it is
/// asked again the next time.
const COUNT_PATIENCE: Duration = Duration::from_secs(1);

/// What every driver shares.
pub(super) struct Node {
    pub(super) store: Arc<Store>,
    pub(super) images: Arc<Images>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) disks: Disks,
    pub(super) uids: Uids,
    /// Launches under way.
    pub(super) launches: Semaphore,
    pub(super) cgroups: CgroupTree,
    pub(super) traffic: Traffic,
    pub(super) smt: Smt,
    /// Folder of the run folders.
    pub(super) run: PathBuf,
    pub(super) vmm: PathBuf,
    pub(super) jailer: Jailer,
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    Delete,
    /// The agent stops.
    Stop(Ending),
}

/// What a stop of the agent does to microVMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// They go on, for the next agent. One that is being made is made anew by it.
    Detach,
    /// The node is shut down: they are powered off in good order.
    PowerOff,
}

/// What is known of a sandbox outside its driver.
#[derive(Debug, Clone)]
pub(super) struct Status {
    pub(super) state: State,
    /// Nothing of it is left, its record included.
    pub(super) gone: bool,
    /// `Some` while it is Running.
    pub(super) live: Option<Arc<Live>>,
}

/// How to reach a running microVM.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) control: Control,
    pub(super) guest: GuestLink,
    pub(super) vmm_pid: u32,
    pub(super) cgroup: PathBuf,
    pub(super) phases: BootPhases,
    /// What of the VMM's counters is in the metrics.
    pub(super) counted: Mutex<vmm::Stats>,
}

impl Live {
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
async fn stats(control: &Control) -> Option<vmm::Stats> {
    match timeout(COUNT_PATIENCE, control.ask(ToVmm::Stats)).await {
        Ok(Ok(Reply::Stats(stats))) => Some(stats),
        _ => None,
    }
}

/// How a driver begins.
pub(super) enum Beginning {
    Launch(Box<Launch>),
    /// Its machine runs already.
    TakeOver(Box<Machine>),
    /// The sandbox only waits to be deleted.
    Wait,
}

/// What a launch needs besides the record.
pub(super) struct Launch {
    pub(super) image: Located,
    pub(super) reservation: Reservation,
    /// What the journal says of it.
    pub(super) intent: Intent,
}

pub(super) struct Driver {
    node: Arc<Node>,
    record: SandboxRecord,
    inbox: mpsc::Receiver<Ask>,
    status: watch::Sender<Status>,
}

impl Driver {
    pub(super) fn new(
        node: Arc<Node>,
        record: SandboxRecord,
        inbox: mpsc::Receiver<Ask>,
    ) -> (Self, watch::Receiver<Status>) {
        let status = Status { state: record.state, gone: false, live: None };
        let (status, watched) = watch::channel(status);
        (Self { node, record, inbox, status }, watched)
    }

    /// Runs until the sandbox is gone or the agent stops.
    pub(super) async fn run(mut self, beginning: Beginning) {
        let mut ask = match beginning {
            Beginning::Launch(launch) => self.live(*launch).await,
            Beginning::TakeOver(machine) => self.take_over(*machine).await,
            Beginning::Wait => None,
        };
        loop {
            match ask {
                Some(Ask::Delete) if self.delete().await => return,
                Some(Ask::Stop(_)) => return,
                Some(Ask::Delete) | None => {}
            }
            let Some(next) = self.inbox.recv().await else { return };
            ask = Some(next);
        }
    }

    /// From launch to end. Gives the ask that ended it, if it was one.
    async fn live(&mut self, launch: Launch) -> Option<Ask> {
        let began = Instant::now();
        let node = Arc::clone(&self.node);
        let turn = tokio::select! {
            // The semaphore is never closed, and without a turn there is only less order.
            turn = node.launches.acquire() => turn.ok(),
            ask = self.inbox.recv() => return Some(self.not_launched(ask).await),
        };
        let mut phases = BootPhases { turn_ms: ms_since(began), ..BootPhases::default() };
        let began = Instant::now();
        let Launch { image, reservation, intent } = launch;
        let image = Arc::new(image);
        let lent = Lent { uid: node.uids.lease(), reservation };
        self.record.uid = Some(lent.uid.uid());
        self.note(Intent { step: Step::Lending, ..intent }).await;
        let prepared = {
            let (node, record) = (Arc::clone(&self.node), self.record.clone());
            let image = Arc::clone(&image);
            off_thread(move || Machine::prepare(&node, &record, &image, lent)).await
        };
        phases.prepare_ms = ms_since(began);
        let mut machine = match prepared {
            Ok(machine) => machine,
            Err(error) => {
                node.metrics.boot_failed();
                self.fail(error_chain(&error)).await;
                return None;
            }
        };
        let ask = match self.boot(&mut machine, &image, &mut phases).await {
            Booting::Booted(booted) => {
                drop(turn);
                self.serve(&mut machine, booted, phases).await
            }
            Booting::Failed => None,
            Booting::Asked(ask) => Some(ask),
        };
        self.part(machine, ask).await;
        ask
    }

    /// From the machine of an earlier agent to its end.
    async fn take_over(&mut self, mut machine: Machine) -> Option<Ask> {
        let ask = match machine.connect().await {
            Ok(booted) => self.serve(&mut machine, booted, BootPhases::default()).await,
            Err(error) => {
                // A VMM that is just ending does not answer either.
                let reason = match timeout(SECOND_SIGN_PATIENCE, machine.ended()).await {
                    Ok(_) => {
                        let (end, reason) = machine.post_mortem(None);
                        self.node.metrics.ended(end);
                        format!("while the agent was away {reason}")
                    }
                    Err(_) => {
                        format!("the microVM cannot be taken over: {}", error_chain(&error))
                    }
                };
                self.lose(&machine, reason).await;
                None
            }
        };
        self.part(machine, ask).await;
        ask
    }

    /// Gives the machine back, or leaves it to the next agent.
    async fn part(&mut self, machine: Machine, ask: Option<Ask>) {
        if ask == Some(Ask::Delete) {
            // Durable before anything is taken apart: a crash from here on ends in its deletion.
            self.change(Event::Delete, None).await;
            fault::at(Point::DeleteAccepted);
        }
        self.status.send_modify(|status| status.live = None);
        if ask == Some(Ask::Stop(Ending::Detach)) && self.record.state == State::Running {
            machine.detach();
            return;
        }
        off_thread(move || drop(machine)).await;
        if ask == Some(Ask::Delete) {
            fault::at(Point::DeleteKilled);
        }
    }

    async fn boot(
        &mut self,
        machine: &mut Machine,
        image: &Located,
        phases: &mut BootPhases,
    ) -> Booting {
        let (node, record) = (Arc::clone(&self.node), self.record.clone());
        let booted = tokio::select! {
            booted = launch::boot(machine, &record, image, &node, phases) => booted,
            ask = self.inbox.recv() => return Booting::Asked(self.not_launched(ask).await),
        };
        match booted {
            Ok(booted) => return Booting::Booted(booted),
            Err(BootError::Failed(error)) => {
                node.metrics.boot_failed();
                self.lose(machine, error_chain(&error)).await;
            }
            Err(BootError::Ended(last_word)) => {
                let (end, reason) = machine.post_mortem(last_word);
                node.metrics.boot_failed();
                node.metrics.ended(end);
                self.lose(machine, format!("booting failed: {reason}")).await;
            }
        }
        Booting::Failed
    }

    /// An ask came before the sandbox ran.
    async fn not_launched(&mut self, ask: Option<Ask>) -> Ask {
        let ask = ask.unwrap_or(Ask::Stop(Ending::Detach));
        if ask == Ask::Stop(Ending::PowerOff) {
            self.fail("the node was shut down while the sandbox was being made").await;
        }
        ask
    }

    /// While it is Running.
    async fn serve(
        &mut self,
        machine: &mut Machine,
        booted: Booted,
        phases: BootPhases,
    ) -> Option<Ask> {
        let Booted { control, mut events, guest } = booted;
        let node = Arc::clone(&self.node);
        let taken_over = self.record.state == State::Running;
        // What an earlier agent has counted, this one does not count again.
        let counted = if taken_over {
            stats(&control).await.unwrap_or_default()
        } else {
            vmm::Stats::default()
        };
        let live = Arc::new(Live {
            control,
            guest: guest.clone(),
            vmm_pid: machine.vmm_pid(),
            cgroup: machine.cgroup_path().to_owned(),
            phases,
            counted: Mutex::new(counted),
        });
        // In this order: whoever sees Running must find the way in.
        self.status.send_modify(|status| status.live = Some(Arc::clone(&live)));
        if taken_over {
            info!(id:% = self.record.id, vmm_pid = machine.vmm_pid(); "sandbox taken over");
        } else {
            self.change(Event::GuestReady, None).await;
            fault::at(Point::CreateRunning);
            node.metrics.booted(&phases);
            info!(
                id:% = self.record.id, vmm_pid = machine.vmm_pid(), turn_ms = phases.turn_ms,
                prepare_ms = phases.prepare_ms, spawn_ms = phases.spawn_ms,
                boot_ms = phases.boot_ms, start_ms = phases.start_ms;
                "sandbox runs"
            );
        }
        loop {
            tokio::select! {
                ask = self.inbox.recv() => match ask {
                    Some(Ask::Delete) => {
                        live.count(&node.metrics).await;
                        node.metrics.ended(End::Deleted);
                        return Some(Ask::Delete);
                    }
                    Some(Ask::Stop(Ending::PowerOff)) => {
                        live.count(&node.metrics).await;
                        node.metrics.ended(End::AgentStopped);
                        self.power_off(machine, &guest).await;
                        return Some(Ask::Stop(Ending::PowerOff));
                    }
                    Some(Ask::Stop(Ending::Detach)) | None => {
                        return Some(Ask::Stop(Ending::Detach));
                    }
                },
                event = events.recv() => match event {
                    Some(vmm::Event::Exited(exit)) => {
                        self.bury(machine, Some(exit)).await;
                        return None;
                    }
                    Some(vmm::Event::DeviceStopped { device, reason }) => {
                        warn!(id:% = self.record.id, device:%, reason:%; "a device was stopped");
                        node.metrics.device_stopped();
                    }
                    Some(vmm::Event::GuestReady) => {}
                    None => {
                        let _ = timeout(SECOND_SIGN_PATIENCE, machine.ended()).await;
                        self.bury(machine, None).await;
                        return None;
                    }
                },
                _ = machine.ended() => {
                    let last_word = timeout(SECOND_SIGN_PATIENCE, last_word(&mut events)).await;
                    self.bury(machine, last_word.ok().flatten()).await;
                    return None;
                }
            }
        }
    }

    /// The machine ended by itself.
    async fn bury(&mut self, machine: &mut Machine, last_word: Option<Exit>) {
        let (end, reason) = machine.post_mortem(last_word);
        self.node.metrics.ended(end);
        self.lose(machine, reason).await;
    }

    /// Fails with the machine's last words in the log.
    async fn lose(&mut self, machine: &Machine, reason: String) {
        let (serial, vmm) = machine.last_words();
        warn!(id:% = self.record.id, serial:?, vmm:?; "last words of a microVM");
        self.fail(reason).await;
    }

    /// Powers the guest off in good order, for the node is shut down.
    async fn power_off(&mut self, machine: &Machine, guest: &GuestLink) {
        let off = async {
            if let Err(error) = guest.power_off(STOP_GRACE).await {
                warn!(id:% = self.record.id, error:%; "the guest does not power off");
                return;
            }
            let _ = machine.ended().await;
        };
        let in_order = timeout(STOP_GRACE + STOP_PATIENCE, off).await.is_ok();
        let how = if in_order { "was powered off" } else { "was ended" };
        self.fail(format!("the node was shut down, and the microVM {how} with it")).await;
    }

    async fn fail(&mut self, reason: impl Into<String>) {
        self.change(Event::Lost, Some(reason.into())).await;
    }

    /// Makes a move, durable before anybody sees it.
    async fn change(&mut self, event: Event, failure: Option<String>) {
        let from = self.record.state;
        let to = match from.after(event) {
            Ok(to) if to == from => return,
            Ok(to) => to,
            Err(refused) => {
                warn!(id:% = self.record.id, error:% = refused; "a move was refused");
                return;
            }
        };
        info!(id:% = self.record.id, from:? = from, event:? = event, to:? = to; "sandbox changed state");
        if let Some(reason) = &failure {
            warn!(id:% = self.record.id, reason:%; "sandbox failed");
        }
        self.record.state = to;
        self.record.failure = failure;
        if to == State::Deleting {
            self.note(Intent::new(&self.record.id, Operation::Delete)).await;
        } else {
            let (store, record) = (Arc::clone(&self.node.store), self.record.clone());
            let stored = off_thread(move || store.put_sandbox(&record)).await;
            self.doubt(stored);
        }
        self.status.send_modify(|status| {
            status.state = to;
            if to != State::Running {
                status.live = None;
            }
        });
    }

    /// Writes the record, and that something is under way about it.
    async fn note(&self, intent: Intent) {
        let (store, record) = (Arc::clone(&self.node.store), self.record.clone());
        let stored = off_thread(move || store.put_intent(&record, &intent)).await;
        self.doubt(stored);
    }

    fn doubt(&self, stored: Result<(), StoreError>) {
        if let Err(error) = stored {
            // The move stands: it happened. A restart finds the state before it and repairs that.
            warn!(id:% = self.record.id, error:% = error_chain(&error); "state not stored");
        }
    }

    /// Whether nothing is left. If something is, the next ask tries again.
    async fn delete(&mut self) -> bool {
        self.change(Event::Delete, None).await;
        let intent = Intent::new(&self.record.id, Operation::Delete);
        self.note(Intent { step: Step::Removing, ..intent }).await;
        let (node, id) = (Arc::clone(&self.node), self.record.id.clone());
        let removed = off_thread(move || {
            node.disks.remove(&id).map_err(|error| error_chain(&error))?;
            fault::at(Point::DeleteDisk);
            let removed = node.store.remove_sandbox(&id).map_err(|error| error_chain(&error));
            fault::at(Point::DeleteGone);
            removed
        });
        match removed.await {
            Ok(_) => {
                self.status.send_modify(|status| status.gone = true);
                info!(id:% = self.record.id; "sandbox deleted");
                true
            }
            Err(error) => {
                warn!(id:% = self.record.id, error:%; "sandbox not deleted");
                false
            }
        }
    }
}

/// How a boot came out.
enum Booting {
    Booted(Booted),
    Failed,
    Asked(Ask),
}

async fn last_word(events: &mut mpsc::Receiver<vmm::Event>) -> Option<Exit> {
    while let Some(event) = events.recv().await {
        if let vmm::Event::Exited(exit) = event {
            return Some(exit);
        }
    }
    None
}
