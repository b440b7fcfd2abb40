//! What a start does about an agent that stopped or was killed at any step: the store says what was
//! to be, names on the host say what is left.
//!
//! A sandbox that is Running is taken over with all it was lent. One that was being made is made
//! anew from its beginning. A deletion goes on. What no record knows is taken away, by its name.

use std::{collections::HashSet, sync::Arc};

use fs_err as fs;
use holdfast_jail::{JailError, RunFolder};
use holdfast_model::{Event, SandboxId, State, StopReason};
use holdfast_scheduler::Scheduler;
use holdfast_store::{Intent, Operation, SandboxRecord, Step};
use log::{info, warn};

use super::{
    StartError,
    launch::{Found, Lent, Machine},
    limits,
    node::Node,
};
use crate::{error_chain::error_chain, metrics::Adoption};

/// How often a sandbox is begun to be made. One that takes its agent down with it must not do so
/// for ever.
const CREATE_ATTEMPTS_MAX: u32 = 5;

/// A sandbox that is there after the start.
pub(super) enum Recovered {
    /// It runs.
    Running(SandboxRecord, Box<Machine>),
    /// It is to be made, and nothing of it is there.
    ToMake(SandboxRecord),
    /// It waits to be deleted.
    Waiting(SandboxRecord),
}

/// Repairs, and gives the sandboxes that are left. Blocks.
pub(super) fn recover(
    node: &Node,
    scheduler: &Arc<Scheduler>,
) -> Result<Vec<Recovered>, StartError> {
    let records = node.store.all_sandboxes()?;
    let mut recovered = Vec::with_capacity(records.len());
    let mut running = HashSet::new();
    // First all that runs: what is made anew must not get in its way.
    for mut record in records {
        // Its snapshot was not committed: if its microVM is there, it goes on.
        if record.state == State::Stopping {
            record.state = record.state.after(Event::NotSaved).unwrap_or(record.state);
            node.store.put_sandbox(&record)?;
        }
        if record.state == State::Running {
            let found = take_over(node, scheduler, record)?;
            if let Recovered::Running(record, _) = &found {
                running.insert(record.id.clone());
            }
            recovered.push(found);
        } else {
            recovered.push(Recovered::Waiting(record));
        }
    }
    sweep_machines(node, &running)?;
    let recovered: Vec<_> = recovered
        .into_iter()
        .map(|found| match found {
            Recovered::Waiting(record) => go_on(node, record),
            found => Ok(Some(found)),
        })
        .filter_map(Result::transpose)
        .collect::<Result<_, _>>()?;
    let known: HashSet<&str> = recovered.iter().map(|found| found.record().id.as_str()).collect();
    node.disks.sweep(|name| known.contains(name)).map_err(|source| StartError::Folder {
        action: "sweep",
        path: node.disks.folder_of_all().to_owned(),
        source,
    })?;
    let saved = recovered.iter().filter_map(|found| found.record().saved.as_ref());
    let snapshots = node.store.all_snapshots()?;
    let asked_for = snapshots.iter().map(|record| record.data.as_str());
    let saved: HashSet<&str> =
        saved.map(|saved| saved.snapshot.as_str()).chain(asked_for).collect();
    node.snapshots.sweep(|id| saved.contains(id))?;
    Ok(recovered)
}

/// Whether it ran until the node was shut down in good order: then it goes on where it stood. One
/// that fell back to an earlier state, or could not be resumed, waits until somebody wants it: what
/// it would do again was done before.
pub(super) fn comes_back(record: &SandboxRecord) -> bool {
    let stopped = record
        .saved
        .as_ref()
        .is_some_and(|saved| saved.reason == StopReason::NodeStopped && !saved.of_another);
    record.state == State::Suspended && stopped && record.failure.is_none()
}

impl Recovered {
    fn record(&self) -> &SandboxRecord {
        match self {
            Self::Running(record, _) | Self::ToMake(record) | Self::Waiting(record) => record,
        }
    }
}

/// A sandbox that was Running: its machine, or why there is none.
fn take_over(
    node: &Node,
    scheduler: &Arc<Scheduler>,
    mut record: SandboxRecord,
) -> Result<Recovered, StartError> {
    let lent = || {
        let uid = node.uids.take(record.uid?)?;
        Some(Lent { uid, reservation: scheduler.take_again(limits::demand(record.spec.resources)) })
    };
    let mut node_restarted = false;
    let (adoption, reason) = match Machine::adopt(node, &record.id, lent) {
        Ok(Found::Running(machine)) => {
            node.metrics.adopted(Adoption::Running);
            return Ok(Recovered::Running(record, machine));
        }
        Ok(Found::Ended(end, how)) => {
            node.metrics.ended(end);
            (Adoption::Ended, format!("while the agent was away {how}"))
        }
        Ok(Found::Nothing) => {
            node_restarted = true;
            (Adoption::Ended, "the node was restarted, and the microVM with it".to_owned())
        }
        Err(error) => {
            let reason = format!("the microVM cannot be taken over: {}", error_chain(&error));
            (Adoption::Failed, reason)
        }
    };
    node.metrics.adopted(adoption);
    warn!(id:% = record.id, reason:%; "sandbox lost");
    // What it did since its last suspend is lost with the node, and no more than that.
    let event =
        if node_restarted && record.saved.is_some() { Event::FellBack } else { Event::Lost };
    record.state = record.state.after(event).unwrap_or(State::Failed);
    record.failure = Some(reason);
    record.uid = None;
    node.store.put_sandbox(&record)?;
    Ok(Recovered::Waiting(record))
}

