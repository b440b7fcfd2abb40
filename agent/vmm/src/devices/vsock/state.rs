//! What a snapshot keeps of the socket device: no connection. Their host ends do not outlive this
//! process; the guest is told by a transport reset.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::devices) struct State {
    /// PID 1 knocked. It is reported once in the life of a machine.
    pub(super) ready_reported: bool,
}
