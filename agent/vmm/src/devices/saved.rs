//! What a snapshot keeps of a device: what the driver wrote into its registers, where its queues
//! stand, and what its worker knows. Read from a file that anybody may have changed.

use serde::{Deserialize, Serialize};

use super::{balloon, blk, net, queue::RingSetup, rng, vsock};

/// One device that is paused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DeviceState {
    pub(super) name: String,
    pub(super) registers: RegistersState,
    pub(super) run: RunState,
}

/// The transport's half.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RegistersState {
    pub(super) status: u32,
    pub(super) device_features_page: u32,
    pub(super) driver_features_page: u32,
    pub(super) driver_features: u64,
    pub(super) queue: u32,
    pub(super) queues: Vec<RingSetup>,
    pub(super) interrupt_reasons: u32,
    pub(super) needs_reset: bool,
}

/// The thread's half.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RunState {
    /// Empty: the driver has not started the device, or broke it.
    pub(super) rings: Vec<RingState>,
    pub(super) worker: WorkerState,
}

/// Where one queue stands. Whatever it says is bounded by the queue's size when it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RingState {
    pub(super) next_available: u16,
    pub(super) next_used: u16,
    pub(super) untold: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum WorkerState {
    Disk(blk::State),
    Rng(rng::State),
    Vsock(vsock::State),
    Network(net::State),
    Balloon(balloon::State),
}

/// A state that does not fit the device it is given to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unfit {
    #[error("the state has {found} devices, the machine {wanted}")]
    Count { found: usize, wanted: usize },
    #[error("device {wanted} is {found} in the state")]
    Name { found: String, wanted: String },
    #[error("device {device} was {found} when the state was told, and is {wanted}")]
    Other { device: String, found: String, wanted: String },
    #[error("device {device} was told a feature that this host's does not have: {missing:#x}")]
    Features { device: String, missing: u64 },
    #[error("device {device} has registers that no driver can have written")]
    Registers { device: String },
    #[error("device {device} cannot go on: {reason}")]
    Broken { device: String, reason: String },
    #[error("the thread of device {device} has ended")]
    Ended { device: String },
}

/// For workers: the state is of another kind, or says something else than `wanted`.
#[derive(Debug)]
pub(super) struct Differs {
    pub(super) found: String,
    pub(super) wanted: String,
}

impl Differs {
    pub(super) fn new(found: &impl std::fmt::Debug, wanted: &impl std::fmt::Debug) -> Self {
        Self { found: format!("{found:?}"), wanted: format!("{wanted:?}") }
    }
}
