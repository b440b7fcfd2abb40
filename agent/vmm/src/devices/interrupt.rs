//! The one interrupt of a device: why it was raised, and the line it is raised on.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::EventFd;

/// Shared between the device's thread, which raises it, and the vCPUs, which read and acknowledge.
pub(super) struct Interrupt {
    reasons: AtomicU32,
    /// Set when the device stopped for a broken queue; only a reset by the driver clears it.
    needs_reset: AtomicBool,
    irqfd: EventFd,
}

impl Interrupt {
    pub(super) fn new(irqfd: EventFd) -> Self {
        Self { reasons: AtomicU32::new(0), needs_reset: AtomicBool::new(false), irqfd }
    }

    /// Tells the driver that buffers came back.
    pub(super) fn used_buffers(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// Tells the driver that its configuration changed.
    pub(super) fn changed_configuration(&self) {
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// Tells the driver that this device works no more until it is reset.
    pub(super) fn broken(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    pub(super) fn reasons(&self) -> u32 {
        self.reasons.load(Ordering::SeqCst)
    }

    pub(super) fn acknowledge(&self, reasons: u32) {
        self.reasons.fetch_and(!reasons, Ordering::SeqCst);
    }

    /// As it was in another process. What was raised there may not have reached the guest, so that
    /// it is raised again; a driver takes one too many for none.
    pub(super) fn restore(&self, reasons: u32, needs_reset: bool) {
        self.reasons.store(reasons, Ordering::SeqCst);
        self.needs_reset.store(needs_reset, Ordering::SeqCst);
        if reasons != 0 {
            self.raise(0);
        }
    }

    /// As after power-on.
    pub(super) fn reset(&self) {
        self.reasons.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
    }

    fn raise(&self, reason: u32) {
        // The reason is stored first: the handler that the line starts reads it.
        self.reasons.fetch_or(reason, Ordering::SeqCst);
        // Fails only when the counter is full, and then the line is up already.
        let _ = self.irqfd.write(1);
    }
}
