//! Why guest memory is not filled.

use std::io;

use holdfast_snapshot::SnapshotError;
use holdfast_wire::{WIRE_VERSION, pager::PIECES_MAX};

#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    #[error("request of version {found}; this pager speaks {WIRE_VERSION}: install both anew")]
    Version { found: u16 },
    #[error("{found} pieces were handed over; {PIECES_MAX} are the most")]
    Pieces { found: usize },
    #[error("regions of {found} bytes for an image of {wanted}, or not of whole pages")]
    Regions { found: u64, wanted: u64 },
    #[error("fd {fd} for {what} is one of the standard streams, named twice, or not open")]
    Fd { what: &'static str, fd: i32 },
    #[error("rights cannot be given up: {what}")]
    Confine {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error("faults cannot be read")]
    Faults(#[source] io::Error),
    #[error("a fault at {address:#x} is not in guest memory")]
    Outside { address: u64 },
    #[error("a page cannot be put at {address:#x}")]
    Put {
        address: u64,
        #[source]
        source: io::Error,
    },
    #[error("the memory file cannot be written")]
    Copy(#[source] io::Error),
    #[error("the guest ended before its memory was filled")]
    GuestGone,
    #[error("a thread of the pager cannot be started, or ended in a panic")]
    Thread,
}

impl PagerError {
    /// Whether the stored bytes are to blame.
    pub(crate) fn is_damage(&self) -> bool {
        matches!(
            self,
            Self::Snapshot(
                SnapshotError::Changed { .. }
                    | SnapshotError::Missing { .. }
                    | SnapshotError::WrongKey { .. }
                    | SnapshotError::Malformed { .. }
                    | SnapshotError::TooLarge { .. }
            )
        )
    }
}
