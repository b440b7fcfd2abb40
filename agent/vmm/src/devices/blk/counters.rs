//! What one disk has done, counted by its thread and read by the control thread.

use std::sync::atomic::{AtomicU64, Ordering};

use holdfast_wire::vmm::DiskStats;

#[derive(Debug, Default)]
pub(in crate::devices) struct DiskCounters {
    pub(super) read_bytes: AtomicU64,
    pub(super) written_bytes: AtomicU64,
    pub(super) requests: AtomicU64,
    pub(super) errors: AtomicU64,
}

impl DiskCounters {
    /// Not one instant: a request in flight may be in one number and not in the next.
    pub(in crate::devices) fn read(&self) -> DiskStats {
        DiskStats {
            read_bytes: self.read_bytes.load(Ordering::Relaxed),
            written_bytes: self.written_bytes.load(Ordering::Relaxed),
            requests: self.requests.load(Ordering::Relaxed),
            errors: self.errors.load(Ordering::Relaxed),
        }
    }
}
