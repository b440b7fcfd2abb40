//! Durable records. The only crate that knows how they lie on disk.
//!
//! One redb file; every change is one transaction, on disk before it is answered. Records are JSON
//! so that a newer agent can read what an older one wrote field by field. Calls block: the agent
//! makes writing ones off its async threads.
#![forbid(unsafe_code)]

mod decision;
mod error;
mod identity;
mod journal;
mod operation;
mod record;
mod secret;
mod store;
mod table;

pub use error::StoreError;
pub use journal::{Intent, Operation, Step};
pub use operation::{Answer, Begun, OPERATION_AGE_MS_MAX, OPERATIONS_MAX};
pub use record::{
    DecisionRecord, DiskImageRecord, DiskImageState, GroupRecord, GroupSecretRecord, SandboxRecord,
    Saved, SecretRecord, SigningKeyRecord, SnapshotRecord,
};
pub use store::{Put, SCHEMA_VERSION, Store};
