//! The registry's side of suspend and resume: who asks, who waits, and who is woken for what.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{StreamExt, stream};
use holdfast_model::{SandboxId, State, StopReason, SuspendMode};
use log::{info, warn};
use tokio::{sync::oneshot, time::timeout};

use super::{
    ExecError, PolicyError, ResumeError, SuspendError,
    asks::{Ask, Wake},
    launch::{launches_max, us_since},
    limits, policy,
    registry::{Registry, free_disk},
    status::{Live, Status},
    suspend::Suspend,
};
use crate::error_chain::error_chain;

/// How long a suspend is waited for. It goes on after that.
const SUSPEND_PATIENCE: Duration = Duration::from_secs(30);

/// How long a resume is waited for, by whoever asked or needs the sandbox.
const RESUME_PATIENCE: Duration = Duration::from_secs(60);

/// How long a change of policy waits for the end of a move.
const POLICY_PATIENCE: Duration = Duration::from_secs(60);

/// Between two asks that came at a bad moment.
const ASK_AGAIN: Duration = Duration::from_millis(50);

impl Registry {
    /// Suspends the sandbox, and answers when it is Suspended, or after a while when it is not yet.
    /// One that is Suspended already is left so. `mode`: `None` is what its policy says.
    pub async fn suspend(
        &self,
        id: &SandboxId,
        mode: Option<SuspendMode>,
    ) -> Result<(), SuspendError> {
        let mut handle =
            self.handle(id).ok_or_else(|| SuspendError::NotFound { id: id.clone() })?;
        match handle.status.borrow().state {
            State::Running | State::Stopping => {}
            State::Suspended => return Ok(()),
            state => return Err(SuspendError::NotRunning { id: id.clone(), state }),
        }
        let before = handle.status.borrow_and_update().refusals.count;
        let mode = match mode {
            Some(mode) => mode,
            None => {
                let record = self.node.store.sandbox(id)?;
                let record = record.ok_or_else(|| SuspendError::NotFound { id: id.clone() })?;
                policy::suspend_mode(&record.spec)
            }
        };
        // A full inbox holds asks that end it.
        let how = Suspend { reason: StopReason::Asked, mode };
        let _ = handle.inbox.try_send(Ask::Suspend(how));
        let patience = timeout(SUSPEND_PATIENCE, async {
            while handle.status.changed().await.is_ok() {
                let status = handle.status.borrow_and_update();
                match (status.state, status.refusals.since(before)) {
                    (State::Running, Some(reason)) => {
                        let (id, reason) = (id.clone(), reason.to_owned());
                        return Err(SuspendError::Failed { id, reason });
                    }
                    // Its microVM ended before it stood still, or somebody deletes it.
                    (state @ (State::Failed | State::Deleting), _) => {
                        return Err(SuspendError::NotRunning { id: id.clone(), state });
                    }
                    (State::Stopping | State::Running, _) => {}
                    (State::Suspended, _) if !status.returned => {}
                    _ => break,
                }
            }
            Ok(())
        });
        // It goes on after that; whoever wants to know looks at its state.
        patience.await.unwrap_or(Ok(()))
    }

    /// Has a suspended sandbox go on, and answers when it runs.
    pub async fn resume(&self, id: &SandboxId) -> Result<(), ResumeError> {
        let asked = Instant::now();
        let mut handle = self.handle(id).ok_or_else(|| ResumeError::NotFound { id: id.clone() })?;
        let slow = |state| ResumeError::Slow { id: id.clone(), state, waited: RESUME_PATIENCE };
        // One that is just being suspended is waited for.
        let settled = |status: &Status| status.gone || status.state != State::Stopping;
        let before = handle.status.borrow().refusals.count;
        let state = match timeout(RESUME_PATIENCE, handle.status.wait_for(settled)).await {
            Ok(Ok(status)) => status.state,
            Ok(Err(_)) => return Err(ResumeError::NotFound { id: id.clone() }),
            Err(_) => return Err(slow(State::Stopping)),
        };
        match state {
            // Another call is at it: its outcome is this one's.
            State::Resuming => {}
            State::Suspended => {
                let wake = self.what_a_resume_needs(id, asked).await?;
                let _ = handle.inbox.try_send(Ask::Resume(Box::new(wake)));
            }
            state => return Err(ResumeError::NotSuspended { id: id.clone(), state }),
        }
        let outcome = timeout(RESUME_PATIENCE, async {
            loop {
                {
                    let status = handle.status.borrow_and_update();
                    match (status.state, status.refusals.since(before)) {
                        (State::Running, _) if status.live.is_some() => return Ok(()),
                        (State::Suspended, Some(reason)) => {
                            let (id, reason) = (id.clone(), reason.to_owned());
                            return Err(ResumeError::Failed { id, reason });
                        }
                        (State::Deleting | State::Failed, _) => {
                            let (id, state) = (id.clone(), status.state);
                            return Err(ResumeError::NotSuspended { id, state });
                        }
                        _ => {}
                    }
                }
                if handle.status.changed().await.is_err() {
                    return Err(ResumeError::NotFound { id: id.clone() });
                }
            }
        });
        match outcome.await {
            Ok(outcome) => outcome,
            Err(_) => Err(slow(State::Resuming)),
        }
    }

