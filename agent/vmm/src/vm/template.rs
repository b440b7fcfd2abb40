//! CPU templates: what is left of KVM's list of features so that a snapshot fits other hosts.
//!
//! A template is a table of what is kept of each leaf and what must be there; leaves that are not
//! in it go. What is kept and not needed differs between hosts without harm to a running kernel,
//! or is a defence that hiding would take from it: a restore compares those.

use holdfast_wire::vmm::CpuTemplate;
use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// A host does not have what its template promises.
#[derive(Debug, thiserror::Error)]
#[error("this host's CPU lacks, of its template: {}", .missing.join(", "))]
pub(crate) struct Unfit {
    missing: Vec<String>,
}

/// One leaf: registers in the order EAX, EBX, ECX, EDX.
struct Row {
    function: u32,
    index: u32,
    keep: [u32; 4],
    need: [u32; 4],
}

const ALL: u32 = u32::MAX;
/// As KVM tells it: sizes, names, topology, and KVM's own leaves, which our host kernel sets.
const fn whole(function: u32, index: u32) -> Row {
    Row { function, index, keep: [ALL; 4], need: [0; 4] }
}

/// Highest leaves told: extended state, and AMD's topology.
const HIGHEST: u32 = 0xd;
const HIGHEST_EXTENDED: u32 = 0x8000_001e;
const EXTENDED: u32 = 0x8000_0000;
pub(super) const SIZES: u32 = 0x8000_0008;
/// Bits of a physical address. Guest memory ends below, see `config`.
const ADDRESS_BITS: u32 = 40;
const STATE: u32 = 0xd;
/// Bytes of x87, SSE and AVX state with its header.
const STATE_BYTES: u32 = 832;

/// SSE3, PCLMULQDQ, SSSE3, FMA, CMPXCHG16B, SSE4.1, SSE4.2, MOVBE, POPCNT, AES, XSAVE, AVX, F16C
/// and RDRAND.
const ECX_1: u32 = 1 | 1 << 1 | 1 << 9 | 1 << 12 | 1 << 13 | 3 << 19 | 3 << 22 | 3 << 25 | 7 << 28;
/// KVM does these itself on every CPU: x2APIC, TSC deadline, and the mirror of CR4.OSXSAVE.
const ECX_1_KVM: u32 = 1 << 21 | 1 << 24 | 1 << 27;
const ECX_1_HYPERVISOR: u32 = 1 << 31;
/// FPU to CX8, APIC, SEP, MTRR to CLFSH without the serial number, MMX to SSE2.
const EDX_1: u32 = 0x1ff | 1 << 9 | 1 << 11 | 0x3f << 12 | 1 << 19 | 0xf << 23;
/// MCE and MCA are KVM's own; MTRR and the rest every 64-bit CPU has.
const EDX_1_NEED: u32 = EDX_1 & !(1 << 7 | 1 << 14 | 1 << 1);
const EDX_1_SEVERAL: u32 = 1 << 28;
/// FSGSBASE, BMI1, AVX2, SMEP, BMI2.
const EBX_7: u32 = 1 | 1 << 3 | 1 << 5 | 3 << 7;
/// TSC_ADJUST, which KVM does itself.
const EBX_7_KVM: u32 = 1 << 1;
/// Controls of speculation: SPEC_CTRL, STIBP, SSBD. ARCH_CAPABILITIES is not among them: without
/// it a kernel takes its CPU for open to everything, and defends itself wherever it runs.
pub(super) const EDX_7_DEFENCES: u32 = 3 << 26 | 1 << 31;
/// The same on AMD: IBPB, IBRS, STIBP, SSBD, VIRT_SSBD.
pub(super) const EBX_SIZES_DEFENCES: u32 = 1 << 12 | 3 << 14 | 3 << 24;
/// LAHF and LZCNT.
const ECX_EXTENDED: u32 = 1 | 1 << 5;
/// SYSCALL, NX, RDTSCP and long mode.
const EDX_EXTENDED: u32 = 1 << 11 | 1 << 20 | 1 << 27 | 1 << 29;
/// 1 GiB pages, and AMD's mirror of leaf 1.
const EDX_EXTENDED_KEEP: u32 = EDX_EXTENDED | 1 << 26 | 0x0183_f3ff;
/// Not all CPUs say so of their counter, and KVM says it of none where it is not so.
const EDX_POWER_STEADY_TSC: u32 = 1 << 8;

