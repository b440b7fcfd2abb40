//! Values behind what policies refer to: brought to the process whenever they change or their time is
//! nearly over.

use std::{sync::Arc, time::Duration};

use holdfast_model::SandboxId;
use holdfast_netpolicy::Policy;
use tokio::{task::JoinSet, time::sleep};

use super::{
    EgressError, Rules, Values,
    asks::{Reply, Told, Wanted, refers, revalue},
    link::Link,
    supervisor::Supervisor,
};
use crate::{blocking::off_thread, sandbox::now_ms};

impl Supervisor {
    /// The values of now behind what a policy refers to.
    pub(super) async fn values(&mut self, id: &SandboxId, rules: &Rules) -> Values {
        // Most policies refer to nothing, and are not read for that.
        if !refers(rules) {
            return Values::default();
        }
        let (shared, policy) = (Arc::clone(&self.shared), rules.policy.clone());
        let (group, id) = (self.group.clone(), id.clone());
        let values = off_thread(move || match Policy::parse(&policy) {
            Ok(policy) => shared.credentials.values(&group, &id, &policy),
            // The process refuses it, and says why.
            Err(_) => Values::default(),
        })
        .await;
        self.renew_by(values.renew_at_ms);
        values
    }

    /// Has values brought again then, or earlier.
    pub(super) fn renew_by(&mut self, at_ms: Option<u64>) {
        self.renew_at_ms = earlier(self.renew_at_ms, at_ms);
    }

    /// Brings the values of now to every sandbox whose policy refers to some, or to those where it
    /// is time. `reply` is told when they hold.
    pub(super) async fn bring_values(
        &mut self,
        link: &Link,
        due_at_ms: Option<u64>,
        reply: Option<Reply>,
        told: &mut JoinSet<Told>,
    ) -> Result<(), EgressError> {
        let is_due = |wanted: &Wanted| match due_at_ms {
            None => refers(&wanted.rules),
            Some(now_ms) => wanted.renew_at_ms.is_some_and(|at| at <= now_ms),
        };
        let due: Vec<_> = self
            .wanted
            .iter()
            .filter(|(_, wanted)| is_due(wanted))
            .map(|(id, wanted)| (id.clone(), wanted.rules.clone()))
            .collect();
        if due_at_ms.is_some() {
            // Of those that are not due it is known; of the others it is said below.
            let later = self.wanted.values().filter(|wanted| !is_due(wanted));
            self.renew_at_ms = later.filter_map(|wanted| wanted.renew_at_ms).min();
        }
        let mut answers = Vec::with_capacity(due.len());
        for (id, rules) in due {
            let values = self.values(&id, &rules).await;
            if let Some(wanted) = self.wanted.get_mut(&id) {
                wanted.renew_at_ms = values.renew_at_ms;
            }
            match link.ask(revalue(&id, values), None).await {
                Ok(answer) => answers.push(answer),
                Err(error) => {
                    self.revaluing.extend(reply);
                    return Err(error);
                }
            }
        }
        told.spawn(async move {
            let mut outcome = Ok(());
            for answer in answers {
                outcome = outcome.and(answer.done().await);
            }
            Told::Values { outcome, reply }
        });
        Ok(())
    }

    /// Until values are to be brought again.
    pub(super) async fn renewal_due(&self) {
        match self.renew_at_ms {
            Some(at_ms) => sleep(Duration::from_millis(at_ms.saturating_sub(now_ms()))).await,
            None => std::future::pending().await,
        }
    }

    /// No process has values any more that are not those of now.
    pub(super) fn revalued(&mut self) {
        for reply in self.revaluing.drain(..) {
            let _ = reply.send(Ok(()));
        }
    }
}

/// The earlier of two times that may be none.
fn earlier(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    one.into_iter().chain(other).min()
}