    /// Has sandboxes go on that ran until the node was shut down. One that cannot waits for whoever
    /// needs it.
    pub(super) async fn bring_back(self: Arc<Self>, ids: Vec<SandboxId>) {
        let count = ids.len();
        info!(count; "sandboxes go on that ran until the node was shut down");
        stream::iter(ids)
            .for_each_concurrent(launches_max(), async |id| match self.resume(&id).await {
                // Somebody was quicker, or has deleted it.
                Ok(()) | Err(ResumeError::NotSuspended { .. } | ResumeError::NotFound { .. }) => {}
                Err(error) => {
                    warn!(id:%, error:% = error_chain(&error); "sandbox not brought back");
                }
            })
            .await;
    }

    /// Gives the sandbox another policy. Answers when it rules.
    pub async fn change_lifecycle(&self, id: &SandboxId, json: String) -> Result<(), PolicyError> {
        self.change(id, |reply| Ask::Lifecycle(json.clone(), reply)).await
    }

    /// Gives the sandbox another egress policy. Answers how often it was given one when this one is
    /// durable and rules: no byte of a flow that it does not allow passes after that.
    pub async fn change_egress(&self, id: &SandboxId, json: String) -> Result<u64, PolicyError> {
        self.change(id, |reply| Ask::Egress(json.clone(), reply)).await
    }

    async fn change<T, E: Into<PolicyError>>(
        &self,
        id: &SandboxId,
        ask: impl Fn(oneshot::Sender<Result<T, E>>) -> Ask,
    ) -> Result<T, PolicyError> {
        let mut handle = self.handle(id).ok_or_else(|| PolicyError::NotFound { id: id.clone() })?;
        let passing = [State::Creating, State::Stopping, State::Resuming];
        let settled = |status: &Status| status.gone || !passing.contains(&status.state);
        let waited = async {
            // A move that begins in between drops the ask: it is made again after it.
            loop {
                let gone = handle
                    .status
                    .wait_for(settled)
                    .await
                    .map_or(true, |status| status.gone || status.state == State::Deleting);
                let (reply, replied) = oneshot::channel();
                let asked = handle.inbox.send(ask(reply)).await;
                if gone || asked.is_err() {
                    return Err(PolicyError::NotFound { id: id.clone() });
                }
                match replied.await {
                    Ok(stored) => return stored.map_err(Into::into),
                    Err(_) => tokio::time::sleep(ASK_AGAIN).await,
                }
            }
        };
        let slow = || PolicyError::Slow { id: id.clone(), waited: POLICY_PATIENCE };
        timeout(POLICY_PATIENCE, waited).await.map_err(|_| slow())?
    }

    /// What a suspended sandbox needs again.
    async fn what_a_resume_needs(
        &self,
        id: &SandboxId,
        asked: Instant,
    ) -> Result<Wake, ResumeError> {
        if self.table().stopping {
            return Err(ResumeError::Stopping);
        }
        let record = self.node.store.sandbox(id)?;
        let record = record.ok_or_else(|| ResumeError::NotFound { id: id.clone() })?;
        let image = self.node.images.locate(record.image).await;
        let image = image.map_err(ResumeError::ImageStore)?;
        let image = image.ok_or(ResumeError::NoImage { digest: record.image })?;
        let free = free_disk(&self.state_folder).map_err(ResumeError::Disk)?;
        let reservation = self.scheduler.admit(limits::demand(record.spec.resources), free)?;
        Ok(Wake { image, reservation, asked, admission_us: us_since(asked) })
    }

    /// The way into a sandbox that runs, or that is woken for this.
    pub(super) async fn awake(&self, id: &SandboxId) -> Result<Arc<Live>, ExecError> {
        match self.live(id) {
            Err(ExecError::NotRunning {
                state: State::Suspended | State::Stopping | State::Resuming,
                ..
            }) => match self.resume(id).await {
                // It was not suspended after all, or somebody else woke it.
                Ok(()) | Err(ResumeError::NotSuspended { state: State::Running, .. }) => {
                    self.live(id)
                }
                Err(error) => Err(Box::new(error).into()),
            },
            live => live,
        }
    }
}