/// x86-64-v3 with AES, PCLMULQDQ, RDRAND, FSGSBASE and SMEP, which all CPUs that have it have too.
const V3: &[Row] = &[
    whole(0, 0),
    Row {
        function: 1,
        index: 0,
        keep: [ALL, ALL, ECX_1 | ECX_1_KVM | ECX_1_HYPERVISOR, EDX_1 | EDX_1_SEVERAL],
        need: [0, 0, ECX_1, EDX_1_NEED],
    },
    whole(2, 0),
    whole(4, 0),
    whole(4, 1),
    whole(4, 2),
    whole(4, 3),
    // ARAT: the timer goes on while a CPU sleeps.
    Row { function: 6, index: 0, keep: [1 << 2, 0, 0, 0], need: [0; 4] },
    Row {
        function: 7,
        index: 0,
        keep: [0, EBX_7 | EBX_7_KVM, 0, EDX_7_DEFENCES],
        need: [0, EBX_7, 0, 0],
    },
    whole(0xb, 0),
    whole(0xb, 1),
    // x87, SSE and AVX; saved with XSAVEOPT at best.
    Row { function: STATE, index: 0, keep: [7, ALL, ALL, 0], need: [7, 0, 0, 0] },
    Row { function: STATE, index: 1, keep: [1, 0, 0, 0], need: [1, 0, 0, 0] },
    whole(STATE, 2),
    whole(0x4000_0000, 0),
    whole(0x4000_0001, 0),
    whole(EXTENDED, 0),
    Row {
        function: 0x8000_0001,
        index: 0,
        keep: [ALL, ALL, ECX_EXTENDED, EDX_EXTENDED_KEEP],
        need: [0, 0, ECX_EXTENDED, EDX_EXTENDED],
    },
    whole(0x8000_0002, 0),
    whole(0x8000_0003, 0),
    whole(0x8000_0004, 0),
    whole(0x8000_0005, 0),
    whole(0x8000_0006, 0),
    Row { function: 0x8000_0007, index: 0, keep: [0, 0, 0, EDX_POWER_STEADY_TSC], need: [0; 4] },
    Row { function: SIZES, index: 0, keep: [ALL, EBX_SIZES_DEFENCES, ALL, 0], need: [0; 4] },
    whole(0x8000_001d, 0),
    whole(0x8000_001d, 1),
    whole(0x8000_001d, 2),
    whole(0x8000_001d, 3),
    whole(HIGHEST_EXTENDED, 0),
];

/// What all of one vendor's CPUs with x86-64-v3 have beside it: leaf, register, bits, whether
/// needed. A snapshot does not go from one vendor to the other anyway.
type Extra = (u32, usize, u32, bool);
const INTEL: &[Extra] = &[
    // PCID, without which a kernel that separates its page tables is slow; ERMS and INVPCID.
    (1, 2, 1 << 17, true),
    (7, 1, 3 << 9, true),
];
const AMD: &[Extra] = &[
    // CMP_LEGACY and TOPOEXT, by which the cores are counted; MMXEXT and FXSR_OPT.
    (0x8000_0001, 2, 1 << 1 | 1 << 22, false),
    (0x8000_0001, 3, 1 << 22 | 1 << 25, false),
];

const VENDOR_INTEL: u32 = u32::from_le_bytes(*b"Genu");
const VENDOR_AMD: u32 = u32::from_le_bytes(*b"Auth");

