//! The virtual machine as KVM sees it: memory, interrupts, vCPUs.

pub(crate) mod cpuid;
pub(crate) mod exits;
pub(crate) mod fit;
pub(crate) mod gate;
pub(crate) mod memory;
pub(crate) mod registers;
pub(crate) mod saved;
pub(crate) mod template;
pub(crate) mod userfault;
pub(crate) mod vcpu;
pub(crate) mod wiring;

use std::{io, os::fd::OwnedFd, sync::Arc};

use holdfast_wire::vmm::CpuTemplate;
use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, Msrs};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vmm_sys_util::errno;

use self::saved::{SharedState, VcpuState};
use crate::{
    layout::{KVM_IDENTITY_MAP, KVM_TSS},
    limits::state::MSRS_MAX,
    sys,
};

/// The guest's memory. Cloning shares it.
pub(crate) type Memory = vm_memory::GuestMemoryMmap<()>;

#[derive(Debug, thiserror::Error)]
pub(crate) enum VmError {
    #[error("the fd for KVM is not /dev/kvm: it answers API version {found}")]
    NotKvm { found: i32 },
    #[error("this host's KVM lacks {capability}")]
    Lacks { capability: &'static str },
    #[error("KVM refused to {what}")]
    Kvm {
        what: &'static str,
        #[source]
        source: errno::Error,
    },
    #[error("guest memory cannot be shown to the guest")]
    Memory(#[source] io::Error),
    #[error("KVM set {done} of {wanted} model-specific registers")]
    Msrs { done: usize, wanted: usize },
    #[error("KVM did not take {value:#x} for model-specific register {index:#x}")]
    Msr { index: u32, value: u64 },
    #[error(
        "the guest counts time at {wanted_khz} kHz, this host's CPUs at {host_khz}, and its KVM \
         cannot make up for it"
    )]
    Counter { wanted_khz: u32, host_khz: u32 },
    #[error("the state has {found} vCPUs, the machine {wanted}")]
    Vcpus { found: usize, wanted: u8 },
    #[error(transparent)]
    Unlike(#[from] fit::Unlike),
    #[error(transparent)]
    Template(#[from] template::Unfit),
    #[error("the list of {what} does not fit KVM's limit")]
    List { what: &'static str },
}

/// Names the refused ioctl in the error.
fn refused(what: &'static str) -> impl FnOnce(errno::Error) -> VmError {
    move |source| VmError::Kvm { what, source }
}

/// Capabilities without which we do not start. All are older than any supported kernel, but a
/// software KVM may lack them.
const NEEDED: [(Cap, &str); 6] = [
    (Cap::Irqchip, "an in-kernel interrupt controller"),
    (Cap::Irqfd, "irqfd"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::UserMemory, "user memory"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::ExtCpuid, "CPUID lists"),
];

/// A KVM machine without vCPUs yet.
pub(crate) struct Vm {
    pub(crate) fd: VmFd,
    supported: CpuId,
    template: CpuTemplate,
    tsc_deadline: bool,
    /// Model-specific registers that a snapshot keeps.
    msrs: Arc<[u32]>,
}

impl Vm {
    /// Makes the machine, with its memory and interrupt controllers.
    pub(crate) fn new(
        kvm_fd: OwnedFd,
        memory: &Memory,
        template: CpuTemplate,
    ) -> Result<Self, VmError> {
        let kvm = checked(sys::kvm_from(kvm_fd))?;
        let fd = kvm.create_vm().map_err(refused("make a machine"))?;
        fd.set_identity_map_address(KVM_IDENTITY_MAP).map_err(refused("place its identity map"))?;
        fd.set_tss_address(KVM_TSS).map_err(refused("place its task state"))?;
        // No PIT: with hardware-reduced ACPI the kernel uses the local APICs' timers alone.
        fd.create_irq_chip().map_err(refused("make the interrupt controllers"))?;
        sys::map_memory(&fd, memory).map_err(VmError::Memory)?;
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(refused("list the CPU's features"))?;
        let supported = template::apply(template, supported)?;
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        let msrs = kvm.get_msr_index_list().map_err(refused("list its registers"))?;
        let msrs = msrs.as_slice().iter().copied().take(MSRS_MAX).collect();
        Ok(Self { fd, supported, template, tsc_deadline, msrs })
    }

    pub(crate) fn msrs(&self) -> Arc<[u32]> {
        Arc::clone(&self.msrs)
    }

    /// What all vCPUs share; they must stand still.
    pub(crate) fn shared_state(&self) -> Result<SharedState, VmError> {
        SharedState::read(&self.fd)
    }

    /// Adds to the states of all vCPUs what they were told of their CPU.
    pub(crate) fn add_features(&self, states: &mut [VcpuState]) -> Result<(), VmError> {
        let count = u8::try_from(states.len()).unwrap_or(u8::MAX);
        for (index, state) in (0..count).zip(states) {
            state.features = self.features(index, count)?.as_slice().to_vec();
        }
        Ok(())
    }

    /// Makes all vCPUs as they were when `states` were read, and what they share.
    pub(crate) fn restored_vcpus(
        &self,
        count: u8,
        states: &[VcpuState],
        shared: &SharedState,
    ) -> Result<Vec<VcpuFd>, VmError> {
        if states.len() != usize::from(count) {
            return Err(VmError::Vcpus { found: states.len(), wanted: count });
        }
        let mut vcpus = Vec::new();
        for (index, state) in (0..count).zip(states) {
            let here = self.features(index, count)?;
            fit::check(self.template, &state.features, here.as_slice())?;
            vcpus.push(self.fd.create_vcpu(index.into()).map_err(refused("make a vCPU"))?);
        }
        for (vcpu, state) in vcpus.iter().zip(states) {
            state.write(vcpu)?;
        }
        // Before anything raises a line, and the clock last: it runs from here on.
        shared.write(&self.fd)?;
        Ok(vcpus)
    }

    fn features(&self, index: u8, count: u8) -> Result<CpuId, VmError> {
        let shape = cpuid::Shape { vcpus: count, tsc_deadline: self.tsc_deadline };
        cpuid::for_vcpu(&self.supported, shape, index).ok_or(VmError::List { what: "CPU features" })
    }

    /// Makes all vCPUs: the first at `entry`, the others waiting for it.
    pub(crate) fn vcpus(&self, count: u8, entry: u64) -> Result<Vec<VcpuFd>, VmError> {
        (0..count).map(|index| self.vcpu(index, count, entry)).collect()
    }

    fn vcpu(&self, index: u8, count: u8, entry: u64) -> Result<VcpuFd, VmError> {
        let vcpu = self.fd.create_vcpu(index.into()).map_err(refused("make a vCPU"))?;
        let features = self.features(index, count)?;
        vcpu.set_cpuid2(&features).map_err(refused("set a vCPU's features"))?;
        let msrs = registers::model_specific().ok_or(VmError::List { what: "registers" })?;
        set_msrs(&vcpu, &msrs)?;
        let mut lapic = vcpu.get_lapic().map_err(refused("tell a local APIC's state"))?;
        registers::set_pins(&mut lapic);
        vcpu.set_lapic(&lapic).map_err(refused("set a local APIC's pins"))?;
        if index == 0 {
            let mut special = vcpu.get_sregs().map_err(refused("tell a vCPU's registers"))?;
            registers::to_pvh(&mut special);
            vcpu.set_sregs(&special).map_err(refused("set a vCPU's mode"))?;
            vcpu.set_regs(&registers::general(entry)).map_err(refused("set a vCPU's entry"))?;
        }
        Ok(vcpu)
    }
}

fn set_msrs(vcpu: &VcpuFd, msrs: &Msrs) -> Result<(), VmError> {
    let wanted = msrs.as_slice().len();
    let done = vcpu.set_msrs(msrs).map_err(refused("set model-specific registers"))?;
    if done == wanted { Ok(()) } else { Err(VmError::Msrs { done, wanted }) }
}

/// Refuses what is not KVM, or a KVM without what we need.
fn checked(kvm: Kvm) -> Result<Kvm, VmError> {
    let found = kvm.get_api_version();
    if u32::try_from(found) != Ok(KVM_API_VERSION) {
        return Err(VmError::NotKvm { found });
    }
    match NEEDED.iter().find(|(capability, _)| !kvm.check_extension(*capability)) {
        Some((_, capability)) => Err(VmError::Lacks { capability }),
        None => Ok(kvm),
    }
}
