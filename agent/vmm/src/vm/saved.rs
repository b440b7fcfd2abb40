//! What a snapshot keeps of the virtual machine itself: each vCPU's registers, the interrupt
//! controllers, the clock. The order in which they are read and written is KVM's: some depend on
//! others.

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_clock_data,
    kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::{VmError, refused};
use crate::{limits::state::MSRS_MAX, sys};

/// Registers read or written by one call to KVM.
const MSRS_PER_CALL: usize = 64;
/// The time stamp counter.
const MSR_TSC: u32 = 0x10;
/// A moment of the time stamp counter, which must be right before it is set.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Parts of a million by which the counters of two hosts may differ before a guest's sense of time
/// suffers; clocks that are kept by a network drift as much.
const TSC_TOLERANCE_PPM: u64 = 250;

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// One vCPU that stands still.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct VcpuState {
    run_state: kvm_mp_state,
    general: kvm_regs,
    special: kvm_sregs,
    /// The XSAVE area without the zeros at its end, most of it.
    extended: Vec<u32>,
    extended_control: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    /// 0: the host does not say.
    tsc_khz: u32,
    msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
    /// What the guest was told of its CPU.
    pub(super) features: Vec<kvm_cpuid_entry2>,
}

impl VcpuState {
    /// Reads it. `msrs` are the registers that KVM lists; those it cannot read are left out, and
    /// `features` for the caller to fill in.
    pub(crate) fn read(vcpu: &VcpuFd, msrs: &[u32]) -> Result<Self, VmError> {
        // First: KVM takes in an INIT or SIPI that waits for the vCPU.
        let run_state = vcpu.get_mp_state().map_err(refused("tell whether a vCPU runs"))?;
        Ok(Self {
            run_state,
            general: vcpu.get_regs().map_err(refused("tell a vCPU's general registers"))?,
            special: vcpu.get_sregs().map_err(refused("tell a vCPU's special registers"))?,
            extended: without_zeros_at_end(
                &vcpu.get_xsave().map_err(refused("tell a vCPU's extended state"))?.region,
            ),
            extended_control: vcpu.get_xcrs().map_err(refused("tell a vCPU's XCR0"))?,
            debug: vcpu.get_debug_regs().map_err(refused("tell a vCPU's debug registers"))?,
            lapic: vcpu.get_lapic().map_err(refused("tell a local APIC's state"))?,
            tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
            msrs: read_msrs(vcpu, msrs)?,
            // Last: the calls above may change what is pending.
            events: vcpu.get_vcpu_events().map_err(refused("tell a vCPU's pending events"))?,
            features: Vec::new(),
        })
    }

    /// Writes it to a vCPU that has not run.
    pub(super) fn write(&self, vcpu: &VcpuFd) -> Result<(), VmError> {
        let features = CpuId::from_entries(&self.features)
            .map_err(|_| VmError::List { what: "CPU features" })?;
        vcpu.set_cpuid2(&features).map_err(refused("set a vCPU's features"))?;
        self.fit_counter(vcpu)?;
        vcpu.set_mp_state(self.run_state).map_err(refused("set whether a vCPU runs"))?;
        vcpu.set_regs(&self.general).map_err(refused("set a vCPU's general registers"))?;
        vcpu.set_sregs(&self.special).map_err(refused("set a vCPU's special registers"))?;
        let mut extended = kvm_xsave::default();
        for (word, saved) in extended.region.iter_mut().zip(&self.extended) {
            *word = *saved;
        }
        sys::set_extended_state(vcpu, &extended).map_err(refused("set a vCPU's extended state"))?;
        vcpu.set_xcrs(&self.extended_control).map_err(refused("set a vCPU's XCR0"))?;
        vcpu.set_debug_regs(&self.debug).map_err(refused("set a vCPU's debug registers"))?;
        vcpu.set_lapic(&self.lapic).map_err(refused("set a local APIC's state"))?;
        write_msrs(vcpu, &self.msrs)?;
        vcpu.set_vcpu_events(&self.events).map_err(refused("set a vCPU's pending events"))
    }

