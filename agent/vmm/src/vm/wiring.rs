//! What the virtual machine lends its devices while they are being made: interrupt lines and
//! doorbells. A trait, so that device tests run without KVM.

use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// First interrupt line given to a device. Lines below belong to the serial port and to ACPI.
pub(crate) const DEVICE_GSI_FIRST: u32 = 5;
/// Last line of the one in-kernel IOAPIC.
pub(crate) const DEVICE_GSI_LAST: u32 = 23;

/// Start of the devices' windows, inside the gap that guest memory leaves at 3 to 4 GiB.
pub(crate) const DEVICE_WINDOWS_BASE: u64 = 0xd000_0000;
/// Bytes of one device's window: registers and configuration of virtio over MMIO.
pub(crate) const DEVICE_WINDOW_BYTES: u64 = 0x1000;

#[derive(Debug, thiserror::Error)]
pub(crate) enum WiringError {
    #[error("all interrupt lines {DEVICE_GSI_FIRST} to {DEVICE_GSI_LAST} are taken")]
    NoLineLeft,
    #[error("no eventfd to be had")]
    EventFd(#[source] std::io::Error),
    #[error("KVM did not take the eventfd for interrupt line {gsi}")]
    Interrupt {
        gsi: u32,
        #[source]
        source: std::io::Error,
    },
    #[error("KVM did not take the eventfd for address {address:#x}")]
    Doorbell {
        address: u64,
        #[source]
        source: std::io::Error,
    },
}

/// One interrupt line: writing to the eventfd raises it (edge-triggered).
pub(crate) struct Line {
    pub(crate) gsi: u32,
    pub(crate) irqfd: EventFd,
}

/// Lends interrupt lines and doorbells.
pub(crate) trait Wiring {
    /// The next free interrupt line.
    fn interrupt(&mut self) -> Result<Line, WiringError>;

    /// An eventfd that KVM signals, without an exit to us, when the guest writes the `u32`
    /// `value` at `address`.
    fn doorbell(&mut self, address: u64, value: u32) -> Result<EventFd, WiringError>;
}

/// The real thing: lines of the in-kernel IOAPIC, doorbells in KVM.
pub(crate) struct KvmWiring<'a> {
    vm: &'a VmFd,
    next_line: u32,
}

impl<'a> KvmWiring<'a> {
    pub(crate) fn new(vm: &'a VmFd) -> Self {
        Self { vm, next_line: DEVICE_GSI_FIRST }
    }

    /// A line whose number the guest knows otherwise.
    pub(crate) fn fixed_line(&self, gsi: u32) -> Result<EventFd, WiringError> {
        let irqfd = EventFd::new(EFD_NONBLOCK).map_err(WiringError::EventFd)?;
        self.vm
            .register_irqfd(&irqfd, gsi)
            .map_err(|source| WiringError::Interrupt { gsi, source: source.into() })?;
        Ok(irqfd)
    }
}

impl Wiring for KvmWiring<'_> {
    fn interrupt(&mut self) -> Result<Line, WiringError> {
        let gsi = self.next_line;
        if gsi > DEVICE_GSI_LAST {
            return Err(WiringError::NoLineLeft);
        }
        let irqfd = self.fixed_line(gsi)?;
        self.next_line += 1;
        Ok(Line { gsi, irqfd })
    }

    fn doorbell(&mut self, address: u64, value: u32) -> Result<EventFd, WiringError> {
        let bell = EventFd::new(EFD_NONBLOCK).map_err(WiringError::EventFd)?;
        self.vm
            .register_ioevent(&bell, &IoEventAddress::Mmio(address), value)
            .map_err(|source| WiringError::Doorbell { address, source: source.into() })?;
        Ok(bell)
    }
}
