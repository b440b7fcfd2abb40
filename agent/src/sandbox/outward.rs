//! A sandbox's way to the outside: its sockets and its policy, brought to its group's egress process.

use std::time::Duration;

use holdfast_netpolicy::Policy;
use holdfast_store::SandboxRecord;
use log::warn;
use tokio::time::timeout;

use super::{driver::Driver, launch::Machine};
use crate::{egress::Rules, error_chain::error_chain};

/// How long a launch waits for the process. It goes on being tried after that.
const PATIENCE: Duration = Duration::from_secs(5);

impl Driver {
    /// Before its guest runs, so that what it sends with its first instruction is judged. A sandbox
    /// that cannot be let out runs all the same, and nothing leaves it.
    pub(super) async fn let_out(&self, machine: &mut Machine) {
        let id = &self.record.id;
        let way = match machine.way_out() {
            Ok(way) => way,
            Err(error) => {
                warn!(id:%, error:% = error_chain(&error); "nothing leaves a sandbox");
                return;
            }
        };
        let put = self.node.egress.put(&self.record.group, id, way, self.rules());
        match timeout(PATIENCE, put).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                let hint = error.hint();
                warn!(id:%, error:% = error_chain(&error), hint; "nothing leaves a sandbox yet");
            }
            Err(_) => warn!(id:%, waited:? = PATIENCE; "nothing leaves a sandbox yet"),
        }
    }

    /// When its machine goes.
    pub(super) async fn shut_in(&self) {
        let removed = self.node.egress.remove(&self.record.group, &self.record.id);
        // Its flows end with its machine in any case.
        let _ = timeout(PATIENCE, removed).await;
    }

    /// What its flows are judged by.
    pub(super) fn rules(&self) -> Rules {
        rules_of(&self.record)
    }
}

fn rules_of(record: &SandboxRecord) -> Rules {
    let policy = record.spec.egress_json.clone().unwrap_or_else(|| Policy::default().to_json());
    Rules { generation: record.egress_generation, policy: policy.into_bytes(), secrets: Vec::new() }
}
