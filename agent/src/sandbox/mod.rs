//! Sandboxes of this node: the registry that knows them, and for each a driver that owns it.

mod activity;
mod asks;
mod boot;
mod clones;
mod control;
mod disk;
mod driver;
mod error;
mod filling;
mod guest;
#[cfg(test)]
mod guest_tests;
mod launch;
mod limits;
mod memory;
mod moves;
mod node;
mod opening;
mod outward;
mod policy;
mod recover;
mod registry;
mod remote;
mod report;
mod secrets;
mod settings;
mod sleep;
mod snapshots;
mod status;
mod suspend;
mod templates;
mod touched;
mod uid;

pub use asks::Ending;
pub use error::{
    CreateError, DeleteError, ExecError, FetchError, ForkError, GuestError, LaunchError,
    PolicyError, ResumeError, SecretError, SnapshotCallError, StartError, SuspendError,
};
pub use guest::{ExecInput, ExecOutput, ExecSession, FileReader};
pub use launch::BootPhases;
pub use limits::DiskBound;
pub use opening::Parts;
pub use registry::{Registry, RuntimeDetails};
pub use report::{Fetched, Mended, ResumePhases, ResumeReport, Warmth};
pub use snapshots::{Anatomy, SaveError, Upload};

/// Milliseconds since 1970, for records.
pub fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
