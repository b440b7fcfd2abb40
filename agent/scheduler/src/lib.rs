//! Admission of CPU, memory and disk on one node.
//!
//! Nothing here measures anything: what the node has comes in as arguments, so that the rules can
//! be tested. A [`Reservation`] holds its share until it is dropped.
#![forbid(unsafe_code)]

mod capacity;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use capacity::{Capacity, Factors};
use holdfast_model::{Mib, MilliCpu};

/// What one sandbox takes, its host-side overhead included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    pub cpu: MilliCpu,
    pub memory: Mib,
    /// Disk that must be free right now for the sandbox to begin with. Its disk is sparse: the
    /// whole of it is promised to nobody.
    pub disk_start: Mib,
}

/// What is short.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    #[error("no free memory for {wanted} ({reserved} of {offered} reserved, {free} free)")]
    Memory { wanted: Mib, reserved: Mib, offered: Mib, free: Mib },
    #[error("no free CPU for {wanted} ({reserved} of {offered} reserved, {free} free)")]
    Cpu { wanted: MilliCpu, reserved: MilliCpu, offered: MilliCpu, free: MilliCpu },
    #[error("no free disk for {wanted} ({free} free)")]
    Disk { wanted: Mib, free: Mib },
    #[error("no place for another sandbox (the node holds {max} at most)")]
    Count { max: u32 },
}

/// How often each kind of shortage refused a sandbox.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Refusals {
    pub memory: u64,
    pub cpu: u64,
    pub disk: u64,
    pub count: u64,
}

impl Refusals {
    fn note(&mut self, full: &Full) {
        *match full {
            Full::Memory { .. } => &mut self.memory,
            Full::Cpu { .. } => &mut self.cpu,
            Full::Disk { .. } => &mut self.disk,
            Full::Count { .. } => &mut self.count,
        } += 1;
    }
}

impl Full {
    /// What the operator can do next.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Memory { .. } => {
                "delete a sandbox, ask for less, or raise capacity.memory_factor; \
                 `holdfast node status` lists who has what"
            }
            Self::Cpu { .. } => {
                "delete a sandbox, ask for less, or raise capacity.cpu_factor; \
                 `holdfast node status` lists who has what"
            }
            Self::Disk { .. } => "delete sandboxes or run `holdfast image gc`",
            Self::Count { .. } => "delete a sandbox, or raise limits.sandboxes_max",
        }
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Used {
    cpu_milli: u64,
    memory_mib: u64,
    count: u32,
    refusals: Refusals,
}

impl Used {
    fn take(&mut self, demand: Demand) {
        self.cpu_milli += u64::from(demand.cpu.0);
        self.memory_mib += u64::from(demand.memory.0);
        self.count += 1;
    }
}

/// Hands out the node's CPU and memory.
#[derive(Debug)]
pub struct Scheduler {
    limits: Capacity,
    sandboxes_max: u32,
    used: Mutex<Used>,
}

impl Scheduler {
    /// `limits`: what may be given away, factors and the host's own share already applied.
    pub fn new(limits: Capacity, sandboxes_max: u32) -> Arc<Self> {
        Arc::new(Self { limits, sandboxes_max, used: Mutex::default() })
    }

    /// Takes a share, or says what is short. `disk_free` is what the state file system has now.
    pub fn admit(self: &Arc<Self>, demand: Demand, disk_free: Mib) -> Result<Reservation, Full> {
        let mut used = self.used();
        if let Some(full) = self.shortage(&used, demand, disk_free) {
            used.refusals.note(&full);
            return Err(full);
        }
        used.take(demand);
        Ok(Reservation { scheduler: Arc::clone(self), demand })
    }

    fn shortage(&self, used: &Used, demand: Demand, disk_free: Mib) -> Option<Full> {
        let (offered, free) = (self.limits, self.free_of(used));
        if used.count >= self.sandboxes_max {
            return Some(Full::Count { max: self.sandboxes_max });
        }
        if demand.memory > free.memory {
            return Some(Full::Memory {
                wanted: demand.memory,
                reserved: Mib(offered.memory.0 - free.memory.0),
                offered: offered.memory,
                free: free.memory,
            });
        }
        if demand.cpu > free.cpu {
            return Some(Full::Cpu {
                wanted: demand.cpu,
                reserved: MilliCpu(offered.cpu.0 - free.cpu.0),
                offered: offered.cpu,
                free: free.cpu,
            });
        }
        (demand.disk_start > disk_free)
            .then_some(Full::Disk { wanted: demand.disk_start, free: disk_free })
    }

    /// Since this scheduler was made.
    pub fn refusals(&self) -> Refusals {
        self.used().refusals
    }

    /// The share of a sandbox that runs already: it has what it has, whatever the limits are now.
    pub fn take_again(self: &Arc<Self>, demand: Demand) -> Reservation {
        self.used().take(demand);
        Reservation { scheduler: Arc::clone(self), demand }
    }

