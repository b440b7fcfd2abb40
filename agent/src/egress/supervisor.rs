//! One task that owns one group's egress process, and what is to be served by it.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use holdfast_model::{GroupKey, SandboxId};
use holdfast_wire::egress::{Decisions, Request};
use log::{info, warn};
use tokio::{sync::mpsc, task::JoinSet, time::sleep};

use super::{
    EgressError, Shared, Way,
    asks::{Ask, Reply, Told, Wanted, put, revalue},
    link::{self, Hello, Link},
    process::{Place, Process},
};
use crate::{blocking::off_thread, error_chain::error_chain, sandbox::now_ms};

/// Between the first two starts of a process that does not stay. Doubled for each later one.
const PAUSE_MIN: Duration = Duration::from_millis(50);

/// Between two starts at most: connections wait for the process meanwhile.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// A process that ran for so long had started well.
const WELL: Duration = Duration::from_secs(10);

/// How long a process without a sandbox is kept for the next.
const IDLE: Duration = Duration::from_secs(60);

pub(super) struct Supervisor {
    pub(super) shared: Arc<Shared>,
    pub(super) group: GroupKey,
    place: Place,
    /// Whether everything that may be held has been put: until then nothing is taken from a process
    /// that was found.
    settled: bool,
    pub(super) wanted: BTreeMap<SandboxId, Wanted>,
    /// Milliseconds since 1970: no value is to be renewed before. `None`: none ever.
    pub(super) renew_at_ms: Option<u64>,
    /// What a process that was found holds and nobody has put yet.
    strays: Vec<String>,
    /// Those who wait for a process that serves.
    waiting: Vec<(SandboxId, Reply)>,
    /// Those who wait until no process has values of before they asked.
    pub(super) revaluing: Vec<Reply>,
    /// Started before: another one is a restart.
    started: bool,
    gauges: Arc<Gauges>,
    /// Why there was no process the last time, as the log has it.
    trouble: Option<String>,
}

/// What a group has now, for whoever counts.
#[derive(Debug, Default)]
pub(super) struct Gauges {
    pub(super) sandboxes: AtomicUsize,
    pub(super) serves: AtomicBool,
}

/// A process that serves.
struct Up {
    process: Process,
    link: Link,
    decisions: mpsc::Receiver<Decisions>,
}

/// Why a process is not looked after any more.
enum Down {
    /// It ended, or is not to be trusted with more.
    Failed(Process),
    /// Nobody needs it.
    Idle(Process),
    /// The agent stops.
    Left(Process),
}

impl Supervisor {
    pub(super) fn new(
        shared: Arc<Shared>,
        group: GroupKey,
        settled: bool,
        gauges: Arc<Gauges>,
    ) -> Self {
        let place = shared.place(&group);
        Self {
            shared,
            group,
            place,
            settled,
            wanted: BTreeMap::new(),
            renew_at_ms: None,
            strays: Vec::new(),
            waiting: Vec::new(),
            revaluing: Vec::new(),
            started: false,
            gauges,
            trouble: None,
        }
    }

