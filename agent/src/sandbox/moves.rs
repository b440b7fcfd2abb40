//! Changes of a sandbox's record, durable before anybody sees them.

use std::sync::Arc;

use holdfast_model::{Event, State};
use holdfast_store::{Intent, Operation, Step, StoreError};
use log::{info, warn};

use super::{PolicyError, driver::Driver};
use crate::{
    blocking::off_thread,
    egress::EgressError,
    error_chain::error_chain,
    fault::{self, Point},
};

impl Driver {
    pub(super) async fn fail(&mut self, reason: impl Into<String>) {
        self.change(Event::Lost, Some(reason.into())).await;
    }

    /// Makes a move, durable before anybody sees it.
    pub(super) async fn change(&mut self, event: Event, failure: Option<String>) {
        let from = self.record.state;
        let to = match from.after(event) {
            Ok(to) if to == from => return,
            Ok(to) => to,
            Err(refused) => {
                warn!(id:% = self.record.id, error:% = refused; "a move was refused");
                return;
            }
        };
        info!(id:% = self.record.id, from:? = from, event:? = event, to:? = to; "sandbox changed state");
        if let Some(reason) = &failure {
            warn!(id:% = self.record.id, reason:%; "sandbox failed");
        }
        self.record.state = to;
        self.record.failure = failure;
        if to == State::Deleting {
            self.note(Intent::new(&self.record.id, Operation::Delete)).await;
        } else {
            let (store, record) = (Arc::clone(&self.node.store), self.record.clone());
            let stored = off_thread(move || store.put_sandbox(&record)).await;
            self.doubt(stored);
        }
        self.status.send_modify(|status| {
            status.state = to;
            if to != State::Running {
                status.live = None;
            }
        });
    }

    pub(super) async fn change_lifecycle(&mut self, json: String) -> Result<(), StoreError> {
        let before = self.record.spec.lifecycle_json.replace(json);
        let (store, record) = (Arc::clone(&self.node.store), self.record.clone());
        let stored = off_thread(move || store.put_sandbox(&record)).await;
        if stored.is_err() {
            self.record.spec.lifecycle_json = before;
        }
        stored
    }

    /// The policy is whole in the record, or the one before it still is. Of a sandbox that runs it
    /// rules, or that one still does.
    pub(super) async fn change_egress(
        &mut self,
        json: String,
        runs: bool,
    ) -> Result<u64, PolicyError> {
        let before = self.record.clone();
        self.record.spec.egress_json = Some(json);
        self.record.egress_generation += 1;
        // Durable first: whoever finds the process with an older one brings it this one.
        if let Err(error) = self.store().await {
            self.record = before;
            return Err(error.into());
        }
        if runs {
            let rules = self.rules();
            let (group, id) = (&self.record.group, &self.record.id);
            match self.node.egress.change(group, id, rules).await {
                Err(error @ EgressError::Refused { .. }) => {
                    self.record = before;
                    self.store().await?;
                    return Err(error.into());
                }
                outcome => outcome?,
            }
        }
        Ok(self.record.egress_generation)
    }

    async fn store(&self) -> Result<(), StoreError> {
        let (store, record) = (Arc::clone(&self.node.store), self.record.clone());
        off_thread(move || store.put_sandbox(&record)).await
    }

    /// Writes the record, and that something is under way about it.
    pub(super) async fn note(&self, intent: Intent) {
        let (store, record) = (Arc::clone(&self.node.store), self.record.clone());
        let stored = off_thread(move || store.put_intent(&record, &intent)).await;
        self.doubt(stored);
    }

    fn doubt(&self, stored: Result<(), StoreError>) {
        if let Err(error) = stored {
            // The move stands: it happened. A restart finds the state before it and repairs that.
            warn!(id:% = self.record.id, error:% = error_chain(&error); "state not stored");
        }
    }

    /// Whether nothing is left. If something is, the next ask tries again.
    pub(super) async fn delete(&mut self) -> bool {
        self.change(Event::Delete, None).await;
        let intent = Intent::new(&self.record.id, Operation::Delete);
        self.note(Intent { step: Step::Removing, ..intent }).await;
        let (node, id) = (Arc::clone(&self.node), self.record.id.clone());
        let saved = self.record.saved.clone();
        let removed = off_thread(move || {
            node.disks.remove(&id).map_err(|error| error_chain(&error))?;
            fault::at(Point::DeleteDisk);
            let removed = node.store.remove_sandbox(&id).map_err(|error| error_chain(&error));
            // Its record named it: only now does nobody need it, if nobody else does.
            if let (Ok(_), Some(saved)) = (&removed, saved) {
                node.snapshots.released_or_logged(&saved.snapshot);
            }
            fault::at(Point::DeleteGone);
            removed
        });
        match removed.await {
            Ok(_) => {
                self.node.decisions.forget(&self.record.id);
                self.status.send_modify(|status| status.gone = true);
                info!(id:% = self.record.id; "sandbox deleted");
                true
            }
            Err(error) => {
                warn!(id:% = self.record.id, error:%; "sandbox not deleted");
                false
            }
        }
    }
}