/// KVM's list cut down to `template`.
pub(crate) fn apply(template: CpuTemplate, supported: CpuId) -> Result<CpuId, Unfit> {
    match template {
        CpuTemplate::Host => Ok(supported),
        CpuTemplate::V3 => cut(V3, &supported),
    }
}

fn cut(rows: &[Row], supported: &CpuId) -> Result<CpuId, Unfit> {
    let entries = supported.as_slice();
    let vendor = entries.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.ebx);
    let extras = match vendor {
        VENDOR_INTEL => INTEL,
        VENDOR_AMD => AMD,
        _ => &[],
    };
    let mut missing = Vec::new();
    let mut kept = Vec::new();
    for row in rows {
        let (keep, need) = with_extras(row, extras);
        let same =
            |entry: &&kvm_cpuid_entry2| entry.function == row.function && entry.index == row.index;
        let found = entries.iter().find(same);
        let has = found.map_or([0; 4], registers);
        for (name, (need, has)) in ["EAX", "EBX", "ECX", "EDX"].iter().zip(need.iter().zip(has)) {
            if need & !has != 0 {
                let bits = need & !has;
                missing.push(format!("leaf {:#x} {name} {bits:#x}", row.function));
            }
        }
        if let Some(entry) = found {
            kept.push(cut_entry(*entry, keep));
        }
    }
    if !missing.is_empty() {
        return Err(Unfit { missing });
    }
    // No more entries than KVM had room for.
    CpuId::from_entries(&kept).map_err(|_| Unfit { missing: vec!["a list that fits".to_owned()] })
}

fn with_extras(row: &Row, extras: &[Extra]) -> ([u32; 4], [u32; 4]) {
    let (mut keep, mut need) = (row.keep, row.need);
    for (function, register, bits, needed) in extras {
        if *function == row.function && row.index == 0 {
            keep[*register] |= bits;
            need[*register] |= if *needed { *bits } else { 0 };
        }
    }
    (keep, need)
}

fn registers(entry: &kvm_cpuid_entry2) -> [u32; 4] {
    [entry.eax, entry.ebx, entry.ecx, entry.edx]
}

