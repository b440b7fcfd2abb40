//! What the host lends one microVM: cgroup, run folder, memory, network, the VMM process.
//!
//! Each is a guard: dropping it takes it back, and what a killed agent could not drop is found by
//! its name at the next start. Dropping may block for some milliseconds: do it off async threads.

mod block;
mod cgroup;
mod cores;
mod error;
mod jailer;
mod memory;
mod messages;
mod process;
mod record;
mod run_folder;
mod shim;
mod slot;
mod stock;
#[allow(unsafe_code)]
mod sys;
mod vmm;

pub use block::BlockDevice;
pub use cgroup::{Cgroup, CgroupTree, IoLimits, Limits, Usage, cgroup_usage};
pub use cores::{cores_can_be_kept_apart, keep_cores_apart};
pub use error::JailError;
pub use jailer::Jailer;
pub use memory::{guest_memory, sealed_bytes};
pub use process::{Confinement, Handover, Identity, ProcessLimits, confine, in_words};
pub use run_folder::{RunFolder, sweep_run_folders};
pub use shim::{landlock_version, run as run_shim};
pub use slot::{
    BywayPlan, HostPlan, Slot, SlotCounter, SlotNetwork, SlotSockets, Slots, prepare_host, tap_of,
};
pub use vmm::{Adopted, VmmPlan, VmmProcess};
