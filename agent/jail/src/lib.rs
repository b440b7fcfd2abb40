//! What the host lends one microVM: cgroup, run folder, memory, the VMM process.
//!
//! Each is a guard: dropping it takes it back, and what a killed agent could not drop is found by
//! its name at the next start. Dropping may block for some milliseconds: do it off async threads.

mod cgroup;
mod error;
mod jailer;
mod memory;
mod process;
mod record;
mod run_folder;
mod shim;
#[allow(unsafe_code)]
mod sys;
mod vmm;

pub use cgroup::{Cgroup, CgroupTree, Limits, Usage, cgroup_usage};
pub use error::JailError;
pub use jailer::Jailer;
pub use memory::{guest_memory, sealed_bytes};
pub use process::{Confinement, Handover, Identity, ProcessLimits, confine, in_words};
pub use run_folder::{RunFolder, sweep_run_folders};
pub use shim::run as run_shim;
pub use vmm::{Adopted, VmmPlan, VmmProcess};
