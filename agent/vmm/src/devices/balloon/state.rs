//! What a snapshot keeps of a balloon: how large it is and shall be. The pages in it are told by
//! the memory image, where they are holes.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::devices) struct State {
    /// Pages of 4 KiB the guest shall give up.
    pub(super) target_pages: u32,
    /// Pages it has given up, as its driver says.
    pub(super) actual_pages: u32,
}
