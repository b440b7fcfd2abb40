//! One task that owns one sandbox from its creation until it is gone. Others send it asks and
//! watch its status.

use std::{
    sync::{Arc, Mutex, OnceLock},
    time::{Duration, Instant},
};

use futures_util::future::join;
use holdfast_model::{Event, State, StopReason};
use holdfast_store::{Intent, SandboxRecord, Step};
use holdfast_wire::vmm::{self, Exit};
use log::{info, warn};
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};

use super::{
    BootPhases, LaunchError,
    activity::Activity,
    asks::{Arrival, Ask, Beginning, Ending, Launch, Parted, ending},
    boot::{self, BootError, Origin},
    guest::GuestLink,
    launch::{Booted, Lent, Machine, us_since},
    node::Node,
    now_ms, policy,
    report::{ResumePhases, ResumeReport, Warmth},
    snapshots::Memory,
    status::{Live, Refusals, Status, stats},
    suspend::Suspend,
    templates::{Kind, Plan},
};
use crate::{
    blocking::off_thread,
    error_chain::error_chain,
    fault::{self, Point},
    images::Located,
    metrics::End,
};

/// How long a workload may take to end when the agent stops.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// How long the guest may take to power off after that.
const STOP_PATIENCE: Duration = Duration::from_secs(15);

/// A guest that goes on has answered by then, and begun what it was woken for.
const FIRST_TOUCHES: Duration = Duration::from_millis(100);

/// How long to wait for the other sign of an end (wait status, last message) when one came.
const SECOND_SIGN_PATIENCE: Duration = Duration::from_millis(500);

pub(super) struct Driver {
    pub(super) node: Arc<Node>,
    pub(super) record: SandboxRecord,
    pub(super) inbox: mpsc::Receiver<Ask>,
    pub(super) status: watch::Sender<Status>,
}

impl Driver {
    pub(super) fn new(
        node: Arc<Node>,
        record: SandboxRecord,
        inbox: mpsc::Receiver<Ask>,
    ) -> (Self, watch::Receiver<Status>) {
        let status = Status {
            state: record.state,
            gone: false,
            live: None,
            returned: true,
            refusals: Refusals::default(),
        };
        let (status, watched) = watch::channel(status);
        (Self { node, record, inbox, status }, watched)
    }

    /// Runs until the sandbox is gone or the agent stops.
    pub(super) async fn run(mut self, beginning: Beginning) {
        let mut parted = match beginning {
            Beginning::Launch(launch) => self.live(*launch).await,
            Beginning::TakeOver(machine) => self.take_over(*machine).await,
            Beginning::Wait => Parted::Ended,
        };
        loop {
            let ask = match parted {
                Parted::Asked(ask) => ask,
                Parted::Ended => match self.next_ask().await {
                    Some(ask) => ask,
                    None => return,
                },
            };
            parted = match ask {
                Ask::Delete if self.delete().await => return,
                Ask::Stop(_) => return,
                Ask::Resume(wake) if self.is_suspended() => self.resume(*wake).await,
                Ask::Keep(reply) => {
                    let _ = reply.send(self.keep_suspended().await);
                    Parted::Ended
                }
                Ask::Lifecycle(json, reply) => {
                    let _ = reply.send(self.change_lifecycle(json).await);
                    Parted::Ended
                }
                Ask::Egress(json, reply) => {
                    let _ = reply.send(self.change_egress(json, false).await);
                    Parted::Ended
                }
                // Too late, or tried again when it is asked again.
                Ask::Delete | Ask::Suspend(_) | Ask::Resume(_) => Parted::Ended,
            };
        }
    }

    /// The next ask, of a client or of the sandbox's own policy. `None`: nobody will ask any more.
    async fn next_ask(&mut self) -> Option<Ask> {
        let saved = self.record.saved.as_ref().filter(|_| self.is_suspended());
        let delete_at = saved.and_then(|saved| policy::delete_at_ms(&self.record.spec, saved));
        let Some(delete_at) = delete_at else { return self.inbox.recv().await };
        let left = Duration::from_millis(delete_at.saturating_sub(now_ms()));
        match timeout(left, self.inbox.recv()).await {
            Ok(ask) => ask,
            Err(_) => {
                info!(id:% = self.record.id; "sandbox is deleted as its policy says");
                Some(Ask::Delete)
            }
        }
    }