    pub fn limits(&self) -> Capacity {
        self.limits
    }

    /// What is still to be had.
    pub fn free(&self) -> Capacity {
        self.free_of(&self.used())
    }

    fn free_of(&self, used: &Used) -> Capacity {
        let rest = |limit: u32, used: u64| {
            u32::try_from(u64::from(limit).saturating_sub(used)).unwrap_or(u32::MAX)
        };
        Capacity {
            cpu: MilliCpu(rest(self.limits.cpu.0, used.cpu_milli)),
            memory: Mib(rest(self.limits.memory.0, used.memory_mib)),
        }
    }

    fn used(&self) -> MutexGuard<'_, Used> {
        // Nothing that holds the lock can panic half way through a change.
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One sandbox's share of the node. Given back on drop.
#[must_use = "dropping the guard gives the share back"]
#[derive(Debug)]
pub struct Reservation {
    scheduler: Arc<Scheduler>,
    demand: Demand,
}

impl Reservation {
    pub fn demand(&self) -> Demand {
        self.demand
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut used = self.scheduler.used();
        used.cpu_milli -= u64::from(self.demand.cpu.0);
        used.memory_mib -= u64::from(self.demand.memory.0);
        used.count -= 1;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PLENTY: Mib = Mib(1_000_000);

    fn node(cpu: u32, memory: u32) -> Arc<Scheduler> {
        Scheduler::new(Capacity { cpu: MilliCpu(cpu), memory: Mib(memory) }, 3)
    }

    fn demand(cpu: u32, memory: u32) -> Demand {
        Demand { cpu: MilliCpu(cpu), memory: Mib(memory), disk_start: Mib(100) }
    }

    #[test]
    fn what_is_short_is_counted_and_said_with_what_was_wanted_reserved_and_free() {
        let node = node(1000, 1024);
        let _held = node.admit(demand(750, 512), PLENTY).unwrap();
        let cases = [
            (
                demand(250, 513),
                PLENTY,
                "no free memory for 513Mi (512Mi of 1024Mi reserved, 512Mi free)",
            ),
            (demand(251, 512), PLENTY, "no free CPU for 251m (750m of 1000m reserved, 250m free)"),
            (demand(250, 512), Mib(99), "no free disk for 100Mi (99Mi free)"),
        ];
        for (demand, disk_free, text) in cases {
            assert_eq!(node.admit(demand, disk_free).unwrap_err().to_string(), text);
        }
        let refused = Refusals { memory: 1, cpu: 1, disk: 1, count: 0 };
        assert_eq!(node.refusals(), refused);
    }

    #[test]
    fn the_last_mebibyte_is_given_and_comes_back_on_drop() {
        let node = node(1000, 1024);
        let held = node.admit(demand(1000, 1024), PLENTY).unwrap();
        assert_eq!(node.free(), Capacity { cpu: MilliCpu(0), memory: Mib(0) });
        drop(held);
        assert_eq!(node.free(), node.limits());
    }

    #[test]
    fn what_runs_already_is_taken_again_over_the_limits_and_comes_back() {
        let node = node(1000, 1024);
        let held = node.take_again(demand(4000, 4096));
        assert_eq!(node.free(), Capacity { cpu: MilliCpu(0), memory: Mib(0) });
        assert!(node.admit(demand(1, 1), PLENTY).is_err());
        drop(held);
        assert_eq!(node.free(), node.limits());
    }

    #[test]
    fn one_sandbox_more_than_the_node_may_hold_is_refused() {
        let node = node(100_000, 100_000);
        let _held: Vec<_> = (0..3).map(|_| node.admit(demand(1, 1), PLENTY).unwrap()).collect();
        assert_eq!(node.admit(demand(1, 1), PLENTY).unwrap_err(), Full::Count { max: 3 });
        assert_eq!(node.refusals(), Refusals { count: 1, ..Refusals::default() });
    }

    proptest! {
        #[test]
        fn whatever_is_taken_and_given_back_the_sum_never_passes_the_limits(
            steps in proptest::collection::vec((any::<bool>(), 0_u32..600, 0_u32..600), 0..60),
        ) {
            let node = node(1000, 1000);
            let mut held = Vec::new();
            for (take, cpu, memory) in steps {
                if take {
                    held.extend(node.admit(demand(cpu, memory), PLENTY));
                } else {
                    held.pop();
                }
                let sum = |part: fn(&Reservation) -> u32| held.iter().map(part).sum::<u32>();
                prop_assert_eq!(node.free().cpu.0, 1000 - sum(|r| r.demand().cpu.0));
                prop_assert_eq!(node.free().memory.0, 1000 - sum(|r| r.demand().memory.0));
            }
        }
    }
}
