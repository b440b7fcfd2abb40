//! What was decided about the flows of sandboxes.

use std::collections::BTreeSet;

use holdfast_model::SandboxId;

use crate::{
    DecisionRecord, SandboxRecord, Store, StoreError,
    table::{self, Record},
};

impl Record for DecisionRecord {
    const TABLE: &'static str = "egress_decisions";

    fn key(&self) -> String {
        key(&self.sandbox, self.sequence)
    }
}

/// In the order of their numbers.
fn key(sandbox: &SandboxId, sequence: u64) -> String {
    format!("{sandbox}/{sequence:016x}")
}

impl Store {
    /// Writes new decisions and removes old ones, by sandbox and number, in one transaction. Those
    /// of a sandbox that is gone are not written.
    pub fn keep_decisions(
        &self,
        new: &[DecisionRecord],
        old: &[(SandboxId, u64)],
    ) -> Result<(), StoreError> {
        self.write("keep decisions", |txn| {
            let named: BTreeSet<&SandboxId> = new.iter().map(|record| &record.sandbox).collect();
            let mut there = BTreeSet::new();
            for id in named {
                if table::get_mut::<SandboxRecord>(txn, id.as_str())?.is_some() {
                    there.insert(id);
                }
            }
            for record in new.iter().filter(|record| there.contains(&record.sandbox)) {
                table::put(txn, record)?;
            }
            for (sandbox, sequence) in old {
                table::remove::<DecisionRecord>(txn, &key(sandbox, *sequence))?;
            }
            Ok(())
        })
    }

    /// The sandbox's decisions in the order in which they were made.
    pub fn decisions(&self, sandbox: &SandboxId) -> Result<Vec<DecisionRecord>, StoreError> {
        self.read(|txn| table::list_below(txn, sandbox.as_str()))
    }

    /// Those of every sandbox, in the order of sandboxes and then of time.
    pub fn all_decisions(&self) -> Result<Vec<DecisionRecord>, StoreError> {
        self.list(|_: &DecisionRecord| true)
    }
}