    /// Until the agent stops.
    pub(super) async fn run(mut self, mut inbox: mpsc::Receiver<Ask>) {
        let mut pause = PAUSE_MIN;
        loop {
            // Nothing is started before somebody needs it.
            while self.wanted.is_empty() {
                match inbox.recv().await {
                    Some(ask) => self.note(ask),
                    None => return,
                }
            }
            let began = Instant::now();
            match self.bring_up().await {
                Ok(up) => match self.serve_all(up, &mut inbox).await {
                    Down::Failed(process) => {
                        warn!(group:% = self.group; "an egress process is started anew");
                        process.end().await;
                        self.revalued();
                    }
                    Down::Idle(process) => {
                        info!(group:% = self.group; "egress process ended: no sandbox needs it");
                        process.end().await;
                        self.revalued();
                        self.started = false;
                        continue;
                    }
                    Down::Left(process) => return process.detach(),
                },
                Err(error) => {
                    let reason = error_chain(&error);
                    // It is tried again and again: said once.
                    if self.trouble.as_ref() != Some(&reason) {
                        let hint = error.hint();
                        warn!(group:% = self.group, reason:%, hint; "no egress process");
                        self.trouble = Some(reason.clone());
                    }
                    for (_, reply) in self.waiting.drain(..) {
                        let reason = reason.clone();
                        let _ = reply.send(Err(EgressError::Refused { reason }));
                    }
                }
            }
            if began.elapsed() >= WELL {
                pause = PAUSE_MIN;
            }
            if !self.wait(pause, &mut inbox).await {
                return;
            }
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// Takes asks for as long as this. False: nobody asks any more.
    async fn wait(&mut self, pause: Duration, inbox: &mut mpsc::Receiver<Ask>) -> bool {
        let over = sleep(pause);
        tokio::pin!(over);
        loop {
            tokio::select! {
                () = &mut over => return true,
                ask = inbox.recv() => match ask {
                    Some(ask) => self.note(ask),
                    None => return false,
                },
            }
        }
    }

    /// Keeps in mind what is asked while there is no process.
    fn note(&mut self, ask: Ask) {
        match ask {
            Ask::Put { sandbox, way, rules, reply } => {
                self.wanted.insert(sandbox.clone(), Wanted { way, rules, renew_at_ms: None });
                self.waiting.push((sandbox, reply));
            }
            Ask::Change { sandbox, rules, reply } => match self.wanted.get_mut(&sandbox) {
                Some(wanted) => {
                    wanted.rules = rules;
                    self.waiting.push((sandbox, reply));
                }
                None => drop(reply.send(Err(EgressError::NotHeld { id: sandbox }))),
            },
            Ask::Remove { sandbox, reply } => {
                self.wanted.remove(&sandbox);
                self.waiting.retain(|(waiting, _)| *waiting != sandbox);
                let _ = reply.send(Ok(()));
            }
            // One that an earlier agent left may have some, until it is found.
            Ask::Revalue { reply } => {
                self.revaluing.push(reply);
                if self.wanted.is_empty() {
                    self.revalued();
                }
            }
            Ask::Settled => self.settled = true,
            Ask::Configure | Ask::Forget => {}
        }
    }

    /// Finds the process or starts one, and brings it to where it should be. It serves nobody before
    /// it was told all about them.
    async fn bring_up(&mut self) -> Result<Up, EgressError> {
        let (process, (link, decisions, hello)) = match self.find().await? {
            Some(found) => found,
            None => {
                self.revalued();
                let place = self.place.clone();
                // On this thread: a child of the runtime is waited for by it.
                let (process, socket) = place.start()?;
                if std::mem::replace(&mut self.started, true) {
                    self.shared.metrics.egress_restarted();
                }
                match link::over(socket).await {
                    Ok(up) => (process, up),
                    Err(error) => {
                        process.end().await;
                        return Err(error);
                    }
                }
            }
        };
        self.started = true;
        let mut up = Up { process, link, decisions };
        let (shared, group) = (Arc::clone(&self.shared), self.group.clone());
        let telling = self.tell_everything(&up.link, hello);
        // Those told of first decide already.
        let told =
            meanwhile(telling, &mut up.decisions, |batch| (shared.sink)(&group, batch)).await;
        match told {
            Ok(()) => Ok(up),
            Err(error) => {
                up.process.end().await;
                Err(error)
            }
        }
    }

    /// The process that an earlier agent left. One that does not answer as it should is ended.
    async fn find(
        &self,
    ) -> Result<Option<(Process, (Link, mpsc::Receiver<Decisions>, Hello))>, EgressError> {
        let place = self.place.clone();
        let Some((process, socket)) = off_thread(move || place.find()).await? else {
            return Ok(None);
        };
        match link::over(socket).await {
            Ok(up) => {
                info!(group:% = self.group; "egress process taken over");
                Ok(Some((process, up)))
            }
            Err(error) => {
                let error = error_chain(&error);
                warn!(group:% = self.group, error:%; "egress process not taken over");
                process.end().await;
                Ok(None)
            }
        }
    }

    async fn tell_everything(&mut self, link: &Link, hello: Hello) -> Result<(), EgressError> {
        let held: HashMap<String, u64> =
            hello.sandboxes.into_iter().map(|held| (held.sandbox, held.generation)).collect();
        link.demand(self.configure().await?, None).await?;
        self.strays = held.keys().cloned().collect();
        self.remove_strays(link).await?;
        let mut failed = HashMap::new();
        let ids: Vec<_> = self.wanted.keys().cloned().collect();
        for id in ids {
            match self.tell(link, &id, held.get(id.as_str()).copied()).await {
                Ok(()) => {}
                // Of this one sandbox: nothing leaves it, and others are served.
                Err(error @ (EgressError::Refused { .. } | EgressError::Jail(_))) => {
                    warn!(id:%, error:% = error_chain(&error); "a sandbox has no egress");
                    failed.insert(id, error);
                }
                Err(error) => return Err(error),
            }
        }
        for (id, reply) in self.waiting.drain(..) {
            let outcome = failed.remove(&id).map_or(Ok(()), Err);
            let _ = reply.send(outcome);
        }
        self.revalued();
        self.count();
        Ok(())
    }

    /// Has the process let go of what nobody has put, once all who would have done so have.
    async fn remove_strays(&mut self, link: &Link) -> Result<(), EgressError> {
        if !self.settled {
            return Ok(());
        }
        let known: HashSet<&str> = self.wanted.keys().map(SandboxId::as_str).collect();
        let strays = std::mem::take(&mut self.strays);
        for sandbox in strays.into_iter().filter(|stray| !known.contains(stray.as_str())) {
            link.demand(Request::Remove { sandbox }, None).await?;
        }
        Ok(())
    }

    /// Brings one sandbox to a process that has it with this generation, or not at all.
    async fn tell(
        &mut self,
        link: &Link,
        id: &SandboxId,
        held: Option<u64>,
    ) -> Result<(), EgressError> {
        let Some(mut wanted) = self.wanted.remove(id) else { return Ok(()) };
        let sockets = match (held, &wanted.way) {
            // It has the sockets, and they stay where they are.
            (Some(generation), Way::Tap(_)) if generation >= wanted.rules.generation => {
                // Its values may be those of before the agent was away.
                let values = self.values(id, &wanted.rules).await;
                wanted.renew_at_ms = values.renew_at_ms;
                self.wanted.insert(id.clone(), wanted);
                return link.demand(revalue(id, values), None).await;
            }
            (Some(_), Way::Tap(_)) => Ok(None),
            (held, _) => {
                if held.is_some() {
                    // Those of a slot that is gone: the sandbox was made anew.
                    link.ask(Request::Remove { sandbox: id.to_string() }, None).await?;
                }
                let (back, sockets) = off_thread(move || {
                    let sockets = wanted.sockets();
                    (wanted, sockets)
                })
                .await;
                wanted = back;
                sockets.map(Some)
            }
        };
        let values = self.values(id, &wanted.rules).await;
        wanted.renew_at_ms = values.renew_at_ms;
        let request = put(id, &wanted.rules, values);
        self.wanted.insert(id.clone(), wanted);
        link.demand(request, sockets?).await
    }

    async fn configure(&self) -> Result<Request, EgressError> {
        let ca = self.shared.authority(&self.group).await?;
        Ok(Request::Configure(Box::new(self.shared.setup().configure(&self.group, &ca))))
    }

    /// While it runs, and until everybody has an answer or waits for the next process.
    async fn serve_all(&mut self, up: Up, inbox: &mut mpsc::Receiver<Ask>) -> Down {
        self.trouble = None;
        self.gauges.serves.store(true, Ordering::Relaxed);
        let mut told = JoinSet::new();
        let down = self.serve(up, inbox, &mut told).await;
        self.gauges.serves.store(false, Ordering::Relaxed);
        // With the connection every answer has ended that was still to come.
        while let Some(Ok(told)) = told.join_next().await {
            self.settle(told);
        }
        down
    }

    async fn serve(
        &mut self,
        up: Up,
        inbox: &mut mpsc::Receiver<Ask>,
        told: &mut JoinSet<Told>,
    ) -> Down {
        let Up { process, link, mut decisions } = up;
        let (shared, group, mut dropped) = (Arc::clone(&self.shared), self.group.clone(), 0);
        let mut take = |batch: Decisions| {
            shared.metrics.egress_dropped(batch.dropped - dropped.min(batch.dropped));
            dropped = batch.dropped;
            (shared.sink)(&group, batch);
        };
        loop {
            tokio::select! {
                ask = inbox.recv() => match ask {
                    Some(Ask::Forget) if self.wanted.is_empty() => return Down::Idle(process),
                    Some(ask) => {
                        let passed_on = self.pass_on(ask, &link, told);
                        if let Err(error) = meanwhile(passed_on, &mut decisions, &mut take).await {
                            warn!(error:% = error_chain(&error); "an egress process is given up");
                            return Down::Failed(process);
                        }
                    }
                    None => return Down::Left(process),
                },
                Some(Ok(told)) = told.join_next(), if !told.is_empty() => {
                    let useless = told.shows_useless();
                    self.settle(told);
                    if useless {
                        return Down::Failed(process);
                    }
                }
                () = self.renewal_due() => {
                    let brought = self.bring_values(&link, Some(now_ms()), None, told);
                    if let Err(error) = meanwhile(brought, &mut decisions, &mut take).await {
                        warn!(error:% = error_chain(&error); "an egress process is given up");
                        return Down::Failed(process);
                    }
                }
                batch = decisions.recv() => match batch {
                    Some(batch) => take(batch),
                    None => return Down::Failed(process),
                },
                () = sleep(IDLE), if self.wanted.is_empty() && told.is_empty() => {
                    return Down::Idle(process);
                }
            }
        }
    }

    /// Sends what is asked, in the order of the asks; the answer comes by `told`. The error: the
    /// process is of no more use.
    async fn pass_on(
        &mut self,
        ask: Ask,
        link: &Link,
        told: &mut JoinSet<Told>,
    ) -> Result<(), EgressError> {
        let (sandbox, request, sockets, before, reply) = match ask {
            Ask::Put { sandbox, way, rules, reply } => {
                let values = self.values(&sandbox, &rules).await;
                let mut wanted = Wanted { way, rules, renew_at_ms: values.renew_at_ms };
                let request = put(&sandbox, &wanted.rules, values);
                let (wanted, sockets) = off_thread(move || {
                    let sockets = wanted.sockets();
                    (wanted, sockets)
                })
                .await;
                let replaced = self.wanted.insert(sandbox.clone(), wanted);
                self.count();
                let sockets = match sockets {
                    Ok(sockets) => sockets,
                    Err(error) => {
                        let _ = reply.send(Err(error));
                        return Ok(());
                    }
                };
                if replaced.is_some() {
                    // Another slot of the same sandbox: the sockets of the one before go first.
                    link.ask(Request::Remove { sandbox: sandbox.to_string() }, None).await?;
                }
                (sandbox, request, Some(sockets), None, reply)
            }
            Ask::Change { sandbox, rules, reply } => {
                let values = self.values(&sandbox, &rules).await;
                let Some(wanted) = self.wanted.get_mut(&sandbox) else {
                    let _ = reply.send(Err(EgressError::NotHeld { id: sandbox }));
                    return Ok(());
                };
                wanted.renew_at_ms = values.renew_at_ms;
                let request = put(&sandbox, &rules, values);
                let generation = rules.generation;
                let before = std::mem::replace(&mut wanted.rules, rules);
                (sandbox, request, None, Some((before, generation)), reply)
            }
            Ask::Remove { sandbox, reply } => {
                self.wanted.remove(&sandbox);
                self.count();
                let request = Request::Remove { sandbox: sandbox.to_string() };
                (sandbox, request, None, None, reply)
            }
            Ask::Revalue { reply } => {
                return self.bring_values(link, None, Some(reply), told).await;
            }
            Ask::Forget => return Ok(()),
            Ask::Configure => {
                let configure = match self.configure().await {
                    Ok(configure) => configure,
                    Err(error) => {
                        let error = error_chain(&error);
                        warn!(group:% = self.group, error:%; "egress process not configured anew");
                        return Ok(());
                    }
                };
                return match link.demand(configure, None).await {
                    // As it was; the next change, or the next process, has another try.
                    Err(EgressError::Refused { reason }) => {
                        warn!(group:% = self.group, reason:%; "egress process not configured anew");
                        Ok(())
                    }
                    outcome => outcome,
                };
            }
            Ask::Settled => {
                self.settled = true;
                return self.remove_strays(link).await;
            }
        };
        let answer = match link.ask(request, sockets).await {
            Ok(answer) => answer,
            Err(error) => {
                // The next process is told everything: the asker waits for that.
                self.waiting.push((sandbox, reply));
                return Err(error);
            }
        };
        told.spawn(async move {
            Told::Sandbox { sandbox, outcome: answer.done().await, before, reply }
        });
        Ok(())
    }

    fn settle(&mut self, told: Told) {
        let (sandbox, outcome, before, reply) = match told {
            Told::Sandbox { sandbox, outcome, before, reply } => (sandbox, outcome, before, reply),
            Told::Values { outcome: Ok(()), reply } => {
                if let Some(reply) = reply {
                    let _ = reply.send(Ok(()));
                }
                return;
            }
            // The process is ended for that, and has none then.
            Told::Values { outcome: Err(_), reply } => return self.revaluing.extend(reply),
        };
        let refused = matches!(outcome, Err(EgressError::Refused { .. }));
        if let (true, Some((before, generation)), Some(wanted)) =
            (refused, before, self.wanted.get_mut(&sandbox))
            && wanted.rules.generation == generation
        {
            wanted.rules = before;
            // What was said of the others' time does not hold for theirs.
            wanted.renew_at_ms = Some(0);
            self.renew_by(Some(0));
        }
        match outcome {
            // The next process is told everything: the asker waits for that.
            Err(EgressError::Ended) if self.wanted.contains_key(&sandbox) => {
                self.waiting.push((sandbox, reply));
            }
            // All of it ended with the process.
            Err(EgressError::Ended) => drop(reply.send(Ok(()))),
            // Whoever asked may have given up.
            outcome => drop(reply.send(outcome)),
        }
    }

    fn count(&self) {
        self.gauges.sandboxes.store(self.wanted.len(), Ordering::Relaxed);
    }
}

/// Takes decisions while something else is asked of the process: answers come behind decisions, and
/// with nobody to take these none would be heard.
async fn meanwhile<T>(
    work: impl Future<Output = T>,
    decisions: &mut mpsc::Receiver<Decisions>,
    mut take: impl FnMut(Decisions),
) -> T {
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            Some(batch) = decisions.recv() => take(batch),
        }
    }
}
