//! A sandbox's way to the outside: its sockets and its policy, brought to its group's egress process.

use std::{sync::Arc, time::Duration};

use holdfast_api::egress::of_record;
use holdfast_netpolicy::Passing;
use holdfast_store::SandboxRecord;
use log::warn;
use tokio::time::timeout;

use super::{
    driver::{Driver, Node},
    launch::Machine,
    secrets::credentials,
};
use crate::{
    blocking::off_thread,
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
                Ok(way) => put(&node, record, way).await,
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
    pub(super) async fn rules(&self) -> Rules {
        rules(&self.node, self.record.clone()).await
    }
}

async fn put(node: &Arc<Node>, record: SandboxRecord, way: Way) {
    let (group, id) = (record.group.clone(), record.id.clone());
    let put = node.egress.put(&group, &id, way, rules(node, record).await);
    match timeout(PATIENCE, put).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            let hint = error.hint();
            warn!(id:%, error:% = error_chain(&error), hint; "nothing leaves a sandbox yet");
        }
        Err(_) => warn!(id:%, waited:? = PATIENCE; "nothing leaves a sandbox yet"),
    }
}

async fn rules(node: &Arc<Node>, record: SandboxRecord) -> Rules {
    let (id, generation) = (record.id.clone(), record.egress_generation);
    let policy = of_record(record.spec.egress_json.as_deref());
    let passing = match record.spec.skip_egress_proxy {
        true => Passing::All,
        false => Passing::Udp,
    };
    let text = policy.to_json();
    let node = Arc::clone(node);
    let secrets = off_thread(move || credentials(&node, &record.group, &policy)).await;
    let secrets = secrets.unwrap_or_else(|error| {
        // A policy that refers to some is refused without.
        warn!(id:%, error:% = error_chain(&error); "secrets of a group cannot be read");
        Vec::new()
    });
    Rules { generation, policy: text.into_bytes(), secrets, passing }
}
