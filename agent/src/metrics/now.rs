//! What is measured when somebody asks, not when it happens.

use std::collections::BTreeMap;

use super::{Metrics, as_f64, list::*};
use crate::egress::Unrecorded;

/// What is measured when somebody asks, not when it happens.
#[derive(Debug, Clone, Default)]
pub struct Now {
    /// By the name of the state, in lower case.
    pub sandboxes: BTreeMap<&'static str, u64>,
    pub vmm_resident_bytes: u64,
    pub vmm_resident_largest_bytes: u64,
    pub memory_capacity_bytes: u64,
    pub memory_reserved_bytes: u64,
    pub cpus_capacity: f64,
    pub cpus_reserved: f64,
    pub disk_total_bytes: u64,
    pub disk_available_bytes: u64,
    pub slots_ready: u64,
    pub egress_processes: u64,
    pub egress_sandboxes: u64,
    pub byways: u64,
    /// From sandboxes, and to them.
    pub byway_bytes: (u64, u64),
    pub unrecorded: Unrecorded,
    pub agent_resident_bytes: u64,
    pub agent_open_files: u64,
    /// Since the daemon started, by what was short.
    pub refusals: [(&'static str, u64); 4],
    /// Since the daemon started.
    pub store_errors: u64,
}

impl Metrics {
    /// Sets what is measured on demand.
    pub fn measured(&self, now: &Now) {
        for state in STATES {
            let count = now.sandboxes.get(state).copied().unwrap_or(0);
            self.set(&SANDBOXES, &[state], as_f64(count));
        }
        for (short, count) in now.refusals {
            if !short.is_empty() {
                self.raise(&REFUSALS, &[short], count);
            }
        }
        self.raise(&STORE_ERRORS, &[], now.store_errors);
        let bytes = [
            (&VMM_RESIDENT, "all", now.vmm_resident_bytes),
            (&VMM_RESIDENT, "largest", now.vmm_resident_largest_bytes),
            (&MEMORY, "capacity", now.memory_capacity_bytes),
            (&MEMORY, "reserved", now.memory_reserved_bytes),
            (&STATE_DISK, "total", now.disk_total_bytes),
            (&STATE_DISK, "available", now.disk_available_bytes),
        ];
        for (metric, label, value) in bytes {
            self.set(metric, &[label], as_f64(value));
        }
        self.set(&CPUS, &["capacity"], now.cpus_capacity);
        self.set(&CPUS, &["reserved"], now.cpus_reserved);
        self.set(&SLOTS_READY, &[], as_f64(now.slots_ready));
        self.set(&EGRESS_PROCESSES, &[], as_f64(now.egress_processes));
        self.set(&EGRESS_SANDBOXES, &[], as_f64(now.egress_sandboxes));
        self.set(&BYWAYS, &[], as_f64(now.byways));
        self.set(&BYWAY_BYTES, &["out"], as_f64(now.byway_bytes.0));
        self.set(&BYWAY_BYTES, &["in"], as_f64(now.byway_bytes.1));
        let signed = |count: i64| as_f64(count.unsigned_abs()) * if count < 0 { -1.0 } else { 1.0 };
        self.set(&UNRECORDED, &["questions"], signed(now.unrecorded.questions));
        self.set(&UNRECORDED, &["byways"], signed(now.unrecorded.by));
        self.set(&AGENT_RESIDENT, &[], as_f64(now.agent_resident_bytes));
        self.set(&AGENT_FILES, &[], as_f64(now.agent_open_files));
    }
}
