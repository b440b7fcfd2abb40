//! A vCPU's state at its first instruction, as the PVH boot protocol wants it: 32-bit protected
//! mode, flat segments, paging off, EBX at the start info. Only vCPU 0 starts there; the others
//! wait for the kernel's INIT and SIPI.

use kvm_bindings::{Msrs, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};

use crate::layout::START_INFO;

const CR0_PROTECTED: u64 = 1;
/// Extension type: 387 or later. Reads as set on every CPU with a built-in FPU.
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
/// The bit of RFLAGS that is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;

const CODE_SELECTOR: u16 = 0x8;
const DATA_SELECTOR: u16 = 0x10;
const TASK_SELECTOR: u16 = 0x18;
/// Segment types: code, executable and readable; data, writable; 32-bit TSS, busy.
const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_TASK: u8 = 0xb;
/// Last byte of the smallest 32-bit TSS.
const TASK_LIMIT: u32 = 0x67;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
/// MTRRs on, everything write-back: without it a guest may take its memory for uncached.
const MTRR_ON_WRITE_BACK: u64 = 1 << 11 | 6;

/// Registers of the local APIC's two pins, as byte offsets.
const LAPIC_LVT0: usize = 0x350;
const LAPIC_LVT1: usize = 0x360;
const LVT_MASKED: u32 = 1 << 16;
const LVT_NMI: u32 = 4 << 8;

/// General registers of the boot vCPU.
pub(crate) fn general(entry: u64) -> kvm_regs {
    kvm_regs { rip: entry, rbx: START_INFO, rflags: RFLAGS_RESERVED, ..Default::default() }
}

/// Turns the state after reset into PVH's.
pub(crate) fn to_pvh(special: &mut kvm_sregs) {
    let data = flat(DATA_SELECTOR, TYPE_DATA);
    special.cs = flat(CODE_SELECTOR, TYPE_CODE);
    (special.ds, special.es, special.fs, special.gs, special.ss) = (data, data, data, data, data);
    special.tr = kvm_segment {
        selector: TASK_SELECTOR,
        type_: TYPE_TASK,
        present: 1,
        limit: TASK_LIMIT,
        ..Default::default()
    };
    special.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE;
    special.cr4 = 0;
    special.efer = 0;
}

/// A 4 GiB segment from 0.
fn flat(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        // Code or data, not a system segment.
        s: 1,
        // The limit counts pages.
        g: 1,
        ..Default::default()
    }
}

/// Model-specific registers that must not be at their reset value.
pub(crate) fn model_specific() -> Option<Msrs> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    Msrs::from_entries(&[
        entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEFAULT_TYPE, MTRR_ON_WRITE_BACK),
    ])
    .ok()
}

/// Sets the local APIC's pins: the first masked, for there is no PIC behind it; the second NMI.
pub(crate) fn set_pins(lapic: &mut kvm_lapic_state) {
    for (offset, value) in [(LAPIC_LVT0, LVT_MASKED), (LAPIC_LVT1, LVT_NMI)] {
        let register = &mut lapic.regs[offset..offset + 4];
        for (place, byte) in register.iter_mut().zip(value.to_le_bytes()) {
            *place = byte.cast_signed();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_vcpu_starts_in_flat_32_bit_mode_at_the_entry_with_ebx_at_the_start_info() {
        let mut special = kvm_sregs { efer: 0x500, cr4: 0x20, ..Default::default() };
        to_pvh(&mut special);
        assert_eq!((special.cs.base, special.cs.limit, special.cs.db), (0, u32::MAX, 1));
        assert_eq!((special.cr0 & 1, special.cr0 >> 31, special.cr4, special.efer), (1, 0, 0, 0));
        assert_eq!((general(0x100).rip, general(0x100).rbx), (0x100, START_INFO));
    }

    #[test]
    fn the_first_pin_of_the_local_apic_is_masked() {
        let mut lapic = kvm_lapic_state::default();
        set_pins(&mut lapic);
        assert_eq!(lapic.regs[LAPIC_LVT0..LAPIC_LVT0 + 4], [0, 0, 1, 0]);
        assert_eq!(lapic.regs[LAPIC_LVT1..LAPIC_LVT1 + 4], [0, 4, 0, 0]);
    }
}
