//! Payload bytes through the socket device.

use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Debug, Default)]
pub(in crate::devices) struct VsockCounters {
    from_guest: AtomicU64,
    to_guest: AtomicU64,
}

impl VsockCounters {
    pub(in crate::devices) fn received(&self) -> u64 {
        self.from_guest.load(Ordering::Relaxed)
    }

    pub(in crate::devices) fn sent(&self) -> u64 {
        self.to_guest.load(Ordering::Relaxed)
    }

    pub(super) fn add_from_guest(&self, bytes: u64) {
        self.from_guest.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn add_to_guest(&self, bytes: u64) {
        self.to_guest.fetch_add(bytes, Ordering::Relaxed);
    }
}
