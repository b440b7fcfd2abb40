//! What a node may give away, from what it has.

use holdfast_model::{Mib, MilliCpu};

/// Amounts of CPU and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    pub cpu: MilliCpu,
    pub memory: Mib,
}

/// How much more is given away than there is, in percent: 100 is no overcommit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Factors {
    pub cpu_percent: u32,
    pub memory_percent: u32,
}

impl Capacity {
    /// What may be given away: memory less the host's own share, then both times their factors.
    pub fn offered(self, host_memory: Mib, factors: Factors) -> Self {
        let times = |amount: u32, percent: u32| {
            u32::try_from(u64::from(amount) * u64::from(percent) / 100).unwrap_or(u32::MAX)
        };
        let memory = self.memory.0.saturating_sub(host_memory.0);
        Self {
            cpu: MilliCpu(times(self.cpu.0, factors.cpu_percent)),
            memory: Mib(times(memory, factors.memory_percent)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HAS: Capacity = Capacity { cpu: MilliCpu(2000), memory: Mib(8192) };

    #[test]
    fn the_hosts_share_is_taken_before_the_factor() {
        let factors = Factors { cpu_percent: 400, memory_percent: 150 };
        let offered = HAS.offered(Mib(512), factors);
        assert_eq!(offered, Capacity { cpu: MilliCpu(8000), memory: Mib(11_520) });
    }

    #[test]
    fn a_node_smaller_than_the_hosts_share_offers_nothing() {
        let factors = Factors { cpu_percent: 100, memory_percent: 100 };
        assert_eq!(HAS.offered(Mib(9000), factors).memory, Mib(0));
    }
}
