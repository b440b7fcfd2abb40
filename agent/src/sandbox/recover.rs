//! What a start does about an agent that was killed at any step: the store says what was to be,
//! names on the host say what is left.
//!
//! MicroVMs do not outlive their agent yet: what ran is Failed, and says why.

use std::collections::HashSet;

use holdfast_jail::sweep_run_folders;
use holdfast_model::{Event, SandboxId, State};
use holdfast_store::SandboxRecord;
use log::{info, warn};

use super::{StartError, driver::Node};
use crate::error_chain::error_chain;

/// Repairs, and gives the records of the sandboxes that are left, all of them Failed. Blocks.
pub(super) fn recover(node: &Node) -> Result<Vec<SandboxRecord>, StartError> {
    // The agent itself may be in a cgroup beside them.
    node.cgroups.sweep(|name| name.parse::<SandboxId>().is_ok())?;
    sweep_run_folders(&node.run)?;
    let mut failed = Vec::new();
    for mut record in node.store.all_sandboxes()? {
        match record.state {
            State::Creating | State::Running => {
                record.failure = Some(reason(record.state).to_owned());
                record.state = record.state.after(Event::Lost).unwrap_or(State::Failed);
                node.store.put_sandbox(&record)?;
                warn!(id:% = record.id; "sandbox lost by a restart of the agent");
                failed.push(record);
            }
            State::Deleting => {
                if let Err(error) = node.disks.remove(&record.id) {
                    // Its driver tries again when it is asked.
                    warn!(id:% = record.id, error:% = error_chain(&error); "disk not removed");
                    failed.push(record);
                    continue;
                }
                node.store.remove_sandbox(&record.id)?;
                info!(id:% = record.id; "deletion finished");
            }
            State::Failed => failed.push(record),
        }
    }
    let known: HashSet<&str> = failed.iter().map(|record| record.id.as_str()).collect();
    node.disks.sweep(|name| known.contains(name)).map_err(|source| StartError::Folder {
        action: "sweep",
        path: node.disks.folder_of_all().to_owned(),
        source,
    })?;
    Ok(failed)
}

fn reason(state: State) -> &'static str {
    match state {
        State::Creating => "the agent was restarted while the sandbox was being made",
        _ => "the agent was restarted, and the microVM did not outlive it",
    }
}