    /// From launch to end.
    async fn live(&mut self, launch: Launch) -> Parted {
        let asked = Instant::now();
        let node = Arc::clone(&self.node);
        let turn = tokio::select! {
            // The semaphore is never closed, and without a turn there is only less order.
            turn = node.launches.acquire() => turn.ok(),
            ask = ending(&mut self.inbox) => {
                return Parted::Asked(self.not_launched(ask).await);
            }
        };
        let mut phases = BootPhases { turn_us: us_since(asked), ..BootPhases::default() };
        let began = Instant::now();
        let Launch { image, reservation, intent } = launch;
        let image = Arc::new(image);
        let lent = Lent { uid: node.uids.lease(), reservation };
        self.record.uid = Some(lent.uid.uid());
        self.note(Intent { step: Step::Lending, ..intent }).await;
        let kind = Kind::of(self.record.image, &self.record.spec);
        let prepared = {
            let (node, record) = (Arc::clone(&self.node), self.record.clone());
            let (image, kind) = (Arc::clone(&image), kind.clone());
            off_thread(move || {
                let began = Instant::now();
                // A clone begins where its snapshot stood, or boots from the disk if that was all.
                let (origin, taken) = match &record.saved {
                    Some(saved) => {
                        let taken = node.snapshots.take_up(&record.group, &saved.snapshot);
                        let taken = taken.map_err(LaunchError::Snapshot)?;
                        let stood = !matches!(taken.memory, Memory::Nothing);
                        let origin = if stood { Origin::Saved } else { Origin::Kernel(None) };
                        (origin, Some(taken))
                    }
                    None => match node.templates.plan(&kind) {
                        Plan::Boot => (Origin::Kernel(None), None),
                        Plan::BootAndKeep(making) => (Origin::Kernel(Some(making)), None),
                        Plan::FromTemplate(taken) => (Origin::Template, Some(taken)),
                    },
                };
                let fetched = taken.as_ref().map(|taken| (us_since(began), taken.fetched));
                let machine = Machine::prepare(&node, &record, &image, lent, taken)?;
                Ok::<_, LaunchError>((origin, fetched, machine))
            })
            .await
        };
        phases.prepare_us = us_since(began);
        let (origin, fetched, mut machine) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                node.metrics.boot_failed();
                self.fail(error_chain(&error)).await;
                return Parted::Ended;
            }
        };
        let of_template = matches!(origin, Origin::Template);
        let parted = match self.boot(&mut machine, (&image, origin), &mut phases).await {
            Booting::Booted(booted) => {
                drop(turn);
                if of_template {
                    node.metrics.template_used();
                }
                let mended = booted.mended;
                let report = fetched.map(|(memory_us, fetched)| {
                    let admission_us = phases.turn_us;
                    let waited =
                        ResumePhases { admission_us, memory_us, ..ResumePhases::default() };
                    let report = ResumeReport { phases: waited, fetched, mended };
                    (asked, report.with(machine.made, &phases))
                });
                self.serve(&mut machine, booted, Arrival { phases, report }).await
            }
            Booting::Failed => {
                if of_template {
                    // Whatever was wrong with it: the next one boots.
                    node.templates.forget(&kind);
                }
                Parted::Ended
            }
            Booting::Asked(ask) => Parted::Asked(ask),
        };
        self.part(machine, parted).await
    }

    /// From the machine of an earlier agent to its end.
    async fn take_over(&mut self, mut machine: Machine) -> Parted {
        let parted = match machine.connect(&self.node, &self.record).await {
            Ok(booted) => {
                // Before anybody finds it: then everything an earlier agent left is known.
                self.let_out(&mut machine).await;
                self.serve(&mut machine, booted, Arrival::default()).await
            }
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
                Parted::Ended
            }
        };
        self.part(machine, parted).await
    }

    /// Gives the machine back, or leaves it to the next agent.
    pub(super) async fn part(&mut self, machine: Machine, parted: Parted) -> Parted {
        let deleted = matches!(parted, Parted::Asked(Ask::Delete));
        if deleted {
            // Durable before anything is taken apart: a crash from here on ends in its deletion.
            self.change(Event::Delete, None).await;
            fault::at(Point::DeleteAccepted);
        }
        self.status.send_modify(|status| status.live = None);
        let detached = matches!(parted, Parted::Asked(Ask::Stop(Ending::Detach)));
        if detached && self.record.state == State::Running {
            machine.detach();
            return parted;
        }
        self.shut_in().await;
        off_thread(move || drop(machine)).await;
        self.status.send_modify(|status| status.returned = true);
        if self.is_suspended() {
            // Not before: the VMM's memory and the node's CPU are for others first.
            self.node.snapshots.changed();
        }
        if deleted {
            fault::at(Point::DeleteKilled);
        }
        parted
    }

    async fn boot(
        &mut self,
        machine: &mut Machine,
        (image, origin): (&Located, Origin),
        phases: &mut BootPhases,
    ) -> Booting {
        let (node, record) = (Arc::clone(&self.node), self.record.clone());
        let let_out = self.let_out(machine);
        let booting = boot::begin(machine, (&record, image), origin, &node, phases);
        let booted = tokio::select! {
            (booted, ()) = join(booting, let_out) => booted,
            ask = ending(&mut self.inbox) => {
                return Booting::Asked(self.not_launched(ask).await);
            }
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
    async fn not_launched(&mut self, ask: Ask) -> Ask {
        if matches!(ask, Ask::Stop(Ending::PowerOff)) {
            self.fail("the node was shut down while the sandbox was being made").await;
        }
        ask
    }

    /// While it is Running.
    pub(super) async fn serve(
        &mut self,
        machine: &mut Machine,
        booted: Booted,
        arrival: Arrival,
    ) -> Parted {
        let Booted { control, mut events, guest, network, .. } = booted;
        let phases = arrival.phases;
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
            network,
            vmm_pid: machine.vmm_pid(),
            cgroup: machine.cgroup_path().to_owned(),
            phases,
            report: OnceLock::new(),
            filling: machine.filling().cloned(),
            activity: Activity::new(),
            counted: Mutex::new(counted),
        });
        // In this order: whoever sees Running must find the way in.
        self.status.send_modify(|status| {
            status.live = Some(Arc::clone(&live));
            status.returned = false;
        });
        if taken_over {
            info!(id:% = self.record.id, vmm_pid = machine.vmm_pid(); "sandbox taken over");
        } else if self.record.state == State::Resuming {
            self.change(Event::GuestReady, None).await;
            fault::at(Point::ResumeRunning);
            node.metrics.resumed();
            info!(
                id:% = self.record.id, vmm_pid = machine.vmm_pid(), prepare_us = phases.prepare_us,
                spawn_us = phases.spawn_us, restore_us = phases.boot_us, tell_us = phases.start_us;
                "sandbox resumed"
            );
        } else {
            self.change(Event::GuestReady, None).await;
            fault::at(Point::CreateRunning);
            node.metrics.booted(&phases);
            info!(
                id:% = self.record.id, vmm_pid = machine.vmm_pid(), turn_us = phases.turn_us,
                prepare_us = phases.prepare_us, spawn_us = phases.spawn_us,
                boot_us = phases.boot_us, start_us = phases.start_us;
                "sandbox runs"
            );
        }
        let mut is_hot = false;
        if let Some((asked, mut report)) = arrival.report {
            is_hot = report.fetched.warmth == Warmth::Hot;
            report.phases.total_us = us_since(asked);
            node.metrics.went_on(&report);
            info!(id:% = self.record.id, report:?; "what it took to go on");
            // Nobody else sets it.
            let _ = live.report.set(report);
        }
        let mut note_at = is_hot.then(|| Instant::now() + FIRST_TOUCHES);
        let mut idle_after = policy::idle_after(&self.record.spec);
        let mut look_at = Instant::now() + idle_after.unwrap_or_default();
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(note_at.unwrap_or(look_at).into()),
                    if note_at.is_some() =>
                {
                    note_at = None;
                    self.note_touched(machine);
                }
                () = tokio::time::sleep_until(look_at.into()), if idle_after.is_some() => {
                    let after = idle_after.unwrap_or_default();
                    if live.is_idle(after).await {
                        live.count(&node.metrics).await;
                        let mode = policy::suspend_mode(&self.record.spec);
                        let how = Suspend { reason: StopReason::Idle, mode };
                        if self.suspend(machine, &live, how).await {
                            return Parted::Ended;
                        }
                    }
                    look_at = Instant::now() + live.next_look(after);
                }
                ask = self.inbox.recv() => match ask {
                    Some(Ask::Delete) => {
                        live.count(&node.metrics).await;
                        node.metrics.ended(End::Deleted);
                        return Parted::Asked(Ask::Delete);
                    }
                    Some(Ask::Stop(Ending::Suspend)) => {
                        live.count(&node.metrics).await;
                        if !self.suspend_with_the_node(machine, &live).await {
                            node.metrics.ended(End::AgentStopped);
                            self.power_off(machine, &guest).await;
                        }
                        return Parted::Asked(Ask::Stop(Ending::Suspend));
                    }
                    Some(Ask::Stop(Ending::PowerOff)) => {
                        live.count(&node.metrics).await;
                        node.metrics.ended(End::AgentStopped);
                        self.power_off(machine, &guest).await;
                        return Parted::Asked(Ask::Stop(Ending::PowerOff));
                    }
                    Some(Ask::Stop(Ending::Detach)) | None => {
                        return Parted::Asked(Ask::Stop(Ending::Detach));
                    }
                    Some(Ask::Suspend(how)) => {
                        live.count(&node.metrics).await;
                        if self.suspend(machine, &live, how).await {
                            return Parted::Ended;
                        }
                    }
                    Some(Ask::Keep(reply)) => {
                        let _ = reply.send(self.keep_running(machine, &live).await);
                    }
                    Some(Ask::Lifecycle(json, reply)) => {
                        let _ = reply.send(self.change_lifecycle(json).await);
                        idle_after = policy::idle_after(&self.record.spec);
                        look_at = Instant::now() + live.next_look(idle_after.unwrap_or_default());
                    }
                    Some(Ask::Egress(json, reply)) => {
                        let _ = reply.send(self.change_egress(json, true).await);
                    }
                    // It runs.
                    Some(Ask::Resume(_)) => {}
                },
                event = events.recv() => match event {
                    Some(vmm::Event::Exited(exit)) => {
                        self.bury(machine, Some(exit)).await;
                        return Parted::Ended;
                    }
                    Some(vmm::Event::DeviceStopped { device, reason }) => {
                        warn!(id:% = self.record.id, device:%, reason:%; "a device was stopped");
                        node.metrics.device_stopped();
                    }
                    Some(vmm::Event::GuestReady) => {}
                    None => {
                        let _ = timeout(SECOND_SIGN_PATIENCE, machine.ended()).await;
                        self.bury(machine, None).await;
                        return Parted::Ended;
                    }
                },
                _ = machine.ended() => {
                    let last_word = timeout(SECOND_SIGN_PATIENCE, last_word(&mut events)).await;
                    self.bury(machine, last_word.ok().flatten()).await;
                    return Parted::Ended;
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
        let reason = format!("the node was shut down, and the microVM {how} with it");
        // What it did since its last suspend is lost, and no more than that.
        let back = self.record.saved.is_some();
        self.change(if back { Event::FellBack } else { Event::Lost }, Some(reason)).await;
    }
}

/// How a boot came out.
pub(super) enum Booting {
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
