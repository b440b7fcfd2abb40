//! The nouns: ids, units, specs, states, secrets. No I/O, no clock, no async.
#![forbid(unsafe_code)]

pub mod digest;
pub mod group;
pub mod id;
pub mod lifecycle;
pub mod link;
pub mod sandbox;
pub mod secret;
pub mod unit;

pub use digest::Digest;
pub use group::GroupKey;
pub use id::{DiskImageId, SandboxId, SnapshotId};
pub use lifecycle::{Event, State, StopReason, SuspendMode};
pub use sandbox::{Resources, SandboxSpec};
pub use secret::Secret;
pub use unit::{Mib, MilliCpu};