/// Kills and takes away every machine that is not one of these, known by the names on the host.
fn sweep_machines(node: &Node, running: &HashSet<SandboxId>) -> Result<(), StartError> {
    let stray = |name: &str| name.parse().is_ok_and(|id: SandboxId| !running.contains(&id));
    // The agent itself may be in a cgroup beside them.
    for _ in node.cgroups.sweep(stray)? {
        node.metrics.adopted(Adoption::Swept);
    }
    let failed = |source| JailError::RunFolder { action: "sweep", path: node.run.clone(), source };
    let entries = match fs::read_dir(&node.run) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(failed(source).into()),
    };
    for entry in entries {
        let name = entry.map_err(failed)?.file_name();
        if let Some(name) = name.to_str().filter(|name| stray(name)) {
            // Dropping it removes it.
            drop(RunFolder::adopt(&node.run, name)?);
        }
    }
    Ok(())
}

/// Goes on with a sandbox whose machine is gone. `None`: its deletion is complete.
fn go_on(node: &Node, mut record: SandboxRecord) -> Result<Option<Recovered>, StartError> {
    match record.state {
        State::Creating => {
            let known = node.store.intent(&record.id)?;
            let mut intent = known.unwrap_or_else(|| Intent::new(&record.id, Operation::Create));
            info!(id:% = record.id, step:? = intent.step, attempts = intent.attempts; "sandbox is made anew");
            let cleared = node.disks.remove(&record.id).map_err(|error| error_chain(&error));
            let again = cleared.and_then(|()| match intent.attempts {
                CREATE_ATTEMPTS_MAX.. => Err(format!(
                    "the agent was restarted {CREATE_ATTEMPTS_MAX} times while the sandbox was \
                     being made"
                )),
                _ => Ok(()),
            });
            record.uid = None;
            if let Err(reason) = again {
                record.state = record.state.after(Event::Lost).unwrap_or(State::Failed);
                record.failure = Some(reason);
                node.store.put_sandbox(&record)?;
                return Ok(Some(Recovered::Waiting(record)));
            }
            intent.attempts += 1;
            intent.step = Step::Accepted;
            node.store.put_intent(&record, &intent)?;
            Ok(Some(Recovered::ToMake(record)))
        }
        State::Deleting => {
            if let Err(error) = node.disks.remove(&record.id) {
                // Its driver tries again when it is asked.
                warn!(id:% = record.id, error:% = error_chain(&error); "disk not removed");
                return Ok(Some(Recovered::Waiting(record)));
            }
            node.store.remove_sandbox(&record.id)?;
            info!(id:% = record.id; "deletion finished");
            Ok(None)
        }
        State::Resuming => {
            // What ran of it is gone; its snapshot is as it was.
            record.state = record.state.after(Event::NotResumed).unwrap_or(State::Suspended);
            record.uid = None;
            node.store.put_sandbox(&record)?;
            Ok(Some(Recovered::Waiting(record)))
        }
        State::Failed | State::Running | State::Stopping | State::Suspended => {
            Ok(Some(Recovered::Waiting(record)))
        }
    }
}

#[cfg(test)]
mod tests {
    use holdfast_model::{
        Digest, GroupKey, SandboxSpec, SnapshotId, SuspendMode, id::ID_BYTES, sandbox::ImageSource,
    };
    use holdfast_store::Saved;

    use super::*;

    fn record(state: State, reason: Option<StopReason>) -> SandboxRecord {
        SandboxRecord {
            state,
            saved: reason.map(|reason| Saved {
                snapshot: SnapshotId::from_random([2; ID_BYTES]),
                at_ms: 0,
                reason,
                of_another: false,
                network: None,
                mode: SuspendMode::Memory,
            }),
            ..SandboxRecord::accepted(
                SandboxId::from_random([1; ID_BYTES]),
                GroupKey::local_default(),
                SandboxSpec::of_image(ImageSource::Public("debian".to_owned())),
                Digest::from_sha256([1; 32]),
                0,
            )
        }
    }

    #[test]
    fn only_what_ran_until_the_node_stopped_and_lost_nothing_comes_back_by_itself() {
        let stopped = Some(StopReason::NodeStopped);
        assert!(comes_back(&record(State::Suspended, stopped)));
        for reason in [None, Some(StopReason::Asked), Some(StopReason::Idle)] {
            assert!(!comes_back(&record(State::Suspended, reason)), "{reason:?}");
        }
        for state in State::ALL.into_iter().filter(|state| *state != State::Suspended) {
            assert!(!comes_back(&record(state, stopped)), "{state:?}");
        }
        let fell_back = Some("the node was restarted".to_owned());
        let record = record(State::Suspended, stopped);
        assert!(!comes_back(&SandboxRecord { failure: fell_back, ..record }));
    }
}
