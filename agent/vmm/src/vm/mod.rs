//! The virtual machine as KVM sees it: memory, interrupts, vCPUs.

pub(crate) mod wiring;

/// The guest's memory. Cloning shares it.
pub(crate) type Memory = vm_memory::GuestMemoryMmap<()>;
