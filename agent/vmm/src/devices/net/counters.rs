//! What one network has moved, counted by its thread and read by the control thread.

use std::sync::atomic::{AtomicU64, Ordering};

use holdfast_wire::vmm::NetworkStats;

#[derive(Debug, Default)]
pub(in crate::devices) struct NetworkCounters {
    received_bytes: AtomicU64,
    received_frames: AtomicU64,
    sent_bytes: AtomicU64,
    sent_frames: AtomicU64,
    dropped_frames: AtomicU64,
}

impl NetworkCounters {
    /// A frame of `bytes` bytes went to the guest.
    pub(super) fn received(&self, bytes: usize) {
        self.received_frames.fetch_add(1, Ordering::Relaxed);
        self.received_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// A frame of `bytes` bytes came from the guest.
    pub(super) fn sent(&self, bytes: usize) {
        self.sent_frames.fetch_add(1, Ordering::Relaxed);
        self.sent_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn dropped(&self) {
        self.dropped_frames.fetch_add(1, Ordering::Relaxed);
    }

    /// Not one instant: a frame in flight may be in one number and not in the next.
    pub(in crate::devices) fn read(&self) -> NetworkStats {
        NetworkStats {
            received_bytes: self.received_bytes.load(Ordering::Relaxed),
            received_frames: self.received_frames.load(Ordering::Relaxed),
            sent_bytes: self.sent_bytes.load(Ordering::Relaxed),
            sent_frames: self.sent_frames.load(Ordering::Relaxed),
            dropped_frames: self.dropped_frames.load(Ordering::Relaxed),
        }
    }
}