fn cut_entry(mut entry: kvm_cpuid_entry2, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    entry.eax &= eax;
    entry.ebx &= ebx;
    entry.ecx &= ecx;
    entry.edx &= edx;
    match (entry.function, entry.index) {
        (0, _) => entry.eax = entry.eax.min(HIGHEST),
        (EXTENDED, _) => entry.eax = entry.eax.min(HIGHEST_EXTENDED),
        // Bytes of the state in use, and of all that is left.
        (STATE, 0) => (entry.ebx, entry.ecx) = (STATE_BYTES, STATE_BYTES),
        (SIZES, _) => entry.eax = entry.eax & !0xff | (entry.eax & 0xff).min(ADDRESS_BITS),
        _ => {}
    }
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    /// A host that has every bit of every leaf, and leaves beyond.
    fn everything(vendor: u32) -> Vec<kvm_cpuid_entry2> {
        let mut entries: Vec<_> =
            V3.iter().map(|row| leaf(row.function, row.index, [ALL; 4])).collect();
        entries[0] = leaf(0, 0, [0x24, vendor, 0, 0]);
        for (function, index) in [(7, 1), (STATE, 3), (0x14, 0), (0x1e, 0), (0x8000_0021, 0)] {
            entries.push(leaf(function, index, [ALL; 4]));
        }
        entries
    }

    fn v3(entries: &[kvm_cpuid_entry2]) -> Result<Vec<kvm_cpuid_entry2>, Unfit> {
        let cut = apply(CpuTemplate::V3, CpuId::from_entries(entries).unwrap())?;
        Ok(cut.as_slice().to_vec())
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> [u32; 4] {
        let found = entries.iter().find(|it| it.function == function && it.index == index);
        registers(found.unwrap())
    }

    #[test]
    fn the_host_template_changes_nothing() {
        let list = CpuId::from_entries(&everything(VENDOR_AMD)).unwrap();
        assert_eq!(apply(CpuTemplate::Host, list.clone()).unwrap().as_slice(), list.as_slice());
    }

    #[test]
    fn features_beyond_v3_are_gone() {
        let cut = v3(&everything(VENDOR_AMD)).unwrap();
        let [_, ebx, ecx, edx] = find(&cut, 7, 0);
        // No AVX-512, SMAP, SHA, RDSEED; no ARCH_CAPABILITIES.
        assert_eq!((ebx, ecx), (0b1_1010_1011, 0));
        assert_eq!(edx & 1 << 29, 0);
        // No MONITOR, VMX, DCA, PCID.
        assert_eq!(find(&cut, 1, 0)[2] & (1 << 3 | 1 << 5 | 1 << 18 | 1 << 17), 0);
        // No SVM, SSE4A, XOP, FMA4.
        assert_eq!(find(&cut, 0x8000_0001, 0)[2] & (1 << 2 | 1 << 6 | 1 << 11 | 1 << 16), 0);
        assert_eq!(find(&cut, STATE, 0), [7, 832, 832, 0]);
        assert_eq!(find(&cut, STATE, 1), [1, 0, 0, 0]);
        assert_eq!(find(&cut, SIZES, 0)[0] & 0xff, 40);
    }

    #[test]
    fn leaves_beyond_the_template_are_gone_and_the_highest_say_so() {
        let cut = v3(&everything(VENDOR_AMD)).unwrap();
        assert_eq!(cut.len(), V3.len());
        assert_eq!(find(&cut, 0, 0)[0], 0xd);
        assert_eq!(find(&cut, EXTENDED, 0)[0], HIGHEST_EXTENDED);
    }

    #[test]
    fn each_vendor_keeps_what_all_its_cpus_have() {
        let intel = v3(&everything(VENDOR_INTEL)).unwrap();
        let amd = v3(&everything(VENDOR_AMD)).unwrap();
        assert_eq!(find(&intel, 1, 0)[2] & 1 << 17, 1 << 17);
        assert_eq!(find(&amd, 1, 0)[2] & 1 << 17, 0);
        assert_eq!(find(&intel, 0x8000_0001, 0)[2] & 1 << 22, 0);
        assert_eq!(find(&amd, 0x8000_0001, 0)[2] & 1 << 22, 1 << 22);
    }

    #[test]
    fn two_hosts_that_differ_beyond_the_template_look_the_same() {
        let rich = everything(VENDOR_INTEL);
        let mut plain = rich.clone();
        for entry in &mut plain {
            match (entry.function, entry.index) {
                (0, _) => entry.eax = 0x16,
                (7, 0) => (entry.ebx, entry.ecx) = (EBX_7 | EBX_7_KVM | 3 << 9, 0),
                (STATE, 0) => (entry.eax, entry.ebx, entry.ecx) = (7, 832, 832),
                (STATE, 1) => (entry.eax, entry.ebx) = (1, 0),
                _ => {}
            }
        }
        plain.retain(|entry| {
            entry.function < 0x14 || entry.function >= EXTENDED || entry.index == 0
        });
        assert_eq!(v3(&rich).unwrap(), v3(&plain).unwrap());
    }

    #[test]
    fn a_host_without_a_needed_feature_is_refused_by_leaf_and_bit() {
        let mut entries = everything(VENDOR_AMD);
        for entry in &mut entries {
            if (entry.function, entry.index) == (7, 0) {
                // AVX2 and BMI2.
                entry.ebx &= !(1 << 5 | 1 << 8);
            }
        }
        entries.retain(|entry| entry.function != 0x8000_0001);
        let told = v3(&entries).unwrap_err().to_string();
        assert_eq!(
            told,
            "this host's CPU lacks, of its template: leaf 0x7 EBX 0x120, \
             leaf 0x80000001 ECX 0x21, leaf 0x80000001 EDX 0x28100800"
        );
    }
}