    /// The guest has measured the counter: it must go on at the rate it had.
    fn fit_counter(&self, vcpu: &VcpuFd) -> Result<(), VmError> {
        let host = vcpu.get_tsc_khz().unwrap_or(0);
        if self.tsc_khz == 0 || host == 0 || is_close(self.tsc_khz, host) {
            return Ok(());
        }
        let unfit = VmError::Counter { wanted_khz: self.tsc_khz, host_khz: host };
        vcpu.set_tsc_khz(self.tsc_khz).map_err(|_| unfit)
    }
}

fn without_zeros_at_end(words: &[u32]) -> Vec<u32> {
    let end = words.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1);
    words[..end].to_vec()
}

fn is_close(one: u32, other: u32) -> bool {
    u64::from(one.abs_diff(other)) * 1_000_000 <= u64::from(one) * TSC_TOLERANCE_PPM
}

fn msrs(entries: &[kvm_msr_entry]) -> Result<Msrs, VmError> {
    Msrs::from_entries(entries).map_err(|_| VmError::List { what: "registers" })
}

fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, VmError> {
    let mut read = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let piece = &rest[..rest.len().min(MSRS_PER_CALL)];
        let asked: Vec<_> =
            piece.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut asked = msrs(&asked)?;
        let done = vcpu.get_msrs(&mut asked).map_err(refused("tell model-specific registers"))?;
        read.extend(asked.as_slice().iter().take(done).map(|entry| (entry.index, entry.data)));
        // KVM stops at the first that this vCPU does not have.
        let skipped = usize::from(done < piece.len());
        rest = &rest[(done + skipped).min(rest.len())..];
    }
    // A stable sort: the rest keeps the order KVM gave it.
    read.sort_by_key(|&(index, _)| match index {
        MSR_TSC => 0,
        MSR_TSC_DEADLINE => 2,
        _ => 1,
    });
    Ok(read)
}

fn write_msrs(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), VmError> {
    if values.len() > MSRS_MAX {
        return Err(VmError::List { what: "registers" });
    }
    let mut rest = values;
    while !rest.is_empty() {
        let piece = &rest[..rest.len().min(MSRS_PER_CALL)];
        let entry = |&(index, data)| kvm_msr_entry { index, data, ..Default::default() };
        let wanted = msrs(&piece.iter().map(entry).collect::<Vec<_>>())?;
        let done = vcpu.set_msrs(&wanted).map_err(refused("set model-specific registers"))?;
        match piece.get(done) {
            // What this host lacks and the guest left alone is no loss.
            Some((_, 0)) => rest = &rest[done + 1..],
            Some(&(index, value)) => return Err(VmError::Msr { index, value }),
            None => rest = &rest[piece.len()..],
        }
    }
    Ok(())
}

/// What all vCPUs share.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SharedState {
    chips: [kvm_irqchip; 3],
    /// Nanoseconds of the guest's paravirtual clock. It stands still until the restore, as in a
    /// sleep; the time of day is for PID 1 to set.
    clock_ns: u64,
}

impl SharedState {
    pub(super) fn read(vm: &VmFd) -> Result<Self, VmError> {
        let mut chips = CHIPS.map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
        for chip in &mut chips {
            vm.get_irqchip(chip).map_err(refused("tell an interrupt controller's state"))?;
        }
        let clock = vm.get_clock().map_err(refused("tell the clock"))?;
        Ok(Self { chips, clock_ns: clock.clock })
    }

    pub(super) fn write(&self, vm: &VmFd) -> Result<(), VmError> {
        for (chip, chip_id) in self.chips.iter().zip(CHIPS) {
            let chip = kvm_irqchip { chip_id, ..*chip };
            vm.set_irqchip(&chip).map_err(refused("set an interrupt controller's state"))?;
        }
        let clock = kvm_clock_data { clock: self.clock_ns, ..Default::default() };
        vm.set_clock(&clock).map_err(refused("set the clock"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_zeros_at_the_end_are_left_out() {
        assert_eq!(without_zeros_at_end(&[0, 1, 0, 2, 0, 0]), [0, 1, 0, 2]);
        assert_eq!(without_zeros_at_end(&[0, 0]), [0; 0]);
    }

    #[test]
    fn counters_that_differ_less_than_a_clock_drifts_are_the_same() {
        assert!(is_close(2_600_000, 2_600_000));
        assert!(is_close(2_600_000, 2_600_650));
        assert!(!is_close(2_600_000, 2_600_651));
        assert!(!is_close(2_600_000, 2_000_000));
    }
}
