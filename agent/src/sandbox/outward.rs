//! A sandbox's way to the outside: its sockets and its policy, brought to its group's egress process.

use std::{sync::Arc, time::Duration};

use holdfast_api::egress::of_record;
use holdfast_netpolicy::Passing;
use holdfast_store::SandboxRecord;
use log::warn;
use tokio::time::timeout;

use super::{driver::Driver, launch::Machine, node::Node};
use crate::{
    egress::{Rules, Way},
    error_chain::error_chain,
};

/// How long a launch waits for the process. It goes on being tried after that.
const PATIENCE: Duration = Duration::from_secs(5);

impl Driver {
    /// Beside the start of its guest, and done before anybody else finds it: what the guest sends
    /// until then waits at the sockets. A sandbox that cannot be let out runs all the same, and
    /// nothing leaves it.
    pub(super) fn let_out(&self, machine: &mut Machine) -> impl Future<Output = ()> + use<> {
        let way = machine.way_out();
        let (node, record) = (Arc::clone(&self.node), self.record.clone());
        async move {
            match way {
                Ok(way) => put(&node, &record, way).await,
                Err(error) => {
                    let id = record.id;
                    warn!(id:%, error:% = error_chain(&error); "nothing leaves a sandbox");
                }
            }
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
        rules(&self.record)
    }
}

async fn put(node: &Node, record: &SandboxRecord, way: Way) {
    let id = &record.id;
    let put = node.egress.put(&record.group, id, way, rules(record));
    match timeout(PATIENCE, put).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            let hint = error.hint();
            warn!(id:%, error:% = error_chain(&error), hint; "nothing leaves a sandbox yet");
        }
        Err(_) => warn!(id:%, waited:? = PATIENCE; "nothing leaves a sandbox yet"),
    }
}

fn rules(record: &SandboxRecord) -> Rules {
    let policy = of_record(record.spec.egress_json.as_deref()).to_json().into_bytes();
    let passing = Passing::of(record.spec.skip_egress_proxy);
    Rules { generation: record.egress_generation, policy, passing }
}
