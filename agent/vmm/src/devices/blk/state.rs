//! What a snapshot keeps of a disk: what the driver was told about it. A restore over a disk that
//! differs would corrupt the guest's file systems.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::devices) struct State {
    /// At most 20 bytes; the serial number.
    pub(super) name: String,
    pub(super) sectors: u64,
    pub(super) read_only: bool,
}
