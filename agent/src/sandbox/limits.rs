//! What one sandbox may use of the node, from its resources: one place for every figure.
//! `docs/limits.md` has the table and the reasons.

use holdfast_jail::{BlockDevice, IoLimits, Limits};
use holdfast_model::{Mib, MilliCpu, Resources};
use holdfast_scheduler::Demand;

use crate::config;

/// What a VMM needs beside the guest's memory whatever its size: its own pages (4 MiB at most, the
/// jail's parent process among them), kernel stacks and descriptors of its threads, socket buffers
/// (272 KiB at most for each connection whose reader is slow), and a cushion for page cache of its
/// disks, which is reclaimed but must not be so little that every write waits.
const VMM_OVERHEAD: Mib = Mib(64);

/// Of so many MiB of guest memory one more goes to the kernel's tables for it: the VMM's page
/// tables, KVM's, and the index of the shared memory, 8 bytes or a little more of each for every
/// page of 4 KiB; together 1/160 at most, when nothing of it is in huge pages.
const MEMORY_PER_TABLES: u32 = 128;

/// The shim, and threads of a VMM: vCPUs, one for events, workers of its devices. Far below what
/// could hurt.
pub(super) const VMM_PIDS_MAX: u32 = 96;

/// Descriptors of a VMM: 256 vsock connections, those handed over, some for each device and vCPU.
pub(super) const VMM_FDS_MAX: u32 = 1024;

/// Weight of a whole CPU: the kernel's own default, so that sandboxes of one CPU stand beside the
/// agent as equals. Others in proportion.
const WEIGHT_PER_CPU: u32 = 100;

/// Free disk without which no sandbox begins: what a fresh one writes in its first minutes.
const DISK_START: Mib = Mib(256);

/// How quickly a sandbox of one CPU may read, and as quickly write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct IoPolicy {
    pub(super) device: BlockDevice,
    pub(super) mib_per_second: u32,
    pub(super) operations_per_second: u32,
}

impl IoPolicy {
    /// `None`: the configuration bounds nothing.
    pub(super) fn of(limits: &config::Limits, device: BlockDevice) -> Option<Self> {
        let (mib, operations) = (limits.io_mib_per_second, limits.io_operations_per_second);
        (mib > 0 || operations > 0).then_some(Self {
            device,
            mib_per_second: mib,
            operations_per_second: operations,
        })
    }

    fn share(self, cpu: MilliCpu) -> IoLimits {
        // One at least: 0 would be no limit.
        let part = |whole: u64| match whole {
            0 => 0,
            whole => (whole.saturating_mul(u64::from(cpu.0)) / 1000).max(1),
        };
        IoLimits {
            device: self.device,
            bytes_per_second: part(Mib(self.mib_per_second).bytes()),
            operations_per_second: part(self.operations_per_second.into()),
        }
    }
}

/// What the node must have free for a sandbox, its VMM included.
pub(super) fn demand(resources: Resources) -> Demand {
    let Mib(guest) = resources.memory;
    let tables = guest.div_ceil(MEMORY_PER_TABLES);
    let memory = guest.saturating_add(tables).saturating_add(VMM_OVERHEAD.0);
    Demand { cpu: resources.cpu, memory: Mib(memory), disk_start: DISK_START }
}

/// What holds for its cgroup from its first instruction on.
pub(super) fn at_boot(resources: Resources, memory: Mib, io: Option<IoPolicy>) -> Limits {
    Limits {
        // A boot has whole CPUs: held to a quarter of one it would take four times as long and
        // use no less. Boots take turns instead.
        cpu: MilliCpu(u32::from(resources.vcpus()) * 1000),
        cpu_weight: (resources.cpu.0 * WEIGHT_PER_CPU / 1000).max(1),
        memory,
        pids: VMM_PIDS_MAX,
        io: io.map(|policy| policy.share(resources.cpu)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: BlockDevice = BlockDevice { major: 254, minor: 0 };

    fn of_tier(cpu: u32, memory: u32) -> (Demand, Limits) {
        let resources = Resources::new(MilliCpu(cpu), Mib(memory), None).unwrap();
        let demand = demand(resources);
        let io = IoPolicy { device: DISK, mib_per_second: 400, operations_per_second: 10_000 };
        (demand, at_boot(resources, demand.memory, Some(io)))
    }

    #[test]
    fn every_tier_has_its_weight_its_memory_with_its_overhead_and_its_share_of_the_disk() {
        let tiers = [
            (250, 512, 1000, 25, 580, 100, 2500),
            (500, 1024, 1000, 50, 1096, 200, 5000),
            (1000, 2048, 1000, 100, 2128, 400, 10_000),
            (2000, 4096, 2000, 200, 4192, 800, 20_000),
            (4000, 8192, 4000, 400, 8320, 1600, 40_000),
        ];
        for (cpu, memory, boot_cpu, weight, with_overhead, io_mib, operations) in tiers {
            let (demand, limits) = of_tier(cpu, memory);
            assert_eq!(demand.memory, Mib(with_overhead), "cpu {cpu}");
            assert_eq!(demand.cpu, MilliCpu(cpu), "cpu {cpu}");
            let io = IoLimits {
                device: DISK,
                bytes_per_second: Mib(io_mib).bytes(),
                operations_per_second: operations,
            };
            let expected = Limits {
                cpu: MilliCpu(boot_cpu),
                cpu_weight: weight,
                memory: Mib(with_overhead),
                pids: 96,
                io: Some(io),
            };
            assert_eq!(limits, expected, "cpu {cpu}");
        }
    }

    #[test]
    fn io_that_the_configuration_leaves_free_is_bounded_by_nothing() {
        let free = config::Limits {
            io_mib_per_second: 0,
            io_operations_per_second: 0,
            ..config::Limits::default()
        };
        assert_eq!(IoPolicy::of(&free, DISK), None);
        let half = config::Limits { io_mib_per_second: 1, ..free };
        let share = IoPolicy::of(&half, DISK).unwrap().share(MilliCpu(250));
        assert_eq!((share.bytes_per_second, share.operations_per_second), (256 * 1024, 0));
    }
}
