//! What the guest's CPUs say of themselves: all that KVM supports, with the topology made ours.
//! One package, one thread a core, APIC id = vCPU number.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaf 1: features.
const FEATURES: u32 = 1;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_SEVERAL_CPUS: u32 = 1 << 28;
/// Leaf 4: Intel's caches.
const CACHES_INTEL: u32 = 4;
/// Leaf 0xa: performance counters, which would let a guest watch the host's caches.
const PERFORMANCE_COUNTERS: u32 = 0xa;
/// Leaves 0xb and 0x1f: topology.
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;
const FEATURES_AMD: u32 = 0x8000_0001;
/// PerfCtrExtCore, PerfCtrExtNB and PerfCtrExtLLC.
const ECX_AMD_COUNTERS: u32 = 1 << 23 | 1 << 24 | 1 << 28;
const SIZES_AMD: u32 = 0x8000_0008;
const CACHES_AMD: u32 = 0x8000_001d;
const TOPOLOGY_AMD: u32 = 0x8000_001e;

/// What the machine's shape adds to KVM's list.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) vcpus: u8,
    /// The in-kernel local APIC has a TSC deadline timer, which KVM leaves to us to announce.
    pub(crate) tsc_deadline: bool,
}

impl Shape {
    /// Bits of an APIC id that number the cores.
    fn core_bits(self) -> u32 {
        u32::from(self.vcpus).next_power_of_two().trailing_zeros()
    }
}

/// KVM's list made into that of vCPU `index`. `None`: KVM's list leaves no room for the topology.
pub(crate) fn for_vcpu(supported: &CpuId, shape: Shape, index: u8) -> Option<CpuId> {
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|entry| !matches!(entry.function, TOPOLOGY | TOPOLOGY_V2))
        .copied()
        .collect();
    for entry in &mut entries {
        adjust(entry, shape, index);
    }
    let highest = entries.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    for leaf in [TOPOLOGY, TOPOLOGY_V2] {
        if highest >= leaf {
            entries.extend(topology(leaf, shape, index));
        }
    }
    CpuId::from_entries(&entries).ok()
}

fn adjust(entry: &mut kvm_cpuid_entry2, shape: Shape, index: u8) {
    let apic_id = u32::from(index);
    let vcpus = u32::from(shape.vcpus);
    match entry.function {
        FEATURES => {
            entry.ebx = entry.ebx & 0x0000_ffff | vcpus << 16 | apic_id << 24;
            entry.ecx |= ECX_HYPERVISOR;
            set(&mut entry.ecx, ECX_TSC_DEADLINE, shape.tsc_deadline);
            set(&mut entry.edx, EDX_SEVERAL_CPUS, vcpus > 1);
        }
        CACHES_INTEL if entry.eax & 0x1f != 0 => {
            let last_level = entry.eax >> 5 & 0x7 >= 3;
            let sharing = if last_level { vcpus - 1 } else { 0 };
            let cores = (1 << shape.core_bits()) - 1;
            entry.eax = entry.eax & 0x3fff | sharing << 14 | cores << 26;
        }
        PERFORMANCE_COUNTERS => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        FEATURES_AMD => entry.ecx &= !ECX_AMD_COUNTERS,
        SIZES_AMD => {
            entry.ecx = entry.ecx & !0xf0ff | (vcpus - 1) | shape.core_bits() << 12;
        }
        CACHES_AMD if entry.eax & 0x1f != 0 => {
            let last_level = entry.eax >> 5 & 0x7 >= 3;
            let sharing = if last_level { vcpus - 1 } else { 0 };
            entry.eax = entry.eax & !(0xfff << 14) | sharing << 14;
        }
        TOPOLOGY_AMD => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (apic_id, apic_id, 0, 0);
        }
        _ => {}
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on {
        *register |= bit;
    } else {
        *register &= !bit;
    }
}

/// The three sub-leaves of a topology leaf: threads of a core, cores of the package, the end.
fn topology(leaf: u32, shape: Shape, index: u8) -> [kvm_cpuid_entry2; 3] {
    let vcpus = u32::from(shape.vcpus);
    let levels = [(0, 1, LEVEL_THREAD), (shape.core_bits(), vcpus, LEVEL_CORE), (0, 0, 0)];
    let mut number = 0;
    levels.map(|(bits, cpus, level)| {
        let entry = kvm_cpuid_entry2 {
            function: leaf,
            index: number,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: bits,
            ebx: cpus,
            ecx: number | level << 8,
            edx: u32::from(index),
            ..Default::default()
        };
        number += 1;
        entry
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ebx: u32::MAX, ecx: 0, edx: 0, ..Default::default() }
    }

    fn of_vcpu_2_of_3(entries: &[kvm_cpuid_entry2]) -> Vec<kvm_cpuid_entry2> {
        let shape = Shape { vcpus: 3, tsc_deadline: true };
        for_vcpu(&CpuId::from_entries(entries).unwrap(), shape, 2).unwrap().as_slice().to_vec()
    }

    #[test]
    fn features_name_the_vcpu_the_hypervisor_and_the_timer() {
        let entries = of_vcpu_2_of_3(&[leaf(0, 1), leaf(FEATURES, 0)]);
        assert_eq!(entries[1].ebx, 0x0203_ffff);
        assert_eq!(entries[1].ecx, ECX_HYPERVISOR | ECX_TSC_DEADLINE);
        assert_eq!(entries[1].edx, EDX_SEVERAL_CPUS);
    }

    #[test]
    fn topology_is_ours_whatever_the_host_says_and_absent_where_the_host_has_none() {
        let entries = of_vcpu_2_of_3(&[leaf(0, 0x10), leaf(TOPOLOGY, 9), leaf(TOPOLOGY, 9)]);
        let told: Vec<_> =
            entries[1..].iter().map(|entry| (entry.eax, entry.ebx, entry.ecx, entry.edx)).collect();
        assert_eq!(told, [(0, 1, 0x100, 2), (2, 3, 0x201, 2), (0, 0, 2, 2)]);
        assert_eq!(of_vcpu_2_of_3(&[leaf(0, 0xa)]).len(), 1);
    }

    #[test]
    fn performance_counters_are_hidden() {
        let entries = of_vcpu_2_of_3(&[leaf(PERFORMANCE_COUNTERS, 7)]);
        assert_eq!((entries[0].eax, entries[0].ebx), (0, 0));
    }
}
