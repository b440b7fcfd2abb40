//! Counts of VM exits that reached us. The dearest thing a guest does is to leave: these numbers
//! say how often.

use std::sync::atomic::{AtomicU64, Ordering};

use holdfast_wire::vmm::Exits;

/// One vCPU's counters, on a cache line of their own so that vCPUs do not slow each other.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct ExitCounters {
    mmio: AtomicU64,
    port_io: AtomicU64,
    other: AtomicU64,
}

impl ExitCounters {
    pub(crate) fn count_mmio(&self) {
        self.mmio.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_port_io(&self) {
        self.port_io.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_other(&self) {
        self.other.fetch_add(1, Ordering::Relaxed);
    }

    /// Adds this vCPU's counts to `sum`.
    pub(crate) fn add_to(&self, sum: &mut Exits) {
        sum.mmio += self.mmio.load(Ordering::Relaxed);
        sum.port_io += self.port_io.load(Ordering::Relaxed);
        sum.other += self.other.load(Ordering::Relaxed);
    }
}
