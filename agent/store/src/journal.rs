//! What was to be done to a sandbox, and how far it came: written before each step, in the same
//! transaction as the record it is about, so that an agent that died in between can be followed.

use holdfast_model::SandboxId;
use serde::{Deserialize, Serialize};

use crate::table::Record;

/// An operation of several steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// Repeated from its beginning: what a step left is taken away first.
    Create,
    /// Gone on with: each step does nothing where it was done.
    Delete,
}

/// How far an operation has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Step {
    /// It was promised; nothing is done.
    Accepted,
    /// Create: the host lends disk, uid, cgroup and run folder, and starts the VMM.
    Lending,
    /// Delete: the VMM is gone, the disk is being removed.
    Removing,
}

/// One operation that is under way. A sandbox has one at most.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    pub sandbox: SandboxId,
    pub operation: Operation,
    pub step: Step,
    /// How often it was begun, this time included.
    pub attempts: u32,
}

impl Intent {
    pub fn new(sandbox: &SandboxId, operation: Operation) -> Self {
        Self { sandbox: sandbox.clone(), operation, step: Step::Accepted, attempts: 1 }
    }
}

impl Record for Intent {
    const TABLE: &'static str = "intents";

    fn key(&self) -> String {
        self.sandbox.as_str().to_owned()
    }
}
