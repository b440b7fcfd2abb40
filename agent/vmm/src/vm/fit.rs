//! Whether a guest that has seen one host's CPU can go on on another.

use holdfast_wire::vmm::CpuTemplate;
use kvm_bindings::kvm_cpuid_entry2;

use super::template::{EBX_SIZES_DEFENCES, EDX_7_DEFENCES, SIZES};

/// A guest was told of its CPU what is not so here.
#[derive(Debug, thiserror::Error)]
#[error("the state is from another kind of CPU: leaf {function:#x}.{index} differs here")]
pub(crate) struct Unlike {
    function: u32,
    index: u32,
}

/// Defences against speculation: leaf, register, bits.
const DEFENCES: [(u32, usize, u32); 2] = [(7, 3, EDX_7_DEFENCES), (SIZES, 1, EBX_SIZES_DEFENCES)];

/// `told` is what the guest knows, `here` what this host says to a new guest of `template`.
///
/// Of the host's own CPU everything must be the same. Of a template what it promises is there, or
/// the machine would not have started; but the guest chose its defences by what it saw, so that
/// those it uses must be there too, and the vendor be the same.
pub(super) fn check(
    template: CpuTemplate,
    told: &[kvm_cpuid_entry2],
    here: &[kvm_cpuid_entry2],
) -> Result<(), Unlike> {
    let of = |list: &[kvm_cpuid_entry2], function, index| {
        let same = |entry: &&kvm_cpuid_entry2| entry.function == function && entry.index == index;
        list.iter().find(same).map(|it| [it.eax, it.ebx, it.ecx, it.edx])
    };
    let unlike = |function, index| Err(Unlike { function, index });
    match template {
        CpuTemplate::Host => {
            let all = told.iter().chain(here).map(|entry| (entry.function, entry.index));
            for (function, index) in all {
                if of(told, function, index) != of(here, function, index) {
                    return unlike(function, index);
                }
            }
        }
        CpuTemplate::V3 => {
            let vendor = |list| of(list, 0, 0).map(|[_, ebx, ecx, edx]| [ebx, ecx, edx]);
            if vendor(told) != vendor(here) {
                return unlike(0, 0);
            }
            for (function, register, bits) in DEFENCES {
                let has = |list| of(list, function, 0).map_or(0, |all| all[register]) & bits;
                if has(told) & !has(here) != 0 {
                    return unlike(function, 0);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(leaves: &[(u32, [u32; 4])]) -> Vec<kvm_cpuid_entry2> {
        let entry = |&(function, [eax, ebx, ecx, edx]): &(u32, [u32; 4])| kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        leaves.iter().map(entry).collect()
    }

    #[test]
    fn the_hosts_own_cpu_must_be_the_same_in_every_leaf() {
        let told = list(&[(0, [13, 1, 2, 3]), (7, [0, 1, 0, 0])]);
        assert!(check(CpuTemplate::Host, &told, &told).is_ok());
        let other = list(&[(0, [13, 1, 2, 3]), (7, [0, 3, 0, 0])]);
        let error = check(CpuTemplate::Host, &told, &other).unwrap_err();
        assert!(error.to_string().contains("leaf 0x7.0"), "{error}");
        assert!(check(CpuTemplate::Host, &told, &told[..1]).is_err());
        assert!(check(CpuTemplate::Host, &told[..1], &told).is_err());
    }

    #[test]
    fn of_a_template_the_vendor_and_the_defences_in_use_must_be_there_and_more_is_no_harm() {
        let told = list(&[(0, [13, 1, 2, 3]), (7, [0, 1, 0, 1 << 26])]);
        let more = list(&[(0, [16, 1, 2, 3]), (7, [0, 9, 0, 3 << 26])]);
        assert!(check(CpuTemplate::V3, &told, &more).is_ok());
        assert!(check(CpuTemplate::V3, &more, &told).is_err());
        let vendor = list(&[(0, [13, 9, 2, 3]), (7, [0, 1, 0, 1 << 26])]);
        assert!(check(CpuTemplate::V3, &told, &vendor).is_err());
    }
}
