//! What one sandbox may use of the node, from its resources: one place for every figure.
//! `docs/limits.md` has the table and the reasons.

use holdfast_jail::{BlockDevice, IoLimits, Limits};
use holdfast_model::{Mib, MilliCpu, Resources};
use holdfast_scheduler::Demand;
use holdfast_wire::vmm::{self, Rate};

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

/// How long a sandbox may move bytes as quickly as it can before the VMM holds it to its rate.
const BURST_MS: u64 = 100;

/// How quickly a sandbox of one CPU may move bytes, each way. 0 is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Speed {
    bytes_per_second: u64,
    operations_per_second: u64,
}

impl Speed {
    fn new(mib_per_second: u32, operations_per_second: u32) -> Self {
        Self {
            bytes_per_second: Mib(mib_per_second).bytes(),
            operations_per_second: operations_per_second.into(),
        }
    }

    /// That of a sandbox with so much CPU.
    fn share(self, cpu: MilliCpu) -> Self {
        // One at least: 0 would be no limit.
        let part = |whole: u64| match whole {
            0 => 0,
            whole => (whole.saturating_mul(u64::from(cpu.0)) / 1000).max(1),
        };
        Self {
            bytes_per_second: part(self.bytes_per_second),
            operations_per_second: part(self.operations_per_second),
        }
    }

    /// As token buckets of a VMM.
    fn buckets(self) -> vmm::IoLimits {
        let rate = |per_second: u64| {
            let burst = per_second.saturating_mul(BURST_MS).div_ceil(1000);
            (per_second > 0).then_some(Rate { per_second, burst })
        };
        vmm::IoLimits {
            bytes: rate(self.bytes_per_second),
            operations: rate(self.operations_per_second),
        }
    }
}

/// What bounds sandboxes' disk traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskBound {
    /// Each one's cgroup, on this device.
    Cgroup(BlockDevice),
    /// Each one's VMM, its writable disk alone.
    Vmm,
    /// The configuration says nothing.
    None,
}

/// What bounds the traffic of sandboxes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Traffic {
    disk: Speed,
    network: Speed,
    /// The disk that cgroups bound. `None`: they cannot.
    device: Option<BlockDevice>,
}

impl Traffic {
    /// `device`: where disk traffic goes, if that is one device and cgroups can bound it.
    pub(super) fn new(limits: &config::Limits, device: Option<BlockDevice>) -> Self {
        Self {
            disk: Speed::new(limits.io_mib_per_second, limits.io_operations_per_second),
            network: Speed::new(limits.network_mib_per_second, limits.network_frames_per_second),
            device,
        }
    }

    pub(super) fn disk_bound(&self) -> DiskBound {
        match self.device {
            _ if self.disk == Speed::default() => DiskBound::None,
            Some(device) => DiskBound::Cgroup(device),
            None => DiskBound::Vmm,
        }
    }

    fn cgroup(&self, cpu: MilliCpu) -> Option<IoLimits> {
        let Speed { bytes_per_second, operations_per_second } = self.disk.share(cpu);
        let device = self.device.filter(|_| self.disk != Speed::default())?;
        Some(IoLimits { device, bytes_per_second, operations_per_second })
    }

    /// What the VMM holds a sandbox's own disk to: nothing where its cgroup does, which bounds what
    /// reaches the disk and not what the page cache answers.
    pub(super) fn disk_buckets(&self, cpu: MilliCpu) -> vmm::IoLimits {
        match self.device {
            Some(_) => vmm::IoLimits::default(),
            None => self.disk.share(cpu).buckets(),
        }
    }

    /// What the VMM holds a sandbox's network to, each way.
    pub(super) fn network_buckets(&self, cpu: MilliCpu) -> vmm::IoLimits {
        self.network.share(cpu).buckets()
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
pub(super) fn at_boot(resources: Resources, memory: Mib, traffic: &Traffic) -> Limits {
    Limits {
        // A boot has whole CPUs: held to a quarter of one it would take four times as long and
        // use no less. Boots take turns instead.
        cpu: MilliCpu(u32::from(resources.vcpus()) * 1000),
        cpu_weight: (resources.cpu.0 * WEIGHT_PER_CPU / 1000).max(1),
        memory,
        pids: VMM_PIDS_MAX,
        io: traffic.cgroup(resources.cpu),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: BlockDevice = BlockDevice { major: 254, minor: 0 };

    fn of_tier(cpu: u32, memory: u32) -> (Demand, Limits) {
        let resources = Resources::new(MilliCpu(cpu), Mib(memory), None).unwrap();
        let demand = demand(resources);
        let traffic = Traffic::new(&config::Limits::default(), Some(DISK));
        (demand, at_boot(resources, demand.memory, &traffic))
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
        let traffic = Traffic::new(&free, Some(DISK));
        assert_eq!(traffic.cgroup(MilliCpu(250)), None);
        assert_eq!(traffic.disk_bound(), DiskBound::None);
        let half = config::Limits { io_mib_per_second: 1, ..free };
        let share = Traffic::new(&half, Some(DISK)).cgroup(MilliCpu(250)).unwrap();
        assert_eq!((share.bytes_per_second, share.operations_per_second), (256 * 1024, 0));
    }

    #[test]
    fn the_vmm_bounds_the_network_and_the_disk_if_no_cgroup_can() {
        let of = |device| Traffic::new(&config::Limits::default(), device);
        let network = of(Some(DISK)).network_buckets(MilliCpu(250));
        let bytes = 125 * 1024 * 1024 / 4;
        assert_eq!(network.bytes, Some(Rate { per_second: bytes, burst: bytes.div_ceil(10) }));
        assert_eq!(network.operations, Some(Rate { per_second: 25_000, burst: 2500 }));

        assert_eq!(of(Some(DISK)).disk_buckets(MilliCpu(1000)), vmm::IoLimits::default());
        assert_eq!(of(Some(DISK)).disk_bound(), DiskBound::Cgroup(DISK));
        assert_eq!(of(None).disk_bound(), DiskBound::Vmm);
        let disk = of(None).disk_buckets(MilliCpu(1000));
        assert_eq!(disk.operations, Some(Rate { per_second: 10_000, burst: 1000 }));
    }
}
