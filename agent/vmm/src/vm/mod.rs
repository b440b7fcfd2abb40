//! The virtual machine as KVM sees it: memory, interrupts, vCPUs.

pub(crate) mod cpuid;
pub(crate) mod exits;
pub(crate) mod gate;
pub(crate) mod memory;
pub(crate) mod registers;
pub(crate) mod template;
pub(crate) mod vcpu;
pub(crate) mod wiring;

use std::{io, os::fd::OwnedFd};

use holdfast_wire::vmm::CpuTemplate;
use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, Msrs};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vmm_sys_util::errno;

use crate::{
    layout::{KVM_IDENTITY_MAP, KVM_TSS},
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
    tsc_deadline: bool,
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
        Ok(Self { fd, supported, tsc_deadline })
    }

    /// Makes all vCPUs: the first at `entry`, the others waiting for it.
    pub(crate) fn vcpus(&self, count: u8, entry: u64) -> Result<Vec<VcpuFd>, VmError> {
        (0..count).map(|index| self.vcpu(index, count, entry)).collect()
    }

    fn vcpu(&self, index: u8, count: u8, entry: u64) -> Result<VcpuFd, VmError> {
        let vcpu = self.fd.create_vcpu(index.into()).map_err(refused("make a vCPU"))?;
        let shape = cpuid::Shape { vcpus: count, tsc_deadline: self.tsc_deadline };
        let cpuid = cpuid::for_vcpu(&self.supported, shape, index)
            .ok_or(VmError::List { what: "CPU features" })?;
        vcpu.set_cpuid2(&cpuid).map_err(refused("set a vCPU's features"))?;
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
