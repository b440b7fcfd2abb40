//! What a snapshot keeps of a network: what the driver was told. No frames: a network may lose
//! some, and connections that were open do not outlive a restore anyway.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::devices) struct State {
    pub(super) mac: [u8; 6],
    pub(super) mtu: u16,
    /// Features offered, for they depend on the host's tap. A restore on a host that has fewer
    /// would send the driver frames it cannot read.
    pub(super) offered: u64,
}
