//! A sandbox's way to the outside: its sockets and its policy, brought to its group's egress process.

use std::{sync::Arc, time::Duration};

use holdfast_api::egress::of_record;
use log::warn;
use tokio::time::timeout;

use super::{driver::Driver, launch::Machine, secrets::credentials};
use crate::{blocking::off_thread, egress::Rules, error_chain::error_chain};

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
        let put = self.node.egress.put(&self.record.group, id, way, self.rules().await);
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
    pub(super) async fn rules(&self) -> Rules {
        let (node, record) = (Arc::clone(&self.node), self.record.clone());
        let policy = of_record(record.spec.egress_json.as_deref());
        let text = policy.to_json();
        let secrets = off_thread(move || credentials(&node, &record.group, &policy)).await;
        let secrets = secrets.unwrap_or_else(|error| {
            // A policy that refers to some is refused without.
            let error = error_chain(&error);
            warn!(id:% = self.record.id, error:%; "secrets of a group cannot be read");
            Vec::new()
        });
        Rules { generation: self.record.egress_generation, policy: text.into_bytes(), secrets }
    }
}
