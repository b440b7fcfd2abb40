//! What a snapshot keeps of an entropy device: no bytes, ever. Two clones must not be given the
//! same ones.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::devices) struct State {
    /// Bytes given so far; a count for the log, nothing the driver can see.
    pub(super) bytes_given: u64,
}
